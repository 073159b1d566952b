//! Pages by userfaultfd: moved where the kernel can, copied where not.
//!
//! Only the destination of a MOVE must be registered, so there are two descriptors: one for the
//! program's memory, which reports faults and events, and one for the staging area, which nobody
//! ever reads because nobody ever touches a missing page there. A third is for memory that is only
//! watched: it reports unmaps and remaps.

use super::{Filled, Mover, Taken, slot_run};
use crate::region::BlockState;
use crate::sys::map;
use crate::sys::pagemap::{Categories, PageMap, Region as PageRegion};
use crate::sys::uffd::{CopyFlags, Features, MoveFlags, Progress, RegisterModes, Uffd};
use core::time::Duration;
use gpusvm_mm::{KeptReason, Source};
use gpusvm_sync::Arc;
use gpusvm_types::{BLOCK_SIZE, ByteSize, DmaAddr, PAGE_SIZE, PageCount, Span, VirtAddr};
use rustix::io::Errno;
use rustix::mm::MprotectFlags;

/// A page of zeroes.
#[repr(align(4096))]
struct Zeroes([u8; PAGE_SIZE.as_usize()]);

/// How pages are moved.
struct Errand<'a> {
    /// Whose the destination is.
    to: &'a Uffd,
    /// Who waits for the destination goes on waiting.
    dont_wake: bool,
    patience: u32,
}

/// How often a call that says `EAGAIN` is made again by and by: about a second.
const PATIENT: u32 = 10_000;
/// As often as it takes to find out that it will not do to wait here.
const HASTY: u32 = 3;
/// How many of the tries only yield.
const YIELDS: u32 = 64;
const NAP: Duration = Duration::from_micros(100);

/// Pages by userfaultfd.
#[derive(Debug)]
pub(crate) struct UffdMover {
    /// The program's memory. Shared with who reads it.
    program: Arc<Uffd>,
    /// Memory that is only watched, where there is write protection. Shared likewise.
    watcher: Option<Arc<Uffd>>,
    /// The staging area, where pages can be moved.
    staging: Option<Uffd>,
    pages: PageMap,
}

impl UffdMover {
    /// With the descriptors of the program's memory, of what of it is only watched, and, where pages can
    /// be moved, that of staging.
    pub(crate) fn new(
        program: Arc<Uffd>,
        watcher: Option<Arc<Uffd>>,
        staging: Option<Uffd>,
    ) -> Result<Self, Errno> {
        Ok(Self {
            program,
            watcher,
            staging,
            pages: PageMap::open()?,
        })
    }

    /// Moves out as far as it goes, around pages that do not move.
    fn move_out(
        &self,
        run: Span,
        slot: VirtAddr,
        sources: &mut [Source],
        block: &BlockState,
    ) -> Result<Taken, Errno> {
        let Some(staging) = &self.staging else {
            return self.protect_in_place(run, sources);
        };
        let mut rest = Some(run);
        let mut broke_sharing = None;
        while let Some(left) = rest {
            let to = slot + left.start().offset_from(run.start());
            let moved = self.move_to_slot(staging, left, to);
            rest = Span::new(left.start() + moved.done, left.end()).ok();
            let (Some(errno), Some(left)) = (moved.errno, rest) else {
                break;
            };
            let stuck = Span::page_of(left.start());
            let source = &mut sources[run.index_of(stuck.first_page())];
            match errno {
                // Shared with a child of fork: a write makes it ours. Pinned: it stays.
                Errno::BUSY if broke_sharing != Some(stuck) => {
                    broke_sharing = Some(stuck);
                    self.break_sharing(left, block);
                    continue;
                }
                Errno::BUSY => *source = Source::Kept(KeptReason::Busy),
                Errno::NOENT | Errno::FAULT => *source = Source::Kept(KeptReason::Unmapped),
                // A kind of memory that does not move: read-only, locked, several mappings.
                Errno::INVAL if left == run => return self.protect_in_place(run, sources),
                errno if left == run => return Err(errno),
                _ => {
                    let first = run.index_of(stuck.first_page());
                    sources[first..].fill(Source::Kept(KeptReason::Busy));
                    break;
                }
            }
            rest = Span::new(stuck.end(), left.end()).ok();
        }
        match self.note_holes(slot_run(run, slot), sources) {
            Ok(huge) => Ok(Taken::Moved { huge }),
            Err(errno) => {
                let _ = self.put_back(run, slot);
                Err(errno)
            }
        }
    }

    fn move_to_slot(&self, staging: &Uffd, from: Span, to: VirtAddr) -> Progress {
        let errand = Errand {
            to: staging,
            dont_wake: true,
            patience: PATIENT,
        };
        // SAFETY: the block is locked, so whoever touches a page of it waits until it is put back
        // or settled; or it is the nursery's. The slot is ours and empty there.
        unsafe { self.move_all(from, to, &errand) }
    }

    /// Moves as far as it goes; holes stay holes, and count as moved.
    ///
    /// Linux 6.18 loses count after a race that it resolves by itself: it tries once more what it has
    /// just done. For a page, that ends with `EEXIST`, so a page that is gone at its old place has
    /// moved, whatever is said. For a hole, where holes are allowed, it never ends; so they are not
    /// allowed, and passed over here.
    ///
    /// # Safety
    ///
    /// As [`Uffd::move_pages`].
    unsafe fn move_all(&self, from: Span, to: VirtAddr, errand: &Errand<'_>) -> Progress {
        let flags = MoveFlags {
            allow_holes: false,
            dont_wake: errand.dont_wake,
        };
        let mut done = ByteSize::ZERO;
        loop {
            let moved = again(errand.patience, |more| {
                let done = done + more;
                let (dst, src, len) = (to + done, from.start() + done, from.len() - done);
                // SAFETY: as the caller promises.
                unsafe { errand.to.move_pages(dst, src, len, flags) }
            });
            done += moved.done;
            let left = Span::new(from.start() + done, from.end());
            let (Some(Errno::EXIST | Errno::NOENT), Ok(left)) = (moved.errno, left) else {
                let errno = moved.errno;
                return Progress { done, errno };
            };
            let gone = match moved.errno {
                Some(Errno::EXIST) => self.hole_at(Span::page_of(left.start())),
                _ => self.hole_at(left),
            };
            if gone.is_zero() {
                let errno = moved.errno;
                return Progress { done, errno };
            }
            done += gone;
            if done == from.len() {
                return Progress { done, errno: None };
            }
        }
    }

    /// How much of `span` is a hole, from its start on.
    fn hole_at(&self, span: Span) -> ByteSize {
        let mut next = [PageRegion::EMPTY];
        match self.pages.scan(span, &mut next) {
            Ok(scanned) if scanned.regions == 0 => span.len(),
            Ok(_) => next[0].start.max(span.start()).offset_from(span.start()),
            Err(_) => ByteSize::ZERO,
        }
    }

    /// Makes the pages that are there at the start of `left` the process' own.
    fn break_sharing(&self, left: Span, block: &BlockState) {
        let mut there = [PageRegion::EMPTY];
        // Holes must stay holes: only as far as pages are.
        let extent = match self.pages.scan(left, &mut there) {
            Ok(scanned) if scanned.regions == 1 => Span::new(there[0].start, there[0].end).ok(),
            _ => None,
        };
        let extent = extent.and_then(|extent| extent.intersection(left));
        let extent = extent.unwrap_or_else(|| Span::page_of(left.start()));
        // Should it fail, the page says so once more, and is kept.
        let _ = block.breaking_sharing(|| map::populate_write(extent));
    }

    /// Keeps writers out; the pages stay where they are until they are copied.
    fn protect_in_place(&self, run: Span, sources: &mut [Source]) -> Result<Taken, Errno> {
        sources.fill(Source::Hole);
        if self.program.features().contains(Features::WP) {
            self.write_protect(run, true)?;
        }
        match self.note_holes(run, sources) {
            Ok(_) => Ok(Taken::InPlace),
            Err(errno) => {
                self.release(run);
                Err(errno)
            }
        }
    }

    /// The zero page comes where nothing is.
    fn fill_gaps(&self, run: Span) -> Result<(), Errno> {
        let mut there = [PageRegion::EMPTY; 64];
        let mut rest = Some(run);
        while let Some(left) = rest {
            let scanned = self.pages.scan(left, &mut there)?;
            let mut at = left.start();
            let found = &there[..scanned.regions];
            let ends = found.iter().map(|region| (region.start, region.end));
            for (start, end) in ends.chain([(scanned.until, scanned.until)]) {
                if let Ok(gap) = Span::new(at, start) {
                    self.zero_fill(gap);
                }
                at = end;
            }
            rest = Span::new(scanned.until, run.end()).ok();
        }
        Ok(())
    }

    fn write_protect(&self, run: Span, on: bool) -> Result<(), Errno> {
        let protected = again(PATIENT, |_| Progress {
            done: ByteSize::ZERO,
            errno: self.program.write_protect(run, on, false).err(),
        });
        protected.errno.map_or(Ok(()), Err)
    }

    /// Finds out which of the pages that are expected at `there` are none, and says where the others
    /// are. Whether they are all one huge page.
    fn note_holes(&self, there: Span, sources: &mut [Source]) -> Result<bool, Errno> {
        let mut seen = [PageRegion::EMPTY; 64];
        let mut huge = false;
        let mut rest = Some(there);
        while let Some(left) = rest {
            let scanned = self.pages.scan(left, &mut seen)?;
            for region in &seen[..scanned.regions] {
                if region.categories.contains(Categories::ZERO) {
                    continue;
                }
                let span = Span::new(region.start, region.end).ok();
                let Some(span) = span.and_then(|span| span.intersection(there)) else {
                    continue;
                };
                huge = span.len() == BLOCK_SIZE && region.categories.contains(Categories::HUGE);
                let first = there.index_of(span.first_page());
                let pages = span.page_count().as_usize();
                let mut at = DmaAddr::new(span.start().get());
                for source in &mut sources[first..first + pages] {
                    if *source == Source::Hole {
                        *source = Source::Page(at);
                    }
                    at = at + PAGE_SIZE;
                }
            }
            rest = Span::new(scanned.until, there.end()).ok();
        }
        Ok(huge)
    }
}

impl Mover for UffdMover {
    fn arm(&self, span: Span) -> Result<(), Errno> {
        let wp = self.program.features().contains(Features::WP);
        let modes = RegisterModes { missing: true, wp };
        // SAFETY: the handlers serve every fault of mirrored memory.
        match (unsafe { self.program.register(span, modes) }, &self.watcher) {
            (Err(Errno::BUSY), Some(watcher)) => match (watcher.unregister(span), halves(span)) {
                // It was watched. If it is somebody else's, that refuses as well.
                // SAFETY: as above.
                (Ok(()), _) => unsafe { self.program.register(span, modes) },
                // Some of it was, some is registered already.
                (Err(_), Some([low, high])) => self.arm(low).and_then(|()| self.arm(high)),
                (Err(_), None) => Err(Errno::BUSY),
            },
            (registered, _) => registered,
        }
    }

    fn watch(&self, span: Span) -> Result<(), Errno> {
        let watcher = self.watcher.as_ref().ok_or(Errno::NOSYS)?;
        let modes = RegisterModes {
            missing: false,
            wp: true,
        };
        // SAFETY: nothing is ever write-protected by this descriptor, so no touch waits.
        unsafe { watcher.register(span, modes) }
    }

    fn unwatch(&self, span: Span) {
        if let Some(watcher) = &self.watcher {
            unregister(watcher, span);
        }
    }

    fn disarm(&self, span: Span) {
        unregister(&self.program, span);
    }

    fn takes_to_slot(&self) -> bool {
        self.staging.is_some()
    }

    fn is_huge(&self, page: Span) -> bool {
        let mut there = [PageRegion::EMPTY];
        let scanned = self.pages.scan(page, &mut there);
        scanned.is_ok_and(|scanned| {
            scanned.regions == 1 && there[0].categories.contains(Categories::HUGE)
        })
    }

    fn take_out(
        &self,
        run: Span,
        slot: VirtAddr,
        sources: &mut [Source],
        block: &BlockState,
    ) -> Result<Taken, Errno> {
        gpusvm_sync::walk!("take_out");
        sources.fill(Source::Hole);
        self.move_out(run, slot, sources, block)
    }

    fn settle(&self, run: Span, block: &BlockState) {
        if self.program.features().contains(Features::EVENT_REMOVE) {
            block.expect_removes(run);
        }
        // SAFETY: the bytes live elsewhere now; whoever touches a page waits for the block.
        let dropped = unsafe { map::discard(run) };
        debug_assert!(
            dropped.is_ok() || dropped == Err(Errno::NOMEM),
            "{run}: {dropped:?}"
        );
    }

    fn can_protect(&self) -> bool {
        self.program.features().contains(Features::WP)
    }

    fn protect(&self, run: Span, sources: &mut [Source]) -> Result<(), Errno> {
        self.fill_gaps(run)?;
        self.write_protect(run, true)?;
        // What was dropped since is missing, and a touch of it is caught as one.
        sources.fill(Source::Hole);
        self.note_holes(run, sources).map(drop)
    }

    fn release(&self, run: Span) {
        if self.write_protect(run, false).is_ok() {
            return;
        }
        // Part of it was unmapped meanwhile, or is another mapping's. The others can be written, and
        // who waits is woken, which the kernel does only where it refuses nothing.
        for page in run.pages() {
            let page = Span::page_of(page.start());
            // Refused: it is not registered, so nobody keeps writers out.
            let _ = self.program.write_protect(page, false, false);
        }
        self.wake(run);
    }

    fn put_back(&self, run: Span, slot: VirtAddr) -> Filled {
        let errand = Errand {
            to: &self.program,
            dont_wake: false,
            patience: HASTY,
        };
        // SAFETY: the slot holds what the pages are to become, and the run is missing.
        let moved = unsafe { self.move_all(slot_run(run, slot), run.start(), &errand) };
        Filled {
            done: moved.done,
            moved: true,
            errno: moved.errno,
        }
    }

    fn fill(&self, run: Span, slot: VirtAddr) -> Filled {
        gpusvm_sync::walk!("fill");
        if !self.moves_in(run.len()) {
            return self.fill_copy(run, slot);
        }
        let moved = self.put_back(run, slot);
        // Read-only or locked: such memory takes copies only.
        if moved.errno == Some(Errno::INVAL) && moved.done.is_zero() {
            self.fill_copy(run, slot)
        } else {
            moved
        }
    }

    fn fill_copy(&self, run: Span, slot: VirtAddr) -> Filled {
        // SAFETY: the slot holds what the pages are to become, and the run is missing.
        let copied = again(HASTY, |done| unsafe {
            let len = run.len() - done;
            self.program
                .copy(run.start() + done, slot + done, len, CopyFlags::default())
        });
        Filled {
            done: copied.done,
            moved: false,
            errno: copied.errno,
        }
    }

    /// A slot that gives some of its pages away is no longer warm, so only whole blocks move.
    fn moves_in(&self, len: ByteSize) -> bool {
        self.staging.is_some() && len == BLOCK_SIZE
    }

    fn warm_up(&self, from: Span, to: VirtAddr) -> Result<(), Errno> {
        let Some(staging) = &self.staging else {
            return map::populate(slot_run(from, to));
        };
        let moved = self.move_to_slot(staging, from, to);
        moved.errno.map_or(Ok(()), Err)
    }

    fn zero_fill(&self, run: Span) -> bool {
        let mut any = false;
        let mut rest = Some(run);
        while let Some(left) = rest {
            let mut filled = self.program.zeropage(left, false);
            if filled.errno == Some(Errno::NOENT) && filled.done.is_zero() {
                // No one mapping has all of it: pages of it are there all the same.
                filled = self.program.zeropage(Span::page_of(left.start()), false);
            }
            any |= !filled.done.is_zero();
            let stopped_early = filled.errno == Some(Errno::AGAIN) && filled.done.is_zero();
            if stopped_early {
                // An event must be read first, maybe by this very thread.
                break;
            }
            // A page that is there already is passed over; nothing else can be done about others.
            let passed = if filled.is_complete() || !filled.done.is_zero() {
                ByteSize::ZERO
            } else {
                PAGE_SIZE
            };
            rest = Span::new(left.start() + filled.done + passed, left.end()).ok();
        }
        self.wake(run);
        any
    }

    fn zero_fill_protected(&self, page: Span) {
        static ZEROES: Zeroes = Zeroes([0; PAGE_SIZE.as_usize()]);
        let flags = CopyFlags {
            dont_wake: false,
            wp: true,
        };
        let from = VirtAddr::new(ZEROES.0.as_ptr().addr() as u64);
        // SAFETY: the page is missing, and zero; should it be there, nothing happens.
        let filled = again(HASTY, |_| unsafe {
            self.program.copy(page.start(), from, page.len(), flags)
        });
        if filled.errno.is_some() {
            self.wake(page);
        }
    }

    fn wake(&self, span: Span) {
        // Fails when it was unmapped meanwhile: then the kernel wakes them.
        let _ = self.program.wake(span);
    }

    fn poison(&self, page: Span) {
        if self.program.features().contains(Features::POISON) {
            let poison = |_| self.program.poison(page, false);
            let _ = again(PATIENT, poison);
        } else {
            // SAFETY: what the page held is out of reach: who touches it is not to read zeroes.
            let _ = unsafe { map::protect(page, MprotectFlags::empty()) };
        }
        self.wake(page);
    }
}

/// Whatever of `span` is registered with `uffd`. What was unmapped meanwhile refuses, or is registered with
/// another, which is the end of it as well; but with it all else refuses too.
fn unregister(uffd: &Uffd, span: Span) {
    if let (Err(_), Some(halves)) = (uffd.unregister(span), halves(span)) {
        halves.into_iter().for_each(|half| unregister(uffd, half));
    }
}

/// Both halves of what is more than a page.
fn halves(span: Span) -> Option<[Span; 2]> {
    let low = PageCount::new(span.page_count().get() / 2);
    let middle = (span.first_page() + low).start();
    let low = Span::new(span.start(), middle).ok()?;
    Some([low, Span::new(middle, span.end()).ok()?])
}

/// Repeats a call from where it got to, as long as it says `EAGAIN`: without bound while it gets on,
/// else so many times.
fn again(patience: u32, mut call: impl FnMut(ByteSize) -> Progress) -> Progress {
    let mut done = ByteSize::ZERO;
    let mut stuck = 0;
    loop {
        let progress = call(done);
        done += progress.done;
        stuck = if progress.done.is_zero() {
            stuck + 1
        } else {
            0
        };
        if progress.errno != Some(Errno::AGAIN) || stuck == patience {
            let errno = progress.errno;
            return Progress { done, errno };
        }
        match stuck {
            0 => {}
            1..YIELDS => std::thread::yield_now(),
            _ => std::thread::sleep(NAP),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many calls are made when the first so many get on by a page, and all say `EAGAIN`.
    fn calls(patience: u32, get_on: u32) -> u32 {
        let mut calls = 0;
        let progress = again(patience, |_| {
            calls += 1;
            let done = if calls <= get_on {
                PAGE_SIZE
            } else {
                ByteSize::ZERO
            };
            Progress {
                done,
                errno: Some(Errno::AGAIN),
            }
        });
        assert_eq!(progress.errno, Some(Errno::AGAIN));
        assert_eq!(
            progress.done,
            ByteSize::new(PAGE_SIZE.get() * u64::from(get_on))
        );
        calls
    }

    #[test]
    fn a_call_that_gets_nowhere_is_made_so_often() {
        for patience in [HASTY, PATIENT] {
            assert_eq!(calls(patience, 0), patience);
            assert_eq!(calls(patience, 20), 20 + patience, "what gets on is no try");
        }
    }
}
