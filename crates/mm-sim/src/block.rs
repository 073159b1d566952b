//! A locked block of the simulated process.

use crate::Sim;
use crate::fork::Pass;
use crate::inbound::SimInbound;
use crate::outbound::SimOutbound;
use crate::region::{BlockState, Part, Region};
use crate::stats::Counters;
use gpusvm_mm::{
    Block, CpuFault, DevicePage, FaultOutcome, Freed, Home, Invalidation, MmError, Place, Reason,
    Source, Wanted, WordState,
};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{OwnerId, PageIndex, Span, VirtAddr};
use std::time::Duration;

/// A locked block: the part of it that is one mirrored mapping. Dropping it unlocks the block, and
/// whoever waits for its pages looks again.
#[derive(Debug)]
pub struct BlockGuard<'a> {
    pub(crate) sim: &'a Sim,
    pub(crate) region: Arc<Region>,
    span: Span,
    /// Keeps fork out, for as long as pages can leave for a device. CPU faults have none: they only
    /// bring pages home.
    pass: Option<Pass<'a>>,
}

/// No mirrored mapping is there any more.
#[derive(Debug)]
pub(crate) struct NotHere;

impl<'a> BlockGuard<'a> {
    /// Waits for the block of `at`, from which pages can leave then.
    pub(crate) fn lock_with_pass(sim: &'a Sim, at: VirtAddr) -> Result<Self, NotHere> {
        // First: who forks waits for all passes, and then for blocks.
        let pass = sim.pass();
        let mut block = Self::lock(sim, at)?;
        block.pass = Some(pass);
        Ok(block)
    }

    /// Waits for the block of `at`.
    pub(crate) fn lock(sim: &'a Sim, at: VirtAddr) -> Result<Self, NotHere> {
        let region = Self::region_at(sim, at)?;
        Self::wait_for(sim, &region, at, None);
        Self::locked(sim, region, at)
    }

    /// Waits for the block of `at`, for so long at most. `None` when it was busy all the time.
    pub(crate) fn lock_within(
        sim: &'a Sim,
        at: VirtAddr,
        limit: Duration,
    ) -> Result<Option<Self>, NotHere> {
        let region = Self::region_at(sim, at)?;
        if !Self::wait_for(sim, &region, at, Some(limit)) {
            return Ok(None);
        }
        Self::locked(sim, region, at).map(Some)
    }

    fn wait_for(sim: &Sim, region: &Region, at: VirtAddr, limit: Option<Duration>) -> bool {
        let what = format_args!("the block at {}", at.block_start());
        let state = region.block(at);
        sim.runtime
            .wait_until(&what, limit, &mut || state.try_lock())
    }

    /// The block of `at`, if it is free.
    pub(crate) fn try_lock(sim: &'a Sim, at: VirtAddr) -> Result<Option<Self>, NotHere> {
        let region = Self::region_at(sim, at)?;
        if !region.block(at).try_lock() {
            return Ok(None);
        }
        Self::locked(sim, region, at).map(Some)
    }

    fn region_at(sim: &Sim, at: VirtAddr) -> Result<Arc<Region>, NotHere> {
        let kernel = sim.kernel.lock();
        let part = kernel.parts.find(at).ok_or(NotHere)?;
        Ok(Arc::clone(&part.region))
    }

    /// The part may have been unmapped, and replaced by another, before the lock was held.
    fn locked(sim: &'a Sim, region: Arc<Region>, at: VirtAddr) -> Result<Self, NotHere> {
        let span = {
            let kernel = sim.kernel.lock();
            let part = kernel.parts.find(at);
            let part = part.filter(|part| Arc::ptr_eq(&part.region, &region));
            part.and_then(|part| part.span.intersection(Span::block_of(at)))
        };
        let Some(span) = span else {
            region.block(at).unlock();
            return Err(NotHere);
        };
        Ok(Self {
            sim,
            region,
            span,
            pass: None,
        })
    }

    pub(crate) fn state(&self) -> &BlockState {
        self.region.block(self.span.start())
    }

    /// Tells subscribers that pages of the block are about to change.
    pub(crate) fn invalidate(&self, span: Span, reason: Reason) {
        self.sim.step(format_args!("invalidate {span} {reason:?}"));
        let event = Invalidation { span, reason };
        self.sim.notifiers.invalidate(&event);
    }

    /// The parts of its region that lie in the block: they share its lock and its state.
    fn parts(&self) -> Vec<Part> {
        let block = Span::block_of(self.span.start());
        let mut parts = self.sim.kernel.lock().parts.parts_in(block);
        parts.retain(|part| Arc::ptr_eq(&part.region, &self.region));
        parts
    }

    /// Leaves touches to the kernel again, if no range is in the block and no page on a device.
    pub(crate) fn unregister_if_unused(&self) {
        let is_away = |part: &Part| {
            let mut words = self.region.words_in(part.span).iter();
            words.any(|word| word.get().place != Place::System)
        };
        let state = self.state();
        if state.armed.load(Ordering::Relaxed) == 0 && !self.parts().iter().any(is_away) {
            // Without a range there are no copies.
            for part in self.parts() {
                self.unprotect(part.span, Reason::Write);
            }
            state.registered.store(false, Ordering::Release);
        }
    }

    /// Gives back the device pages of `span` whose contents the program gave up. Whether there were
    /// any.
    pub(crate) fn release_dropped(&self, span: Span) -> bool {
        self.release(span, |word| word.dropped)
    }

    /// Gives back the device pages of `span`, which was unmapped. Only for who handles the events in
    /// their order: before, the pages may still be about to move to another address.
    pub(crate) fn release_unmapped(&self, span: Span) {
        self.release(span, |word| word.dropped || word.unmapped);
    }

    fn release(&self, span: Span, which: impl Fn(WordState) -> bool) -> bool {
        // Part of it may be gone since somebody saw it.
        let Some(span) = span.intersection(self.span) else {
            return false;
        };
        let words = self.region.words_in(span);
        // What was given up is nobody's to read any more.
        self.unprotect_those(span, Reason::Clear, &which);
        let goes = |word: WordState| word.device_page().filter(|_| which(word));
        if !words.iter().any(|word| goes(word.get()).is_some()) {
            return false;
        }
        let mut in_place = Vec::new();
        for (i, word) in words.iter().enumerate() {
            match (goes(word.get()), word.get().place) {
                (Some(_), Place::Coherent(_)) => in_place.push(i),
                (Some(device), _) => drop(word.mark_leaving(device)),
                (None, _) => {}
            }
        }
        self.invalidate(span, Reason::Clear);
        let mut freed = Freed::new(&self.sim.memories);
        for (i, word) in words.iter().enumerate() {
            // Others may have been dropped meanwhile: they were not invalidated.
            let state = word.get();
            let device = match state.place {
                Place::Leaving(device) if which(state) => device,
                Place::Coherent(device) if in_place.contains(&i) => device,
                _ => continue,
            };
            word.settle_system();
            freed.push(device);
        }
        true
    }

    /// Brings every device page of `span` home. Says what kept it, if anything did.
    pub(crate) fn bring_home(&mut self, span: Span, wanted: Wanted) -> FaultOutcome {
        // Part of it may be gone since somebody saw it.
        let Some(span) = span.intersection(self.span) else {
            return FaultOutcome::Served;
        };
        self.release_dropped(span);
        for page in span.pages() {
            let word = self.region.word(page).get();
            let (Some(device), false) = (word.device_page(), word.unmapped) else {
                // In RAM; or unmapped, and the event will say what becomes of it.
                continue;
            };
            let fault = CpuFault {
                at: page.start(),
                page: device,
                wanted,
            };
            match self.migrate_to_ram(&fault) {
                FaultOutcome::Served => {}
                outcome => return outcome,
            }
            let word = self.region.word(page).get();
            if word.device_page().is_some() && !word.unmapped && !word.dropped {
                return FaultOutcome::Failed;
            }
        }
        FaultOutcome::Served
    }

    /// Asks the owner of a page to bring it home.
    pub(crate) fn migrate_to_ram(&mut self, fault: &CpuFault) -> FaultOutcome {
        let sim = self.sim;
        sim.step(format_args!(
            "migrate_to_ram {} {:?}",
            fault.at, fault.wanted
        ));
        let ops = Arc::clone(&sim.memories.of(fault.page).ops);
        let outcome = ops.migrate_to_ram(sim, self, fault);
        sim.note(format_args!("migrate_to_ram {} -> {outcome:?}", fault.at));
        outcome
    }

    /// Whether a page is on a device, out of the CPU's reach, and the program still wants it.
    pub(crate) fn is_away(&self, page: PageIndex) -> bool {
        let word = self.region.word(page).get();
        !word.place.is_in_place() && !word.unmapped && !word.dropped
    }
}

impl Block for BlockGuard<'_> {
    type Outbound<'b>
        = SimOutbound<'b>
    where
        Self: 'b;
    type Inbound<'b>
        = SimInbound<'b>
    where
        Self: 'b;

    fn span(&self) -> Span {
        self.span
    }

    fn home(&self, page: PageIndex) -> Home {
        self.region.word(page).get().home()
    }

    fn collect(
        &mut self,
        span: Span,
        owner: OwnerId,
        peers: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self::Outbound<'_>, MmError> {
        // A fault that sent pages away would meet a fork that waits for it.
        if self.pass.is_none() || self.sim.is_gone() {
            return Err(MmError::Gone);
        }
        if !self.state().registered.load(Ordering::Acquire) {
            return Err(MmError::NotArmed { span });
        }
        SimOutbound::collect(self, span, owner, peers)
    }

    fn collect_coherent(
        &mut self,
        span: Span,
        owner: OwnerId,
    ) -> Result<Self::Outbound<'_>, MmError> {
        if self.pass.is_none() || self.sim.is_gone() {
            return Err(MmError::Gone);
        }
        if !self.state().registered.load(Ordering::Acquire) {
            return Err(MmError::NotArmed { span });
        }
        SimOutbound::collect_coherent(self, span, owner)
    }

    fn collect_device(
        &mut self,
        span: Span,
        select: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self::Inbound<'_>, MmError> {
        SimInbound::collect(self, span, select)
    }

    fn write_protect(&mut self, span: Span, sources: &mut [Source]) -> Result<(), MmError> {
        if self.pass.is_none() || self.sim.is_gone() {
            return Err(MmError::Gone);
        }
        if !self.state().registered.load(Ordering::Acquire) {
            return Err(MmError::NotArmed { span });
        }
        self.protect(span, sources)
    }
}

impl Drop for BlockGuard<'_> {
    fn drop(&mut self) {
        self.state().unlock();
        Counters::count(&self.sim.counters.wakeups);
        self.sim.step(format_args!("unlock {}", self.span));
    }
}
