//! The CPU touched a device page: `drm_pagemap_migrate_to_ram`.
//!
//! ```text
//!   fault -> whose allocation? -> may it leave yet? -> window: allocation, aligned, clipped
//!         -> collect_device: pages of the same allocation only -> copy -> commit
//! ```

use crate::pieces::{self, Cause};
use crate::{Holds, Pagemap};
use gpusvm_mm::{AddressSpace, Block, CpuFault, FaultOutcome, Inbound, Wanted};
use gpusvm_types::Span;

pub(crate) fn migrate_to_ram<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    mm: &M,
    block: &mut M::Block<'_>,
    fault: &CpuFault,
) -> FaultOutcome {
    gpusvm_sync::walk!("migrate_to_ram");
    // The page can have gone home, or to a new allocation, before the block was locked.
    let Some(zdd) = pagemap.zdds.of(fault.page.pfn) else {
        return FaultOutcome::Served;
    };
    let Some(devmem) = pagemap.zdds.devmem(zdd) else {
        return FaultOutcome::Served;
    };
    let holds = match fault.wanted {
        Wanted::Touched | Wanted::Device => Holds::All,
        Wanted::Fork => Holds::FirmLeases,
        Wanted::Asked | Wanted::Unmap => Holds::Leases,
    };
    if let Some(until) = devmem.stays_until(mm.now(), holds) {
        return FaultOutcome::NotBefore(until);
    }

    let window = Span::chunk_of(fault.at, pagemap.window_for(&devmem));
    let Some(window) = window.intersection(block.span()) else {
        return FaultOutcome::Failed;
    };
    let collected = block.collect_device(window, &mut |_, page| pagemap.is_same(page, zdd));
    let Ok(collected) = collected else {
        return FaultOutcome::Failed;
    };
    let mut pieces = pieces::to_ram(collected.leaving());
    let copied = devmem
        .ops()
        .copy_to_ram(&mut pieces, None, cause(fault.wanted));
    drop(pieces);
    if copied.is_err() {
        return FaultOutcome::Failed;
    }
    let in_place = collected.in_place();
    match collected.commit() {
        Ok(()) => {
            devmem.came_home_in_place(in_place, cause(fault.wanted));
            FaultOutcome::Served
        }
        Err(_) => FaultOutcome::Failed,
    }
}

const fn cause(wanted: Wanted) -> Cause {
    match wanted {
        Wanted::Touched => Cause::CpuFault,
        Wanted::Device => Cause::DeviceFault,
        Wanted::Asked => Cause::Asked,
        Wanted::Fork => Cause::Fork,
        Wanted::Unmap => Cause::Unmap,
    }
}
