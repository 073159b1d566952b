//! Pages into device memory.

use crate::driver::Vm;
use crate::driver::devmem::Bo;
use crate::driver::vram::Resident;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Home};
use gpusvm_pagemap::{
    Cause, Devmem, MigrateError, MigrateRequest, Mode, PagemapAddr, PagemapOps, migrate,
};
use gpusvm_sync::Arc;
use gpusvm_types::{DevicePfn, OwnerId, PageCount, Span};

impl<M: AddressSpace> Vm<M> {
    /// Moves what of `span` is in RAM to the device, as far as it goes. Pages that are on the device
    /// already stay where they are.
    ///
    /// # Errors
    ///
    /// Why something did not move; what moved before stays moved.
    pub(crate) fn populate(
        &self,
        span: Span,
        timeslice: Duration,
        cause: Cause,
    ) -> Result<(), MigrateError> {
        if !self.pagemap.is_bound() {
            return Err(MigrateError::Unbound { span });
        }
        let mut homes = vec![Home::System; span.page_count().as_usize()];
        self.svm
            .mm()
            .range_fault(span, Some(self.pagemap.owner()), &mut homes)?;
        for run in runs_in_ram(span, &homes) {
            self.populate_run(run, timeslice, cause)?;
        }
        Ok(())
    }

    fn populate_run(
        &self,
        span: Span,
        timeslice: Duration,
        cause: Cause,
    ) -> Result<(), MigrateError> {
        let count = span.page_count();
        let runs = self.allocate(count).ok_or(MigrateError::NoSpace { span })?;
        let bo = Bo {
            device: Arc::clone(&self.device),
            vram: Arc::clone(&self.vram),
            counters: Arc::clone(&self.counters),
            mm: Arc::downgrade(self.svm.mm()),
            runs,
        };
        let devmem = Arc::new(Devmem::new(count, Box::new(bo)));
        let request = MigrateRequest {
            span,
            timeslice,
            mode: Mode::Partial,
            cause,
        };
        migrate::migrate_to_devmem(&self.pagemap, &devmem, &request)?;
        self.vram.add_resident(Resident { devmem, span });
        Ok(())
    }
}

impl<M: AddressSpace> PagemapOps for Vm<M> {
    fn populate(&self, span: Span, timeslice: Duration) -> Result<(), MigrateError> {
        span.blocks()
            .try_for_each(|piece| Vm::populate(self, piece, timeslice, Cause::Prefetch).map(drop))
    }

    fn device_map(&self, page: DevicePfn, for_owner: OwnerId) -> Option<PagemapAddr> {
        (for_owner == self.pagemap.owner()).then(|| PagemapAddr::Vram(page.dev_addr()))
    }

    fn device_unmap(&self, _: &PagemapAddr, _: OwnerId) {
        // A device's own memory needs no mapping to reach it.
    }
}

/// The longest pieces of `span` whose pages are in RAM.
fn runs_in_ram(span: Span, homes: &[Home]) -> Vec<Span> {
    let mut runs: Vec<Span> = Vec::new();
    for (page, _) in span
        .pages()
        .zip(homes)
        .filter(|(_, home)| **home == Home::System)
    {
        let page = Span::of_pages(page, PageCount::ONE);
        match runs.last_mut() {
            Some(run) if run.end() == page.start() => *run = run.union(page),
            _ => runs.push(page),
        }
    }
    runs
}
