//! Device memory: what is free, and what lives there.
//!
//! # Locking
//!
//! The buddy's lock is held for one operation and taken also by CPU faults, whose last page frees an
//! allocation. The list's lock is held to pick or to add. Neither is held across a call out.

use core::time::Duration;
use gpusvm_device::{BlockRun, Buddy};
use gpusvm_mm::Time;
use gpusvm_pagemap::Devmem;
use gpusvm_sync::{Arc, Condvar, Mutex};
use gpusvm_types::{PageCount, Span};
use std::collections::VecDeque;

/// The memory of one device.
#[derive(Debug)]
pub(crate) struct Vram {
    buddy: Mutex<Buddy>,
    freed: Condvar,
    /// What lives there, the longest-resident first; with entries that are gone by now.
    residents: Mutex<VecDeque<Resident>>,
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
pub(crate) enum Victim {
    /// Evict this.
    Evict(Resident),
    /// Everything that could go may not go before then.
    Wait(Duration),
    /// Nothing lives there that could go.
    Nothing,
}

impl Vram {
    pub(crate) fn new(pages: PageCount) -> Self {
        Self {
            buddy: Mutex::new(Buddy::new(pages)),
            freed: Condvar::new(),
            residents: Mutex::new(VecDeque::new()),
        }
    }

    pub(crate) fn used(&self) -> PageCount {
        self.buddy.lock().used_pages()
    }

    pub(crate) fn total(&self) -> PageCount {
        self.buddy.lock().total()
    }

    /// Device pages for `count` pages: one run if there is one, else as few as there are. `None`
    /// when not so many are free.
    pub(crate) fn allocate(&self, count: PageCount) -> Option<Box<[BlockRun]>> {
        let mut buddy = self.buddy.lock();
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
        Some(runs.into_boxed_slice())
    }

    /// Gives device pages back. Allocates nothing.
    pub(crate) fn free(&self, runs: &[BlockRun]) {
        let mut buddy = self.buddy.lock();
        runs.iter().for_each(|run| buddy.free(*run));
        drop(buddy);
        self.freed.notify_all();
    }

    /// Waits for something to be freed, up to `timeout`.
    pub(crate) fn wait_freed(&self, timeout: Duration) {
        let buddy = self.buddy.lock();
        drop(self.freed.wait_timeout(buddy, timeout));
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

    /// The allocations that pages live in.
    pub(crate) fn residents_in(&self, span: Span) -> Vec<Resident> {
        let residents = self.residents.lock();
        let live = residents
            .iter()
            .filter(|resident| !resident.devmem.is_detached());
        live.filter(|resident| resident.span.overlaps(span))
            .cloned()
            .collect()
    }

    /// Picks who goes: the one that has been there longest, unless the device used it since it was
    /// last asked (`was_used`), it may not leave yet, or a launch needs it. It is off the list until
    /// it comes back.
    pub(crate) fn pick(&self, now: Time, was_used: impl Fn(&Resident) -> bool) -> Victim {
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
                    return Victim::Evict(resident);
                }
                residents.push_back(resident);
            }
        }
        soonest.map_or(Victim::Nothing, Victim::Wait)
    }

    /// A victim that could not go after all.
    pub(crate) fn put_back(&self, resident: Resident) {
        self.residents.lock().push_back(resident);
    }
}
