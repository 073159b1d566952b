//! The contract of an address space, kept by the simulated process.

use crate::Sim;
use crate::block::{BlockGuard, NotHere};
use crate::fork::Pass;
use crate::injector::Step;
use crate::kernel::Pte;
use crate::outbound::EAGAIN;
use gpusvm_mm::device_page;
use gpusvm_mm::range_fault::{self, RANGE_TIMEOUT};
use gpusvm_mm::{
    AddressSpace, ArmToken, Block, DeviceMemoryId, DeviceMemoryOps, DevicePage, FaultOutcome, Home,
    Intent, Mirror, MmError, Notifiers, Reason, Seen, Snapshot, Time, Vma, Wanted,
};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{OwnerId, PageCount, PageIndex, Span, VirtAddr};

impl AddressSpace for Sim {
    type Block<'a> = BlockGuard<'a>;
    type NoFork<'a> = Pass<'a>;

    fn now(&self) -> Time {
        self.time()
    }

    fn find_vma(&self, at: VirtAddr) -> Result<Option<Vma>, MmError> {
        self.yield_now();
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        Ok(self.kernel.lock().find_vma(at))
    }

    fn is_readable(&self, at: VirtAddr) -> bool {
        let kernel = self.kernel.lock();
        let vma = kernel.find_vma(at);
        let is_lost = matches!(kernel.pages.get(&at.page()), Some(Pte::Poisoned));
        vma.is_some_and(|vma| vma.span.contains(at) && vma.readable) && !is_lost
    }

    fn mirrored(&self, at: VirtAddr) -> Mirror {
        self.mirror_of(at)
    }

    fn notifiers(&self) -> &Notifiers {
        &self.notifiers
    }

    fn add_device_memory(
        &self,
        pages: PageCount,
        owner: OwnerId,
        ops: Arc<dyn DeviceMemoryOps<Self>>,
    ) -> Result<DeviceMemoryId, MmError> {
        self.memories.add(pages, owner, ops)
    }

    fn arm(&self, span: Span) -> Result<ArmToken, MmError> {
        self.step(format_args!("arm {span}"));
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        let token = {
            let kernel = self.kernel.lock();
            let part = kernel.parts.find(span.start());
            let part = part.filter(|part| part.span.covers(span));
            part.ok_or(MmError::NotMirrored { span })?.region.token()
        };
        for piece in span.blocks() {
            if let Err(error) = self.arm_block(span, piece, token) {
                if let Ok(done) = Span::new(span.start(), piece.start()) {
                    self.disarm(done, token);
                }
                return Err(error);
            }
        }
        Ok(token)
    }

    fn disarm(&self, span: Span, token: ArmToken) {
        self.step(format_args!("disarm {span}"));
        for piece in span.blocks() {
            // All of it unmapped and forgotten meanwhile, perhaps replaced: nothing is registered for us.
            let Some(block) = self.lock_what_is_left(piece, token) else {
                continue;
            };
            let armed = &block.state().armed;
            let left = armed.load(Ordering::Relaxed).saturating_sub(1);
            armed.store(left, Ordering::Relaxed);
            // With a page on a device it stays registered: until the next range lets go, or the
            // mapping ends.
            block.unregister_if_unused();
        }
    }

    fn watch(&self, span: Span) -> Result<ArmToken, MmError> {
        self.step(format_args!("watch {span}"));
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        let kernel = self.kernel.lock();
        let part = kernel.parts.find(span.start());
        let part = part.filter(|part| part.span.covers(span));
        let region = &part.ok_or(MmError::NotMirrored { span })?.region;
        // Every unmapping is heard of here; only which mapping it is has to be known.
        let mut words = region.words_in(span).iter();
        match words.any(|word| word.get().unmapped) {
            true => Err(MmError::NotMirrored { span }),
            false => Ok(region.token()),
        }
    }

    fn unwatch(&self, span: Span, _: ArmToken) {
        self.step(format_args!("unwatch {span}"));
    }

    fn watched(&self, at: VirtAddr, token: ArmToken) -> Option<Span> {
        self.yield_now();
        if self.is_gone() {
            return None;
        }
        let kernel = self.kernel.lock();
        let part = kernel.parts.find(at)?;
        let in_block = part.span.intersection(Span::block_of(at))?;
        if part.region.token() != token {
            return None;
        }
        let rest = Span::new(Span::page_of(at).start(), in_block.end()).ok()?;
        let is_gone = |page: &PageIndex| part.region.word(*page).get().unmapped;
        let end = rest.pages().find(is_gone);
        Span::new(rest.start(), end.map_or(rest.end(), |page| page.start())).ok()
    }

    fn no_fork(&self) -> Option<Self::NoFork<'_>> {
        (!self.is_gone()).then(|| self.pass())
    }

    fn lock_block(&self, span: Span) -> Result<Self::Block<'_>, MmError> {
        self.step(format_args!("lock {span}"));
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        if !Span::block_of(span.start()).covers(span) {
            return Err(MmError::CrossesBlock { span });
        }
        let block = BlockGuard::lock_with_pass(self, span.start());
        let block = block.map_err(|NotHere| MmError::NotMirrored { span })?;
        if block.span().covers(span) {
            Ok(block)
        } else {
            Err(MmError::NotMirrored { span })
        }
    }

    fn lock_device_page(&self, page: DevicePage) -> Option<(Self::Block<'_>, PageIndex)> {
        let address = || self.memories.address_of(page);
        device_page::lock_where_it_lives(address, |at| {
            self.step(format_args!("lock {page:?}"));
            // Not mirrored there any more? If a remap names it anew, that is known soon.
            BlockGuard::lock_with_pass(self, at.start()).ok()
        })
    }

    fn can_watch_writes(&self) -> bool {
        true
    }

    fn range_fault(
        &self,
        span: Span,
        owner: Option<OwnerId>,
        intent: Intent,
        homes: &mut [Home],
    ) -> Result<(), MmError> {
        let look = || {
            self.step(format_args!("range fault {span}"));
            self.look(span, owner, intent, homes)
        };
        range_fault::until_stable(span, || self.time(), look)
    }

    fn snapshot(&self, span: Span, seen: &mut [Seen]) -> Result<(), MmError> {
        assert_eq!(
            seen.len(),
            span.page_count().as_usize(),
            "one for each page"
        );
        self.step(format_args!("snapshot {span}"));
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        let kernel = self.kernel.lock();
        for (page, seen) in span.pages().zip(seen) {
            *seen = kernel.see(page);
        }
        Ok(())
    }
}

impl Sim {
    fn arm_block(&self, span: Span, piece: Span, token: ArmToken) -> Result<(), MmError> {
        let block = BlockGuard::lock(self, piece.start());
        let block = block.map_err(|NotHere| MmError::NotMirrored { span: piece })?;
        if block.region.token() != token {
            return Err(MmError::NotMirrored { span });
        }
        if self.injector.step(Step::Arm) {
            return Err(MmError::System {
                call: "watching a block",
                span: piece,
                errno: EAGAIN,
            });
        }
        let state = block.state();
        state.registered.store(true, Ordering::Release);
        state.armed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The block of `piece`, as long as any part of it is of the mapping that was armed.
    fn lock_what_is_left(&self, piece: Span, token: ArmToken) -> Option<BlockGuard<'_>> {
        let parts = self
            .kernel
            .lock()
            .parts
            .parts_in(Span::block_of(piece.start()));
        let ours = parts
            .into_iter()
            .filter(|part| part.region.token() == token);
        let mut blocks = ours.filter_map(|part| BlockGuard::lock(self, part.span.start()).ok());
        blocks.find(|block| block.region.token() == token)
    }

    /// Looks at the homes once.
    fn look(
        &self,
        span: Span,
        owner: Option<OwnerId>,
        intent: Intent,
        homes: &mut [Home],
    ) -> Result<Snapshot, MmError> {
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        for piece in span.blocks() {
            let region = {
                let kernel = self.kernel.lock();
                let part = kernel.parts.find(piece.start());
                let part = part.filter(|part| part.span.covers(piece));
                Arc::clone(&part.ok_or(MmError::NotMirrored { span: piece })?.region)
            };
            for page in piece.pages() {
                let home = region.word(page).get().home();
                homes[span.index_of(page)] = home;
                match home {
                    Home::System | Home::Unmapped => {}
                    Home::Coherent(_) if owner.is_some() => {}
                    Home::Protected if intent == Intent::Read => {}
                    Home::Protected => return Ok(self.unprotect_for_others(page)),
                    Home::Moving => {
                        // Whoever moves it holds the block; a dropped page needs somebody to.
                        let block = BlockGuard::lock_within(self, page.start(), RANGE_TIMEOUT);
                        if let Ok(Some(block)) = block {
                            block.release_dropped(piece);
                        }
                        return Ok(Snapshot::Moving);
                    }
                    Home::Device(device) if Some(self.memories.of(device).owner) == owner => {}
                    Home::Device(_) | Home::Coherent(_) => return self.bring_foreign_home(page),
                }
            }
        }
        Ok(Snapshot::Stable)
    }

    /// A device is about to write: with the protected pages around it.
    fn unprotect_for_others(&self, page: PageIndex) -> Snapshot {
        match BlockGuard::lock_within(self, page.start(), RANGE_TIMEOUT) {
            Ok(Some(block)) if block.region.word(page).get().protected => {
                block.unprotect(block.protected_around(page), Reason::Write);
                Snapshot::BroughtHome
            }
            _ => Snapshot::Moving,
        }
    }

    /// With what belongs to it. Pages of the asking owner in the same block stay.
    fn bring_foreign_home(&self, page: PageIndex) -> Result<Snapshot, MmError> {
        let at = page.start();
        let mut block = match BlockGuard::lock_within(self, at, RANGE_TIMEOUT) {
            Ok(Some(block)) => block,
            // Somebody moves its pages; or it is gone, which the next look finds.
            Ok(None) | Err(NotHere) => return Ok(Snapshot::Moving),
        };
        match block.bring_home(Span::page_of(at), Wanted::Device) {
            FaultOutcome::Served => {}
            FaultOutcome::NotBefore(due) => {
                drop(block);
                self.sleep_until(due);
                return Ok(Snapshot::Held);
            }
            FaultOutcome::Failed => return Err(MmError::StuckOnDevice { at }),
        }
        Ok(Snapshot::BroughtHome)
    }
}
