//! An allocation goes home, without an address: `drm_pagemap_evict_to_ram`.
//!
//! The way goes from the device's pages to the blocks they stand in for. Whether it worked is
//! judged by the allocation: when its last page is gone, whoever took it, it is detached.

use crate::pieces::{self, Cause};
use crate::zdd::Zdd;
use crate::{Devmem, EvictError, Pagemap};
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Block, Inbound, MmError};
use gpusvm_types::{DevicePfn, PAGES_PER_BLOCK, PageCount};

/// How often eviction walks an allocation before it gives up: the kernel's two retries.
pub const EVICT_TRIES: u32 = 3;
/// How often it waits for pages that stand in for none any more, or not yet: for a second or a little more.
const EVICT_WAITS: u32 = 10_000;
/// For how long.
const EVICT_WAIT: Duration = Duration::from_micros(100);

/// What came of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Walked {
    /// Pages went home, or may not.
    Tried,
    /// No page stands in for any: somebody is about to give them back, or to put them to use. There is no block
    /// to wait for.
    Between,
}

/// Brings every page of `devmem` home. Timeslices do not hold; a launch that needs it does. What others are
/// bringing home is waited for, unless it is for room: others may have some.
///
/// # Errors
///
/// `Gone` when the address space is (`EFAULT`), `Busy` when pages were left after [`EVICT_TRIES`]
/// (`EBUSY`), or the last error of the device or the address space.
pub fn evict_to_ram<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    devmem: &Devmem,
    cause: Cause,
) -> Result<(), EvictError> {
    gpusvm_sync::walk!("evict_to_ram");
    let mut last = None;
    let (mut tries, mut waits) = (0, 0);
    while tries < EVICT_TRIES && waits < EVICT_WAITS {
        if devmem.is_detached() {
            return Ok(());
        }
        let mm = pagemap.mm.upgrade().ok_or(EvictError::Gone)?;
        match walk(pagemap, &*mm, devmem, cause) {
            // Who needs room has others to take it from.
            Ok(Walked::Between) if cause != Cause::Eviction => {
                waits += 1;
                gpusvm_sync::sleep(EVICT_WAIT);
            }
            walked => {
                tries += 1;
                last = walked.err();
            }
        }
    }
    if devmem.is_detached() {
        return Ok(());
    }
    let busy = || EvictError::Busy {
        left: left(pagemap, devmem),
        tries: EVICT_TRIES,
    };
    Err(last.unwrap_or_else(busy))
}

fn walk<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    mm: &M,
    devmem: &Devmem,
    cause: Cause,
) -> Result<Walked, EvictError> {
    gpusvm_sync::walk!("walk");
    let mut pfns = [DevicePfn::new(0); PAGES_PER_BLOCK];
    let pfns = &mut pfns[..devmem.size().as_usize().min(PAGES_PER_BLOCK)];
    devmem.ops().populate_pfn(pfns)?;
    let zdd = pfns
        .first()
        .and_then(|head| first_in_use(pagemap, devmem, *head, pfns));
    let Some(zdd) = zdd else {
        return Ok(Walked::Between);
    };
    let mut walked = Walked::Between;
    for pfn in pfns.iter() {
        if pagemap.zdds.of(*pfn) != Some(zdd) {
            continue;
        }
        let Some((mut block, _)) = mm.lock_device_page(pagemap.page(*pfn)) else {
            continue;
        };
        walked = Walked::Tried;
        // It may have gone home meanwhile, and a new allocation may have begun at the same page. Leases
        // are taken with the block locked, so none begins from here on.
        let current = pagemap.zdds.devmem(zdd);
        let is_it = current.is_some_and(|current| core::ptr::eq(&raw const *current, devmem));
        if !is_it || devmem.is_leased() {
            return Ok(walked);
        }
        let span = block.span();
        let collected = block
            .collect_device(span, &mut |_, page| pagemap.is_same(page, zdd))
            .map_err(gone_or)?;
        devmem
            .ops()
            .copy_to_ram(&mut pieces::to_ram(collected.leaving()), None, cause)?;
        let in_place = collected.in_place();
        collected.commit().map_err(gone_or)?;
        devmem.came_home_in_place(in_place, cause);
    }
    Ok(walked)
}

/// The zdd of the allocation, if a page of it is in use and is still this allocation's.
fn first_in_use<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    devmem: &Devmem,
    head: DevicePfn,
    pfns: &[DevicePfn],
) -> Option<Zdd> {
    let zdd = pfns.iter().find_map(|pfn| pagemap.zdds.of(*pfn))?;
    let current = pagemap.zdds.devmem(zdd)?;
    let same = core::ptr::eq(&raw const *current, devmem);
    debug_assert!(!same || pagemap.zdds.of(head).is_none_or(|of| of == zdd));
    same.then_some(zdd)
}

fn left<M: AddressSpace>(pagemap: &Pagemap<M>, devmem: &Devmem) -> PageCount {
    let mut pfns = [DevicePfn::new(0); PAGES_PER_BLOCK];
    let pfns = &mut pfns[..devmem.size().as_usize().min(PAGES_PER_BLOCK)];
    if devmem.ops().populate_pfn(pfns).is_err() {
        return PageCount::ZERO;
    }
    let zdd = pfns.iter().find_map(|pfn| pagemap.zdds.of(*pfn));
    zdd.map_or(PageCount::ZERO, |zdd| pagemap.zdds.in_use(zdd))
}

fn gone_or(error: MmError) -> EvictError {
    match error {
        MmError::Gone => EvictError::Gone,
        other => EvictError::Mm(other),
    }
}
