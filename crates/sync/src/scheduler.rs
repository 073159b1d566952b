//! Threads that take turns: how a simulator decides who runs, also where somebody waits for a lock.
//!
//! ```text
//!   lock() ---- free ----> taken                                (always, at no cost)
//!      `------- busy ----> no scheduler: the thread sleeps in std
//!                          scheduler:    wait_until(lock is free): others run meanwhile
//! ```
//!
//! In a simulated world one thread runs at a time, and a thread that is parked can hold a lock. If
//! another slept in `std` for that lock, nobody would run any more. So a thread can have a
//! [`Scheduler`], and every wait of this crate goes through it.
//!
//! Threads of the real world have none: they pay one look at a thread-local cell, and only where they
//! would sleep anyway.

use std::cell::Cell;
use std::time::Duration;

/// Who decides which of some threads runs.
pub trait Scheduler: Send + Sync {
    /// Others may run now.
    fn yield_now(&self);

    /// Others run for so long, by the scheduler's clock.
    fn sleep(&self, for_: Duration);

    /// Others run until `is_ready`, for at most `timeout`. Whether it became ready.
    ///
    /// `is_ready` is asked by the waiting thread itself, so it can take what it waits for. `what`
    /// names that, for who looks for a deadlock.
    fn wait_until(
        &self,
        what: &'static str,
        timeout: Option<Duration>,
        is_ready: &mut dyn FnMut() -> bool,
    ) -> bool {
        let _ = what;
        let mut left = timeout;
        while !is_ready() {
            match &mut left {
                None => self.yield_now(),
                Some(Duration::ZERO) => return false,
                Some(left) => {
                    let slice = SLICE.min(*left);
                    self.sleep(slice);
                    *left -= slice;
                }
            }
        }
        true
    }
}

/// How often a wait with a timeout looks, unless the scheduler knows better.
const SLICE: Duration = Duration::from_micros(1);

thread_local! {
    // Without a destructor and known at compile time: a page fault handler may look at it.
    static SCHEDULER: Cell<Option<&'static dyn Scheduler>> = const { Cell::new(None) };
}

/// Gives this thread a scheduler, or takes it away.
pub fn set_scheduler(scheduler: Option<&'static dyn Scheduler>) {
    SCHEDULER.set(scheduler);
}

/// The scheduler of this thread, if it has one.
pub fn scheduler() -> Option<&'static dyn Scheduler> {
    SCHEDULER.get()
}

/// Lets others run.
pub fn yield_now() {
    match scheduler() {
        Some(scheduler) => scheduler.yield_now(),
        None => std::thread::yield_now(),
    }
}

/// Does nothing for so long: simulated time where time is simulated.
pub fn sleep(for_: Duration) {
    match scheduler() {
        Some(scheduler) => scheduler.sleep(for_),
        None => std::thread::sleep(for_),
    }
}
