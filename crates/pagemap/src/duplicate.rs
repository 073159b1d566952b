//! Copies of pages of RAM for a device to read: the pages stay where they are.
//!
//! ```text
//!   bound? -> check the mapping -> which device pages? -> lock the block -> write-protect
//!                                                                              |
//!        Duplicate <- copy, with the block locked <- read the sequence <-------'
//!            |
//!            `--- dropped: the memory is given back, once
//! ```
//!
//! A duplicate is as good as the sequence that was read before it was copied: whoever writes a page, or
//! takes it away, invalidates first. It is nobody's home: no word and no zdd names its pages, so nothing
//! is copied back when it goes.
//!
//! # Differences from the kernel
//!
//! `drm_pagemap` has no such thing; the nearest is read duplication in NVIDIA's UVM driver.

use crate::migrate::check;
use crate::pieces::{self, Cause};
use crate::{Devmem, MigrateError, Pagemap};
use alloc::{boxed::Box, vec};
use gpusvm_mm::{AddressSpace, Block, DevicePage, KeptReason, MmError, Source};
use gpusvm_types::{DevicePfn, PAGES_PER_BLOCK, PageCount, PageIndex, Span};

/// Copies of pages in device memory. Dropping it gives the memory back: not in a fault handler, and not
/// before no device maps them.
#[derive(Debug)]
pub struct Duplicate {
    span: Span,
    devmem: Devmem,
    copies: Box<[Option<DevicePage>]>,
}

impl Duplicate {
    /// What was to be copied.
    pub fn span(&self) -> Span {
        self.span
    }

    /// How much device memory it takes.
    pub fn size(&self) -> PageCount {
        self.devmem.size()
    }

    /// The copy of a page, if there is one.
    pub fn copy_of(&self, page: PageIndex) -> Option<DevicePage> {
        let inside = self.span.contains(page.start());
        inside.then(|| self.copies[self.span.index_of(page)])?
    }

    /// How many pages have one.
    pub fn count(&self) -> PageCount {
        PageCount::from_usize(self.copies.iter().flatten().count())
    }
}

/// Copies the pages of `span` that are in RAM to `devmem`, and keeps everybody from writing them.
/// `read_begin` is called when nobody can write them any more, and before they are copied: what it
/// reads must be current when the copies are mapped. Pages that are elsewhere have no copy.
///
/// On an error the memory is given back. Pages may stay protected then, which costs whoever writes them
/// a fault.
///
/// # Errors
///
/// As [`migrate_to_devmem`](crate::migrate::migrate_to_devmem), with `NothingCollected` when no page is
/// in RAM, and `Mm(UnwatchedWrites)` where writes are not seen.
pub fn duplicate<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    devmem: Devmem,
    span: Span,
    cause: Cause,
    read_begin: impl FnOnce(),
) -> Result<Duplicate, MigrateError> {
    let mm = pagemap.mm.upgrade().ok_or(MmError::Gone)?;
    // As for a migration: unbinding waits for who is bound, and must not wait for a fork with it.
    let _no_fork = mm.no_fork().ok_or(MmError::Gone)?;
    let _bound = pagemap.enter().ok_or(MigrateError::Unbound { span })?;
    check(&*mm, &devmem, span)?;
    if !mm.can_watch_writes() {
        return Err(MmError::UnwatchedWrites { span }.into());
    }
    let failed = |error| MigrateError::Devmem { span, error };
    let mut pfns = [DevicePfn::new(0); PAGES_PER_BLOCK];
    let pfns = &mut pfns[..span.page_count().as_usize()];
    devmem.ops().populate_pfn(pfns).map_err(failed)?;

    let mut sources = vec![Source::Kept(KeptReason::Busy); pfns.len()];
    let mut block = mm.lock_block(span)?;
    block.write_protect(span, &mut sources)?;
    read_begin();
    if !sources.iter().any(|source| source.is_collected()) {
        return Err(MigrateError::NothingCollected { span });
    }
    let fence = devmem.pre_migrate_fence();
    let mut pieces = pieces::to_devmem(&sources, pfns);
    let copied = devmem
        .ops()
        .copy_to_devmem(&mut pieces, fence.as_deref(), cause);
    copied.map_err(failed)?;
    drop(block);
    devmem.fence_passed();
    let copy = |(source, pfn): (&Source, &DevicePfn)| {
        let is_copied = source.is_collected();
        is_copied.then(|| pagemap.page(*pfn))
    };
    let copies = sources.iter().zip(&*pfns).map(copy).collect();
    Ok(Duplicate {
        span,
        devmem,
        copies,
    })
}
