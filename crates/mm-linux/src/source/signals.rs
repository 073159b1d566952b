//! SIGSEGV in the place of userfaultfd: the last rung.
//!
//! ```text
//!   thread: touch -> SIGSEGV -> hook: is the page mirrored and away?
//!                                 |- no: not ours, or there again: chain, or retry
//!                                 `- yes: claim a slot, ring the bell, sleep on the slot
//!   handler: next() -> slot -> serve -> wake(span): the slots of the span are let go
//! ```
//!
//! The hook runs in a signal handler: it uses atomics and futexes, and nothing else.
//!
//! # Locking
//!
//! None in the hook but the region table's, to read, which is never held by a thread that can fault.

use super::{Arrival, FaultSink, FaultSource, Held};
use crate::StartError;
use crate::process::Process;
use crate::sys::futex;
use core::cell::UnsafeCell;
use core::time::Duration;
use gpusvm_guarded::{FaultInfo, HookVerdict};
use gpusvm_mm::AddressSpace;
use gpusvm_sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use gpusvm_sync::{Arc, Weak};
use gpusvm_types::{ByteSize, Span, VirtAddr};
use std::sync::RwLock;

/// How many threads can wait at once. One more waits for a slot.
const SLOTS: usize = 128;
/// How long a thread sleeps before it looks for itself whether its page is there.
const PATIENCE: Duration = Duration::from_millis(100);

/// A thread that waits for a page.
#[derive(Debug)]
struct Slot {
    state: AtomicU32,
    at: AtomicU64,
}

const FREE: u32 = 0;
const CLAIMED: u32 = 1;
/// Not seen by a handler yet.
const POSTED: u32 = 2;
const TAKEN: u32 = 3;
const LET_GO: u32 = 4;
const REFUSED: u32 = 5;

static WAITING: [Slot; SLOTS] = [const {
    Slot {
        state: AtomicU32::new(FREE),
        at: AtomicU64::new(0),
    }
}; SLOTS];
/// Counts postings: handlers sleep on it.
static BELL: AtomicU32 = AtomicU32::new(0);
/// The engine on this rung. Read in the signal handler: written before its first page is away.
static ENGINE: Engine = Engine(UnsafeCell::new(RwLock::new(Weak::new())));
static TAKEN_BY_ONE: AtomicBool = AtomicBool::new(false);

/// A lock that a child of fork has anew: a thread that is not there may hold the one that it got.
struct Engine(UnsafeCell<RwLock<Weak<Process>>>);

// SAFETY: a lock, that is exchanged only where there is one thread.
unsafe impl Sync for Engine {}

impl Engine {
    fn get(&self) -> &RwLock<Weak<Process>> {
        // SAFETY: exchanged only by `begin_anew`, when nobody has a reference.
        unsafe { &*self.0.get() }
    }
}

/// Forgets threads that wait, and the engine: they are the parent's.
///
/// # Safety
///
/// In a child of fork, as long as it has one thread; and not in a signal handler.
pub(crate) unsafe fn begin_anew() {
    for slot in &WAITING {
        slot.state.store(FREE, Ordering::Relaxed);
    }
    // SAFETY: no other thread is there, and this one is not in a function of this file. What was there is
    // not dropped: it may be held, and what it leads to is left alone.
    unsafe { ENGINE.0.get().write(RwLock::new(Weak::new())) };
    TAKEN_BY_ONE.store(false, Ordering::Release);
}

/// SIGSEGV in the place of userfaultfd.
#[derive(Debug)]
pub(crate) struct SignalSource {
    stopped: AtomicBool,
}

impl SignalSource {
    /// Installs the handler of the process.
    pub(crate) fn install() -> Result<Self, StartError> {
        if TAKEN_BY_ONE.swap(true, Ordering::AcqRel) {
            return Err(StartError::SignalsTaken);
        }
        let failed = |error| StartError::System {
            what: "installing a SIGSEGV handler",
            error,
        };
        gpusvm_guarded::install().map_err(failed)?;
        gpusvm_guarded::set_fault_hook(on_fault);
        Ok(Self {
            stopped: AtomicBool::new(false),
        })
    }

    /// Another engine may take the place.
    fn leave(&self) {
        if !self.stopped.swap(true, Ordering::AcqRel) {
            TAKEN_BY_ONE.store(false, Ordering::Release);
        }
    }

    /// Says whose pages are away.
    pub(crate) fn serve(process: &Arc<Process>) {
        if let Ok(mut engine) = ENGINE.get().write() {
            *engine = Arc::downgrade(process);
        }
    }
}

impl Drop for SignalSource {
    fn drop(&mut self) {
        self.leave();
    }
}

impl FaultSource for SignalSource {
    fn next(&self, timeout: Option<Duration>, _: &mut dyn FaultSink) -> Option<Arrival> {
        let heard = BELL.load(Ordering::Acquire);
        if let Some(arrival) = take_posted() {
            return Some(arrival);
        }
        if !self.stopped.load(Ordering::Acquire) {
            futex::wait(&BELL, heard, timeout);
        }
        take_posted()
    }

    fn hold(&self) -> Held<'_> {
        // There are no events.
        Held(None)
    }

    fn if_all_is_told(&self, act: &mut dyn FnMut()) -> bool {
        act();
        true
    }

    fn unless_more_is_told(&self, act: &mut dyn FnMut(), _: &mut dyn FnMut()) -> bool {
        act();
        true
    }

    fn rouse(&self) {
        ring();
    }

    fn interrupt(&self) {
        self.leave();
        ring();
    }
}

fn take_posted() -> Option<Arrival> {
    let posted = WAITING.iter().find(|slot| {
        let taken = slot
            .state
            .compare_exchange(POSTED, TAKEN, Ordering::AcqRel, Ordering::Relaxed);
        taken.is_ok()
    })?;
    let at = VirtAddr::new(posted.at.load(Ordering::Acquire));
    Some(Arrival {
        at,
        protected: false,
        tid: None,
        told: 0,
    })
}

fn ring() {
    BELL.fetch_add(1, Ordering::AcqRel);
    futex::wake(&BELL, u32::MAX);
}

/// Threads that wait for a page of `span` try again.
pub(crate) fn wake(span: Span) {
    answer(span, LET_GO);
}

/// Threads that wait for the page get the signal they would have got without us.
pub(crate) fn refuse(page: Span) {
    answer(page, REFUSED);
}

fn answer(span: Span, verdict: u32) {
    for slot in &WAITING {
        let state = slot.state.load(Ordering::Acquire);
        let waits = state == POSTED || state == TAKEN;
        if waits && span.contains(VirtAddr::new(slot.at.load(Ordering::Acquire))) {
            let answered =
                slot.state
                    .compare_exchange(state, verdict, Ordering::AcqRel, Ordering::Relaxed);
            if answered.is_ok() {
                futex::wake(&slot.state, u32::MAX);
            }
        }
    }
}

/// In the signal handler, on the thread that faulted.
fn on_fault(fault: &FaultInfo) -> HookVerdict {
    let at = VirtAddr::new(ByteSize::from_usize(fault.addr).get());
    // Written once, before any page is away; never waited for in a signal handler.
    let Some(process) = ENGINE
        .get()
        .try_read()
        .ok()
        .and_then(|engine| engine.upgrade())
    else {
        return HookVerdict::NotMine;
    };
    let verdict = judge(&process, at, fault.write);
    // Not the last reference, which its threads hold: nothing is freed in a signal handler.
    drop(process);
    verdict
}

fn judge(process: &Process, at: VirtAddr, write: bool) -> HookVerdict {
    let Some(part) = process.regions.find(at) else {
        return HookVerdict::NotMine;
    };
    if part.region.word(at.page()).get().place.is_in_place() {
        // There again by now, or never the engine's doing: a program that protects its own pages.
        let vma = process
            .find_vma(at)
            .ok()
            .flatten()
            .filter(|vma| vma.span.contains(at));
        let allowed = vma.is_some_and(|vma| if write { vma.writable } else { vma.readable });
        return if allowed {
            HookVerdict::Retry
        } else {
            HookVerdict::NotMine
        };
    }
    match wait_for(at) {
        REFUSED => HookVerdict::NotMine,
        _ => HookVerdict::Retry,
    }
}

/// Sleeps until a handler answers, or long enough to look again.
fn wait_for(at: VirtAddr) -> u32 {
    let claim = |slot: &&Slot| {
        slot.state
            .compare_exchange(FREE, CLAIMED, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    };
    let Some(slot) = WAITING.iter().find(claim) else {
        std::thread::yield_now();
        return LET_GO;
    };
    slot.at.store(at.get(), Ordering::Release);
    slot.state.store(POSTED, Ordering::Release);
    ring();
    for state in [POSTED, TAKEN, TAKEN] {
        futex::wait(&slot.state, state, Some(PATIENCE));
        let now = slot.state.load(Ordering::Acquire);
        if now == LET_GO || now == REFUSED {
            break;
        }
    }
    slot.state.swap(FREE, Ordering::AcqRel)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fork::Starting;
    use crate::sys::testing::{Ended, Forks};
    use std::sync::Barrier;

    /// Nobody serves this address: who sleeps on it looks again by and by, whether asked to or not.
    #[test]
    fn who_is_not_answered_looks_again() {
        let state = wait_for(VirtAddr::new(0x1000));
        assert!([POSTED, TAKEN, LET_GO, REFUSED].contains(&state), "{state}");
    }

    /// Other threads of the parent, in the middle of everything at the fork, are not there in the child.
    #[test]
    fn a_child_has_the_place_to_itself() {
        let forks = Forks::lock();
        drop(Starting::begin());
        let is_held = Barrier::new(2);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let taken = TAKEN_BY_ONE.swap(true, Ordering::AcqRel);
                let engine = ENGINE.get().write().unwrap();
                WAITING[7].state.store(CLAIMED, Ordering::Release);
                is_held.wait();
                is_held.wait();
                WAITING[7].state.store(FREE, Ordering::Release);
                drop(engine);
                TAKEN_BY_ONE.store(taken, Ordering::Release);
            });
            is_held.wait();
            let ended = forks.child(|| {
                let is_free = |slot: &Slot| slot.state.load(Ordering::Acquire) == FREE;
                let all = WAITING.iter().all(is_free) && ENGINE.get().try_write().is_ok();
                i32::from(!all || SignalSource::install().is_err())
            });
            is_held.wait();
            assert_eq!(ended, Ended::Exit(0));
        });
    }
}
