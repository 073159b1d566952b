//! The contract of an address space, kept by this process.

use super::{Process, piece_of};
use crate::block::{BlockGuard, NotHere};
use crate::fault;
use crate::fork::Pass;
use crate::region::Behind;
use crate::source::Arrival;
use crate::sys::procmap::RawVma;
use crate::sys::procmem::ProcMem;
use core::time::Duration;
use gpusvm_mm::device_page;
use gpusvm_mm::range_fault::{self, RANGE_TIMEOUT};
use gpusvm_mm::{
    AddressSpace, ArmToken, Block, DeviceMemoryId, DeviceMemoryOps, DevicePage, FaultOutcome, Home,
    Intent, Mirror, MmError, Notifiers, Reason, Seen, Snapshot, Time, Vma, VmaKind, Wanted,
};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{OwnerId, PageCount, PageIndex, Span, VirtAddr};
use rustix::io::Errno;

/// How often to look at a page that cannot be read, about 10 ms in all.
const LOOKS: u32 = 100;
/// How long between two of them.
const BETWEEN_LOOKS: Duration = Duration::from_micros(100);

impl AddressSpace for Process {
    type Block<'a> = BlockGuard<'a>;
    type NoFork<'a> = Pass<'a>;

    fn now(&self) -> Time {
        Time::since_start(self.began.elapsed())
    }

    fn find_vma(&self, at: VirtAddr) -> Result<Option<Vma>, MmError> {
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        if self.rung() == crate::Rung::Signals
            && let Some(part) = self.regions.find(at)
        {
            return Ok(Some(as_the_program_knows_it(part.span)));
        }
        let found = self.vmas.find(at).map_err(|errno| MmError::System {
            call: "looking a mapping up",
            span: Span::page_of(at),
            errno: errno.raw_os_error(),
        })?;
        Ok(found.map(|vma| Vma {
            span: vma.span,
            readable: vma.read,
            writable: vma.write,
            kind: self.kind_of(&vma, at),
        }))
    }

    fn is_readable(&self, at: VirtAddr) -> bool {
        // What moved here a moment ago is not lost, though some of it is elsewhere.
        self.settle_events();
        if !self.is_inherited()
            && let Some(part) = self.regions.find(at)
        {
            let word = part.region.word(at.page()).get();
            if !word.place.is_in_place() || !self.is_in_ram(at.page()) {
                return true;
            }
        }
        let reads = || {
            let read = ProcMem::open().and_then(|memory| memory.read(at, &mut [0]));
            read.is_ok_and(|read| read == 1)
        };
        if self.is_inherited() {
            return reads();
        }
        // Registered once, and nobody's since: the kernel knows of no page, and asks us. It refuses to
        // be told as long as mappings change.
        (0..LOOKS).any(|look| {
            if look > 0 {
                let arrival = Arrival {
                    at,
                    protected: false,
                    tid: None,
                    told: self.events_told(),
                };
                fault::serve_unknown(self, &arrival);
            }
            if look > 1 {
                std::thread::sleep(BETWEEN_LOOKS);
            }
            reads()
        })
    }

    fn mirrored(&self, at: VirtAddr) -> Mirror {
        match self.is_inherited() {
            true => Mirror::Gap(Span::page_of(at)),
            false => self.regions.mirror(at),
        }
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
        self.check_ours()?;
        self.memories.add(pages, owner, ops)
    }

    fn arm(&self, span: Span) -> Result<ArmToken, MmError> {
        gpusvm_sync::walk!("arm");
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        let part = self
            .regions
            .find(span.start())
            .filter(|part| part.span.covers(span));
        let token = part.ok_or(MmError::NotMirrored { span })?.region.token();
        // What was unmapped before is marked.
        self.source.fence();
        for piece in span.blocks() {
            let block = BlockGuard::lock(self, piece.start()).map_err(Self::not_mirrored(piece));
            // What is there of an unmapped page, if anything, is another mapping's: nobody would end what
            // began for it.
            let is_ours = |block: &BlockGuard<'_>| {
                let mut words = block.region.words_in(piece).iter();
                block.region.token() == token && !words.any(|word| word.get().unmapped)
            };
            let block = block.and_then(|block| match is_ours(&block) {
                true => Ok(block),
                false => Err(MmError::NotMirrored { span }),
            });
            if let Err(error) = block.and_then(|block| Self::arm_block(&block, piece)) {
                if let Ok(done) = Span::new(span.start(), piece.start()) {
                    self.disarm(done, token);
                }
                return Err(error);
            }
        }
        Ok(token)
    }

    fn disarm(&self, span: Span, token: ArmToken) {
        if self.is_inherited() {
            return;
        }
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
        self.watch_mapping(span)
    }

    fn unwatch(&self, span: Span, token: ArmToken) {
        if !self.is_inherited() {
            self.unwatch_mapping(span, token);
        }
    }

    fn watched(&self, at: VirtAddr, token: ArmToken) -> Option<Span> {
        self.watched_from(at, token)
    }

    fn no_fork(&self) -> Option<Self::NoFork<'_>> {
        self.gate.pass().filter(|_| !self.is_gone())
    }

    fn lock_block(&self, span: Span) -> Result<Self::Block<'_>, MmError> {
        gpusvm_sync::walk!("lock_block");
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        if piece_of(span, span.start()) != Some(span) {
            return Err(MmError::CrossesBlock { span });
        }
        let block = BlockGuard::lock_with_pass(self, span.start()).ok_or(MmError::Gone)?;
        let block = block.map_err(Self::not_mirrored(span))?;
        if block.span().covers(span) {
            Ok(block)
        } else {
            Err(MmError::NotMirrored { span })
        }
    }

    fn lock_device_page(&self, page: DevicePage) -> Option<(Self::Block<'_>, PageIndex)> {
        gpusvm_sync::walk!("lock_device_page");
        let lock = |at: PageIndex| BlockGuard::lock_with_pass(self, at.start())?.ok();
        device_page::lock_where_it_lives(|| self.memories.address_of(page), lock)
    }

    fn can_watch_writes(&self) -> bool {
        // In user mode a system call that writes a protected page would fail.
        let waits = matches!(self.rung(), crate::Rung::Move | crate::Rung::Copy);
        waits && self.mover.can_protect()
    }

    fn range_fault(
        &self,
        span: Span,
        owner: Option<OwnerId>,
        intent: Intent,
        homes: &mut [Home],
    ) -> Result<(), MmError> {
        let look = || self.look(span, owner, intent, homes);
        range_fault::until_stable(span, || self.now(), look)
    }

    fn snapshot(&self, span: Span, seen: &mut [Seen]) -> Result<(), MmError> {
        self.see(span, seen)
    }
}

impl Process {
    /// What is mirrored as one kind of memory migrates as such only: another kind can have come to its place
    /// unheard of.
    fn kind_of(&self, vma: &RawVma, at: VirtAddr) -> VmaKind {
        let mirrored = self.regions.find(at.max(vma.span.start()));
        let behind = mirrored.map(|part| part.region.behind());
        match behind {
            Some(Behind::File) if vma.private_file => VmaKind::PrivateFile,
            Some(Behind::Zeroes) | None if vma.is_plain() => VmaKind::PrivateAnonymous,
            _ => VmaKind::Other,
        }
    }

    fn arm_block(block: &BlockGuard<'_>, piece: Span) -> Result<(), MmError> {
        block
            .register(piece)
            .map_err(|errno: Errno| MmError::System {
                call: "registering with userfaultfd",
                span: block.span(),
                errno: errno.raw_os_error(),
            })?;
        block.state().armed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The block of `piece`, as long as any part of it is of the mapping that was armed.
    pub(super) fn lock_what_is_left(&self, piece: Span, token: ArmToken) -> Option<BlockGuard<'_>> {
        let parts = self.regions.parts_in(Span::block_of(piece.start()));
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
            let part = self
                .regions
                .find(piece.start())
                .filter(|part| part.span.covers(piece));
            let part = part.ok_or(MmError::NotMirrored { span: piece })?;
            for page in piece.pages() {
                let home = part.region.word(page).get().home();
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
                std::thread::sleep(due.since(self.now()));
                return Ok(Snapshot::Held);
            }
            FaultOutcome::Failed => return Err(MmError::StuckOnDevice { at }),
        }
        Ok(Snapshot::BroughtHome)
    }
}

/// On the last rung the engine closes and cuts mappings itself. What it mirrors there was allocated
/// here, so it is known what it was before.
const fn as_the_program_knows_it(span: Span) -> Vma {
    Vma {
        span,
        readable: true,
        writable: true,
        kind: VmaKind::PrivateAnonymous,
    }
}
