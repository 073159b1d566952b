//! The counted back-reference from device pages to their allocation: `drm_pagemap_zdd`.
//!
//! ```text
//!   device page  ->  head (the first pfn of its allocation)  ->  slot: count, allocation
//! ```
//!
//! A page of device memory in use holds one reference. The migration that fills an allocation holds
//! one more until it is done, so that pages dropped meanwhile cannot release it too early.
//!
//! # Locking
//!
//! A page's head is written before the page is visible to anyone and read with its block locked, or
//! as a hint. The slot's lock is held only to look.
//!
//! # Differences from the kernel
//!
//! The kernel allocates a zdd for each migration and keeps a pointer in `page->zone_device_data`. Here
//! slots are preallocated, one for each page that can be a head, so a CPU fault allocates nothing.

use crate::Devmem;
use alloc::{boxed::Box, sync::Arc, vec::Vec};
use gpusvm_sync::Mutex;
use gpusvm_sync::atomic::{AtomicU32, Ordering};
use gpusvm_types::{DevicePfn, PageCount};

/// The allocation a device page belongs to, named by its first page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zdd(DevicePfn);

/// The back-references of all pages of one device memory.
#[derive(Debug)]
pub(crate) struct Zdds {
    heads: Box<[AtomicU32]>,
    slots: Box<[Slot]>,
}

#[derive(Debug, Default)]
struct Slot {
    references: AtomicU32,
    devmem: Mutex<Option<Arc<Devmem>>>,
}

/// No head: what a free page has.
const FREE: u32 = u32::MAX;

impl Zdds {
    pub(crate) fn new(pages: PageCount) -> Self {
        let pages = pages.as_usize();
        Self {
            heads: (0..pages).map(|_| AtomicU32::new(FREE)).collect(),
            slots: (0..pages).map(|_| Slot::default()).collect(),
        }
    }

    /// The allocation of a page in use.
    pub(crate) fn of(&self, pfn: DevicePfn) -> Option<Zdd> {
        match self.heads.get(pfn.index())?.load(Ordering::Acquire) {
            FREE => None,
            head => Some(Zdd(DevicePfn::new(head))),
        }
    }

    pub(crate) fn devmem(&self, zdd: Zdd) -> Option<Arc<Devmem>> {
        self.slots[zdd.0.index()].devmem.lock().clone()
    }

    /// Begins an allocation: one reference, held by the migration. `pfns` are all its pages.
    pub(crate) fn begin(&self, devmem: &Arc<Devmem>, pfns: &[DevicePfn]) -> Zdd {
        let head = *pfns.first().expect("an allocation has pages");
        let slot = &self.slots[head.index()];
        let before = slot.references.swap(1, Ordering::AcqRel);
        assert_eq!(
            before, 0,
            "the pages of an allocation are in use by another"
        );
        *slot.devmem.lock() = Some(Arc::clone(devmem));
        Zdd(head)
    }

    /// A page begins to be in use.
    pub(crate) fn get(&self, zdd: Zdd, pfn: DevicePfn) {
        self.slots[zdd.0.index()]
            .references
            .fetch_add(1, Ordering::AcqRel);
        self.heads[pfn.index()].store(zdd.0.get(), Ordering::Release);
    }

    /// `count` pages from `first` on, all of one memory, are free again.
    pub(crate) fn put_pages(&self, first: DevicePfn, count: PageCount) {
        gpusvm_sync::walk!("put_pages");
        let mut same: Option<(Zdd, u32)> = None;
        for i in 0..count.get() {
            let pfn = first.offset(PageCount::new(i));
            let head = self.heads[pfn.index()].swap(FREE, Ordering::AcqRel);
            assert_ne!(head, FREE, "device page {pfn:?} was freed twice");
            let zdd = Zdd(DevicePfn::new(head));
            same = match same {
                Some((other, n)) if other == zdd => Some((zdd, n + 1)),
                Some((other, n)) => {
                    self.put(other, n);
                    Some((zdd, 1))
                }
                None => Some((zdd, 1)),
            };
        }
        if let Some((zdd, n)) = same {
            self.put(zdd, n);
        }
    }

    /// Gives `count` references back; the last one releases the allocation.
    pub(crate) fn put(&self, zdd: Zdd, count: u32) {
        let slot = &self.slots[zdd.0.index()];
        // The allocation leaves its slot before the count reaches zero for others to see: a new
        // allocation may begin with the same head as soon as this one is released.
        let devmem = slot.devmem.lock().clone();
        let before = slot.references.fetch_sub(count, Ordering::AcqRel);
        assert!(
            before >= count,
            "more references given back than were taken"
        );
        if before == count {
            *slot.devmem.lock() = None;
            if let Some(devmem) = devmem {
                devmem.release();
            }
        }
    }

    /// The allocations that have pages in use, and how many: a hint unless nothing else runs.
    pub(crate) fn live(&self) -> Vec<(Arc<Devmem>, PageCount)> {
        let in_use = |slot: &Slot| u64::from(slot.references.load(Ordering::Acquire));
        let slots = self.slots.iter().filter(|slot| in_use(slot) > 0);
        slots
            .filter_map(|slot| {
                let devmem = slot.devmem.lock().clone()?;
                Some((devmem, PageCount::new(in_use(slot))))
            })
            .collect()
    }

    /// How many pages of the allocation are in use: a hint unless nothing else runs.
    pub(crate) fn in_use(&self, zdd: Zdd) -> PageCount {
        PageCount::new(u64::from(
            self.slots[zdd.0.index()].references.load(Ordering::Acquire),
        ))
    }
}
