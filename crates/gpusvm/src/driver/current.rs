//! What is true of a range as long as somebody serves it.
//!
//! A fault, a prefetch and a migration find a range, and wait until nobody else serves it. Meanwhile
//! everything may have changed: so all of them look again, here. A range that is not as it should be any
//! more is forgotten with the lock still held, so that nobody maps anything of it in between; but not
//! if a launch, whose device cannot fault, needs it as it is.

use crate::driver::advice::Attributes;
use crate::driver::fault::{self, Request};
use crate::driver::stale::StaleReason;
use crate::driver::vm::Vm;
use gpusvm_device::FaultError;
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_svm::{FaultCtx, FindError, Range, Serving};
use gpusvm_sync::Arc;
use gpusvm_types::VirtAddr;

/// What counts for a range from here on, with how it is advised: who advises otherwise waits for who
/// serves it. Or why it is of no use any more: then it is forgotten, if nobody needs it as it is.
pub(crate) fn current<M: AddressSpace>(
    vm: &Vm<M>,
    request: &Request,
    range: &Arc<Range<M>>,
    _serving: &Serving<'_>,
) -> Result<(Attributes, FaultCtx), StaleReason> {
    if range.is_gone() {
        return Err(StaleReason::Gone);
    }
    let (advice, around) = vm.advised_around(request.at);
    let is_as_advised = around.covers(range.span()) && advice.allows(range.span());
    if !is_as_advised && vm.may_change(range) {
        vm.svm().range_remove(range);
        return Err(StaleReason::Advised);
    }
    Ok((advice, fault::context(vm, request, (advice, around))))
}

/// Lets pages leave the range. If they cannot be watched, says why the pass was for nothing.
pub(crate) fn arm<M: AddressSpace>(
    vm: &Vm<M>,
    at: VirtAddr,
    range: &Arc<Range<M>>,
    serving: &Serving<'_>,
) -> Result<Option<StaleReason>, FaultError> {
    match range_arm(vm, range, serving) {
        Ok(true) => Ok(None),
        Ok(false) => Ok(Some(StaleReason::Gone)),
        Err(FindError::Closed | FindError::Mm(MmError::Gone)) => Err(FaultError::Closed { at }),
        Err(_) => Ok(Some(StaleReason::NotMirrored)),
    }
}

/// As `range_arm`. A range that was unmapped, or is not mirrored any more, since it was found is
/// forgotten, if nobody needs it as it is: nobody else tells a range that was made at that very moment.
pub(crate) fn range_arm<M: AddressSpace>(
    vm: &Vm<M>,
    range: &Arc<Range<M>>,
    serving: &Serving<'_>,
) -> Result<bool, FindError> {
    let armed = vm.svm().range_arm(range, serving);
    let is_of_use = matches!(
        armed,
        Ok(_) | Err(FindError::Closed | FindError::Mm(MmError::Gone))
    );
    if !is_of_use && vm.may_change(range) {
        vm.svm().range_remove(range);
    }
    armed
}
