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
use crate::driver::current::{arm, current};
use crate::driver::place::{Placed, place};
use crate::driver::region::VramRegion;
use crate::driver::report::{FaultReport, Served};
use crate::driver::stages::Stage;
use crate::driver::stale::{self, StaleReason};
use crate::driver::vm::Vm;
use core::time::Duration;
use gpusvm_device::{Access, DeviceFault, FaultError, FaultMode, Verdict};
use gpusvm_mm::{AddressSpace, Time};
use gpusvm_pagemap::Cause;
use gpusvm_svm::{DeviceIndex, FaultCtx, FindError, Permission, Range, Reach};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, Span, VirtAddr};

/// How many passes a fault gets with pages in device memory.
pub const MAX_PASSES: u32 = 8;
/// How many more it gets with pages where they are.
pub const MAX_PASSES_IN_PLACE: u32 = 64;
/// How many it gets in all.
pub(crate) const ALL_PASSES: u32 = MAX_PASSES + MAX_PASSES_IN_PLACE;

/// Each device address space has a mirror of its own.
pub(crate) const ONLY: DeviceIndex = DeviceIndex(0);

/// How a pass over a fault ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// The device can try again.
    Bound(Served),
    /// What was found out was not true any more: start again.
    Stale(StaleReason),
}

/// What is to be made accessible.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    pub(crate) at: VirtAddr,
    pub(crate) access: Access,
    /// The device's translation led to RAM that refused.
    pub(crate) stale: bool,
    pub(crate) cause: Cause,
    /// Pages stay where they are, whatever the policy says, if the device can use them there.
    pub(crate) in_place: bool,
}

impl Request {
    /// A device will do that there.
    pub(crate) const fn prefetch(at: VirtAddr, access: Access) -> Self {
        Self {
            at,
            access,
            stale: false,
            cause: Cause::Prefetch,
            in_place: false,
        }
    }

    /// As `prefetch`, of pages that stay where they are.
    pub(crate) const fn in_place(at: VirtAddr, access: Access) -> Self {
        Self {
            in_place: true,
            ..Self::prefetch(at, access)
        }
    }
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
        in_place: false,
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
    let served = is_served(&range, fault.access) && !range.is_gone();
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
        stale::forget_translation(vm, request.at)?;
    }
    let mut last = StaleReason::Gone;
    for attempt in 0..ALL_PASSES {
        if attempt == MAX_PASSES {
            counters::count(&vm.counters.last_resorts);
        }
        *passes += 1;
        match pass(vm, request, attempt)? {
            Pass::Bound(served) => return Ok(served),
            Pass::Stale(reason) => {
                last = reason;
                counters::count(&vm.counters.stale_passes);
                match reason {
                    StaleReason::Leased => stale::wait_for_leases(vm, request.at),
                    _ => back_off(attempt),
                }
            }
        }
    }
    Err(FaultError::Gave {
        at: request.at,
        reason: last.gave(),
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
    let (advice, around) = vm.advised_around(request.at);
    let ctx = context(vm, request, (advice, around));
    let found = vm.svm().range_find_or_insert(request.at, within, &ctx);
    let range = match found {
        Ok(range) => range,
        Err(FindError::Wider { range, .. }) => {
            stale::forget(vm, range);
            return Ok(Pass::Stale(StaleReason::Wider));
        }
        Err(error) => return stale::refused(request, error),
    };
    let _time = vm.time(&range, Stage::Pass);
    let serving = range.serve();
    let (advice, mut ctx) = match current(vm, request, &range, &serving) {
        Ok(current) => current,
        Err(reason) => return Ok(Pass::Stale(reason)),
    };
    if request.access == Access::Atomic && advice.atomics == Atomics::Cpu {
        let Request { at, access, .. } = *request;
        return Err(FaultError::NotPermitted { at, access });
    }
    if is_served(&range, request.access) {
        counters::count(&vm.counters.coalesced);
        vm.counters.stages.count_coalesced(range.span());
        return Ok(Pass::Bound(Served::Coalesced));
    }
    if let Some(reason) = arm(vm, request.at, &range, &serving)? {
        return Ok(Pass::Stale(reason));
    }
    let moves = range.can_migrate() && (ctx.devmem_only || !request.in_place);
    let placed = if moves {
        place(vm, request, &range, (attempt, advice), &mut ctx)?
    } else {
        Placed::NOWHERE
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
    let Placed {
        again,
        wanted,
        copies,
    } = placed;
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
        Err(error) => return stale::not_mapped(vm, request, range, error),
    };
    let served = match prepared.is_in_vram() {
        true => Served::InDeviceMemory,
        false => Served::InPlace,
    };
    let again = again.filter(|_| served != wanted);
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
        Ok(false) => Ok(Pass::Stale(StaleReason::Invalidated)),
        Err(_) => Err(FaultError::Gave {
            at: request.at,
            reason: "its pages could not be bound",
        }),
    }
}

/// Whether what is mapped allows the access, where it is.
pub(crate) fn is_served<M: AddressSpace>(range: &Range<M>, access: Access) -> bool {
    let wanted = match access {
        Access::Read => Permission::Read,
        Access::Write => Permission::Write,
        Access::Atomic => Permission::Atomic,
    };
    range.pages(ONLY).allow(wanted)
}

pub(crate) fn context<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    (advice, around): (Attributes, Span),
) -> FaultCtx {
    let caps = vm.caps();
    let atomics_on_ram = caps.atomics_on_ram && advice.atomics.on_ram();
    FaultCtx {
        owner: Some(vm.region.pagemap().owner()),
        read_only: !request.access.is_write(),
        devmem_possible: true,
        // A device that cannot reach RAM has no other place, and nor have atomics that cannot work there.
        devmem_only: !caps.coherent || (request.access == Access::Atomic && !atomics_on_ram),
        atomics_on_ram,
        atomics_on_devmem: advice.atomics.on_devmem(),
        allow_mixed: true,
        // A hole is cleared on the device, not faulted in: there is nothing to save.
        check_pages_threshold: ByteSize::ZERO,
        timeslice: Duration::ZERO,
        within: Some(around),
        largest_chunk: advice.granularity,
    }
}

/// Nothing at first: most passes are stale because somebody else was faster.
pub(crate) fn back_off(attempt: u32) {
    match attempt {
        0..4 => gpusvm_sync::yield_now(),
        _ => gpusvm_sync::sleep(Duration::from_micros(20 << attempt.min(10))),
    }
}
