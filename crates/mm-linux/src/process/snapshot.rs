//! Where pages are, seen without disturbing any of them.
//!
//! ```text
//!   mappings      what is mapped at all            one look-up for each mapping
//!   words         of what is mirrored: devices
//!   page table    of the rest: is there a page?    one scan, in runs
//!   words again   of pages that the page table does not have: they may just have left
//! ```
//!
//! Memory that the program has just moved, with pages on a device, is seen there as what its page table
//! says until the event has been handled.
//!
//! # Locking
//!
//! The region table, for a look-up. No block: a page that is on the move is seen as such.

use super::Process;
use crate::regions::Part;
use crate::sys::pagemap::Region as PageRegion;
use gpusvm_mm::{AddressSpace, MmError, Seen};
use gpusvm_types::{PageCount, Span};

/// How many runs one scan reports: more runs, and it goes on where it stopped.
const RUNS: usize = 64;

impl Process {
    /// See [`AddressSpace::snapshot`].
    pub(super) fn see(&self, span: Span, seen: &mut [Seen]) -> Result<(), MmError> {
        assert_eq!(
            seen.len(),
            span.page_count().as_usize(),
            "one for each page"
        );
        seen.fill(Seen::Unmapped);
        self.see_mappings(span, seen)?;
        let parts = self.regions.parts_in(span);
        see_words(&parts, span, seen);
        let is_absent = |seen: &Seen| *seen == Seen::Absent;
        let first = seen.iter().position(is_absent);
        let last = seen.iter().rposition(is_absent);
        if let (Some(first), Some(last)) = (first, last) {
            let start = span.first_page() + PageCount::from_usize(first);
            let absent = Span::of_pages(start, PageCount::from_usize(last - first + 1));
            self.see_page_table(absent, &mut seen[first..=last])?;
            see_words(&parts, span, seen);
        }
        Ok(())
    }

    /// Which pages of `span` live on devices, or are on the move: what words tell. Everything else is
    /// [`Seen::Absent`] here, or [`Seen::Unmapped`]: for who has looked at the page table already.
    ///
    /// # Errors
    ///
    /// `Gone`.
    pub fn seen_elsewhere(&self, span: Span) -> Result<Vec<Seen>, MmError> {
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        let mut seen = vec![Seen::Absent; span.page_count().as_usize()];
        see_words(&self.regions.parts_in(span), span, &mut seen);
        Ok(seen)
    }

    /// What is mapped has no page, as far as is known now.
    fn see_mappings(&self, span: Span, seen: &mut [Seen]) -> Result<(), MmError> {
        let mut rest = Some(span);
        // Each mapping ends behind the one before: at most one for each page.
        while let Some(left) = rest {
            let vma = self.find_vma(left.start())?;
            let Some(vma) = vma.filter(|vma| vma.span.start() < left.end()) else {
                return Ok(());
            };
            if let Some(mapped) = vma.span.intersection(left) {
                of(seen, span, mapped).fill(Seen::Absent);
            }
            rest = Span::new(vma.span.end(), span.end()).ok();
        }
        Ok(())
    }

    /// Which pages that nobody knows of yet are in RAM.
    fn see_page_table(&self, span: Span, seen: &mut [Seen]) -> Result<(), MmError> {
        let mut runs = [PageRegion::EMPTY; RUNS];
        let mut rest = Some(span);
        // A scan that stops early has reported a run, so it came further.
        while let Some(left) = rest {
            let scanned = self.pages.scan(left, &mut runs);
            let scanned = scanned.map_err(|errno| MmError::System {
                call: "scanning the page table",
                span: left,
                errno: errno.raw_os_error(),
            })?;
            let found = runs[..scanned.regions].iter();
            let found =
                found.filter_map(|run| Span::new(run.start, run.end).ok()?.intersection(span));
            for run in found {
                let pages = of(seen, span, run).iter_mut();
                pages
                    .filter(|seen| **seen == Seen::Absent)
                    .for_each(|seen| *seen = Seen::System);
            }
            rest = Span::new(scanned.until, span.end()).ok();
        }
        Ok(())
    }
}

/// What the words tell of pages that are mapped, and that nobody has found in RAM.
fn see_words(parts: &[Part], span: Span, seen: &mut [Seen]) {
    for part in parts {
        for (page, seen) in part.span.pages().zip(of(seen, span, part.span)) {
            if *seen == Seen::Absent
                && let Some(told) = Seen::by_word(part.region.word(page).get().home())
            {
                *seen = told;
            }
        }
    }
}

/// The entries of `piece`, which is in `span`.
fn of(seen: &mut [Seen], span: Span, piece: Span) -> &mut [Seen] {
    let first = span.index_of(piece.first_page());
    &mut seen[first..first + piece.page_count().as_usize()]
}
