//! What shows where pages were that live elsewhere: write-protection of pages that are not there.
//!
//! The kernel keeps it as a marker in the page table, which `/proc/self/pagemap` shows as swapped out. A touch finds
//! such a page missing like any other. But of all that fills pages, only a copy comes where a marker is; and a
//! marker does not move.

use super::UffdMover;
use super::again::{HASTY, again};
use crate::sys::pagemap::{Categories, Region as PageRegion};
use crate::sys::uffd::{CopyFlags, Features, Progress};
use gpusvm_types::{PAGE_SIZE, Span, VirtAddr};
use rustix::io::Errno;

/// A page of zeroes.
#[repr(align(4096))]
struct Zeroes([u8; PAGE_SIZE.as_usize()]);

static ZEROES: Zeroes = Zeroes([0; PAGE_SIZE.as_usize()]);

impl UffdMover {
    /// Whether there are any.
    pub(super) fn has_markers(&self) -> bool {
        self.program.features().contains(Features::WP_UNPOPULATED)
    }

    /// Marks the pages of `run`, none of which is there, or takes the marks off.
    pub(super) fn set_markers(&self, run: Span, on: bool) -> Result<(), Errno> {
        match self.has_markers() {
            // Nobody waits for a mark.
            true => self.program.write_protect(run, on, !on),
            false => Ok(()),
        }
    }

    /// Fills a page that is not there but for a marker, with zeroes. Whether it did.
    pub(super) fn zero_fill_marked(&self, page: Span) -> bool {
        self.has_markers() && self.copy_zeroes(page, false).is_complete()
    }

    /// Zeroes come where no page is; their writes are caught, or not.
    pub(super) fn copy_zeroes(&self, page: Span, protected: bool) -> Progress {
        let flags = CopyFlags {
            dont_wake: false,
            wp: protected,
        };
        let from = VirtAddr::new(ZEROES.0.as_ptr().addr() as u64);
        // SAFETY: the page is missing, and zero; should it be there, nothing happens.
        again(HASTY, |_| unsafe {
            self.program.copy(page.start(), from, page.len(), flags)
        })
    }

    /// Takes the markers off that a protection of `run` has put where no page is: what is not there is a hole
    /// there, and no page that was swapped out.
    pub(super) fn unmark_holes(&self, run: Span) -> Result<(), Errno> {
        if !self.has_markers() {
            return Ok(());
        }
        self.each_swapped(run, |swapped| {
            self.set_markers(swapped, false)?;
            // What still shows so has been swapped out, and is to be protected.
            self.each_swapped(swapped, |page| self.write_protect(page, true))
        })
    }

    /// Calls `each` with the runs of pages of `run` that are swapped out, or show so.
    fn each_swapped(
        &self,
        run: Span,
        mut each: impl FnMut(Span) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut there = [PageRegion::EMPTY; 16];
        let mut rest = Some(run);
        // A scan that stops early has reported a run, so it came further.
        while let Some(left) = rest {
            let scanned = self.pages.scan(left, &mut there)?;
            let found = there[..scanned.regions].iter();
            for region in found.filter(|it| !it.categories.contains(Categories::PRESENT)) {
                if let Ok(swapped) = Span::new(region.start, region.end)
                    && let Some(swapped) = swapped.intersection(run)
                {
                    each(swapped)?;
                }
            }
            rest = Span::new(scanned.until, run.end()).ok();
        }
        Ok(())
    }

    /// Takes the markers off with which `left` begins, for what is not there to be a hole. Whether there were
    /// any.
    pub(super) fn clear_stale_markers(&self, left: Span) -> bool {
        let mut there = [PageRegion::EMPTY];
        let scanned = self.pages.scan(left, &mut there);
        let begins = scanned.is_ok_and(|scanned| scanned.regions == 1)
            && there[0].start <= left.start()
            && !there[0].categories.contains(Categories::PRESENT);
        let run = Span::new(left.start(), there[0].end.min(left.end()));
        begins && run.is_ok_and(|run| self.set_markers(run, false).is_ok())
    }
}
