//! Pages to the device, and no mapping.

use crate::driver::current;
use crate::driver::gpuva::Vma;
use crate::driver::vm::Vm;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_pagemap::{Cause, MigrateError};
use gpusvm_svm::{FaultCtx, FindError};
use gpusvm_types::{Span, VirtAddr};

impl<M: AddressSpace> Vm<M> {
    /// Moves what of `span` can migrate to the device, range by range, and maps nothing: the device's
    /// first touch of a range does. What does not fit evicts others.
    ///
    /// # Errors
    ///
    /// The first reason why something did not move; the rest is tried all the same, unless nothing can
    /// move any more: `Unbound`, `NoSpace`, `Gone`.
    pub fn migrate_to_devmem(&self, span: Span, cause: Cause) -> Result<(), MigrateError> {
        self.each_range(span, |range| {
            let (pagemap, timeslice) = (self.region.pagemap(), Duration::ZERO);
            pagemap.populate(range, timeslice, cause)
        })
    }

    /// As [`Vm::migrate_to_devmem`], of no page outside of `span`, also where a range reaches out of it.
    ///
    /// # Errors
    ///
    /// As [`Vm::migrate_to_devmem`].
    pub fn migrate_pages(&self, span: Span, cause: Cause) -> Result<(), MigrateError> {
        let pagemap = self.region.pagemap();
        self.each_piece(span, |piece| pagemap.populate(piece, Duration::ZERO, cause))
    }

    /// As [`Vm::migrate_pages`], out of the reach of the CPU, also where the memory is coherent.
    ///
    /// # Errors
    ///
    /// As [`Vm::migrate_to_devmem`].
    pub fn migrate_exclusive(&self, span: Span, cause: Cause) -> Result<(), MigrateError> {
        let pagemap = self.region.pagemap();
        self.each_piece(span, |piece| {
            pagemap.populate_exclusive(piece, Duration::ZERO, cause)
        })
    }

    /// What each range has of `span`.
    fn each_piece(
        &self,
        span: Span,
        populate: impl Fn(Span) -> Result<(), MigrateError>,
    ) -> Result<(), MigrateError> {
        self.each_range(span, |range| {
            range.intersection(span).map_or(Ok(()), &populate)
        })
    }

    fn each_range(
        &self,
        span: Span,
        populate: impl Fn(Span) -> Result<(), MigrateError>,
    ) -> Result<(), MigrateError> {
        let mut result = Ok(());
        let mut at = span.start();
        while at < span.end() {
            let (end, moved) = self.migrate_range(at, &populate)?;
            let is_final = matches!(
                moved,
                Err(MigrateError::Unbound { .. }
                    | MigrateError::NoSpace { .. }
                    | MigrateError::Pinned { .. }
                    | MigrateError::Mm(MmError::Gone))
            );
            result = result.and(moved);
            if is_final {
                break;
            }
            at = end;
        }
        result
    }

    /// Moves the range of `at`. Says where it ends.
    fn migrate_range(
        &self,
        at: VirtAddr,
        populate: impl Fn(Span) -> Result<(), MigrateError>,
    ) -> Result<(VirtAddr, Result<(), MigrateError>), MigrateError> {
        let page = Span::page_of(at);
        let _no_fork = self.svm().mm().no_fork().ok_or(MmError::Gone)?;
        let _working = self.enter().ok_or(MmError::Gone)?;
        let within = match self.vmas.find(at) {
            Some((within, Vma::Mirror)) => within,
            // Memory of the device is there already.
            Some((object, Vma::Object(_))) => return Ok((object.end(), Ok(()))),
            None => return Err(MigrateError::NoMapping { span: page }),
        };
        let (advice, around) = self.advised_around(at);
        let ctx = FaultCtx {
            owner: Some(self.region.pagemap().owner()),
            read_only: true,
            within: Some(around),
            largest_chunk: advice.granularity,
            ..FaultCtx::default()
        };
        self.svm().collect_garbage();
        let found = self.svm().range_find_or_insert(at, within, &ctx);
        let range = found.map_err(|error| not_found(page, error))?;
        let end = range.span().end();
        let serving = range.serve();
        if !range.can_migrate() {
            let span = range.span();
            return Ok((end, Err(MigrateError::NotAnonymous { span })));
        }
        let armed = current::range_arm(self, &range, &serving);
        if !armed.map_err(|error| not_found(page, error))? {
            let span = range.span();
            return Ok((end, Err(MigrateError::NoMapping { span })));
        }
        Ok((end, populate(range.span())))
    }
}

const fn not_found(span: Span, error: FindError) -> MigrateError {
    match error {
        FindError::Closed => MigrateError::Mm(MmError::Gone),
        FindError::Mm(error) => MigrateError::Mm(error),
        _ => MigrateError::NoMapping { span },
    }
}
