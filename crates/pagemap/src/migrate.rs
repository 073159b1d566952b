//! RAM, or another device, to device memory: `drm_pagemap_migrate_to_devmem`.
//!
//! ```text
//!   bound? -> check the mapping -> which device pages? -> lock the block -> collect
//!                                                                             |
//!       commit <- copy, source by source: RAM (and holes), then each peer's allocation
//!                   |                                                         |
//!                   `----- any failure: drop, in the reverse order -----------'---> put back
//! ```
//!
//! To memory that the CPU uses in place, nothing is copied: what is in RAM becomes coherent where it is, and
//! what is on devices stays there. Whoever wants that too brings it home first.

use crate::peer_copy::PeerCopies;
use crate::pieces::{self, Cause};
use crate::{Devmem, DevmemError, MigrateError, Pagemap, Way};
use alloc::sync::Arc;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Block, KeptReason, MmError, Outbound, Source};
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
    /// Whether they leave the reach of the CPU also if the memory is coherent.
    pub exclusive: bool,
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

/// Moves the pages of a span into `devmem`, whose memory the pages then keep alive. Pages of peers,
/// devices with the same owner, come directly, unless their timeslice or a launch keeps them there.
/// On an error, or when nothing moved, the allocation is given back and every page is where it was.
///
/// That nothing moved is no error if that is because every page is in this memory already, unless all
/// or nothing was asked for.
///
/// # Errors
///
/// In the order of the checks: `Gone` (`EFAULT`), `Unbound` (`ENODEV`), `TooSmall` (`EINVAL`), `NoMapping`
/// (`ENOENT`), `CrossesMapping` (`EINVAL`), `NotAnonymous` (`EBUSY`), what `populate_pfn` failed at, what
/// the address space refused, `NothingCollected` (`EFAULT`), `NotAllCollected` (`EBUSY`), and what a copy
/// failed at.
pub fn migrate_to_devmem<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    devmem: &Arc<Devmem>,
    request: &MigrateRequest,
) -> Result<Migrated, MigrateError> {
    gpusvm_sync::walk!("migrate_to_devmem");
    let result = try_migrate(pagemap, devmem, request);
    if !matches!(result, Ok(Migrated { moved, .. }) if moved > PageCount::ZERO) {
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
    // First: unbinding waits for who is bound, and must not wait for a fork with it.
    let _no_fork = mm.no_fork().ok_or(MmError::Gone)?;
    let bound = pagemap.enter().ok_or(MigrateError::Unbound { span })?;
    check(&*mm, devmem, span)?;
    let failed = |error| MigrateError::Devmem { span, error };
    let mut pfns = [DevicePfn::new(0); PAGES_PER_BLOCK];
    let pfns = &mut pfns[..span.page_count().as_usize()];
    devmem.ops().populate_pfn(pfns).map_err(failed)?;

    let mut peers = PeerCopies::new(pagemap, &bound);
    let mut block = mm.lock_block(span)?;
    let now = mm.now();
    let in_place = pagemap.is_coherent() && !request.exclusive;
    let collected = match in_place {
        true => block.collect_coherent(span, pagemap.owner())?,
        false => block.collect(span, pagemap.owner(), &mut |_, page| {
            peers.may_take(page, now)
        })?,
    };
    let moved = count(collected.sources());
    match moved {
        PageCount::ZERO if request.mode == Mode::Partial && is_here(pagemap, &collected) => {
            let kept = span.page_count();
            return Ok(Migrated { moved, kept });
        }
        PageCount::ZERO => return Err(MigrateError::NothingCollected { span }),
        collected if request.mode == Mode::AllOrNothing && collected != span.page_count() => {
            return Err(MigrateError::NotAllCollected { span, collected });
        }
        _ => {}
    }
    if in_place {
        let way = Way::ToDevice;
        devmem.ops().moved_in_place(way, moved, request.cause);
    } else {
        copy(devmem, collected.sources(), pfns, &peers, request.cause).map_err(failed)?;
    }

    devmem.start_timeslice(mm.now(), request.timeslice);
    let zdd = pagemap.zdds.begin(devmem, pfns);
    collected.commit(&mut |i| {
        pagemap.zdds.get(zdd, pfns[i]);
        pagemap.page(pfns[i])
    });
    pagemap.zdds.put(zdd, 1);
    let kept = span.page_count() - moved;
    Ok(Migrated { moved, kept })
}

/// Copies each page from where it is: by this device from RAM, by its own device from a peer.
fn copy<M: AddressSpace>(
    devmem: &Devmem,
    sources: &[Source],
    pfns: &[DevicePfn],
    peers: &PeerCopies<'_, M>,
    cause: Cause,
) -> Result<(), DevmemError> {
    let fence = devmem.pre_migrate_fence();
    let is_system = |source: &Source| matches!(source, Source::Page(_) | Source::Hole);
    if sources.iter().any(is_system) {
        let mut pieces = pieces::to_devmem(sources, pfns);
        devmem
            .ops()
            .copy_to_devmem(&mut pieces, fence.as_deref(), cause)?;
    }
    peers.copy(sources, pfns, fence.as_deref(), cause)?;
    devmem.fence_passed();
    Ok(())
}

/// Whether every page is in this memory already.
fn is_here<M: AddressSpace>(pagemap: &Pagemap<M>, collected: &impl Outbound) -> bool {
    let is_ours = |source: &Source| match source {
        Source::Kept(KeptReason::OnDevice(page)) => pagemap.contains(*page),
        _ => false,
    };
    collected.sources().iter().all(is_ours)
}

pub(crate) fn check<M: AddressSpace>(
    mm: &M,
    devmem: &Devmem,
    span: Span,
) -> Result<(), MigrateError> {
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
    if !vma.kind.can_migrate() {
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
