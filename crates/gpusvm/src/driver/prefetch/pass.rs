//! One range of a prefetch: where it was asked to be, and mapped.
//!
//! ```text
//!   hole? skipped -> find or insert the range -> there already? done
//!      -> device: populate | RAM: bring home | advised: as a fault would
//!      -> get pages -> commit, if still current; else again, as a fault does
//! ```

use super::{Location, PrefetchError, PrefetchReason};
use crate::driver::current::{self, current};
use crate::driver::fault::{self, ALL_PASSES, Pass, Request};
use crate::driver::gpuva;
use crate::driver::place::{self, Placed};
use crate::driver::report::Served;
use crate::driver::revisit::BUSY_AGAIN;
use crate::driver::stale::{self, StaleReason};
use crate::driver::vm::Vm;
use gpusvm_device::{Access, FaultError};
use gpusvm_mm::{AddressSpace, MmError, Vma};
use gpusvm_pagemap::MigrateError;
use gpusvm_svm::{FindError, Range, Scan};
use gpusvm_types::{Span, VirtAddr};

/// What became of one range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// It was there.
    Valid,
    /// It is in device memory now, and mapped.
    Moved,
    /// It is mapped where it is.
    InPlace,
    /// It is home, and mapped if the device reaches it there.
    Home,
}

/// How far a step came, and what became of it.
#[derive(Debug)]
pub(super) struct Step {
    /// Where the next one begins.
    pub(super) end: VirtAddr,
    /// Why something is not where it was asked to be. It may be mapped all the same.
    pub(super) error: Option<PrefetchError>,
    /// `None` when there is nothing.
    pub(super) done: Option<Done>,
}

/// Prefetches the first range of `span` that is there, behind any hole.
pub(super) fn step<M: AddressSpace>(vm: &Vm<M>, span: Span, to: Location) -> Step {
    // Holes of the device's address space, and memory of its own, have nothing to prefetch.
    let bound = vm.vmas.inside(span).into_iter();
    let mut mirrors = bound.filter(|(_, vma)| matches!(vma, gpuva::Vma::Mirror));
    let Some((span, _)) = mirrors.next() else {
        return Step::nothing(span.end());
    };
    let vma = match first_in(vm, span) {
        Ok(Some(vma)) => vma,
        // A hole, how large it may be: whoever goes on behind it finds the next mapping.
        Ok(None) => return Step::nothing(span.end()),
        Err(error) => return Step::failed(span, PrefetchReason::Mm(error)),
    };
    let at = span.start().max(vma.span.start());
    for attempt in 0..ALL_PASSES {
        match pass(vm, at, &vma, to, attempt) {
            Ok(Some(step)) => return step,
            Ok(None) => fault::back_off(attempt),
            Err(error) => {
                let left = span.intersection(vma.span).unwrap_or(span);
                return Step::failed(left, PrefetchReason::Fault(error));
            }
        }
    }
    let reason = "it was not stable for long enough";
    let gave = PrefetchReason::Fault(FaultError::Gave { at, reason });
    // The range is the rest of the block, as a rule; its neighbours would be no better.
    Step::failed(Span::new(at, span.end()).unwrap_or(span), gave)
}

impl Step {
    const fn nothing(end: VirtAddr) -> Self {
        Self {
            end,
            error: None,
            done: None,
        }
    }

    fn failed(span: Span, reason: PrefetchReason) -> Self {
        Self {
            end: span.end(),
            error: Some(PrefetchError { span, reason }),
            done: None,
        }
    }
}

/// The first mapping in `span`.
fn first_in<M: AddressSpace>(vm: &Vm<M>, span: Span) -> Result<Option<Vma>, MmError> {
    let vma = vm.svm().mm().find_vma(span.start())?;
    Ok(vma.filter(|vma| vma.span.overlaps(span)))
}

/// As a pass over a fault. `None` when it was for nothing.
fn pass<M: AddressSpace>(
    vm: &Vm<M>,
    at: VirtAddr,
    vma: &Vma,
    to: Location,
    attempt: u32,
) -> Result<Option<Step>, FaultError> {
    let closed = FaultError::Closed { at };
    let _no_fork = vm.svm().mm().no_fork().ok_or(closed)?;
    let _working = vm.enter().ok_or(closed)?;
    vm.svm().collect_garbage();
    let (advice, around) = vm.advised_around(at);
    let is_copied = to == Location::Advised && advice.read_mostly;
    let access = match vma.writable && !is_copied {
        true => Access::Write,
        false => Access::Read,
    };
    let request = Request::prefetch(at, access);
    let ctx = fault::context(vm, &request, (advice, around));
    // As wide as it is bound, which may be wider than what is asked for; or it was unbound meanwhile.
    let Some((within, gpuva::Vma::Mirror)) = vm.vmas.find(at) else {
        return Ok(None);
    };
    let range = match vm.svm().range_find_or_insert(at, within, &ctx) {
        Ok(range) => range,
        Err(FindError::Wider { range, .. }) => {
            stale::forget(vm, range);
            return Ok(None);
        }
        Err(error) => return stale::refused(&request, error).map(|_| None),
    };
    let serving = range.serve();
    let mut ctx = match current(vm, &request, &range, &serving) {
        Ok((now, ctx)) if now == advice => ctx,
        Ok(_) | Err(_) => return Ok(None),
    };
    if is_there(vm, &range, access, to) {
        return ended(&range, Some(Done::Valid), None);
    }
    if current::arm(vm, at, &range, &serving)?.is_some() {
        return Ok(None);
    }
    let mut error = None;
    let mut placed = Placed::NOWHERE;
    match to {
        _ if !range.can_migrate() => {}
        Location::Device => {
            let populated = vm.region.pagemap();
            let populated = populated.populate(range.span(), ctx.timeslice, request.cause);
            error = populated.err().map(PrefetchReason::Migrate);
            placed.again = Some(BUSY_AGAIN);
        }
        Location::Ram => error = take_home(vm, &range),
        Location::Advised => {
            placed = place::place(vm, &request, &range, (attempt, advice), &mut ctx)?
        }
    }
    if !vm.caps().coherent && to == Location::Ram {
        // Not mapped, then.
        let done = error.is_none().then_some(Done::Home);
        return ended(&range, done, error);
    }
    if error.is_some() && ctx.devmem_only {
        return ended(&range, Some(Done::Home), error);
    }
    let done = match fault::map(vm, &request, &range, &ctx, placed)? {
        Pass::Bound(_) if to == Location::Ram && error.is_none() => Done::Home,
        Pass::Bound(Served::InDeviceMemory) if to != Location::Ram => Done::Moved,
        Pass::Bound(_) => Done::InPlace,
        // A prefetch is a wish: it does not wait for launches.
        Pass::Stale(StaleReason::Leased) => {
            let span = range.span();
            let leased = MigrateError::NothingCollected { span };
            return ended(&range, None, error.or(Some(leased.into())));
        }
        Pass::Stale(_) => return Ok(None),
    };
    ended(&range, Some(done), error)
}

/// The end of a step, unless there is no end to come.
fn ended<M: AddressSpace>(
    range: &Range<M>,
    done: Option<Done>,
    reason: Option<PrefetchReason>,
) -> Result<Option<Step>, FaultError> {
    let span = range.span();
    let error = reason.map(|reason| PrefetchError { span, reason });
    if error.as_ref().is_some_and(PrefetchError::is_gone) {
        let at = span.start();
        return Err(FaultError::Closed { at });
    }
    let end = span.end();
    Ok(Some(Step { end, error, done }))
}

/// Brings the range home. Why it does not come, if it does not.
fn take_home<M: AddressSpace>(vm: &Vm<M>, range: &Range<M>) -> Option<PrefetchReason> {
    let span = range.span();
    match vm.take_home(range) {
        Ok(true) => None,
        Ok(false) => Some(MigrateError::NothingCollected { span }.into()),
        Err(error) => Some(error.into()),
    }
}

/// Whether the device would not fault, and the pages are where they were asked to be.
fn is_there<M: AddressSpace>(vm: &Vm<M>, range: &Range<M>, access: Access, to: Location) -> bool {
    let is_served = fault::is_served(range, access);
    if to == Location::Advised || !range.can_migrate() {
        return is_served;
    }
    if !is_served && (to == Location::Device || vm.caps().coherent) {
        return false;
    }
    // Nothing is brought anywhere by a look: pages on the way are not there yet.
    let found = vm.svm().scan(range.span(), Some(vm.region.pagemap()));
    match to {
        Location::Ram => found == Ok(Scan::System),
        _ => found == Ok(Scan::Equal),
    }
}

impl PrefetchError {
    /// Whether it will be so for everything else, too.
    pub(super) const fn is_gone(&self) -> bool {
        matches!(
            self.reason,
            PrefetchReason::Mm(MmError::Gone)
                | PrefetchReason::Migrate(MigrateError::Mm(MmError::Gone))
                | PrefetchReason::Fault(FaultError::Closed { .. })
        )
    }
}
