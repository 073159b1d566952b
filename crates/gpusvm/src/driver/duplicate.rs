//! Copies for reading: a page is in RAM and on devices at once, until somebody writes it.
//!
//! ```text
//!   read fault, Plan.duplicate
//!     -> all of the range in RAM -> device memory, evicting if need be -> protect, copy -> mapped to read
//!
//!   a write by anybody       -> invalidated: not mapped -----------> tend: memory is given back
//!   device memory is full    -> stale ones go, then those that are not used, then residents
//!   unbind                   -> all go
//! ```
//!
//! Nothing is copied back when a copy goes: the page is in RAM all the time.
//!
//! # Which devices
//!
//! Devices that fault and have memory. A device that cannot fault would lose its copies to a write of
//! the CPU in the middle of a launch; it maps RAM that anybody may write, or pages that live with it, as
//! ever. Pages that such a device has declared are not copied to others while its launch runs: they
//! would have to be protected, which takes them away from it.
//!
//! # Locking
//!
//! The list's lock is held to add, and to look at what ranges have. Memory is given back by
//! workers, and whoever needs room: never by a fault handler.

use crate::driver::counters;
use crate::driver::fault::ONLY;
use crate::driver::populate::RegionOps;
use crate::driver::vm::Vm;
use gpusvm_device::FaultMode;
use gpusvm_mm::{AddressSpace, Home, Intent, MmError};
use gpusvm_pagemap::{Cause, MigrateError};
use gpusvm_svm::{Copies, Range};
use gpusvm_sync::{Arc, Mutex, Weak};
use gpusvm_types::{PageCount, Span, VirtAddr};
use std::collections::BTreeMap;

/// Ranges with copies, by where they start.
#[derive(Debug)]
pub(crate) struct Duplicates<M: AddressSpace>(Mutex<List<M>>);

#[derive(Debug)]
struct List<M: AddressSpace> {
    ranges: BTreeMap<VirtAddr, Weak<Range<M>>>,
    /// Where to look next.
    next: VirtAddr,
}

/// How many ranges are looked at between two faults.
const LOOKS: usize = 64;
const START: VirtAddr = VirtAddr::new(0);

impl<M: AddressSpace> Duplicates<M> {
    /// None yet.
    pub(crate) const fn new() -> Self {
        let ranges = BTreeMap::new();
        Self(Mutex::new(List {
            ranges,
            next: START,
        }))
    }

    /// The range is mapped with copies.
    pub(crate) fn add(&self, range: &Arc<Range<M>>) {
        let start = range.span().start();
        let before = self.0.lock().ranges.insert(start, Arc::downgrade(range));
        drop(before);
    }

    /// Up to `most` of the ranges, from where the last look ended on; those that are gone, or have no
    /// copies any more, are forgotten.
    fn look(&self, most: usize) -> Vec<Arc<Range<M>>> {
        let (mut found, mut forgotten) = (Vec::new(), Vec::new());
        let mut list = self.0.lock();
        let next = list.next;
        let (behind, before) = (list.ranges.range(next..), list.ranges.range(..next));
        let all = behind.chain(before).take(most);
        let looked: Vec<_> = all.map(|(at, range)| (*at, range.upgrade())).collect();
        for (at, range) in looked {
            list.next = at + gpusvm_types::PAGE_SIZE;
            match range {
                Some(range) if range.pages(ONLY).duplicated() > PageCount::ZERO => {
                    found.push(range)
                }
                gone => {
                    list.ranges.remove(&at);
                    forgotten.push(gone);
                }
            }
        }
        drop(list);
        // The last to know a range gives back what it has: without the lock.
        drop(forgotten);
        found
    }
}

/// Copies the pages of the range to the device, if its policy says so and it can be. `None` when they
/// are better, or can only be, had another way; that is counted, unless all of them are here.
pub(crate) fn duplicate<M: AddressSpace>(vm: &Vm<M>, range: &Range<M>) -> Option<Copies> {
    vm.reclaim(range);
    match vm.try_duplicate(range) {
        Ok(copies) => copies,
        Err(_) => {
            counters::count(&vm.counters.not_duplicated);
            None
        }
    }
}

impl<M: AddressSpace> Vm<M> {
    fn try_duplicate(&self, range: &Range<M>) -> Result<Option<Copies>, MigrateError> {
        let (span, mm) = (range.span(), self.svm().mm());
        let pagemap = self.region.pagemap();
        if self.caps().faults == FaultMode::Declared || !mm.can_watch_writes() {
            return Err(MmError::UnwatchedWrites { span }.into());
        }
        let mut homes = vec![Home::System; span.page_count().as_usize()];
        mm.range_fault(span, Some(pagemap.owner()), Intent::Read, &mut homes)?;
        let is_here = |home: &Home| {
            home.device_page()
                .is_some_and(|page| pagemap.contains(page))
        };
        if homes.iter().all(is_here) {
            return Ok(None);
        }
        let is_on_a_device = |home: &Home| home.device_page().is_some();
        if homes.iter().any(is_on_a_device) && !self.take_home(range)? {
            return Err(MigrateError::NothingCollected { span });
        }
        let ops = self.region.ops();
        let devmem = ops.allocate(pagemap, span.page_count());
        let devmem = devmem.map_err(|no_room| no_room.of(span))?;
        // Protecting a page takes it away from who declared it.
        let stays = self.region.devices().stays();
        let moving = stays.begin_move(span);
        let _moving = moving.ok_or(MigrateError::NothingCollected { span })?;
        let copies = self
            .svm()
            .duplicate(range, pagemap, devmem, Cause::Duplicate);
        copies.map(Some)
    }

    /// The range is mapped, with copies.
    pub(crate) fn is_duplicated(&self, range: &Arc<Range<M>>) {
        counters::count(&self.counters.duplicated);
        self.duplicates.add(range);
    }

    /// Gives the memory of copies back that are out of use. Whether there were any.
    fn reclaim(&self, range: &Range<M>) -> bool {
        let stale = range.pages(ONLY).reclaim();
        if stale.is_some() {
            counters::count(&self.counters.duplicates_invalidated);
        }
        stale.is_some()
    }

    /// As `reclaim`, now and then, of some ranges.
    pub(crate) fn tend_duplicates(&self) {
        for range in self.duplicates.look(LOOKS) {
            self.reclaim(&range);
        }
    }

    /// Gives the memory of copies back, used or not. Whoever makes one meanwhile is waited for: none is
    /// made any more.
    pub(crate) fn drop_duplicates(&self) {
        let all = Span::new(START, VirtAddr::new(1 << 47)).expect("not empty");
        for range in self.svm().ranges_in(all) {
            let _serving = range.serve();
            self.drop_duplicate(&range);
        }
    }

    /// Whoever reads the copies faults.
    fn drop_duplicate(&self, range: &Range<M>) -> PageCount {
        let pages = range.pages(ONLY).duplicated();
        if pages == PageCount::ZERO || self.reclaim(range) {
            return pages;
        }
        self.svm().range_unmap(range);
        match range.pages(ONLY).reclaim() {
            Some(_) => counters::count(&self.counters.duplicates_dropped),
            // Somebody was faster, or it is mapped again already.
            None => return PageCount::ZERO,
        }
        pages
    }

    /// How much device memory is used for copies.
    pub fn duplicated(&self) -> PageCount {
        let all = self.duplicates.look(usize::MAX);
        let pages = all.iter().map(|range| range.pages(ONLY).duplicated());
        pages.fold(PageCount::ZERO, |sum, pages| sum + pages)
    }
}

impl<M: AddressSpace> RegionOps<M> {
    /// Makes room for `count` pages by copies that go: those that are out of use, then those that the
    /// device did not use lately, or all of them. Whether any went.
    pub(crate) fn drop_duplicates(
        &self,
        vms: &[Arc<Vm<M>>],
        count: PageCount,
        used_too: bool,
    ) -> bool {
        let tables = self.memory.device.page_tables();
        let mut freed = PageCount::ZERO;
        for vm in vms {
            for range in vm.duplicates.look(usize::MAX) {
                if vm.reclaim(&range) {
                    freed = count;
                }
            }
        }
        for vm in vms {
            for range in vm.duplicates.look(usize::MAX) {
                if freed >= count {
                    return true;
                }
                let is_used = !used_too && {
                    let span = range.span();
                    tables.test_and_clear_accessed(vm.id(), span) > PageCount::ZERO
                };
                if !is_used {
                    freed += vm.drop_duplicate(&range);
                }
            }
        }
        freed > PageCount::ZERO
    }
}
