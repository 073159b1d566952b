//! RAM to device memory: `drm_pagemap_migrate_to_devmem`.
//!
//! ```text
//!   check the mapping -> lock the block -> collect -> which device pages? -> copy -> commit
//!                                            |                                |
//!                                            `----- any failure: drop --------'---> put back
//! ```

use crate::pieces::{self, Cause};
use crate::{Devmem, MigrateError, Pagemap};
use alloc::sync::Arc;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Block, MmError, Outbound, Source, VmaKind};
use gpusvm_types::{DevicePfn, PAGES_PER_BLOCK, PageCount, Span};

/// What is to move, and how.
#[derive(Clone, Copy, Debug)]
pub struct MigrateRequest {
    /// Which pages: in one block, in one mapping.
    pub span: Span,
    /// How long they stay, whatever the CPU does.
    pub timeslice: Duration,
    /// What to do about pages that cannot move.
    pub mode: Mode,
    /// Why they move.
    pub cause: Cause,
}

/// What to do about pages that cannot move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// They stay where they are.
    #[default]
    Partial,
    /// Nothing moves: the kernel's rule.
    AllOrNothing,
}

/// What moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Migrated {
    /// How many pages live in the allocation now.
    pub moved: PageCount,
    /// How many stayed where they were.
    pub kept: PageCount,
}

/// Moves the pages of a span into `devmem`, whose memory the pages then keep alive. On an error the
/// allocation is given back and every page is where it was.
///
/// # Errors
///
/// In the order of the checks: `NoMapping` (`ENOENT`), `CrossesMapping` (`EINVAL`), `NotAnonymous`
/// (`EBUSY`), `NothingCollected` (`EFAULT`), `NotAllCollected` (`EBUSY`); `Unbound`, `TooSmall`, and
/// what the address space or the device refused.
pub fn migrate_to_devmem<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    devmem: &Arc<Devmem>,
    request: &MigrateRequest,
) -> Result<Migrated, MigrateError> {
    let result = try_migrate(pagemap, devmem, request);
    if result.is_err() {
        devmem.release();
    }
    result
}

fn try_migrate<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    devmem: &Arc<Devmem>,
    request: &MigrateRequest,
) -> Result<Migrated, MigrateError> {
    let span = request.span;
    let mm = pagemap.mm.upgrade().ok_or(MmError::Gone)?;
    check(pagemap, &*mm, devmem, span)?;

    let mut block = mm.lock_block(span)?;
    let collected = block.collect(span, pagemap.owner())?;
    let moved = count(collected.sources());
    if moved == PageCount::ZERO {
        return Err(MigrateError::NothingCollected { span });
    }
    if request.mode == Mode::AllOrNothing && moved != span.page_count() {
        return Err(MigrateError::NotAllCollected {
            span,
            collected: moved,
        });
    }

    let mut pfns = [DevicePfn::new(0); PAGES_PER_BLOCK];
    let pfns = &mut pfns[..span.page_count().as_usize()];
    let failed = |error| MigrateError::Devmem { span, error };
    devmem.ops().populate_pfn(pfns).map_err(failed)?;
    let mut pieces = pieces::to_devmem(collected.sources(), pfns);
    devmem
        .ops()
        .copy_to_devmem(&mut pieces, request.cause)
        .map_err(failed)?;
    drop(pieces);

    devmem.start_timeslice(mm.now(), request.timeslice);
    let zdd = pagemap.zdds.begin(devmem, pfns);
    collected.commit(&mut |i| {
        pagemap.zdds.get(zdd, pfns[i]);
        pagemap.page(pfns[i])
    });
    pagemap.zdds.put(zdd, 1);
    Ok(Migrated {
        moved,
        kept: span.page_count() - moved,
    })
}

fn check<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    mm: &M,
    devmem: &Devmem,
    span: Span,
) -> Result<(), MigrateError> {
    if !pagemap.is_bound() {
        return Err(MigrateError::Unbound { span });
    }
    if devmem.size() < span.page_count() {
        return Err(MigrateError::TooSmall {
            span,
            size: devmem.size().bytes(),
        });
    }
    let vma = mm
        .find_vma(span.start())?
        .filter(|vma| vma.span.contains(span.start()));
    let vma = vma.ok_or(MigrateError::NoMapping { span })?;
    if !vma.span.covers(span) {
        return Err(MigrateError::CrossesMapping {
            span,
            mapping: vma.span,
        });
    }
    if vma.kind != VmaKind::PrivateAnonymous {
        return Err(MigrateError::NotAnonymous { span });
    }
    Ok(())
}

fn count(sources: &[Source]) -> PageCount {
    PageCount::from_usize(
        sources
            .iter()
            .filter(|source| source.is_collected())
            .count(),
    )
}
