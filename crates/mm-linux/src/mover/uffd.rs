//! Pages by userfaultfd: moved where the kernel can, copied where not.
//!
//! Only the destination of a MOVE must be registered, so there are two descriptors: one for the
//! program's memory, which reports faults and events, and one for the staging area, which nobody
//! ever reads because nobody ever touches a missing page there.

use super::{Filled, Mover, slot_run};
use crate::region::BlockState;
use crate::sys::map;
use crate::sys::pagemap::{Categories, PageMap, Region as PageRegion};
use crate::sys::uffd::{CopyFlags, Features, MoveFlags, Progress, RegisterModes, Uffd};
use gpusvm_mm::{KeptReason, Source};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, DmaAddr, PAGE_SIZE, Span, VirtAddr};
use rustix::io::Errno;

/// How often a system call is made again because mappings were changing.
const MAX_AGAIN: u32 = 10_000;
/// Runs up to this long are copied in: one MOVE per page is slower.
const COPY_UP_TO: ByteSize = ByteSize::kib(64);

/// Pages by userfaultfd.
#[derive(Debug)]
pub(crate) struct UffdMover {
    /// The program's memory. Shared with who reads it.
    program: Arc<Uffd>,
    /// The staging area, where pages can be moved.
    staging: Option<Uffd>,
    pages: PageMap,
}

impl UffdMover {
    /// With the descriptor of the program's memory and, where pages can be moved, that of staging.
    pub(crate) fn new(program: Arc<Uffd>, staging: Option<Uffd>) -> Result<Self, Errno> {
        Ok(Self {
            program,
            staging,
            pages: PageMap::open()?,
        })
    }

    /// Moves out as far as it goes, around pages that do not move.
    fn move_out(
        &self,
        staging: &Uffd,
        run: Span,
        slot: VirtAddr,
        sources: &mut [Source],
    ) -> Result<(), Errno> {
        let flags = MoveFlags {
            allow_holes: true,
            dont_wake: true,
        };
        let mut rest = Some(run);
        let mut broke_sharing = None;
        while let Some(left) = rest {
            let to = slot + left.start().offset_from(run.start());
            // SAFETY: the block is locked, so whoever touches a page of it waits until it is put
            // back or settled; the slot is ours and empty there.
            let moved = again(|done| unsafe {
                staging.move_pages(to + done, left.start() + done, left.len() - done, flags)
            });
            rest = Span::new(left.start() + moved.done, left.end()).ok();
            let Some(errno) = moved.errno else { continue };
            let Some(stuck) = rest.map(|rest| Span::page_of(rest.start())) else {
                break;
            };
            match errno {
                // Shared with a child of fork: a write makes it ours. Pinned: it stays.
                Errno::BUSY if broke_sharing != Some(stuck) => {
                    broke_sharing = Some(stuck);
                    let _ = map::populate_write(stuck);
                }
                Errno::BUSY => {
                    sources[run.index_of(stuck.first_page())] = Source::Kept(KeptReason::Busy);
                    rest = Span::new(stuck.end(), left.end()).ok();
                }
                Errno::NOENT | Errno::FAULT => {
                    sources[run.index_of(stuck.first_page())] = Source::Kept(KeptReason::Unmapped);
                    rest = Span::new(stuck.end(), left.end()).ok();
                }
                errno => {
                    let first = run.index_of(stuck.first_page());
                    return self.undo_or_copy(run, slot, sources, first, errno);
                }
            }
        }
        self.note_holes(slot_run(run, slot), slot, sources)
    }

    /// A kind of memory that does not move, found at the `first`-th page: read-only, locked. What
    /// did move goes back, and the run is copied.
    fn undo_or_copy(
        &self,
        run: Span,
        slot: VirtAddr,
        sources: &mut [Source],
        first: usize,
        errno: Errno,
    ) -> Result<(), Errno> {
        for source in &mut sources[first..] {
            *source = Source::Kept(KeptReason::Busy);
        }
        self.note_holes(slot_run(run, slot), slot, sources)?;
        self.put_back(run, slot, sources)?;
        if errno != Errno::INVAL {
            return Err(errno);
        }
        self.protect_in_place(run, sources)
    }

    /// Keeps writers out; the pages stay where they are until they are copied.
    fn protect_in_place(&self, run: Span, sources: &mut [Source]) -> Result<(), Errno> {
        if self.program.features().contains(Features::WP) {
            self.program.write_protect(run, true, true)?;
        }
        sources.fill(Source::Page(DmaAddr::new(0)));
        self.note_holes(run, run.start(), sources)
    }

    /// Finds out which of the pages that are expected at `there` are none, and says where the others
    /// are.
    fn note_holes(&self, there: Span, base: VirtAddr, sources: &mut [Source]) -> Result<(), Errno> {
        let mut seen = [PageRegion::EMPTY; 64];
        for source in sources.iter_mut().filter(|source| source.is_collected()) {
            *source = Source::Hole;
        }
        let mut rest = Some(there);
        while let Some(left) = rest {
            let scanned = self.pages.scan(left, &mut seen)?;
            for region in &seen[..scanned.regions] {
                if region.categories.contains(Categories::ZERO) {
                    continue;
                }
                let region = Span::new(region.start, region.end).ok();
                let Some(region) = region.and_then(|region| region.intersection(there)) else {
                    continue;
                };
                for page in region.pages() {
                    let source = &mut sources[there.index_of(page)];
                    if *source == Source::Hole {
                        let offset = page.start().offset_from(there.start());
                        *source = Source::Page(DmaAddr::new((base + offset).get()));
                    }
                }
            }
            rest = Span::new(scanned.until, there.end()).ok();
        }
        Ok(())
    }

    /// Whether the bytes of a run that was taken out are still in place.
    fn is_in_place(run: Span, sources: &[Source]) -> bool {
        run.pages()
            .zip(sources)
            .any(|(page, source)| *source == Source::Page(DmaAddr::new(page.start().get())))
    }

    fn copy_in(&self, run: Span, from: VirtAddr) -> Result<(), Errno> {
        // SAFETY: the slot holds what the pages are to become, and the run is missing.
        let copied = again(|done| unsafe {
            let len = run.len() - done;
            self.program
                .copy(run.start() + done, from + done, len, CopyFlags::default())
        });
        copied.errno.map_or(Ok(()), Err)
    }

    fn move_in(&self, run: Span, from: VirtAddr) -> Progress {
        let flags = MoveFlags {
            allow_holes: true,
            dont_wake: false,
        };
        // SAFETY: the slot holds what the pages are to become, and the run is missing.
        again(|done| unsafe {
            self.program
                .move_pages(run.start() + done, from + done, run.len() - done, flags)
        })
    }
}

impl Mover for UffdMover {
    fn arm(&self, span: Span) -> Result<(), Errno> {
        let wp = self.program.features().contains(Features::WP);
        // SAFETY: the handlers serve every fault of mirrored memory.
        unsafe {
            self.program
                .register(span, RegisterModes { missing: true, wp })
        }
    }

    fn disarm(&self, span: Span) {
        // Fails when it was unmapped meanwhile, which is the end of it as well.
        let _ = self.program.unregister(span);
    }

    fn takes_to_slot(&self) -> bool {
        self.staging.is_some()
    }

    fn take_out(&self, run: Span, slot: VirtAddr, sources: &mut [Source]) -> Result<(), Errno> {
        sources.fill(Source::Hole);
        match &self.staging {
            Some(staging) => self.move_out(staging, run, slot, sources),
            None => self.protect_in_place(run, sources),
        }
    }

    fn settle(&self, run: Span, sources: &[Source], block: &BlockState) {
        if !Self::is_in_place(run, sources) {
            return;
        }
        for (page, source) in run.pages().zip(sources) {
            if !source.is_collected() {
                let _ = self
                    .program
                    .write_protect(Span::page_of(page.start()), false, false);
            }
        }
        for piece in collected_runs(run, sources) {
            block.expect_remove(piece);
            // SAFETY: the bytes live elsewhere now; whoever touches the page waits for the block.
            let dropped = unsafe { map::discard(piece) };
            debug_assert!(
                dropped.is_ok() || dropped == Err(Errno::NOMEM),
                "{piece}: {dropped:?}"
            );
            // Its event was read before it returned, unless there are no such events.
            let _ = block.is_own_remove(piece);
        }
    }

    fn put_back(&self, run: Span, slot: VirtAddr, sources: &[Source]) -> Result<(), Errno> {
        if Self::is_in_place(run, sources) {
            let _ = self.program.write_protect(run, false, false);
            return Ok(());
        }
        let mut result = Ok(());
        for piece in collected_runs(run, sources) {
            let from = slot + piece.start().offset_from(run.start());
            if let Some(errno) = self.move_in(piece, from).errno {
                result = Err(errno);
            }
        }
        result
    }

    fn fill(&self, run: Span, slot: VirtAddr) -> Result<Filled, Errno> {
        if self.staging.is_none() || run.len() <= COPY_UP_TO {
            return self.copy_in(run, slot).map(|()| Filled::Copied);
        }
        let moved = self.move_in(run, slot);
        match moved.errno {
            None => Ok(Filled::Moved),
            // Read-only or locked: such memory takes copies only.
            Some(Errno::INVAL) if moved.done.is_zero() => {
                self.copy_in(run, slot).map(|()| Filled::Copied)
            }
            Some(errno) => Err(errno),
        }
    }

    fn warm_up(&self, from: Span, to: VirtAddr) -> Result<(), Errno> {
        let Some(staging) = &self.staging else {
            return map::populate_write(slot_run(from, to));
        };
        // SAFETY: both are ours, and the slot is empty.
        let moved = again(|done| unsafe {
            let flags = MoveFlags::default();
            staging.move_pages(to + done, from.start() + done, from.len() - done, flags)
        });
        moved.errno.map_or(Ok(()), Err)
    }

    fn zero_fill(&self, run: Span) {
        let mut rest = Some(run);
        while let Some(left) = rest {
            let filled = again(|done| {
                let left = Span::new(left.start() + done, left.end());
                left.map_or_else(
                    |_| Progress {
                        done: ByteSize::ZERO,
                        errno: None,
                    },
                    |left| self.program.zeropage(left, false),
                )
            });
            // A page that is there already is passed over; nothing else can be done about others.
            let passed = if filled.is_complete() {
                ByteSize::ZERO
            } else {
                PAGE_SIZE
            };
            rest = Span::new(left.start() + filled.done + passed, left.end()).ok();
        }
        self.wake(run);
    }

    fn wake(&self, span: Span) {
        // Fails when it was unmapped meanwhile: then the kernel wakes them.
        let _ = self.program.wake(span);
    }

    fn poison(&self, page: Span) {
        if !self.program.features().contains(Features::POISON)
            || !self.program.poison(page, false).is_complete()
        {
            // Without poison the thread would fault for ever: it gets what a lost page is.
            self.zero_fill(page);
        }
    }
}

/// Repeats a call from where it got to, as long as it says `EAGAIN`, up to a bound.
fn again(mut call: impl FnMut(ByteSize) -> Progress) -> Progress {
    let mut done = ByteSize::ZERO;
    for _ in 0..MAX_AGAIN {
        let progress = call(done);
        done += progress.done;
        match progress.errno {
            Some(Errno::AGAIN) => std::thread::yield_now(),
            errno => return Progress { done, errno },
        }
    }
    Progress {
        done,
        errno: Some(Errno::AGAIN),
    }
}

/// The longest pieces of `run` in which every page was taken out.
fn collected_runs(run: Span, sources: &[Source]) -> impl Iterator<Item = Span> {
    let mut pages = run.pages().zip(sources).peekable();
    core::iter::from_fn(move || {
        let (first, _) = pages.find(|(_, source)| source.is_collected())?;
        let mut piece = Span::page_of(first.start());
        while let Some((page, _)) = pages.next_if(|(_, source)| source.is_collected()) {
            piece = piece.union(Span::page_of(page.start()));
        }
        Some(piece)
    })
}
