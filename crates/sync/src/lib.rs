//! The one place where locks, counted references and atomics come from.
//!
//! The core layers are `no_std`; they take everything that another kernel, or a model checker,
//! would replace from here. Today the source is `std`.
//!
//! Locks do not poison: a panic under a lock of the core is a bug that the handler threads turn
//! into a poisoned page and a report, and nobody learns more from a second panic.
//!
//! Where a simulated world decides who runs, it is asked before anybody waits: see [`Scheduler`].
#![forbid(unsafe_code)]

pub use std::sync::{Arc, OnceLock, Weak};

/// Atomic integers.
pub mod atomic {
    pub use std::sync::atomic::{
        AtomicBool, AtomicI32, AtomicU8, AtomicU16, AtomicU32, AtomicU64, AtomicUsize, Ordering,
        compiler_fence, fence,
    };
}

mod lock; // what excludes, and what waits for a change
mod scheduler; // who runs meanwhile
mod one_shot; // a step that is to fail
#[cfg(feature = "walk")]
pub mod walk; // which functions are entered, for tests

pub use lock::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
pub use one_shot::OneShot;
pub use scheduler::{Scheduler, scheduler, set_scheduler, sleep, yield_now};

/// Notes that a function of a walk is entered: see `walk`. First thing in the function, with its name.
#[cfg(feature = "walk")]
#[macro_export]
macro_rules! walk {
    ($function:literal) => {
        let _entered = $crate::walk::enter(::core::file!(), $function);
    };
}

/// Notes that a function of a walk is entered, where the feature `walk` is on; else it is nothing.
#[cfg(not(feature = "walk"))]
#[macro_export]
macro_rules! walk {
    ($function:literal) => {};
}
