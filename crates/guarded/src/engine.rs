//! Threads whose accesses to application memory must never be kept waiting.
//!
//! A compute unit of a device in software, or a worker of the engine, that touches a page while it
//! migrates must not sleep until the migration is over: the migration may be waiting for that very
//! thread. Such threads are on record here; whoever serves faults of missing pages answers theirs at
//! once, with zeroes, when the page is one that the program has just dropped.
//!
//! # Locking
//!
//! None: the record is read in signal handlers. It is an array of thread ids, zero where free.

use crate::interrupt::Stack;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// How many such threads there can be.
const SLOTS: usize = 256;

static RECORD: [AtomicI32; SLOTS] = [const { AtomicI32::new(0) }; SLOTS];
/// Whether an interruption of the thread is on its way. One at a time: the handler of a signal can be
/// interrupted by the next, and an alternate stack holds only so many frames.
static INTERRUPTED: [AtomicBool; SLOTS] = [const { AtomicBool::new(false) }; SLOTS];
/// No slot at or above this one was ever used.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);

/// The record of engine threads is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegistryFull;

impl core::fmt::Display for RegistryFull {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "there are {SLOTS} engine threads already")
    }
}

impl core::error::Error for RegistryFull {}

/// Keeps the calling thread on record until it is dropped.
#[derive(Debug)]
pub struct EngineThread {
    slot: usize,
    tid: i32,
    /// The first record of a thread has it.
    _stack: Option<Stack>,
    // The thread that entered is the thread that leaves.
    _stays: core::marker::PhantomData<*const ()>,
}

impl EngineThread {
    /// Puts the calling thread on record.
    ///
    /// # Errors
    ///
    /// When 256 threads are on record already.
    pub fn enter() -> Result<Self, RegistryFull> {
        forget_in_children();
        let tid = current_tid();
        let is_first = !is_engine_thread(tid);
        for (slot, record) in RECORD.iter().enumerate() {
            if record
                .compare_exchange(0, tid, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
            {
                INTERRUPTED[slot].store(false, Ordering::Release);
                HIGH_WATER.fetch_max(slot + 1, Ordering::AcqRel);
                return Ok(Self {
                    slot,
                    tid,
                    _stack: is_first.then(Stack::enter),
                    _stays: core::marker::PhantomData,
                });
            }
        }
        Err(RegistryFull)
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        // In a forked child the slot is free, or another's, already.
        let slot = &RECORD[self.slot];
        let _ = slot.compare_exchange(self.tid, 0, Ordering::AcqRel, Ordering::Relaxed);
    }
}

/// Whether the thread with this id is on record. Async-signal-safe.
pub fn is_engine_thread(tid: i32) -> bool {
    interrupted(tid).is_some()
}

/// Whether an interruption of that thread is on its way, if it is on record. Async-signal-safe.
pub(crate) fn interrupted(tid: i32) -> Option<&'static AtomicBool> {
    let used = HIGH_WATER.load(Ordering::Acquire);
    let mut records = RECORD[..used].iter();
    let slot = records.position(|record| record.load(Ordering::Acquire) == tid)?;
    (tid != 0).then(|| &INTERRUPTED[slot])
}

/// A child of fork has none of the threads on record, and may get one of their ids later.
fn forget_in_children() {
    unsafe extern "C" fn forget() {
        for record in &RECORD {
            record.store(0, Ordering::Relaxed);
        }
    }
    // Not a `Once`: a child of fork would wait for a thread that is not there. Twice does no harm.
    static REGISTERED: AtomicBool = AtomicBool::new(false);
    if !REGISTERED.load(Ordering::Acquire) {
        // SAFETY: the handler only stores to atomics. Failure, for want of memory, would leave
        // stale ids in children, which do no harm before the ids wrap around.
        unsafe { libc::pthread_atfork(None, None, Some(forget)) };
        REGISTERED.store(true, Ordering::Release);
    }
}

pub(crate) fn current_tid() -> i32 {
    // SAFETY: it has no preconditions.
    unsafe { libc::gettid() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::{Mutex, PoisonError};

    /// Tests that look at the record take turns.
    pub(crate) static TURN: Mutex<()> = Mutex::new(());

    #[test]
    fn on_record_while_the_guard_lives_until_full() {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let tid = current_tid();
        assert!(!is_engine_thread(tid));
        assert!(!is_engine_thread(0));
        let mut guards: Vec<EngineThread> = Vec::new();
        while let Ok(guard) = EngineThread::enter() {
            guards.push(guard);
        }
        assert_eq!(guards.len(), SLOTS);
        assert!(is_engine_thread(tid));
        drop(guards);
        assert!(!is_engine_thread(tid));
    }
}
