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

use crate::driver::counters;
use crate::driver::duplicate;
use crate::driver::policy::FaultInfo;
use crate::driver::region::VramRegion;
use crate::driver::report::{FaultReport, Served};
use crate::driver::revisit::BUSY_AGAIN;
use crate::driver::stages::Stage;
use crate::driver::vm::Vm;
use core::time::Duration;
use gpusvm_device::{Access, Caps, DeviceFault, FaultError, FaultMode, Verdict};
use gpusvm_mm::{AddressSpace, MmError, Time};
use gpusvm_pagemap::{Cause, MigrateError};
use gpusvm_svm::{
    Copies, DeviceIndex, FaultCtx, FindError, GetPagesError, Permission, Range, Reach,
};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, Span, VirtAddr};

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
    Bound(Served),
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
    gpusvm_sync::walk!("serve");
    let began = vm.now();
    let DeviceFault {
        at, access, stale, ..
    } = *fault;
    let request = Request {
        at,
        access,
        stale,
        cause: Cause::DeviceFault,
    };
    let mut passes = 0;
    let outcome = make(vm, &request, &mut passes);
    done(vm, fault, (outcome, passes), began);
    outcome.map_or_else(Verdict::Fail, |_| Verdict::Replay)
}

/// The verdict on a fault that waited while another of its block was served, if that served it too.
pub(crate) fn replay<M: AddressSpace>(
    region: &VramRegion<M>,
    fault: &DeviceFault,
) -> Option<Verdict> {
    let vm = region.vm(fault.vm).filter(|_| !fault.stale)?;
    let range = vm.svm().range_find(fault.at)?;
    let served = !range.is_gone() && is_served(&range, fault.access, vm.caps());
    served.then(|| {
        counters::count(&vm.counters.coalesced);
        done(&vm, fault, (Ok(Served::Coalesced), 0), vm.now());
        Verdict::Replay
    })
}

/// Counts a fault, and keeps what is to be known of it.
fn done<M: AddressSpace>(
    vm: &Vm<M>,
    &DeviceFault { at, access, .. }: &DeviceFault,
    (outcome, passes): (Result<Served, FaultError>, u32),
    began: Time,
) {
    let when = vm.now();
    let took = when.since(began);
    counters::count(&vm.counters.faults);
    if outcome.is_err() {
        counters::count(&vm.counters.failed);
    }
    vm.counters.record_fault(took);
    vm.last_fault.set(FaultReport {
        at,
        access,
        outcome,
        passes,
        took,
        when,
    });
}

/// Makes a page accessible to the device, with as much around it as one range holds.
pub(crate) fn make_accessible<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
) -> Result<(), FaultError> {
    gpusvm_sync::walk!("make_accessible");
    make(vm, request, &mut 0).map(drop)
}

/// As `make_accessible`, and counts passes.
fn make<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    passes: &mut u32,
) -> Result<Served, FaultError> {
    gpusvm_sync::walk!("make");
    if request.stale {
        forget_stale(vm, request.at)?;
    }
    for attempt in 0..MAX_PASSES + MAX_PASSES_IN_PLACE {
        if attempt == MAX_PASSES {
            counters::count(&vm.counters.last_resorts);
        }
        *passes += 1;
        match pass(vm, request, attempt)? {
            Pass::Bound(served) => return Ok(served),
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
    gpusvm_sync::walk!("pass");
    let closed = FaultError::Closed { at: request.at };
    // Before everything that others wait for: nobody is to wait for who waits for a fork.
    let _no_fork = vm.svm().mm().no_fork().ok_or(closed)?;
    let working = vm.enter().ok_or(closed)?;
    // Memory of the device's own has no ranges, and goes nowhere.
    let Some(within) = vm.find_mirror(&working, (request.at, request.access))? else {
        return Ok(Pass::Bound(Served::InDeviceMemory));
    };
    vm.svm().collect_garbage();
    let mut ctx = context(vm, request);
    let found = vm.svm().range_find_or_insert(request.at, within, &ctx);
    let range = match found {
        Ok(range) => range,
        Err(FindError::Wider { range, .. }) => {
            forget(vm, range);
            return Ok(Pass::Stale);
        }
        Err(error) => return refused(request, error),
    };
    let _time = vm.time(&range, Stage::Pass);
    let serving = range.serve();
    if range.is_gone() {
        return Ok(Pass::Stale);
    }
    if is_served(&range, request.access, vm.caps()) {
        counters::count(&vm.counters.coalesced);
        vm.counters.stages.count_coalesced(range.span());
        return Ok(Pass::Bound(Served::Coalesced));
    }
    match vm.svm().range_arm(&range, &serving) {
        Ok(true) => {}
        Ok(false) => return Ok(Pass::Stale),
        Err(FindError::Mm(MmError::Gone)) => return Err(FaultError::Closed { at: request.at }),
        // Unmapped, or not mirrored any more, since the range was found. Nobody else tells a range that
        // was made at that very moment.
        Err(_) => {
            drop(serving);
            vm.svm().range_remove(&range);
            return Ok(Pass::Stale);
        }
    }
    let placed = if range.can_migrate() {
        place(vm, request, &range, attempt, &mut ctx)?
    } else {
        Placed::default()
    };
    map(vm, request, &range, &ctx, placed)
}

/// Maps the pages of the range where they are, if they can be mapped there.
pub(crate) fn map<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Arc<Range<M>>,
    ctx: &FaultCtx,
    placed: Placed,
) -> Result<Pass, FaultError> {
    gpusvm_sync::walk!("map");
    let Placed { again, copies } = placed;
    let has_copies = copies.is_some();
    let reach = Reach {
        device: ONLY,
        pagemaps: vm.region.devices().pagemaps(),
        peer: vm.region.peer(),
        ram: vm.caps().coherent,
        faults: vm.caps().faults == FaultMode::Replayable,
    };
    let timed = vm.time(range, Stage::GetPages);
    let prepared = vm.svm().get_pages(range, &reach, ctx, copies);
    drop(timed);
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return not_mapped(vm, request, range, error),
    };
    let served = match prepared.is_in_vram() {
        true => Served::InDeviceMemory,
        false => Served::InPlace,
    };
    let again = again.filter(|_| served == Served::InPlace);
    let bound = vm.svm().commit(range, prepared, |proof, runs| {
        let _time = vm.time(range, Stage::Bind);
        vm.bind(proof, runs)
    });
    match bound {
        Ok(true) => {
            if has_copies {
                vm.is_duplicated(range);
            }
            if let Some(after) = again {
                vm.look_again(after, range);
            }
            Ok(Pass::Bound(served))
        }
        Ok(false) => Ok(Pass::Stale),
        Err(_) => Err(FaultError::Gave {
            at: request.at,
            reason: "its pages could not be bound",
        }),
    }
}

/// Whether only device memory will do: a device that cannot reach RAM has no other place, and nor have
/// its atomics.
fn needs_devmem(access: Access, caps: &Caps) -> bool {
    !caps.coherent || (access == Access::Atomic && !caps.atomics_on_ram)
}

/// Whether what is mapped allows the access, where it is.
pub(crate) fn is_served<M: AddressSpace>(range: &Range<M>, access: Access, caps: &Caps) -> bool {
    let wanted = if access.is_write() {
        Permission::Write
    } else {
        Permission::Read
    };
    match needs_devmem(access, caps) {
        true => range.pages(ONLY).allow_without_ram(wanted),
        false => range.pages(ONLY).allow(wanted),
    }
}

pub(crate) fn context<M: AddressSpace>(vm: &Vm<M>, request: &Request) -> FaultCtx {
    FaultCtx {
        owner: Some(vm.region.pagemap().owner()),
        read_only: !request.access.is_write(),
        devmem_possible: true,
        devmem_only: needs_devmem(request.access, vm.caps()),
        allow_mixed: true,
        // A hole is cleared on the device, not faulted in: there is nothing to save.
        check_pages_threshold: ByteSize::ZERO,
        timeslice: Duration::ZERO,
    }
}

/// What was done about where the pages of a range are.
#[derive(Debug, Default)]
pub(crate) struct Placed {
    /// When to look again if pages of it are in RAM all the same.
    pub(crate) again: Option<Duration>,
    /// For the device to read.
    pub(crate) copies: Option<Copies>,
}

/// Asks the policy whether the range moves, and for how long, and moves it, or copies it. Where only
/// device memory will do, it moves in any case; after too many passes for nothing, it stays where it is.
pub(crate) fn place<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Range<M>,
    attempt: u32,
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
    });
    ctx.timeslice = plan.timeslice;
    if plan.duplicate && !access.is_write() && attempt < MAX_PASSES {
        let copies = duplicate::duplicate(vm, range);
        if copies.is_some() {
            let again = None;
            return Ok(Placed { again, copies });
        }
    }
    let stays = |again| Placed {
        again,
        copies: None,
    };
    if !plan.migrate && !ctx.devmem_only {
        return Ok(stays(plan.ask_again));
    }
    if ctx.devmem_only || attempt < MAX_PASSES {
        migrate(vm, request, range, ctx)?;
    }
    Ok(stays(Some(BUSY_AGAIN)))
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
    match pagemap.populate(range.span(), ctx.timeslice, request.cause) {
        Ok(()) => Ok(()),
        Err(MigrateError::Mm(MmError::Gone)) => Err(FaultError::Closed { at: request.at }),
        Err(MigrateError::NoSpace { .. }) if ctx.devmem_only => Err(FaultError::Gave {
            at: request.at,
            reason: "device memory is full",
        }),
        // Whatever it was, get_pages sees where the pages are.
        Err(_) => Ok(()),
    }
}

/// There is no range. Usually that is the program's doing.
pub(crate) fn refused(request: &Request, error: FindError) -> Result<Pass, FaultError> {
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
    range: &Arc<Range<M>>,
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
        GetPagesError::MixedPagemaps { .. }
        | GetPagesError::Mixed { .. }
        | GetPagesError::OutOfReach { .. } => {
            counters::count(&vm.counters.gathered);
            match vm.svm().range_evict(range) {
                Err(MmError::Gone) => Err(FaultError::Closed { at }),
                _ => Ok(Pass::Stale),
            }
        }
        GetPagesError::Mm(MmError::Gone) => Err(FaultError::Closed { at }),
        // Permissions of a part of it changed, and cut the mapping: ranges of the parts take its place.
        GetPagesError::Unmapped { .. } if is_cut(vm, range) => {
            vm.svm().range_remove(range);
            Ok(Pass::Stale)
        }
        _ => Ok(Pass::Stale),
    }
}

/// Whether no one mapping covers the range.
fn is_cut<M: AddressSpace>(vm: &Vm<M>, range: &Range<M>) -> bool {
    let vma = vm.svm().mm().find_vma(range.span().start());
    vma.is_ok_and(|vma| vma.is_none_or(|vma| !vma.span.covers(range.span())))
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

/// A range from when more was bound would be mapped where it must not be: another takes its place.
pub(crate) fn forget<M: AddressSpace>(vm: &Vm<M>, wider: Span) {
    let range = vm.svm().range_find(wider.start());
    if let Some(range) = range.filter(|range| range.span() == wider) {
        vm.svm().range_remove(&range);
    }
}

/// Nothing at first: most passes are stale because somebody else was faster.
pub(crate) fn back_off(attempt: u32) {
    match attempt {
        0..4 => gpusvm_sync::yield_now(),
        _ => gpusvm_sync::sleep(Duration::from_micros(20 << attempt.min(10))),
    }
}
