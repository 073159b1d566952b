//! A locked block of the process.

use crate::inbound::LinuxInbound;
use crate::memories::Freed;
use crate::outbound::LinuxOutbound;
use crate::process::Process;
use crate::region::{BlockState, Region};
use gpusvm_mm::{
    Block, CpuFault, DevicePage, FaultOutcome, Home, Invalidation, MmError, Place, Reason, Wanted,
    WordState,
};
use gpusvm_sync::Arc;
use gpusvm_types::{OwnerId, PageIndex, Span, VirtAddr};

/// A locked block of the process: the part of it that is one mirrored mapping.
///
/// Dropping it unlocks the block and wakes who waits for its pages, if a fault was seen meanwhile.
#[derive(Debug)]
pub struct BlockGuard<'a> {
    pub(crate) process: &'a Process,
    pub(crate) region: Arc<Region>,
    span: Span,
}

impl<'a> BlockGuard<'a> {
    /// The block of `at` in a part of a region, if it is free.
    pub(crate) fn try_lock(process: &'a Process, at: VirtAddr) -> Result<Option<Self>, NotHere> {
        let part = process.regions.find(at).ok_or(NotHere)?;
        if !part.region.block(at).try_lock() {
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
            region.block(at).unlock();
            return Err(NotHere);
        };
        Ok(Self {
            process,
            region,
            span,
        })
    }

    pub(crate) fn state(&self) -> &BlockState {
        self.region.block(self.span.start())
    }

    /// Tells subscribers that pages of the block are about to change.
    pub(crate) fn invalidate(&self, span: Span, reason: Reason) {
        self.process
            .notifiers
            .invalidate(&Invalidation { span, reason });
    }

    /// Gives back the device pages of `span` whose contents the program gave up: the kernel fills
    /// them with zeroes from now on.
    pub(crate) fn release_dropped(&self, span: Span) {
        self.release(span, |word| word.dropped);
    }

    /// Gives back the device pages of `span`, which was unmapped. Only for who handles the events in
    /// their order: before, the pages may still be about to move to another address.
    pub(crate) fn release_unmapped(&self, span: Span) {
        self.release(span, |word| word.dropped || word.unmapped);
    }

    fn release(&self, span: Span, which: impl Fn(WordState) -> bool) {
        let is_dropped = |page: PageIndex| {
            let word = self.region.word(page).get();
            word.device_page()
                .filter(|_| which(word))
                .map(|device| (page, device))
        };
        if !span.pages().any(|page| is_dropped(page).is_some()) {
            return;
        }
        for (page, device) in span.pages().filter_map(is_dropped) {
            self.region.word(page).mark_leaving(device);
        }
        self.invalidate(span, Reason::Clear);
        let mut freed = Freed::new(&self.process.memories);
        for (page, device) in span.pages().filter_map(is_dropped) {
            self.region.word(page).settle_system();
            freed.push(device);
        }
    }

    /// Brings every device page of `span` home. Says what kept it, if anything did.
    pub(crate) fn bring_home(&mut self, span: Span, wanted: Wanted) -> FaultOutcome {
        self.release_dropped(span);
        for page in span.pages() {
            let Place::Device(device) = self.region.word(page).get().place else {
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
            if matches!(self.region.word(page).get().place, Place::Device(_)) {
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

    fn collect(&mut self, span: Span, owner: OwnerId) -> Result<Self::Outbound<'_>, MmError> {
        LinuxOutbound::collect(self, span, owner)
    }

    fn collect_device(
        &mut self,
        span: Span,
        select: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self::Inbound<'_>, MmError> {
        LinuxInbound::collect(self, span, select)
    }
}

impl Drop for BlockGuard<'_> {
    fn drop(&mut self) {
        if self.state().unlock() {
            self.process.mover.wake(self.span);
        }
    }
}
