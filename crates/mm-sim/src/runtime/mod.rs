//! Simulated threads: exactly one runs, the seed says which, and time is what they make of it.
//!
//! ```text
//!   thread 0   ====|            |=====|                      = runs   - can run   . sleeps
//!   thread 1   ----|====|-------|-----|==
//!   thread 2   .........|=======|--------
//!                  ^ yield: somebody is chosen   ^ all sleep: the clock jumps
//! ```
//!
//! A simulated thread is a thread of the system that waits for its turn. It gives the turn away where
//! the world says so ([`Runtime::yield_now`]), where it sleeps, and where it waits: for a block, or, by
//! way of [`gpusvm_sync::Scheduler`], for any lock of the layers above.
//!
//! Who waits says how to look whether the wait is over, and looks again only after somebody else did
//! something. So when everybody waits and nobody sleeps, that is a deadlock, and is told at once.
//!
//! A thread that is not simulated, such as a test's own, makes steps too: they cost time, and nobody
//! else runs meanwhile.
//!
//! # When a thread panics
//!
//! The run is given up: all others end at their next yield, one after the other, as if they had
//! panicked themselves; then the first panic is raised again where the run was started.

use crate::random::Random;
use core::fmt;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

mod state; // who can run, and who is chosen
mod hook; // what the locks of the layers above call

pub use state::ThreadTimes;
use state::{State, Status, TICK, Thread};

/// What a simulated thread does.
pub type Body = Box<dyn FnOnce() + Send + 'static>;

/// Who runs, the clock, the seed, and what happened.
#[derive(Debug)]
pub(crate) struct Runtime {
    seed: u64,
    // guarded by: nothing else; held for a few instructions.
    state: Mutex<State>,
    ended: Condvar,
    trace: Mutex<VecDeque<String>>,
    trace_len: usize,
}

/// A thread that ends because the run was given up.
struct GivenUp;

thread_local! {
    static CURRENT: RefCell<Option<(Arc<Runtime>, usize)>> = const { RefCell::new(None) };
}

/// How often a thread of the real world looks before it says that it waits for ever.
const LOOKS: u32 = 1_000_000;

impl Runtime {
    pub(crate) fn new(seed: u64, trace_len: usize, most_steps: u64) -> Arc<Self> {
        let state = State {
            now: Duration::ZERO,
            random: Random::new(seed),
            threads: Vec::new(),
            current: None,
            progress: 0,
            patience: 1,
            steps: 0,
            most_steps,
            failed: None,
            stuck: false,
        };
        Arc::new(Self {
            seed,
            state: Mutex::new(state),
            ended: Condvar::new(),
            trace: Mutex::new(VecDeque::new()),
            trace_len,
        })
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    /// The clock. Outside of simulated threads a look takes time, or loops that wait for a time would
    /// not end.
    pub(crate) fn now(&self) -> Duration {
        let mut state = self.lock();
        if self.me().is_none() {
            state.now += TICK;
        }
        state.now
    }

    /// A number below `end` that the seed chooses.
    pub(crate) fn random(&self, end: u64) -> u64 {
        self.lock().random.below(end)
    }

    /// Which simulated thread of this world this is.
    pub(crate) fn me(&self) -> Option<usize> {
        CURRENT.with_borrow(|current| {
            let (runtime, index) = current.as_ref()?;
            core::ptr::eq(Arc::as_ptr(runtime), self).then_some(*index)
        })
    }

    /// A step was made: others may run now.
    pub(crate) fn yield_now(&self) {
        let mut state = self.lock();
        state.now += TICK;
        state.progress += 1;
        let Some(me) = self.me() else { return };
        state.threads[me].times.busy += TICK;
        if std::thread::panicking() {
            return;
        }
        state.steps += 1;
        if state.steps > state.most_steps && state.failed.is_none() {
            state.failed = Some(format!("no end in sight, {}", state.dump()));
        }
        state.threads[me].status = Status::Ready;
        drop(self.give_turn(state, me));
    }

    /// Others run for so long.
    pub(crate) fn sleep(&self, for_: Duration) {
        let mut state = self.lock();
        state.progress += 1;
        let since = state.now;
        let until = since.saturating_add(for_);
        let Some(me) = self.me().filter(|_| !std::thread::panicking()) else {
            state.now = until;
            return;
        };
        state.threads[me].status = Status::Sleeping { until };
        let mut state = self.give_turn(state, me);
        let slept = state.now - since;
        state.threads[me].times.slept += slept;
    }

    /// Others run until `is_ready`, for at most `timeout`. Whether it became ready.
    pub(crate) fn wait_until(
        &self,
        what: &dyn fmt::Display,
        timeout: Option<Duration>,
        is_ready: &mut dyn FnMut() -> bool,
    ) -> bool {
        if is_ready() {
            return true;
        }
        let Some(me) = self.me() else {
            return self.wait_outside(what, timeout, is_ready);
        };
        let mut state = self.lock();
        // What was done before, another may wait for.
        state.progress += 1;
        let since = state.now;
        let until = timeout.map(|timeout| since.saturating_add(timeout));
        loop {
            state.threads[me].status = Status::Waiting {
                what: what.to_string(),
                since,
                until,
                seen: state.progress,
                unwinding: std::thread::panicking(),
            };
            drop(self.give_turn(state, me));
            let ready = is_ready();
            state = self.lock();
            if ready || until.is_some_and(|until| until <= state.now) {
                state.progress += 1;
                let waited = state.now - since;
                state.threads[me].times.waited += waited;
                return ready;
            }
        }
    }

    /// A thread of the real world waits: for others of its kind, or for ever.
    fn wait_outside(
        &self,
        what: &dyn fmt::Display,
        timeout: Option<Duration>,
        is_ready: &mut dyn FnMut() -> bool,
    ) -> bool {
        if let Some(timeout) = timeout {
            self.lock().now += timeout;
            return is_ready();
        }
        for _ in 0..LOOKS {
            std::thread::yield_now();
            if is_ready() {
                return true;
            }
        }
        panic!(
            "seed {}: a thread that is not simulated waits for {what}, and nobody runs",
            self.seed
        );
    }

    /// Runs all to the end. Servants end when they see that the others have.
    ///
    /// # Panics
    ///
    /// As the first that panicked, or when everybody waits.
    pub(crate) fn run(self: &Arc<Self>, bodies: Vec<Body>, servants: Vec<Body>) {
        assert!(
            CURRENT.with_borrow(Option::is_none),
            "a simulated thread starts no others"
        );
        if bodies.is_empty() {
            return;
        }
        {
            let mut state = self.lock();
            let kinds = bodies.iter().map(|_| false);
            let kinds = kinds.chain(servants.iter().map(|_| true));
            state.threads = kinds.map(Thread::new).collect();
            // Some histories switch at every step, others seldom.
            state.patience = 1 << state.random.below(4);
            (state.steps, state.failed, state.stuck) = (0, None, false);
        }
        let bodies = bodies.into_iter().chain(servants);
        let threads: Vec<_> = (0..)
            .zip(bodies)
            .map(|(index, body)| self.spawn(index, body))
            .collect();
        let mut state = self.lock();
        state.current = None;
        self.start_next(&mut state);
        while !state.has_ended() {
            state = self
                .ended
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.current = None;
        let (failed, stuck) = (state.failed.take(), state.stuck);
        drop(state);
        if !stuck {
            // Their panics were caught, and are in `failed`.
            threads.into_iter().for_each(|thread| drop(thread.join()));
        }
        if let Some(failed) = failed {
            panic!("seed {}: {failed}\n{}", self.seed, self.trace_end());
        }
    }

    /// What the threads of the last run did with their time.
    pub(crate) fn thread_times(&self) -> Vec<ThreadTimes> {
        self.lock()
            .threads
            .iter()
            .map(|thread| thread.times)
            .collect()
    }

    /// Whether all threads of the run have ended, but for servants.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().is_over()
    }

    /// Something happened.
    pub(crate) fn trace(&self, what: fmt::Arguments<'_>) {
        if self.trace_len == 0 {
            return;
        }
        let now = self.lock().now.as_micros();
        let line = match self.me() {
            Some(me) => format!("{now:>8} us  thread {me}: {what}"),
            None => format!("{now:>8} us  outside : {what}"),
        };
        let mut trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
        if trace.len() == self.trace_len {
            trace.pop_front();
        }
        trace.push_back(line);
    }

    /// What happened last.
    pub(crate) fn traced(&self) -> Vec<String> {
        let trace = self.trace.lock().unwrap_or_else(PoisonError::into_inner);
        trace.iter().cloned().collect()
    }

    fn trace_end(&self) -> String {
        const LINES: usize = 60;
        let lines = self.traced();
        lines[lines.len().saturating_sub(LINES)..].join("\n")
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "simulated threads are threads of the system that take turns"
    )]
    fn spawn(self: &Arc<Self>, index: usize, body: Body) -> std::thread::JoinHandle<()> {
        let runtime = Arc::clone(self);
        std::thread::spawn(move || {
            CURRENT.set(Some((Arc::clone(&runtime), index)));
            gpusvm_sync::set_scheduler(Some(&hook::Turns));
            let result = catch_unwind(AssertUnwindSafe(|| {
                drop(runtime.wait_for_turn(runtime.lock(), index));
                body();
            }));
            gpusvm_sync::set_scheduler(None);
            CURRENT.set(None);
            runtime.end(index, result.err());
        })
    }

    /// A thread has ended.
    fn end(&self, me: usize, panic: Option<Box<dyn core::any::Any + Send>>) {
        let mut state = self.lock();
        state.threads[me].status = Status::Done;
        state.progress += 1;
        if let Some(panic) = panic.filter(|panic| !panic.is::<GivenUp>())
            && state.failed.is_none()
        {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            let text = text.unwrap_or_else(|| "no message".to_owned());
            state.failed = Some(format!("thread {me} panicked: {text}"));
        }
        self.start_next(&mut state);
    }

    /// Somebody else may run; returns when it is this thread's turn again.
    fn give_turn<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        me: usize,
    ) -> MutexGuard<'a, State> {
        self.start_next(&mut state);
        self.wait_for_turn(state, me)
    }

    fn wait_for_turn<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        me: usize,
    ) -> MutexGuard<'a, State> {
        let turn = Arc::clone(&state.threads[me].turn);
        while state.current != Some(me) {
            state = turn.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.failed.is_some() && !std::thread::panicking() {
            state.threads[me].status = Status::Ready;
            drop(state);
            // Not a panic of its own: no message, no hook.
            resume_unwind(Box::new(GivenUp));
        }
        state.threads[me].status = Status::Ready;
        state
    }

    fn start_next(&self, state: &mut State) {
        let mut next = state.choose();
        if next.is_none() && !state.is_over() && state.failed.is_none() {
            state.failed = Some(format!("deadlock, {}", state.dump()));
            next = state.choose();
        }
        if next.is_none() && !state.has_ended() {
            // They unwind and wait for each other: they stay behind.
            state.stuck = true;
        }
        state.current = next;
        match next {
            Some(next) => state.threads[next].turn.notify_one(),
            None => self.ended.notify_all(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
