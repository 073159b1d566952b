//! Which functions a walk through the layers enters, in their order.
//!
//! ```text
//!   test        record(|| one device fault) ----------------------------> steps, in order
//!   function    walk!("serve")  first thing: noted, with its file, and how deep it is in its thread
//! ```
//!
//! Only tests switch the feature `walk` on; without it `walk!` is nothing. With it, and nobody
//! recording, it is a look at an atomic.
//!
//! Threads hand a walk over to each other, one after the other, so the order of all steps is the order of
//! the walk. What other threads do meanwhile is noted too: whoever looks keeps what begins with the
//! functions that he knows to begin a part of the walk.
//!
//! # Locking
//!
//! The list is a leaf, of a fixed size: a fault handler enters steps, too.

use crate::Mutex;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

/// A function that was entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The file, from the root of the workspace.
    pub file: &'static str,
    /// The function.
    pub function: &'static str,
    /// How many noted functions of its thread it is called by.
    pub depth: usize,
    /// Tells its thread from others.
    pub thread: usize,
}

/// More are not kept.
const MOST: usize = 8192;

static RECORDING: AtomicBool = AtomicBool::new(false);
static STEPS: Mutex<Steps> = Mutex::new(Steps {
    list: [None; MOST],
    len: 0,
});

struct Steps {
    list: [Option<Step>; MOST],
    len: usize,
}

thread_local! {
    // Without a destructor and known at compile time: a page fault handler may look at it.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// The function is left when this is dropped.
#[derive(Debug)]
pub struct Entered(bool);

/// Notes that a function is entered, if somebody records: by [`walk!`](crate::walk!).
pub fn enter(file: &'static str, function: &'static str) -> Entered {
    if !RECORDING.load(Ordering::Relaxed) {
        return Entered(false);
    }
    let (depth, thread) = DEPTH.with(|depth| (depth.get(), std::ptr::from_ref(depth).addr()));
    DEPTH.set(depth + 1);
    let step = Step {
        file,
        function,
        depth,
        thread,
    };
    let mut steps = STEPS.lock();
    let len = steps.len;
    if let Some(place) = steps.list.get_mut(len) {
        *place = Some(step);
        steps.len += 1;
    }
    Entered(true)
}

impl Drop for Entered {
    fn drop(&mut self) {
        if self.0 {
            DEPTH.set(DEPTH.get() - 1);
        }
    }
}

/// Notes what all threads enter while `work` runs. One recording at a time: tests that record take turns.
pub fn record<R>(work: impl FnOnce() -> R) -> (R, Vec<Step>) {
    STEPS.lock().len = 0;
    RECORDING.store(true, Ordering::SeqCst);
    let result = work();
    RECORDING.store(false, Ordering::SeqCst);
    let steps = STEPS.lock();
    let list = steps.list[..steps.len].iter().copied().flatten().collect();
    (result, list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outer() {
        crate::walk!("outer");
        inner();
        inner();
    }

    fn inner() {
        crate::walk!("inner");
    }

    #[test]
    fn steps_are_noted_in_order_and_depth_while_somebody_records() {
        outer();
        let ((), steps) = record(outer);
        outer();
        let seen: Vec<_> = steps
            .iter()
            .map(|step| (step.function, step.depth))
            .collect();
        assert_eq!(seen, [("outer", 0), ("inner", 1), ("inner", 1)]);
        assert!(
            steps
                .iter()
                .all(|step| step.file.ends_with("crates/sync/src/walk.rs"))
        );
    }
}
