//! Device memory is full: somebody goes.

use crate::driver::counters;
use crate::driver::devmem;
use crate::driver::fault::ONLY;
use crate::driver::populate::RegionOps;
use crate::driver::residents::{Picked, Resident, Victim};
use crate::driver::vm::Vm;
use core::time::Duration;
use gpusvm_mm::AddressSpace;
use gpusvm_pagemap::{Cause, Devmem, MigrateError, Pagemap, evict};
use gpusvm_sync::Arc;
use gpusvm_types::{PageCount, Span};

/// How many victims, or waits, one allocation costs before it is given up.
pub const MAX_TRIES: u32 = 64;
/// How many waits are enough when there are others, but only pinned ones: some may be on their way.
const MAX_WAITS_FOR_PINNED: u32 = 4;
/// How long to wait for allocations that are still being filled, each time.
const WAIT_FOR_OTHERS: Duration = Duration::from_millis(2);

/// Why there is no device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// It is full, and nothing could go in time.
    Full,
    /// What could go is pinned.
    Pinned,
}

impl NoRoom {
    /// As the error of a migration of `span`.
    pub(crate) const fn of(self, span: Span) -> MigrateError {
        match self {
            Self::Full => MigrateError::NoSpace { span },
            Self::Pinned => MigrateError::Pinned { span },
        }
    }
}

impl<M: AddressSpace> RegionOps<M> {
    /// An allocation of `count` pages, evicting others until there is room.
    ///
    /// # Errors
    ///
    /// `Full` after [`MAX_TRIES`], or when there can never be so many; `Pinned` when only such pages are
    /// left that stay.
    pub(crate) fn allocate(
        &self,
        pagemap: &Pagemap<M>,
        count: PageCount,
    ) -> Result<Devmem, NoRoom> {
        gpusvm_sync::walk!("allocate");
        self.make_room(pagemap, count, || devmem::allocate(&self.memory, count))
    }

    /// What `get` gets of `count` pages, once there is room.
    ///
    /// # Errors
    ///
    /// As [`RegionOps::allocate`].
    pub(crate) fn make_room<T>(
        &self,
        pagemap: &Pagemap<M>,
        count: PageCount,
        get: impl Fn() -> Option<T>,
    ) -> Result<T, NoRoom> {
        let memory = &self.memory;
        // Objects never go.
        if count + memory.traffic.object_pages() > memory.vram.total() {
            return Err(NoRoom::Full);
        }
        let mut no_room = NoRoom::Full;
        let mut waits_for_pinned = 0..MAX_WAITS_FOR_PINNED;
        let vms = memory.vms();
        for _ in 0..MAX_TRIES {
            if let Some(got) = get() {
                return Ok(got);
            }
            // Without a copy back: first.
            if self.drop_duplicates(&vms, count, false) {
                continue;
            }
            let was_used = |of: &Resident| self.was_used(&vms, of);
            let priority = |of: &Resident| memory.advice.priority(of.span);
            let priority = memory.advice.is_used().then_some(&priority as _);
            match self.residents.pick(memory.now(), was_used, priority) {
                Victim::Evict(victim) => self.evict(pagemap, &vms, &victim),
                _ if self.drop_duplicates(&vms, count, true) => {}
                Victim::Wait(time) => memory.vram.wait_freed(time),
                Victim::Nothing => memory.vram.wait_freed(WAIT_FOR_OTHERS),
                Victim::Pinned => {
                    no_room = NoRoom::Pinned;
                    if waits_for_pinned.next().is_none() {
                        break;
                    }
                    memory.vram.wait_freed(WAIT_FOR_OTHERS);
                }
            }
        }
        get().ok_or(no_room)
    }

    /// If something is in the way of it now, it gets another turn.
    fn evict(&self, pagemap: &Pagemap<M>, vms: &[Arc<Vm<M>>], victim: &Picked<'_>) {
        if evict::evict_to_ram(pagemap, &victim.devmem, Cause::Eviction).is_err() {
            return;
        }
        counters::count(&self.memory.traffic.evictions);
        let now = self.memory.now();
        for range in vms.iter().flat_map(|vm| vm.svm().ranges_in(victim.span)) {
            range.pages(ONLY).history().count_eviction(now);
        }
    }

    /// Whether any device address space used it. All are asked: that begins anew.
    fn was_used(&self, vms: &[Arc<Vm<M>>], resident: &Resident) -> bool {
        gpusvm_sync::walk!("was_used");
        let tables = self.memory.device.page_tables();
        let used = |vm: &Arc<Vm<M>>| tables.test_and_clear_accessed(vm.id(), resident.span);
        let pages: u64 = vms.iter().map(|vm| used(vm).get()).sum();
        pages > 0
    }
}
