//! What a device reaches of a range: mapped for it page by page, and given back page by page.
//!
//! ```text
//!   get_pages: device_map ---> Prepared ---commit---> Pages
//!                  |              |                     |
//!                  `-- fails -----`-- dropped ----------`-- invalidated, replaced, dropped
//!                                                                   |
//!                                                                   v
//!                                                device_unmap, once for each page
//! ```
//!
//! Pages of RAM are reached without anybody's help. Pages of a device, its own or a peer's, are
//! reached through the pagemap that they are of: through one, which is why a range is mapped with
//! pages of one device memory only.

use crate::PageRun;
use alloc::vec::Vec;
use gpusvm_mm::AddressSpace;
use gpusvm_pagemap::{Duplicate, Importer, PagemapAddr};
use gpusvm_types::PAGE_SIZE;

/// Runs of pages and, for those of a device, who gives them back.
#[derive(Debug)]
pub(crate) struct Reached<M: AddressSpace> {
    importer: Option<Importer<M>>,
    runs: Vec<PageRun>,
    /// Whose pages some of the runs are.
    duplicate: Option<Duplicate>,
}

impl<M: AddressSpace> Reached<M> {
    pub(crate) const fn nothing() -> Self {
        Self {
            importer: None,
            runs: Vec::new(),
            duplicate: None,
        }
    }

    pub(crate) fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// Through whom device pages are reached, once it is known.
    pub(crate) fn importer(&self) -> Option<&Importer<M>> {
        self.importer.as_ref()
    }

    /// Device pages are reached through `importer`.
    pub(crate) fn reach_through(&mut self, importer: Importer<M>) -> &Importer<M> {
        debug_assert!(self.importer.is_none(), "one memory for one range");
        self.importer.insert(importer)
    }

    /// One more page, which has the next address of the range.
    pub(crate) fn push(&mut self, page: PageRun) {
        debug_assert_eq!(page.span.len(), PAGE_SIZE);
        if let Some(last) = self.runs.last_mut()
            && last.span.end() == page.span.start()
            && last.permission == page.permission
            && last.address.continues_with(page.address, last.span.len())
        {
            last.span = last.span.union(page.span);
            return;
        }
        self.runs.push(page);
    }

    /// Copies that are reached live as long as this does.
    pub(crate) fn keep(&mut self, duplicate: Option<Duplicate>) {
        self.duplicate = duplicate;
    }

    /// The copies that are kept.
    pub(crate) fn duplicate(&self) -> Option<&Duplicate> {
        self.duplicate.as_ref()
    }

    /// The copies, which nothing reaches any more.
    pub(crate) fn take_duplicate(&mut self) -> Option<Duplicate> {
        debug_assert!(self.runs.is_empty(), "they are mapped");
        self.duplicate.take()
    }

    /// Gives every page back. Frees no storage, and keeps copies: for fault handlers too.
    pub(crate) fn end(&mut self) {
        if let Some(importer) = &self.importer {
            let of_device = |run: &&PageRun| !matches!(run.address, PagemapAddr::System(_));
            for run in self.runs.iter().filter(of_device) {
                let mut at = run.address;
                for _ in run.span.pages() {
                    importer.device_unmap(at);
                    at = next(at);
                }
            }
        }
        self.runs.clear();
    }
}

impl<M: AddressSpace> Drop for Reached<M> {
    fn drop(&mut self) {
        self.end();
    }
}

/// The page behind.
fn next(at: PagemapAddr) -> PagemapAddr {
    match at {
        PagemapAddr::System(at) => PagemapAddr::System(at + PAGE_SIZE),
        PagemapAddr::Vram(at) => PagemapAddr::Vram(at + PAGE_SIZE),
        PagemapAddr::Peer(at) => PagemapAddr::Peer(at + PAGE_SIZE),
    }
}
