//! Pages into device memory.

use crate::driver::region::Memory;
use crate::driver::residents::{Resident, Residents};
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Home, Intent, MmError};
use gpusvm_pagemap::{
    Cause, DevmemError, Holds, MigrateError, MigrateRequest, Mode, Pagemap, PagemapAddr,
    PagemapOps, Peer, migrate,
};
use gpusvm_sync::Arc;
use gpusvm_types::{DevicePfn, PageCount, PageIndex, Span};

/// The driver's part of a device's memory.
#[derive(Debug)]
pub(crate) struct RegionOps<M: AddressSpace> {
    pub(crate) memory: Arc<Memory<M>>,
    pub(crate) residents: Residents,
}

impl<M: AddressSpace> PagemapOps<M> for RegionOps<M> {
    fn populate(
        &self,
        pagemap: &Arc<Pagemap<M>>,
        span: Span,
        timeslice: Duration,
        cause: Cause,
    ) -> Result<(), MigrateError> {
        gpusvm_sync::walk!("populate");
        let how = How {
            timeslice,
            cause,
            exclusive: false,
        };
        self.populate_blocks(pagemap, span, &how)
    }

    fn populate_exclusive(
        &self,
        pagemap: &Arc<Pagemap<M>>,
        span: Span,
        timeslice: Duration,
        cause: Cause,
    ) -> Result<(), MigrateError> {
        let how = How {
            timeslice,
            cause,
            exclusive: true,
        };
        self.populate_blocks(pagemap, span, &how)
    }

    fn device_map(&self, page: DevicePfn, peer: Peer) -> Option<PagemapAddr> {
        gpusvm_sync::walk!("device_map");
        let memory = &*self.memory;
        if peer == memory.peer {
            return Some(PagemapAddr::Vram(page.dev_addr()));
        }
        let aperture = memory.device.aperture()?;
        let offset = page.dev_addr().offset_from(DevicePfn::new(0).dev_addr());
        let reaches = memory.fabrics.reach(peer, memory.peer);
        reaches.then(|| PagemapAddr::Peer(aperture + offset))
    }

    fn device_unmap(&self, _: PagemapAddr, _: Peer) {
        // Neither a device's own memory nor a peer's aperture needs a mapping to be reached.
    }
}

/// How pages come.
#[derive(Clone, Copy, Debug)]
struct How {
    timeslice: Duration,
    cause: Cause,
    exclusive: bool,
}

impl<M: AddressSpace> Drop for RegionOps<M> {
    fn drop(&mut self) {
        // Without an address space no handler runs.
        if self.memory.mm.upgrade().is_some() {
            self.residents.leave_behind();
        }
    }
}

impl<M: AddressSpace> RegionOps<M> {
    /// Nothing lives in `memory` yet.
    pub(crate) fn new(memory: &Arc<Memory<M>>) -> Self {
        Self {
            memory: Arc::clone(memory),
            residents: Residents::default(),
        }
    }

    fn populate_blocks(
        &self,
        pagemap: &Pagemap<M>,
        span: Span,
        how: &How,
    ) -> Result<(), MigrateError> {
        let mut blocks = span.blocks();
        blocks.try_for_each(|piece| self.populate_in_block(pagemap, piece, how))
    }

    /// Moves what of `span`, which is in one block, is elsewhere to the device, as far as it goes:
    /// pages of RAM and pages of peers. When a page has to stay where it is, on a peer or because a
    /// launch declared it, everything does: a range is mapped with pages of one memory.
    fn populate_in_block(
        &self,
        pagemap: &Pagemap<M>,
        span: Span,
        how: &How,
    ) -> Result<(), MigrateError> {
        let request = |span| MigrateRequest {
            span,
            timeslice: how.timeslice,
            mode: Mode::Partial,
            cause: how.cause,
            exclusive: how.exclusive,
        };
        let in_place = pagemap.is_coherent() && !how.exclusive;
        let mm = self.memory.mm.upgrade().ok_or(MmError::Gone)?;
        // Before the move is announced: who declares memory waits for those that are.
        let _no_fork = mm.no_fork().ok_or(MmError::Gone)?;
        let mut homes = vec![Home::System; span.page_count().as_usize()];
        mm.range_fault(span, Some(pagemap.owner()), Intent::Read, &mut homes)?;
        let is_elsewhere = |home: &Home| match *home {
            Home::System | Home::Protected => true,
            Home::Device(page) => !pagemap.contains(page),
            Home::Coherent(page) => !in_place || !pagemap.contains(page),
            Home::Moving | Home::Unmapped => false,
        };
        let runs = runs(span, |page| is_elsewhere(&homes[span.index_of(page)]));
        let is_declared = || self.memory.stays.is_staying(span);
        let leaving = homes.iter().filter(|home| is_elsewhere(home));
        if !runs.is_empty() && (is_declared() || self.must_stay(&mm, pagemap, leaving)) {
            return Err(MigrateError::NothingCollected { span });
        }
        for run in runs {
            // What is coherent goes from device to device by way of RAM, where it is already.
            let mut pages = run.pages().map(|page| homes[span.index_of(page)]);
            if pages.any(|home| match home {
                Home::Coherent(_) => true,
                home => in_place && home.device_page().is_some(),
            }) {
                let mut homes = vec![Home::System; run.page_count().as_usize()];
                mm.range_fault(run, None, Intent::Read, &mut homes)?;
            }
            match self.populate_run(pagemap, &request(run)) {
                // One of the engines does not copy to the other device: through RAM, then.
                Err(MigrateError::Devmem {
                    error: DevmemError::Unsupported { .. },
                    ..
                }) => {
                    mm.range_fault(
                        run,
                        None,
                        Intent::Read,
                        &mut homes[..run.page_count().as_usize()],
                    )?;
                    self.populate_run(pagemap, &request(run))?;
                }
                done => done?,
            }
        }
        Ok(())
    }

    fn populate_run(
        &self,
        pagemap: &Pagemap<M>,
        request: &MigrateRequest,
    ) -> Result<(), MigrateError> {
        let span = request.span;
        let devmem = self.allocate(pagemap, span.page_count());
        let devmem = Arc::new(devmem.map_err(|no_room| no_room.of(span))?);
        let moving = self.memory.stays.begin_move(span);
        let moving = moving.ok_or(MigrateError::NothingCollected { span })?;
        migrate::migrate_to_devmem(pagemap, &devmem, request)?;
        drop(moving);
        self.residents.add(Resident { devmem, span });
        Ok(())
    }

    /// Whether any of the pages lives on a device and may not leave it now. A timeslice is kept for the
    /// device, not against it.
    fn must_stay<'a>(
        &self,
        mm: &M,
        pagemap: &Pagemap<M>,
        leaving: impl Iterator<Item = &'a Home>,
    ) -> bool {
        let Some(pagemaps) = self.memory.pagemaps.upgrade() else {
            return false;
        };
        let now = mm.now();
        let of_devices = leaving.filter_map(|home| home.device_page());
        let devmem_of = |page| pagemaps.page_to_pagemap(page)?.devmem_of(page);
        let mut allocations = of_devices.filter_map(|page| {
            let holds = match pagemap.contains(page) {
                true => Holds::Leases,
                false => Holds::All,
            };
            devmem_of(page).map(|devmem| (devmem, holds))
        });
        allocations.any(|(devmem, holds)| devmem.stays_until(now, holds).is_some())
    }
}

/// The longest pieces of `span` whose pages are such.
fn runs(span: Span, is_such: impl Fn(PageIndex) -> bool) -> Vec<Span> {
    let mut runs: Vec<Span> = Vec::new();
    for page in span.pages().filter(|page| is_such(*page)) {
        let page = Span::of_pages(page, PageCount::ONE);
        match runs.last_mut() {
            Some(run) if run.end() == page.start() => *run = run.union(page),
            _ => runs.push(page),
        }
    }
    runs
}
