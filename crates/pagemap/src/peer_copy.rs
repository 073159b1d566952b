//! Pages of peers: copied directly, by the device that they leave.
//!
//! ```text
//!   collect asks: may this page of a device be taken?   same owner, known, not leased, timeslice over
//!   copy:         for each allocation that pages leave: map their places for its device,
//!                 let it copy, unmap
//! ```
//!
//! # Differences from the kernel
//!
//! `source_peer_migrates` is not a choice, as in the newest kernel: the source copies, since it may have
//! to decompress, or flush a cache, first. A page in its timeslice stays; the kernel takes it.

use crate::pagemap::Bound;
use crate::pieces::{self, Cause};
use crate::zdd::Zdd;
use crate::{Devmem, DevmemError, Holds, Importer, Pagemap, PagemapAddr, PreMigrateFence};
use alloc::sync::Arc;
use alloc::vec::Vec;
use gpusvm_mm::{AddressSpace, DevicePage, Source, Time};
use gpusvm_types::{DevicePfn, PAGES_PER_BLOCK};

/// The allocations that a migration takes pages from.
pub(crate) struct PeerCopies<'a, M: AddressSpace> {
    /// Where the pages go.
    target: &'a Pagemap<M>,
    bound: &'a Bound<'a, M>,
    sources: Vec<PeerSource<M>>,
}

/// An allocation of a peer that pages leave.
struct PeerSource<M: AddressSpace> {
    pagemap: Arc<Pagemap<M>>,
    zdd: Zdd,
    devmem: Arc<Devmem>,
    may_leave: bool,
}

impl<'a, M: AddressSpace> PeerCopies<'a, M> {
    pub(crate) fn new(target: &'a Pagemap<M>, bound: &'a Bound<'a, M>) -> Self {
        let sources = Vec::new();
        Self {
            target,
            bound,
            sources,
        }
    }

    /// Whether a page that lives on a device may be taken. Asked with the page's block locked.
    pub(crate) fn may_take(&mut self, page: DevicePage, now: Time) -> bool {
        if self.target.contains(page) {
            return false;
        }
        if let Some(known) = self.sources.iter().find(|source| source.has(page)) {
            return known.may_leave;
        }
        let Some(source) = self.source_of(page, now) else {
            return false;
        };
        let may_leave = source.may_leave;
        self.sources.push(source);
        may_leave
    }

    fn source_of(&self, page: DevicePage, now: Time) -> Option<PeerSource<M>> {
        let pagemap = self.target.pagemaps.upgrade()?.page_to_pagemap(page)?;
        let zdd = pagemap.zdds.of(page.pfn)?;
        let devmem = pagemap.zdds.devmem(zdd)?;
        let may_leave =
            pagemap.owner() == self.target.owner() && devmem.stays_until(now, Holds::All).is_none();
        Some(PeerSource {
            pagemap,
            zdd,
            devmem,
            may_leave,
        })
    }

    /// Lets each source copy its pages to their places among `pfns`.
    pub(crate) fn copy(
        &self,
        sources: &[Source],
        pfns: &[DevicePfn],
        fence: Option<&dyn PreMigrateFence>,
        cause: Cause,
    ) -> Result<(), DevmemError> {
        for from in self.sources.iter().filter(|source| source.may_leave) {
            let is_mine = |page: DevicePage| from.has(page);
            let mut places = Places::new(self.bound.import(from.pagemap.peer()));
            for (i, source) in sources.iter().enumerate() {
                if matches!(source, Source::Device(page) if is_mine(*page)) {
                    places.map(i, pfns[i])?;
                }
            }
            let mut pieces = pieces::to_peer(sources, &places.mapped, is_mine);
            from.devmem.ops().copy_to_ram(&mut pieces, fence, cause)?;
        }
        Ok(())
    }
}

impl<M: AddressSpace> PeerSource<M> {
    fn has(&self, page: DevicePage) -> bool {
        self.pagemap.is_same(page, self.zdd)
    }
}

/// Device pages, mapped for a peer to write to. Dropping it unmaps them.
struct Places<M: AddressSpace> {
    importer: Importer<M>,
    mapped: [Option<PagemapAddr>; PAGES_PER_BLOCK],
}

impl<M: AddressSpace> Places<M> {
    fn new(importer: Importer<M>) -> Self {
        let mapped = [None; PAGES_PER_BLOCK];
        Self { importer, mapped }
    }

    fn map(&mut self, i: usize, pfn: DevicePfn) -> Result<(), DevmemError> {
        let place = self.importer.device_map(pfn);
        self.mapped[i] = place;
        place.map(drop).ok_or(DevmemError::Unsupported {
            what: "reaching the memory of a device of the same owner",
        })
    }
}

impl<M: AddressSpace> Drop for Places<M> {
    fn drop(&mut self) {
        for address in self.mapped.iter().flatten() {
            self.importer.device_unmap(*address);
        }
    }
}
