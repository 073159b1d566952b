//! Device memory is full: somebody goes.

use crate::driver::Vm;
use crate::driver::counters::Counters;
use crate::driver::vram::{Resident, Victim};
use core::time::Duration;
use gpusvm_device::BlockRun;
use gpusvm_mm::AddressSpace;
use gpusvm_pagemap::{Cause, evict};
use gpusvm_types::PageCount;

/// How many victims, or waits, one allocation costs before it is given up.
pub(crate) const MAX_TRIES: u32 = 64;
/// How long to wait for allocations that are still being filled, each time.
const WAIT_FOR_OTHERS: Duration = Duration::from_millis(2);

impl<M: AddressSpace> Vm<M> {
    /// Device pages for `count` pages, evicting others until there are. `None` after [`MAX_TRIES`],
    /// or when there can never be so many.
    pub(crate) fn allocate(&self, count: PageCount) -> Option<Box<[BlockRun]>> {
        if count > self.vram.total() {
            return None;
        }
        for _ in 0..MAX_TRIES {
            if let Some(runs) = self.vram.allocate(count) {
                return Some(runs);
            }
            match self
                .vram
                .pick(self.now(), |resident| self.was_used(resident))
            {
                Victim::Evict(victim) => self.evict(victim),
                Victim::Wait(time) => self.vram.wait_freed(time),
                Victim::Nothing => self.vram.wait_freed(WAIT_FOR_OTHERS),
            }
        }
        self.vram.allocate(count)
    }

    fn evict(&self, victim: Resident) {
        match evict::evict_to_ram(&self.pagemap, &victim.devmem, Cause::Eviction) {
            Ok(()) => {
                Counters::count(&self.counters.evictions);
                let now = self.now();
                for range in self.svm.ranges_in(victim.span) {
                    range.pages().count_eviction(now);
                }
            }
            // Something is in the way of it now: it gets another turn.
            Err(_) => self.vram.put_back(victim),
        }
    }

    fn was_used(&self, resident: &Resident) -> bool {
        let tables = self.device.page_tables();
        tables.test_and_clear_accessed(self.id, resident.span) > PageCount::ZERO
    }
}
