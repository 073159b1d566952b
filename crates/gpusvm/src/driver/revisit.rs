//! Ranges that are mapped where they are for want of something better, and get a second look.
//!
//! ```text
//!   mapped in place: pages were busy, or thrashed ---- a while later ----> unmapped
//!                                                                             |
//!                 the device still wants them: it faults, and they may move now
//! ```
//!
//! Without this, one page that was pinned for a millisecond would keep its range in RAM for ever.
//!
//! # Locking
//!
//! The list's lock is held to add and to take. Allocates: for workers only.

use crate::driver::counters;
use crate::driver::vm::Vm;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Time};
use gpusvm_svm::Range;
use gpusvm_sync::{Arc, Mutex, Weak};
use std::collections::VecDeque;

/// When pages that could not move are tried again.
pub(crate) const BUSY_AGAIN: Duration = Duration::from_millis(50);

/// Ranges that get a second look.
#[derive(Debug)]
pub(crate) struct Revisits<M: AddressSpace>(Mutex<VecDeque<(Time, Weak<Range<M>>)>>);

impl<M: AddressSpace> Revisits<M> {
    /// None yet.
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(VecDeque::new()))
    }

    /// Looks at the range again at `due`.
    pub(crate) fn add(&self, due: Time, range: &Arc<Range<M>>) {
        self.0.lock().push_back((due, Arc::downgrade(range)));
    }

    /// How many there are.
    fn len(&self) -> usize {
        self.0.lock().len()
    }

    /// A range that is due. Those that are gone are forgotten.
    fn take_due(&self, now: Time) -> Option<Arc<Range<M>>> {
        let mut list = self.0.lock();
        for _ in 0..list.len() {
            let (due, range) = list.pop_front()?;
            match range.upgrade() {
                Some(range) if due <= now => return Some(range),
                Some(_) => list.push_back((due, range)),
                None => {}
            }
        }
        None
    }
}

impl<M: AddressSpace> Vm<M> {
    /// The range is mapped, with pages in RAM that should be on the device: looks again after a while.
    pub(crate) fn look_again(&self, after: Duration, range: &Arc<Range<M>>) {
        counters::count(&self.counters.not_migrated);
        self.revisits.add(self.now().after(after), range);
    }

    /// What is to be done now and then, between faults: unmaps the ranges whose second look is due,
    /// which fault if the device wants them, gives copies back that are out of use, and forgets ranges
    /// whose memory is gone.
    pub fn tend(&self) {
        let Some(_working) = self.enter() else {
            return;
        };
        // Those that are due now: what is put back is due later, whatever the clock does meanwhile.
        let now = self.now();
        for _ in 0..self.revisits.len() {
            let Some(range) = self.revisits.take_due(now) else {
                break;
            };
            // Declared by a launch of a device that cannot fault: not before it has ended. None begins
            // to need it meanwhile, that would take who serves the range. Nobody waits here for who
            // serves one now: a copy can take long, and other ranges are due.
            let serving = range.try_serve();
            let stays = || self.region.devices().stays().is_staying(range.span());
            match serving.is_none() || stays() {
                true => self.revisits.add(now.after(BUSY_AGAIN), &range),
                false => self.svm().range_unmap(&range),
            }
        }
        self.tend_duplicates();
        self.svm().collect_garbage();
    }
}
