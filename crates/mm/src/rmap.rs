//! From device pages to addresses: how eviction finds a page without knowing where it is.
//!
//! # Locking
//!
//! An entry changes under the lock of the block that the page lives in, before or after. A reader
//! without it locks the block the entry names and looks again.
//!
//! # Differences from the kernel
//!
//! The kernel walks `anon_vma`s from a page's `mapping`. Here a device page stands in for one page of
//! one process, so one word per device page is enough, and `mremap` rewrites it.

use alloc::boxed::Box;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{DevicePfn, PageCount, PageIndex};

/// Which page of the process each page of a device memory stands in for.
#[derive(Debug)]
pub struct Rmap(Box<[AtomicU64]>);

/// No page: page index 0 is never mirrored, since address 0 is never mapped.
const NOBODY: u64 = 0;

impl Rmap {
    /// For a memory of this size, nothing in use.
    pub fn new(pages: PageCount) -> Self {
        Self(
            (0..pages.as_usize())
                .map(|_| AtomicU64::new(NOBODY))
                .collect(),
        )
    }

    /// The page that `pfn` stands in for.
    pub fn get(&self, pfn: DevicePfn) -> Option<PageIndex> {
        match self.0.get(pfn.index())?.load(Ordering::Acquire) {
            NOBODY => None,
            page => Some(PageIndex::new(page)),
        }
    }

    /// From now on `pfn` stands in for `page`.
    ///
    /// # Panics
    ///
    /// When the memory has no such page.
    pub fn set(&self, pfn: DevicePfn, page: PageIndex) {
        self.0[pfn.index()].store(page.get(), Ordering::Release);
    }

    /// `pfn` is free.
    ///
    /// # Panics
    ///
    /// When the memory has no such page.
    pub fn clear(&self, pfn: DevicePfn) {
        self.0[pfn.index()].store(NOBODY, Ordering::Release);
    }

    /// How many pages are in use.
    pub fn in_use(&self) -> PageCount {
        let used = self
            .0
            .iter()
            .filter(|entry| entry.load(Ordering::Acquire) != NOBODY)
            .count();
        PageCount::from_usize(used)
    }
}
