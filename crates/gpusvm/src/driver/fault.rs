//! The story of one device fault.
//!
//! ```text
//!   collect garbage -> find or insert the range -> bound meanwhile? done
//!      -> policy: migrate? -> populate -> get pages -> commit, if still current
//!                                             |            |
//!                          pages on two devices: home      |
//!                                             |            |
//!                                             `-- stale ---'--> start again, a bounded number of times,
//!                                                               with longer timeslices; then in place
//! ```

use crate::driver::advice::{Atomics, Attributes};
use crate::driver::counters;
use crate::driver::policy::{Destination, FaultInfo};
use crate::driver::revisit::BUSY_AGAIN;
use crate::driver::vm::Vm;
use core::time::Duration;
use gpusvm_device::{Access, Caps, DeviceFault, FaultError, Verdict};
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_pagemap::{Cause, MigrateError};
use gpusvm_svm::{DeviceIndex, FaultCtx, FindError, GetPagesError, Permission, Range, Reach};
use gpusvm_sync::Arc;
use gpusvm_types::{Span, VirtAddr};

/// How many passes a fault gets with pages in device memory.
pub const MAX_PASSES: u32 = 8;
/// How many more it gets with pages where they are.
pub const MAX_PASSES_IN_PLACE: u32 = 64;

/// Each device address space has a mirror of its own.
pub(crate) const ONLY: DeviceIndex = DeviceIndex(0);

/// How a pass over a fault ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// The device can try again.
    Bound,
    /// What was found out was not true any more: start again.
    Stale,
}

/// What is to be made accessible.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) at: VirtAddr,
    pub(crate) access: Access,
    /// The device's translation led to RAM that refused.
    pub(crate) stale: bool,
    pub(crate) cause: Cause,
}

/// Serves a fault of the device.
pub(crate) fn serve<M: AddressSpace>(vm: &Vm<M>, fault: &DeviceFault) -> Verdict {
    let began = vm.now();
    counters::count(&vm.counters.faults);
    let DeviceFault {
        at, access, stale, ..
    } = *fault;
    let request = Request {
        at,
        access,
        stale,
        cause: Cause::DeviceFault,
    };
    let verdict = match make_accessible(vm, &request) {
        Ok(()) => Verdict::Replay,
        Err(error) => {
            counters::count(&vm.counters.failed);
            Verdict::Fail(error)
        }
    };
    vm.counters.record_fault(vm.now().since(began));
    verdict
}

/// Makes a page accessible to the device, with as much around it as one range holds.
pub(crate) fn make_accessible<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
) -> Result<(), FaultError> {
    if request.stale {
        forget_stale(vm, request.at)?;
    }
    for attempt in 0..MAX_PASSES + MAX_PASSES_IN_PLACE {
        if attempt == MAX_PASSES {
            counters::count(&vm.counters.last_resorts);
        }
        match pass(vm, request, attempt)? {
            Pass::Bound => return Ok(()),
            Pass::Stale => {
                counters::count(&vm.counters.stale_passes);
                back_off(attempt);
            }
        }
    }
    Err(FaultError::Gave {
        at: request.at,
        reason: "it was not stable for long enough",
    })
}

/// One pass over a fault, from nothing to a mapping.
fn pass<M: AddressSpace>(vm: &Vm<M>, request: &Request, attempt: u32) -> Result<Pass, FaultError> {
    let closed = FaultError::Closed { at: request.at };
    // Before everything that others wait for: nobody is to wait for who waits for a fork.
    let _no_fork = vm.svm().mm().no_fork().ok_or(closed)?;
    let _working = vm.enter().ok_or(closed)?;
    vm.svm().collect_garbage();
    let (advice, around) = vm.advised_around(request.at);
    let ctx = context(vm, request, (advice, around));
    let range = match vm.svm().range_find_or_insert(request.at, &ctx) {
        Ok(range) => range,
        Err(error) => return refused(request, error),
    };
    let serving = range.serve();
    if range.is_gone() {
        return Ok(Pass::Stale);
    }
    // What counts is what is advised from here on: who advises otherwise waits for the range.
    let (advice, around) = vm.advised_around(request.at);
    let mut ctx = context(vm, request, (advice, around));
    let is_as_advised = around.covers(range.span()) && advice.allows(range.span());
    if !is_as_advised && vm.may_change(&range) {
        vm.svm().range_remove(&range);
        return Ok(Pass::Stale);
    }
    if request.access == Access::Atomic && advice.atomics == Atomics::Cpu {
        let Request { at, access, .. } = *request;
        return Err(FaultError::NotPermitted { at, access });
    }
    if is_served(&range, request.access, ctx.devmem_only) {
        counters::count(&vm.counters.coalesced);
        return Ok(Pass::Bound);
    }
    match vm.svm().range_arm(&range, &serving) {
        Ok(true) => {}
        Ok(false) => return Ok(Pass::Stale),
        Err(FindError::Mm(MmError::Gone)) => return Err(FaultError::Closed { at: request.at }),
        // Unmapped, or not mirrored any more, since the range was found.
        Err(_) => return Ok(Pass::Stale),
    }
    let again = if range.can_migrate() {
        place(vm, request, &range, (attempt, advice), &mut ctx)?
    } else {
        None
    };
    map(vm, request, &range, &ctx, again)
}

/// Maps the pages of the range where they are, if they can be mapped there.
fn map<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Arc<Range<M>>,
    ctx: &FaultCtx,
    again: Option<Duration>,
) -> Result<Pass, FaultError> {
    let reach = Reach {
        device: ONLY,
        pagemaps: vm.region.devices().pagemaps(),
        peer: vm.region.peer(),
        ram: vm.caps().coherent,
    };
    let prepared = match vm.svm().get_pages(range, &reach, ctx) {
        Ok(prepared) => prepared,
        Err(error) => return not_mapped(vm, request, range, error),
    };
    let again = again.filter(|_| !prepared.is_in_vram());
    let bound = vm
        .svm()
        .commit(range, prepared, |proof, runs| vm.bind(proof, runs));
    match bound {
        Ok(true) => {
            if let Some(after) = again {
                vm.look_again(after, range);
            }
            Ok(Pass::Bound)
        }
        Ok(false) => Ok(Pass::Stale),
        Err(_) => Err(FaultError::Gave {
            at: request.at,
            reason: "its pages could not be bound",
        }),
    }
}

/// Whether only device memory will do: a device that cannot reach RAM has no other place, and nor have
/// its atomics, or those that are advised to work there only.
pub(crate) fn needs_devmem(access: Access, caps: &Caps, advice: &Attributes) -> bool {
    let atomics_on_ram = caps.atomics_on_ram && advice.atomics != Atomics::Device;
    !caps.coherent || (access == Access::Atomic && !atomics_on_ram)
}

/// Whether what is mapped allows the access, where it is.
pub(crate) fn is_served<M: AddressSpace>(
    range: &Range<M>,
    access: Access,
    needs_devmem: bool,
) -> bool {
    let wanted = if access.is_write() {
        Permission::Write
    } else {
        Permission::Read
    };
    match needs_devmem {
        true => range.pages(ONLY).allow_without_ram(wanted),
        false => range.pages(ONLY).allow(wanted),
    }
}

fn context<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    (advice, around): (Attributes, Span),
) -> FaultCtx {
    FaultCtx {
        owner: Some(vm.region.pagemap().owner()),
        read_only: !request.access.is_write(),
        devmem_possible: true,
        devmem_only: needs_devmem(request.access, vm.caps(), &advice),
        timeslice: Duration::ZERO,
        within: Some(around),
        largest_chunk: advice.granularity,
    }
}

/// Asks the policy whether the range moves, and for how long, and moves it. Where only device memory
/// will do, it moves in any case; after too many passes for nothing, it stays where it is. Says when
/// to look again if pages of it are in RAM all the same.
fn place<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Range<M>,
    (attempt, advice): (u32, Attributes),
    ctx: &mut FaultCtx,
) -> Result<Option<Duration>, FaultError> {
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
    if !plan.migrate && !ctx.devmem_only {
        return Ok(plan.ask_again);
    }
    if !ctx.devmem_only && attempt >= MAX_PASSES {
        return Ok(Some(BUSY_AGAIN));
    }
    match plan.to {
        Destination::Ram if !ctx.devmem_only => take_home(vm, request, range),
        Destination::Device(device) if attempt < MAX_PASSES => {
            migrate_to_peer(vm, request, range, (device, ctx))
        }
        _ => migrate(vm, request, range, ctx).map(|()| Some(BUSY_AGAIN)),
    }
}

/// Brings the range home. That it cannot come now is no failure: it is mapped where it is.
fn take_home<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Range<M>,
) -> Result<Option<Duration>, FaultError> {
    match vm.take_home(range) {
        Ok(()) => Ok(None),
        Err(MmError::Gone) => Err(FaultError::Closed { at: request.at }),
        Err(_) => Ok(Some(BUSY_AGAIN)),
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
    let pagemap = vm.region.pagemap();
    match pagemap.populate(range.span(), ctx.timeslice, request.cause) {
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

/// There is no range. Usually that is the program's doing.
fn refused(request: &Request, error: FindError) -> Result<Pass, FaultError> {
    let Request { at, access, .. } = *request;
    match error {
        FindError::NoMapping { .. } => Err(FaultError::Unmapped { at }),
        FindError::NotReadable { .. } | FindError::ReadOnly { .. } => {
            Err(FaultError::NotPermitted { at, access })
        }
        FindError::NoChunk { .. } => Ok(Pass::Stale),
        FindError::Closed | FindError::Mm(MmError::Gone) => Err(FaultError::Closed { at }),
        _ => Err(FaultError::Gave {
            at,
            reason: "there is no range for it",
        }),
    }
}

/// Nothing can be mapped: for good, or for now.
fn not_mapped<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Range<M>,
    error: GetPagesError,
) -> Result<Pass, FaultError> {
    let Request { at, access, .. } = *request;
    match error {
        GetPagesError::ReadOnly { .. } => Err(FaultError::NotPermitted { at, access }),
        GetPagesError::OutOfReach { at } | GetPagesError::NotOnDevice { at }
            if !range.can_migrate() =>
        {
            Err(FaultError::OutOfReach { at })
        }
        // On two devices, or on one that is being unbound, or does not answer: RAM is common ground.
        GetPagesError::MixedPagemaps { .. } | GetPagesError::OutOfReach { .. } => {
            counters::count(&vm.counters.gathered);
            match vm.svm().range_evict(range) {
                Err(MmError::Gone) => Err(FaultError::Closed { at }),
                _ => Ok(Pass::Stale),
            }
        }
        GetPagesError::Mm(MmError::Gone) => Err(FaultError::Closed { at }),
        _ => Ok(Pass::Stale),
    }
}

/// The device found a translation to RAM that is not there any more: memory that nobody mirrors was
/// unmapped behind its back.
fn forget_stale<M: AddressSpace>(vm: &Vm<M>, at: VirtAddr) -> Result<(), FaultError> {
    if let Some(range) = vm.svm().range_find(at) {
        vm.svm().range_remove(&range);
    }
    // A mapping that exists and refuses all the same would be tried for ever.
    if vm.svm().mm().is_readable(at) {
        Ok(())
    } else {
        Err(FaultError::Unmapped { at })
    }
}

/// Nothing at first: most passes are stale because somebody else was faster.
fn back_off(attempt: u32) {
    match attempt {
        0..4 => gpusvm_sync::yield_now(),
        _ => gpusvm_sync::sleep(Duration::from_micros(20 << attempt.min(10))),
    }
}
