//! Device memory: what is free, and what lives there.
//!
//! # Locking
//!
//! The lock of what is free is held for one operation and taken also by CPU faults, whose last page
//! frees an allocation. The list's lock is held to pick or to add. Neither is held across a call out.

use core::ops::Deref;
use core::time::Duration;
use gpusvm_device::{BlockRun, Buddy, Fence};
use gpusvm_mm::Time;
use gpusvm_pagemap::Devmem;
use gpusvm_sync::{Arc, Condvar, Mutex};
use gpusvm_types::{PageCount, Span};
use std::collections::VecDeque;

/// The memory of one device.
#[derive(Debug)]
pub(crate) struct Vram {
    free: Mutex<Free>,
    freed: Condvar,
    /// What lives there, the longest-resident first; with entries that are gone by now.
    residents: Mutex<VecDeque<Resident>>,
}

/// What is free.
#[derive(Debug)]
struct Free {
    buddy: Buddy,
    /// What is free was given to the engine to be cleared, all of it before this. One fence for all:
    /// engines complete in order, so waiting for the latest is waiting long enough.
    idle_after: Option<Fence>,
    /// What could not be cleared is never used again.
    lost: PageCount,
}

/// Device pages that somebody got.
#[derive(Debug)]
pub(crate) struct Allocated {
    /// One run if there was one, else as few as there were.
    pub(crate) runs: Box<[BlockRun]>,
    /// They are not idle before that.
    pub(crate) idle_after: Option<Fence>,
}

/// An allocation that pages live in.
#[derive(Clone, Debug)]
pub(crate) struct Resident {
    pub(crate) devmem: Arc<Devmem>,
    /// Where its pages were mapped when they came: a hint, to ask for accesses.
    pub(crate) span: Span,
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
}

/// Who goes: off the list, so that nobody else picks it. It is on the list again when this is dropped,
/// if pages still live there.
///
/// Off the list it can still be leased: leases are found from the pages of a range, not from the list,
/// and taken with the block of the pages locked, as eviction looks at them. So either the lease is
/// seen, and the pages stay; or the pages were taken first, and then the range is seen as unmapped.
#[derive(Debug)]
pub(crate) struct Picked<'a> {
    vram: &'a Vram,
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
        let back = self.resident.take();
        if let Some(back) = back.filter(|resident| !resident.devmem.is_detached()) {
            self.vram.residents.lock().push_back(back);
        }
    }
}

impl Vram {
    pub(crate) fn new(pages: PageCount) -> Self {
        Self {
            free: Mutex::new(Free {
                buddy: Buddy::new(pages),
                idle_after: None,
                lost: PageCount::ZERO,
            }),
            freed: Condvar::new(),
            residents: Mutex::new(VecDeque::new()),
        }
    }

    pub(crate) fn used(&self) -> PageCount {
        self.free.lock().buddy.used_pages()
    }

    pub(crate) fn total(&self) -> PageCount {
        self.free.lock().buddy.total()
    }

    /// How much of what is used was lost.
    pub(crate) fn lost(&self) -> PageCount {
        self.free.lock().lost
    }

    /// Device pages for `count` pages. `None` when not so many are free.
    pub(crate) fn allocate(&self, count: PageCount) -> Option<Allocated> {
        let mut free = self.free.lock();
        let idle_after = free.idle_after;
        let runs = take(&mut free.buddy, count)?.into_boxed_slice();
        Some(Allocated { runs, idle_after })
    }

    /// Gives device pages back, which are idle after `cleared`. Allocates nothing.
    pub(crate) fn free(&self, runs: &[BlockRun], cleared: Option<Fence>) {
        let mut free = self.free.lock();
        free.idle_after = free.idle_after.max(cleared);
        runs.iter().for_each(|run| free.buddy.free(*run));
        drop(free);
        self.freed.notify_all();
    }

    /// What could not be cleared is not given back.
    pub(crate) fn lose(&self, runs: &[BlockRun]) {
        let mut free = self.free.lock();
        runs.iter().for_each(|run| free.lost += run.count);
    }

    /// What is free is not idle before that.
    pub(crate) fn idle_after(&self) -> Option<Fence> {
        self.free.lock().idle_after
    }

    /// Everything up to `fence` is cleared.
    pub(crate) fn is_idle(&self, fence: Fence) {
        let mut free = self.free.lock();
        free.idle_after = free.idle_after.filter(|latest| *latest > fence);
    }

    /// Waits for something to be freed, up to `timeout`.
    pub(crate) fn wait_freed(&self, timeout: Duration) {
        let free = self.free.lock();
        drop(self.freed.wait_timeout(free, timeout));
    }

    /// Pages live in an allocation from now on.
    pub(crate) fn add_resident(&self, resident: Resident) {
        let mut residents = self.residents.lock();
        while residents
            .front()
            .is_some_and(|first| first.devmem.is_detached())
        {
            residents.pop_front();
        }
        residents.push_back(resident);
    }

    /// Picks who goes: the one that has been there longest, unless the device used it since it was
    /// last asked (`was_used`), it may not leave yet, or a launch needs it.
    pub(crate) fn pick(&self, now: Time, was_used: impl Fn(&Resident) -> bool) -> Victim<'_> {
        let mut residents = self.residents.lock();
        let mut soonest: Option<Duration> = None;
        // Twice around: whoever was used is not asked again the second time.
        for turn in 0..2 {
            for _ in 0..residents.len() {
                let Some(resident) = residents.pop_front() else {
                    break;
                };
                if resident.devmem.is_detached() {
                    continue;
                }
                if let Some(until) = resident.devmem.stays_until(now, true) {
                    let wait = until.since(now);
                    soonest = Some(soonest.map_or(wait, |soonest| soonest.min(wait)));
                } else if turn > 0 || !was_used(&resident) {
                    return Victim::Evict(Picked {
                        vram: self,
                        resident: Some(resident),
                    });
                }
                residents.push_back(resident);
            }
        }
        soonest.map_or(Victim::Nothing, Victim::Wait)
    }
}

/// One run if there is one, else as few as there are.
fn take(buddy: &mut Buddy, count: PageCount) -> Option<Vec<BlockRun>> {
    if buddy.free_pages() < count {
        return None;
    }
    let mut runs = Vec::new();
    let mut left = count.get();
    while left > 0 {
        let largest = buddy.largest_free().get();
        let piece = PageCount::new((1 << left.ilog2()).min(largest));
        match buddy.alloc(piece) {
            Ok(run) => {
                left -= run.count.get();
                runs.push(run);
            }
            Err(_) => {
                runs.into_iter().for_each(|run| buddy.free(run));
                return None;
            }
        }
    }
    Some(runs)
}
