//! What is in the way of a fault: for good, which is an error, or for now, which is a reason to start again.

use crate::driver::counters;
use crate::driver::fault::{Pass, Request};
use crate::driver::vm::Vm;
use gpusvm_device::FaultError;
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_svm::{FindError, GetPagesError, Range};
use gpusvm_sync::Arc;
use gpusvm_types::{Span, VirtAddr};

/// Why a pass was for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StaleReason {
    /// The range was removed, or unmapped, since it was found.
    Gone,
    /// The range is from when more was bound.
    Wider,
    /// The range is not as it is advised now.
    Advised,
    /// Nothing fits between the ranges that are there.
    NoChunk,
    /// The memory is not mirrored any more, or not yet again.
    NotMirrored,
    /// Part of the mapping changed its permissions: ranges of the parts take the place of this one.
    Cut,
    /// Pages were unmapped meanwhile.
    Unmapped,
    /// Pages kept moving.
    Moving,
    /// Only device memory will do, and pages could not come.
    NotOnDevice,
    /// Pages were in two memories, or out of reach, and have come home.
    Gathered,
    /// They are, and a launch needs some of them there.
    Leased,
    /// Something changed between the look and the mapping.
    Invalidated,
}

impl StaleReason {
    /// As the reason why a fault was given up, after too many passes.
    pub(crate) const fn gave(self) -> &'static str {
        match self {
            Self::Gone => "it was not stable for long enough: its range keeps being unmapped",
            Self::Wider => "it was not stable for long enough: what is bound keeps changing",
            Self::Advised => "it was not stable for long enough: advice keeps changing",
            Self::NoChunk => "it was not stable for long enough: no range fits there",
            Self::NotMirrored => "it was not stable for long enough: it is not mirrored any more",
            Self::Cut => "it was not stable for long enough: permissions keep changing",
            Self::Unmapped => "it was not stable for long enough: pages keep being unmapped",
            Self::Moving => "it was not stable for long enough: pages keep moving",
            Self::NotOnDevice => {
                "it was not stable for long enough: pages that only device memory will do for \
                 could not move there"
            }
            Self::Gathered => {
                "it was not stable for long enough: pages keep leaving RAM, where they were gathered"
            }
            Self::Leased => {
                "it was not stable for long enough: a launch needs pages of it on another device"
            }
            Self::Invalidated => {
                "it was not stable for long enough: what was found keeps being invalidated"
            }
        }
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
        FindError::NoChunk { .. } => Ok(Pass::Stale(StaleReason::NoChunk)),
        FindError::Closed | FindError::Mm(MmError::Gone) => Err(FaultError::Closed { at }),
        _ => Err(FaultError::Gave {
            at,
            reason: "there is no range for it",
        }),
    }
}

/// Nothing can be mapped: for good, or for now.
pub(crate) fn not_mapped<M: AddressSpace>(
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
            match vm.take_home(range) {
                Err(MmError::Gone) => Err(FaultError::Closed { at }),
                Ok(false) => Ok(Pass::Stale(StaleReason::Leased)),
                Ok(true) | Err(_) => Ok(Pass::Stale(StaleReason::Gathered)),
            }
        }
        GetPagesError::Mm(MmError::Gone) => Err(FaultError::Closed { at }),
        // Permissions of a part of it changed, and cut the mapping: ranges of the parts take its place.
        GetPagesError::Unmapped { .. } if is_cut(vm, range) => {
            if vm.may_change(range) {
                vm.svm().range_remove(range);
            }
            Ok(Pass::Stale(StaleReason::Cut))
        }
        GetPagesError::Unmapped { .. } => Ok(Pass::Stale(StaleReason::Unmapped)),
        // Since it was armed: nobody else tells a range that was made when its mirror ended.
        GetPagesError::Mm(MmError::NotMirrored { .. }) => {
            if vm.may_change(range) {
                vm.svm().range_remove(range);
            }
            Ok(Pass::Stale(StaleReason::NotMirrored))
        }
        GetPagesError::NotOnDevice { .. } => Ok(Pass::Stale(StaleReason::NotOnDevice)),
        _ => Ok(Pass::Stale(StaleReason::Moving)),
    }
}

/// Waits until the pages of the range of `at` are home, or for so long as that takes at most
/// ([`HELD_TIMEOUT`](gpusvm_mm::range_fault::HELD_TIMEOUT)). Called by nobody who serves a range: others
/// of the same block go on meanwhile.
pub(crate) fn wait_for_leases<M: AddressSpace>(vm: &Vm<M>, at: VirtAddr) {
    let range = vm.svm().range_find(at);
    // Whether they are home, the next pass sees.
    let _ = range.map(|range| vm.svm().range_evict(&range));
}

/// Whether no one mapping covers the range.
fn is_cut<M: AddressSpace>(vm: &Vm<M>, range: &Range<M>) -> bool {
    let vma = vm.svm().mm().find_vma(range.span().start());
    vma.is_ok_and(|vma| vma.is_none_or(|vma| !vma.span.covers(range.span())))
}

/// The device found a translation to RAM that is not there any more: memory that nobody mirrors was
/// unmapped behind its back.
pub(crate) fn forget_translation<M: AddressSpace>(
    vm: &Vm<M>,
    at: VirtAddr,
) -> Result<(), FaultError> {
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
