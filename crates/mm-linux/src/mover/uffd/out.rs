//! Pages on their way: out of the program's memory, around those that do not move.

use super::UffdMover;
use super::again::{PATIENT, again};
use crate::mover::{Mover, Taken, slot_run};
use crate::region::BlockState;
use crate::sys::map;
use crate::sys::pagemap::{Categories, Region as PageRegion};
use crate::sys::uffd::{Features, MoveFlags, Progress, Uffd};
use gpusvm_mm::{KeptReason, Source};
use gpusvm_types::{BLOCK_SIZE, ByteSize, DmaAddr, PAGE_SIZE, Span, VirtAddr};
use rustix::io::Errno;

/// How pages are moved.
pub(super) struct Errand<'a> {
    /// Whose the destination is.
    pub(super) to: &'a Uffd,
    /// Who waits for the destination goes on waiting.
    pub(super) dont_wake: bool,
    pub(super) patience: u32,
}

impl UffdMover {
    /// Moves out as far as it goes, around pages that do not move.
    pub(super) fn move_out(
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
        let mut cleared = None;
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
                // Left behind by what was given up while it was elsewhere: there is nothing.
                Errno::FAULT
                    if self.has_markers()
                        && cleared != Some(stuck)
                        && self.clear_stale_markers(left) =>
                {
                    cleared = Some(stuck);
                    continue;
                }
                Errno::BUSY => *source = Source::Kept(KeptReason::Busy),
                Errno::NOENT | Errno::FAULT => *source = Source::Kept(KeptReason::Unmapped),
                // A kind of memory that does not move: read-only, locked, of a file, several mappings.
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

    pub(super) fn move_to_slot(&self, staging: &Uffd, from: Span, to: VirtAddr) -> Progress {
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
    pub(super) unsafe fn move_all(
        &self,
        from: Span,
        to: VirtAddr,
        errand: &Errand<'_>,
    ) -> Progress {
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
        match self
            .unmark_holes(run)
            .and_then(|()| self.note_holes(run, sources))
        {
            Ok(_) => Ok(Taken::InPlace),
            Err(errno) => {
                self.release(run);
                Err(errno)
            }
        }
    }

    /// Finds out which of the pages that are expected at `there` are none, and says where the others
    /// are. Whether they are all one huge page.
    pub(super) fn note_holes(&self, there: Span, sources: &mut [Source]) -> Result<bool, Errno> {
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
                if region.categories.contains(Categories::FILE) {
                    sources[first..first + pages].fill(Source::Kept(KeptReason::OfFile));
                    continue;
                }
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
