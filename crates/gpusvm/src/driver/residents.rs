//! What lives in device memory, and who of it goes when there is no room.
//!
//! ```text
//!   added ---> pages live in it ---> last page gone: detached ---> nobody else holds it: forgotten
//! ```
//!
//! The last page can leave in a fault handler, which must not free on the heap. So whoever fills an
//! allocation holds it until the list does, and the list until no handler has it in its hands any more:
//! nobody finds a detached allocation anew, so one that only the list holds stays so.
//!
//! The list is apart from what allocations keep alive ([`Memory`](crate::driver::region::Memory)): else
//! it would keep itself alive by what is in it.
//!
//! # Locking
//!
//! The list's lock is held to pick or to add, and not across a call out but to ask for accesses.

use crate::driver::advice::Priority;
use core::ops::Deref;
use core::time::Duration;
use gpusvm_mm::Time;
use gpusvm_pagemap::{Devmem, Holds};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::Span;
use std::collections::VecDeque;

/// An allocation that pages live in.
#[derive(Debug)]
pub(crate) struct Resident {
    pub(crate) devmem: Arc<Devmem>,
    /// Where its pages were mapped when they came: a hint, to ask for accesses.
    pub(crate) span: Span,
}

impl Resident {
    /// Whether its memory was given back, and nobody holds it but the list.
    fn is_gone(&self) -> bool {
        self.devmem.is_detached() && Arc::strong_count(&self.devmem) == 1
    }
}

/// What lives in the memory of one device.
#[derive(Debug, Default)]
pub(crate) struct Residents(Mutex<List>);

/// The longest-resident first; with entries that are gone by now, not more than there are others.
#[derive(Debug, Default)]
struct List {
    queue: VecDeque<Resident>,
    /// How long it may become before it is looked through.
    look_at: usize,
}

/// What to do to make room.
#[derive(Debug)]
pub(crate) enum Victim<'a> {
    /// Evict this.
    Evict(Picked<'a>),
    /// Everything that could go may not go before then.
    Wait(Duration),
    /// Nothing lives there that could go.
    Nothing,
    /// Nothing lives there but what is pinned.
    Pinned,
}

/// Who goes: off the list, so that nobody else picks it. It is on the list again when this is dropped,
/// unless it is gone.
///
/// Off the list it can still be leased: leases are found from the pages of a range, not from the list,
/// and taken with the block of the pages locked, as eviction looks at them. So either the lease is
/// seen, and the pages stay; or the pages were taken first, and then the range is seen as unmapped.
#[derive(Debug)]
pub(crate) struct Picked<'a> {
    residents: &'a Residents,
    resident: Option<Resident>,
}

impl Deref for Picked<'_> {
    type Target = Resident;

    fn deref(&self) -> &Resident {
        self.resident.as_ref().expect("taken by drop only")
    }
}

impl Drop for Picked<'_> {
    fn drop(&mut self) {
        gpusvm_sync::walk!("drop");
        let back = self.resident.take();
        if let Some(back) = back.filter(|resident| !resident.is_gone()) {
            self.residents.0.lock().queue.push_back(back);
        }
    }
}

impl Residents {
    /// Pages live in an allocation from now on.
    pub(crate) fn add(&self, resident: Resident) {
        /// So few are not worth a look.
        const FEW: usize = 16;
        let mut list = self.0.lock();
        list.queue.push_back(resident);
        if list.queue.len() > list.look_at {
            list.queue.retain(|resident| !resident.is_gone());
            list.look_at = FEW.max(2 * list.queue.len());
        }
    }

    /// Forgets what is gone.
    pub(crate) fn forget_gone(&self) {
        self.0.lock().queue.retain(|resident| !resident.is_gone());
    }

    /// Picks who goes: of the lowest `priority`, if there are several, the one that has been there
    /// longest, unless the device used it since it was last asked (`was_used`), it may not leave yet, or
    /// a launch needs it.
    pub(crate) fn pick(
        &self,
        now: Time,
        was_used: impl Fn(&Resident) -> bool,
        priority: Option<&dyn Fn(&Resident) -> Priority>,
    ) -> Victim<'_> {
        gpusvm_sync::walk!("pick");
        let mut list = self.0.lock();
        let queue = &mut list.queue;
        let of = |resident: &Resident| priority.map_or(Priority::Normal, |of| of(resident));
        let lowest = priority.map(|of| lowest_that_goes(queue, of));
        let mut soonest: Option<Duration> = None;
        let mut is_pinned = false;
        // Twice around: whoever was used is not asked again the second time.
        for turn in 0..2 {
            for _ in 0..queue.len() {
                let Some(resident) = queue.pop_front() else {
                    break;
                };
                if resident.is_gone() {
                    continue;
                }
                if resident.devmem.is_detached() {
                    // Somebody still holds it, for a moment.
                } else if of(&resident) == Priority::Pinned {
                    is_pinned = true;
                } else if let Some(until) = resident.devmem.stays_until(now, Holds::All) {
                    let wait = until.since(now);
                    soonest = Some(soonest.map_or(wait, |soonest| soonest.min(wait)));
                } else if lowest.is_none_or(|lowest| of(&resident) <= lowest)
                    && (turn > 0 || !was_used(&resident))
                {
                    return Victim::Evict(Picked {
                        residents: self,
                        resident: Some(resident),
                    });
                }
                queue.push_back(resident);
            }
        }
        match soonest {
            Some(wait) => Victim::Wait(wait),
            None if is_pinned => Victim::Pinned,
            None => Victim::Nothing,
        }
    }

    /// The device leaves while the address space lives. Pages that it could not bring home come home
    /// later, in a handler, and what holds them would be freed there: it is kept for ever instead.
    pub(crate) fn leave_behind(&self) {
        /// How long to wait for a handler that gave an allocation back this very moment.
        const MOMENTS: u32 = 100;
        const MOMENT: Duration = Duration::from_micros(100);
        let queue = core::mem::take(&mut self.0.lock().queue);
        for resident in queue {
            let mut waits = 0..MOMENTS;
            while resident.devmem.is_detached() && !resident.is_gone() && waits.next().is_some() {
                gpusvm_sync::sleep(MOMENT);
            }
            // Detached and still held: by a launch, which ends on another thread.
            if !resident.devmem.is_detached() {
                core::mem::forget(resident);
            }
        }
    }
}

/// The lowest priority of those that may leave now or soon: a timeslice is waited for, a launch is not.
fn lowest_that_goes(
    queue: &VecDeque<Resident>,
    priority: impl Fn(&Resident) -> Priority,
) -> Priority {
    let goes = |resident: &&Resident| {
        let devmem = &resident.devmem;
        !devmem.is_detached() && !devmem.is_leased()
    };
    let priorities = queue.iter().filter(goes).map(priority);
    priorities.min().unwrap_or(Priority::High)
}
