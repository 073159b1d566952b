//! Where the pages of a range go before they are mapped: as the policy says, as far as they can.
//!
//! ```text
//!   policy ---> copies for reading                      pages stay in RAM
//!          |--> here, to a peer, home                   pages move
//!          `--> nothing, or too many passes for that    pages stay where they are
//! ```
//!
//! That pages cannot move is no failure, where the device reaches them all the same: whoever maps them
//! looks where they are.

use crate::driver::advice::Attributes;
use crate::driver::duplicate;
use crate::driver::fault::{MAX_PASSES, ONLY, Request};
use crate::driver::policy::{Destination, FaultInfo};
use crate::driver::report::Served;
use crate::driver::revisit::BUSY_AGAIN;
use crate::driver::stages::Stage;
use crate::driver::vm::Vm;
use core::time::Duration;
use gpusvm_device::FaultError;
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_pagemap::MigrateError;
use gpusvm_svm::{Copies, FaultCtx, Range};

/// What was done about where the pages of a range are.
#[derive(Debug)]
pub(crate) struct Placed {
    /// When to look again if pages of it are not where they are wanted.
    pub(crate) again: Option<Duration>,
    /// Where they are wanted.
    pub(crate) wanted: Served,
    /// For the device to read.
    pub(crate) copies: Option<Copies>,
}

impl Placed {
    /// They stay where they are.
    pub(crate) const NOWHERE: Self = Self {
        again: None,
        wanted: Served::InDeviceMemory,
        copies: None,
    };
}

/// Asks the policy whether the range moves, and for how long, and moves it, or copies it. Where only
/// device memory will do, it moves in any case; after too many passes for nothing, it stays where it is.
pub(crate) fn place<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Range<M>,
    (attempt, advice): (u32, Attributes),
    ctx: &mut FaultCtx,
) -> Result<Placed, FaultError> {
    gpusvm_sync::walk!("place");
    let now = vm.now();
    let Request { at, access, .. } = *request;
    let plan = vm.policy.on_device_fault(&FaultInfo {
        at,
        access,
        attempt,
        bounces: range.pages(ONLY).history().count_bounces(now),
        evictions: range.pages(ONLY).history().evictions(now),
        reaches_ram: vm.caps().coherent,
        atomics_on_ram: vm.caps().atomics_on_ram,
        device: vm.device_number(),
        reaches: vm.reaches(),
        advice,
    });
    ctx.timeslice = plan.timeslice;
    if plan.duplicate && !access.is_write() && attempt < MAX_PASSES {
        let copies = duplicate::duplicate(vm, range);
        if copies.is_some() {
            return Ok(Placed {
                copies,
                ..Placed::NOWHERE
            });
        }
    }
    let stays = |again| Placed {
        again,
        ..Placed::NOWHERE
    };
    if !plan.migrate && !ctx.devmem_only {
        return Ok(stays(plan.ask_again));
    }
    if !ctx.devmem_only && attempt >= MAX_PASSES {
        return Ok(stays(Some(BUSY_AGAIN)));
    }
    let again = match plan.to {
        Destination::Ram if !ctx.devmem_only => {
            let again = take_home(vm, request, range)?;
            let wanted = Served::InPlace;
            return Ok(Placed {
                wanted,
                ..stays(again)
            });
        }
        Destination::Device(device) if attempt < MAX_PASSES => {
            migrate_to_peer(vm, request, range, (device, ctx))
        }
        _ => migrate(vm, request, range, ctx).map(|()| Some(BUSY_AGAIN)),
    };
    again.map(stays)
}

/// Brings the range home. That it cannot come now is no failure: it is mapped where it is.
fn take_home<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Range<M>,
) -> Result<Option<Duration>, FaultError> {
    match vm.take_home(range) {
        Ok(true) => Ok(None),
        Err(MmError::Gone) => Err(FaultError::Closed { at: request.at }),
        Ok(false) | Err(_) => Ok(Some(BUSY_AGAIN)),
    }
}

/// Moves the range to another device; if that cannot be, to this one.
fn migrate_to_peer<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Range<M>,
    (device, ctx): (usize, &FaultCtx),
) -> Result<Option<Duration>, FaultError> {
    let moved = vm.memory_of(device).map(|pagemap| {
        let (span, cause) = (range.span(), request.cause);
        pagemap.populate(span, ctx.timeslice, cause)
    });
    match moved {
        Some(Ok(())) => Ok(None),
        Some(Err(MigrateError::Mm(MmError::Gone))) => Err(FaultError::Closed { at: request.at }),
        // It has to stay where it is for now.
        Some(Err(MigrateError::NothingCollected { .. })) => Ok(Some(BUSY_AGAIN)),
        _ => migrate(vm, request, range, ctx).map(|()| Some(BUSY_AGAIN)),
    }
}

/// Moves the range to the device. That it cannot is no failure where the device reaches RAM.
fn migrate<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Range<M>,
    ctx: &FaultCtx,
) -> Result<(), FaultError> {
    gpusvm_sync::walk!("migrate");
    let _time = vm.time(range, Stage::Migrate);
    let pagemap = vm.region.pagemap();
    let (span, cause) = (range.span(), request.cause);
    let populated = match ctx.devmem_only {
        true => pagemap.populate_exclusive(span, ctx.timeslice, cause),
        false => pagemap.populate(span, ctx.timeslice, cause),
    };
    match populated {
        Ok(()) => Ok(()),
        Err(MigrateError::Mm(MmError::Gone)) => Err(FaultError::Closed { at: request.at }),
        Err(MigrateError::NoSpace { .. }) if ctx.devmem_only => Err(FaultError::Gave {
            at: request.at,
            reason: "device memory is full",
        }),
        Err(MigrateError::Pinned { .. }) if ctx.devmem_only => Err(FaultError::Gave {
            at: request.at,
            reason: "device memory is full of what is pinned",
        }),
        // Whatever it was, get_pages sees where the pages are.
        Err(_) => Ok(()),
    }
}
