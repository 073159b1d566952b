//! What fork does: everything comes home first, the child gets plain memory and inert engines, and may
//! start engines of its own.
//!
//! ```text
//!   prepare   no engine starts; close every gate, wait for migrations to devices, bring all pages home
//!   fork
//!   parent    open the gates; engines may start
//!   child     a new generation: every engine of before is gone, calls answer so, memory is plain, the
//!             parent's is not ours to hear of; engines may start
//! ```
//!
//! # What a child may do
//!
//! The engines that its parent had stay inert in it for ever, and in its own children. A handle of one can be
//! used and dropped there: calls answer `Gone`, nobody waits for threads or locks of the parent, and what
//! other threads of the parent may have been changing is left alone, so it is never freed. An engine that is
//! started in the child is like any other, and the child's forks bring its pages home.
//!
//! POSIX promises a child of a process with several threads only the functions that signal handlers may use
//! before it calls exec; threads and memory are not among them. glibc promises memory: its allocator is
//! usable in the child. Threads can be started there too, in practice, and this is tested. What can go wrong
//! is not ours: a lock of the program or of a library that another thread of the parent held at the fork
//! stays locked, also those of `std` for the standard streams, for environment variables and for a thread
//! that is just starting or ending.
//!
//! A raw `clone` without these handlers gets memory that is not registered in the child: pages that
//! live on a device then read as zeroes there. That is what `pthread_atfork` cannot see; who clones
//! by hand brings memory home first.
//!
//! # Locking
//!
//! Whoever locks a block that pages can leave holds a [`Pass`], and has it before the block: the gate
//! waits for all passes, and then for blocks. A handler, which only brings pages home, needs none, so
//! CPU faults are served all the time.

use crate::process::Process;
use crate::source::signals;
use crate::sys::futex;
use core::cell::{Cell, RefCell};
use core::marker::PhantomData;
use gpusvm_mm::Wanted;
use gpusvm_sync::atomic::{AtomicBool, AtomicU32, Ordering};
use gpusvm_sync::{Arc, Mutex, MutexGuard, Weak};
use gpusvm_types::PageCount;

/// Counts the forks from the first process with an engine down to this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);

/// In which process something was made: this one, or one that it descends from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Birth(u32);

impl Birth {
    /// In this one.
    pub(crate) fn now() -> Self {
        Self(GENERATION.load(Ordering::Acquire))
    }

    /// Whether it was in this one.
    pub(crate) fn is_here(self) -> bool {
        self.0 == GENERATION.load(Ordering::Acquire)
    }
}

/// Lets migrations to devices through, except while the process forks.
#[derive(Debug)]
pub(crate) struct Gate {
    /// Passes given out, and `CLOSED`. In a child, a gate of the parent's stays closed.
    state: AtomicU32,
    birth: Birth,
}

/// Evidence that the process does not fork. It stays with its thread.
#[derive(Debug)]
pub struct Pass<'a> {
    gate: &'a Gate,
    _of_this_thread: PhantomData<*const ()>,
}

thread_local! {
    /// How many passes this thread has, of which gates. Who has one gets more: the gate waits for it
    /// anyway.
    static PASSES: Cell<[Passes; ENGINES_AT_ONCE]> = const { Cell::new([(0, 0); ENGINES_AT_ONCE]) };
}

/// A gate's address, and how many passes of it.
type Passes = (usize, u32);
/// Of how many engines one thread moves pages at the same time.
const ENGINES_AT_ONCE: usize = 4;

/// How often all pages are brought home before a fork, where others move them meanwhile.
const ROUNDS: u32 = 4;

const CLOSED: u32 = 1 << 31;

impl Gate {
    /// Open, in this process.
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU32::new(0),
            birth: Birth::now(),
        }
    }

    /// Waits until the gate is open. `None` in a child of fork.
    pub(crate) fn pass(&self) -> Option<Pass<'_>> {
        loop {
            let now = self.state.load(Ordering::Acquire);
            if now & CLOSED != 0 && !self.has_pass() {
                if !self.birth.is_here() {
                    return None;
                }
                futex::wait(&self.state, now, None);
                continue;
            }
            let given =
                self.state
                    .compare_exchange(now, now + 1, Ordering::AcqRel, Ordering::Relaxed);
            if given.is_ok() {
                self.count_pass(true);
                return Some(Pass {
                    gate: self,
                    _of_this_thread: PhantomData,
                });
            }
        }
    }

    fn has_pass(&self) -> bool {
        let this = core::ptr::from_ref(self).addr();
        PASSES
            .get()
            .iter()
            .any(|(gate, passes)| *gate == this && *passes > 0)
    }

    fn count_pass(&self, more: bool) {
        let this = core::ptr::from_ref(self).addr();
        let mut all = PASSES.get();
        let known = all.iter().position(|(gate, n)| *gate == this && *n > 0);
        let free = || all.iter().position(|(_, n)| *n == 0);
        // Without room it is not counted: this thread waits at the gate for its next pass.
        if let Some(at) = known.or_else(|| if more { free() } else { None }) {
            let (_, passes) = all[at];
            all[at] = (this, if more { passes + 1 } else { passes - 1 });
            PASSES.set(all);
        }
    }

    /// Waits until nobody is inside. Forks take turns, so that it is open before.
    fn close(&self) {
        let mut now = self.state.fetch_or(CLOSED, Ordering::AcqRel) | CLOSED;
        while now != CLOSED {
            futex::wait(&self.state, now, None);
            now = self.state.load(Ordering::Acquire);
        }
    }

    fn open(&self) {
        self.state.fetch_and(!CLOSED, Ordering::AcqRel);
        futex::wake(&self.state, u32::MAX);
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.count_pass(false);
        let before = self.gate.state.fetch_sub(1, Ordering::AcqRel);
        if before == CLOSED + 1 {
            futex::wake(&self.gate.state, u32::MAX);
        }
    }
}

type Engines = Vec<Weak<Process>>;

/// The engines of this process, of this generation only. Locked by who starts one, and from `prepare` until
/// `parent` or `child`: a child finds it whole, and with nobody who starts an engine.
static ENGINES: Mutex<Engines> = Mutex::new(Vec::new());

/// An engine is on its way, and no fork.
#[derive(Debug)]
pub(crate) struct Starting(MutexGuard<'static, Engines>);

impl Starting {
    /// Waits for a fork that is under way. None comes before this is dropped.
    pub(crate) fn begin() -> Self {
        static HAS_HANDLERS: AtomicBool = AtomicBool::new(false);
        // Before the lock is held for the first time: or who forks would not know of it. Two threads may
        // come here at once, which does no harm: handlers that run a second time do nothing.
        if !HAS_HANDLERS.load(Ordering::Acquire) {
            // SAFETY: the handlers are functions of this crate, which is never unloaded.
            unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
            HAS_HANDLERS.store(true, Ordering::Release);
        }
        Self(ENGINES.lock())
    }

    /// Brings the pages of `process` home before each fork from now on.
    pub(crate) fn done(mut self, process: &Arc<Process>) {
        self.0.retain(|engine| engine.strong_count() > 0);
        self.0.push(Arc::downgrade(process));
    }
}

/// A fork that is under way.
struct Fork {
    engines: MutexGuard<'static, Engines>,
    /// Their gates are closed.
    closed: Vec<Arc<Process>>,
}

thread_local! {
    /// Of this thread.
    static FORK: RefCell<Option<Fork>> = const { RefCell::new(None) };
}

unsafe extern "C" fn prepare() {
    if FORK.with_borrow(Option::is_some) {
        return;
    }
    let engines = ENGINES.lock();
    let closed: Vec<_> = engines.iter().filter_map(Weak::upgrade).collect();
    closed.iter().for_each(|engine| engine.gate.close());
    for engine in &closed {
        bring_home_for_a_child(engine);
    }
    FORK.set(Some(Fork { engines, closed }));
}

/// Pages that were moved are brought home to where they are now; and those that move meanwhile, so often.
fn bring_home_for_a_child(engine: &Process) {
    in_rounds(|| {
        engine.settle_events();
        engine.bring_all_home(Wanted::Fork);
        engine.pages_on_devices() == PageCount::ZERO
    });
}

/// Whether a round was enough, of so many.
fn in_rounds(mut round: impl FnMut() -> bool) -> bool {
    (0..ROUNDS).any(|_| round())
}

unsafe extern "C" fn parent() {
    let Some(Fork { engines, closed }) = FORK.take() else {
        return;
    };
    closed.iter().for_each(|engine| engine.gate.open());
    // An engine that ended meanwhile is dropped without the lock.
    drop(engines);
}

unsafe extern "C" fn child() {
    let Some(Fork {
        mut engines,
        closed,
    }) = FORK.take()
    else {
        return;
    };
    GENERATION.fetch_add(1, Ordering::AcqRel);
    // SAFETY: in a child of fork, on its only thread, and not in a signal handler.
    unsafe { signals::begin_anew() };
    // Dropped, they would free what other threads of the parent may have had in hand.
    core::mem::forget(core::mem::take(&mut *engines));
    for engine in closed {
        // Or the parent's memory would stay registered after its engine has ended, for as long as we live.
        engine.mover.end();
        core::mem::forget(engine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testing::{Ended, Forks};
    use core::time::Duration;

    #[test]
    fn a_closed_gate_lets_nobody_through_until_it_opens() {
        let gate = Gate::new();
        let through = AtomicU32::new(0);
        let pass = gate.pass().unwrap();
        std::thread::scope(|scope| {
            let closer = scope.spawn(|| gate.close());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!closer.is_finished(), "somebody is inside");
            drop(pass);
            closer.join().unwrap();
            let waiting = scope.spawn(|| {
                let _pass = gate.pass().unwrap();
                through.store(1, Ordering::Release);
            });
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(through.load(Ordering::Acquire), 0);
            gate.open();
            waiting.join().unwrap();
        });
        assert_eq!(through.into_inner(), 1);
    }

    #[test]
    fn what_never_comes_home_for_a_child_is_brought_so_often() {
        let mut rounds = 0;
        let mut after = |most: u32| {
            rounds = 0;
            let is_home = in_rounds(|| {
                rounds += 1;
                rounds > most
            });
            (is_home, rounds)
        };
        assert_eq!(after(0), (true, 1));
        assert_eq!(after(ROUNDS - 1), (true, ROUNDS));
        assert_eq!(after(ROUNDS), (false, ROUNDS));
    }

    /// Somebody starts engines all the time: the child can start one all the same.
    #[test]
    fn a_child_finds_nobody_who_starts_an_engine() {
        let forks = Forks::lock();
        let stop = AtomicBool::new(false);
        drop(Starting::begin());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    drop(Starting::begin());
                }
            });
            let before = Birth::now();
            for _ in 0..200 {
                let ended = forks.child(|| {
                    let found = Starting::begin();
                    let is_fresh = found.0.is_empty() && found.0.capacity() == 0;
                    i32::from(!is_fresh || before.is_here() || !Birth::now().is_here())
                });
                assert_eq!(ended, Ended::Exit(0));
            }
            assert!(before.is_here());
            stop.store(true, Ordering::Relaxed);
        });
    }
}
