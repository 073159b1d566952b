//! A locked block of the process.

use crate::fork::Pass;
use crate::inbound::LinuxInbound;
use crate::outbound::{LinuxOutbound, PageSet, runs};
use crate::process::Process;
use crate::region::{BlockState, Region};
use core::time::Duration;
use gpusvm_mm::{
    AddressSpace, Block, CpuFault, DevicePage, FaultOutcome, Freed, Home, Invalidation, MmError,
    Place, Reason, Source, Wanted, WordState,
};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{OwnerId, PageIndex, Span, VirtAddr};

/// A locked block of the process: the part of it that is one mirrored mapping.
///
/// Dropping it unlocks the block and wakes who waits for its pages, if a fault was seen meanwhile.
#[derive(Debug)]
pub struct BlockGuard<'a> {
    pub(crate) process: &'a Process,
    pub(crate) region: Arc<Region>,
    span: Span,
    /// Keeps fork out, for as long as pages can leave for a device. Handlers have none: they only
    /// bring pages home.
    pass: Option<Pass<'a>>,
    /// This thread reads pages of it where they are.
    copies: bool,
}

impl<'a> BlockGuard<'a> {
    /// Waits for the block of `at`, from which pages can leave then. `None` in a child of fork.
    pub(crate) fn lock_with_pass(
        process: &'a Process,
        at: VirtAddr,
    ) -> Option<Result<Self, NotHere>> {
        // First: who forks waits for all passes, and then for blocks.
        let pass = process.gate.pass()?;
        Some(Self::lock(process, at).map(|mut block| {
            block.pass = Some(pass);
            block
        }))
    }

    /// The block of `at` in a part of a region, if it is free.
    pub(crate) fn try_lock(process: &'a Process, at: VirtAddr) -> Result<Option<Self>, NotHere> {
        gpusvm_sync::walk!("try_lock");
        let part = process.regions.find(at).ok_or(NotHere)?;
        if !part.region.block(at).try_lock() {
            return Ok(None);
        }
        Self::locked(process, part.region, at).map(Some)
    }

    /// Waits for the block of `at`, for about so long. `None` when it was busy all the time.
    pub(crate) fn lock_within(
        process: &'a Process,
        at: VirtAddr,
        limit: Duration,
    ) -> Result<Option<Self>, NotHere> {
        let part = process.regions.find(at).ok_or(NotHere)?;
        if !part.region.block(at).lock_within(Some(limit)) {
            return Ok(None);
        }
        Self::locked(process, part.region, at).map(Some)
    }

    /// Waits for the block of `at`.
    pub(crate) fn lock(process: &'a Process, at: VirtAddr) -> Result<Self, NotHere> {
        let part = process.regions.find(at).ok_or(NotHere)?;
        part.region.block(at).lock();
        Self::locked(process, part.region, at)
    }

    /// The part may have been unmapped, and replaced by another, before the lock was held.
    fn locked(process: &'a Process, region: Arc<Region>, at: VirtAddr) -> Result<Self, NotHere> {
        let now = process
            .regions
            .find(at)
            .filter(|part| Arc::ptr_eq(&part.region, &region));
        let Some(span) = now.and_then(|part| part.span.intersection(Span::block_of(at))) else {
            // Another part of the mapping may be in the block, and a thread wait for it.
            if region.block(at).unlock() {
                process.mover.wake(Span::block_of(at));
            }
            return Err(NotHere);
        };
        Ok(Self {
            process,
            region,
            span,
            pass: None,
            copies: false,
        })
    }

    /// This thread copies pages where they are from now on, for as long as it has the block.
    pub(crate) fn copies_in_place(&mut self) {
        self.copies = true;
        self.state().copies_in_place(true);
    }

    pub(crate) fn state(&self) -> &BlockState {
        self.region.block(self.span.start())
    }

    /// Tells subscribers that pages of the block are about to change.
    pub(crate) fn invalidate(&self, span: Span, reason: Reason) {
        gpusvm_sync::walk!("invalidate");
        self.process
            .notifiers
            .invalidate(&Invalidation { span, reason });
    }

    /// Gives back the device pages of `span` whose contents the program gave up: the kernel fills
    /// them with zeroes from now on.
    pub(crate) fn release_dropped(&self, span: Span) {
        self.release(span, |word| word.dropped);
    }

    /// The parts of its region that lie in the block: they share its lock and its state.
    pub(crate) fn parts(&self) -> impl Iterator<Item = Span> + use<> {
        let parts = self
            .process
            .regions
            .parts_in(Span::block_of(self.span.start()));
        let region = Arc::clone(&self.region);
        let same = parts.into_iter();
        same.filter_map(move |part| Arc::ptr_eq(&part.region, &region).then_some(part.span))
    }

    /// Begins to catch touches of missing pages of the block; in any case of `piece`, which can be in a
    /// mapping that came where a part of the block went unheard of, before anybody listened.
    ///
    /// # Errors
    ///
    /// What the kernel refused; then nothing of `piece` is caught that was not before.
    pub(crate) fn register(&self, piece: Span) -> Result<(), rustix::io::Errno> {
        let registered = &self.state().registered;
        if registered.load(Ordering::Relaxed) {
            return self.process.mover.arm(piece, self.region.behind());
        }
        if self.region.as_one.is_on() {
            return self.register_as_one(piece);
        }
        if let Err(errno) = self.process.mover.arm(piece, self.region.behind()) {
            self.process.mover.disarm(piece);
            if self.state().watched.load(Ordering::Relaxed) {
                // Best effort: what refused one registration may refuse another.
                let _ = self.process.mover.watch(piece);
            }
            return Err(errno);
        }
        for rest in self.parts().flat_map(|part| part.without(piece)).flatten() {
            let words = self.region.words_in(rest);
            for run in runs(rest, |i| !words[i].get().unmapped) {
                // Of another part nobody may have heard that it went, or what is there by now.
                let _ = self.process.mover.arm(run, self.region.behind());
            }
        }
        registered.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Leaves touches to the kernel again, if no range is in the block and no page on a device, and
    /// nobody wants to hear of the end of the mapping. Not of memory that is registered as one.
    pub(crate) fn unregister_if_unused(&self) {
        let state = self.state();
        let is_away = |part: Span| {
            self.region
                .words_in(part)
                .iter()
                .any(|word| word.get().place != Place::System)
        };
        if state.armed.load(Ordering::Relaxed) > 0
            || state.watched.load(Ordering::Relaxed)
            || !state.registered.load(Ordering::Relaxed)
            || self.parts().any(is_away)
        {
            return;
        }
        // What this thread dropped before is marked.
        self.process.source.fence();
        for part in self.parts() {
            // Without a range there are no copies.
            self.unprotect(part, Reason::Write);
        }
        // Or it becomes one with others, and is registered with them, before it is let go.
        let _alone = self.region.as_one.alone();
        if self.region.as_one.is_on() {
            return;
        }
        let mut has_ended = true;
        for part in self.parts() {
            // Afterwards no fault proves that a dropped page is gone.
            self.process.settle_holes(&self.region, part);
            has_ended &= self.let_go_of_what_is_left(part);
        }
        state.registered.store(!has_ended, Ordering::Relaxed);
    }

    /// Gives back the device pages of `span`, which was unmapped. Only for who handles the events in
    /// their order: before, the pages may still be about to move to another address.
    pub(crate) fn release_unmapped(&self, span: Span) {
        gpusvm_sync::walk!("release_unmapped");
        self.release(span, |word| word.dropped || word.unmapped);
    }

    fn release(&self, span: Span, which: impl Fn(WordState) -> bool) {
        // Part of it may be gone since somebody saw it.
        let Some(span) = span.intersection(self.span) else {
            return;
        };
        // What was given up is nobody's to read any more.
        self.unprotect_those(span, Reason::Clear, &which);
        let words = self.region.words_in(span);
        let goes = |word: WordState| word.device_page().filter(|_| which(word));
        if !words.iter().any(|word| goes(word.get()).is_some()) {
            return;
        }
        let mut in_place = PageSet::default();
        for (i, word) in words.iter().enumerate() {
            match (goes(word.get()), word.get().place) {
                (Some(_), Place::Coherent(_)) => in_place.insert(i..i + 1),
                (Some(device), _) => drop(word.mark_leaving(device)),
                (None, _) => {}
            }
        }
        self.invalidate(span, Reason::Clear);
        let mut freed = Freed::new(&self.process.memories);
        for (i, word) in words.iter().enumerate() {
            // Others may have been dropped meanwhile: they were not invalidated.
            let state = word.get();
            let device = match state.place {
                Place::Leaving(device) if which(state) => device,
                Place::Coherent(device) if in_place.contains(i) => device,
                _ => continue,
            };
            word.settle_system();
            freed.push(device);
        }
        self.take_markers(span);
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
            let ops = Arc::clone(&self.process.memories.of(device).ops);
            let fault = CpuFault {
                at: page.start(),
                page: device,
                wanted,
            };
            match ops.migrate_to_ram(self.process, self, &fault) {
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
}

/// No mirrored mapping is there any more.
#[derive(Debug)]
pub(crate) struct NotHere;

impl Block for BlockGuard<'_> {
    type Outbound<'b>
        = LinuxOutbound<'b>
    where
        Self: 'b;
    type Inbound<'b>
        = LinuxInbound<'b>
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
        // A handler that sent pages away would meet a fork that waits for it.
        if self.pass.is_none() {
            return Err(MmError::Gone);
        }
        if !self.state().registered.load(Ordering::Relaxed) {
            return Err(MmError::NotArmed { span });
        }
        LinuxOutbound::collect(self, span, owner, peers)
    }

    fn collect_coherent(
        &mut self,
        span: Span,
        owner: OwnerId,
    ) -> Result<Self::Outbound<'_>, MmError> {
        // As above: they would have to come home first.
        if self.pass.is_none() {
            return Err(MmError::Gone);
        }
        if !self.state().registered.load(Ordering::Relaxed) {
            return Err(MmError::NotArmed { span });
        }
        LinuxOutbound::collect_coherent(self, span, owner)
    }

    fn collect_device(
        &mut self,
        span: Span,
        select: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self::Inbound<'_>, MmError> {
        LinuxInbound::collect(self, span, select)
    }

    fn write_protect(&mut self, span: Span, sources: &mut [Source]) -> Result<(), MmError> {
        // A handler that did would meet a fork that waits for it.
        if self.pass.is_none() {
            return Err(MmError::Gone);
        }
        if !self.process.can_watch_writes() {
            return Err(MmError::UnwatchedWrites { span });
        }
        if !self.state().registered.load(Ordering::Relaxed) {
            return Err(MmError::NotArmed { span });
        }
        self.protect(span, sources)
    }
}

impl Drop for BlockGuard<'_> {
    fn drop(&mut self) {
        if self.copies {
            self.state().copies_in_place(false);
        }
        if self.state().unlock() {
            // All of the block: another part of the mapping may be in it, with the same lock.
            self.process.mover.wake(Span::block_of(self.span.start()));
        }
    }
}
