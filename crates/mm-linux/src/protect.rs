//! Pages that are read in copies: nobody writes them unheard.
//!
//! ```text
//!   mark the words -> invalidate -> WRITEPROTECT -> (copy, with the block locked)
//!
//!   a write faults -> try the block -> invalidate -> WRITEPROTECT off, wakes -> clear the words
//!                        |
//!                        `- busy: whoever holds it wakes the thread, which faults again
//! ```
//!
//! The words are cleared last: as long as a page cannot be written, no device is told that it may.
//! So no compute unit ever waits for an unprotection, which waits for compute units to be flushed.
//!
//! A page that is protected and not marked is nobody's secret: whoever writes it first unprotects it
//! (`crate::fault`). That is so for a moment after a remap, and when an unprotection was cut short.

use crate::block::BlockGuard;
use crate::outbound::{keep_holes, pages_of_file, runs};
use crate::region::Behind;
use crate::stats::Counters;
use gpusvm_mm::{Block, KeptReason, MmError, Place, Reason, Source, WordState};
use gpusvm_types::{PAGES_PER_BLOCK, PageIndex, Span};
use rustix::io::Errno;

impl BlockGuard<'_> {
    /// See [`Block::write_protect`].
    pub(crate) fn protect(&mut self, span: Span, sources: &mut [Source]) -> Result<(), MmError> {
        let (block, count) = (self.span(), span.page_count().as_usize());
        assert!(block.covers(span), "{span} is not in the locked {block}");
        assert_eq!(sources.len(), count, "a source for each page");
        // What the program gave up before is marked.
        self.process.source.fence();
        let mut news = [false; PAGES_PER_BLOCK];
        self.mark_protected(span, sources, &mut news);
        for run in runs(span, |i| news[i]) {
            self.invalidate(run, Reason::Write);
        }
        // Whoever drops a page now must not leave this thread, which copies it, waiting for itself.
        self.copies_in_place();
        let mut stays = [false; PAGES_PER_BLOCK];
        for (stays, source) in stays.iter_mut().zip(&*sources) {
            *stays = source.is_collected();
        }
        for run in runs(span, |i| stays[i]) {
            let first = span.index_of(run.first_page());
            let there = &mut sources[first..first + run.page_count().as_usize()];
            let filled = self.fill_gaps(run);
            if let Err(errno) = filled.and_then(|()| self.process.mover.protect(run, there)) {
                for run in runs(span, |i| news[i]) {
                    self.process.mover.release(run);
                    let words = self.region.words_in(run);
                    words.iter().for_each(gpusvm_mm::PageWord::unprotect);
                }
                return Err(MmError::System {
                    call: "write-protecting pages",
                    span: run,
                    errno: errno.raw_os_error(),
                });
            }
            if self.region.behind() == Behind::File {
                self.keep_what_is_of_file(run, there);
            }
        }
        Counters::count(&self.process.counters.protections);
        Ok(())
    }

    /// What was never touched becomes the zero page, so that a first write of it is caught.
    pub(crate) fn fill_gaps(&self, run: Span) -> Result<(), Errno> {
        if self.region.behind() == Behind::File {
            // Only pages that are there were chosen: what went since is the file's again.
            return Ok(());
        }
        // What moved here is marked, or no page is filled: from here on, no move is heard of, and none ends.
        let _held = self.process.source.hold();
        let words = self.region.words_in(run);
        let mut pieces = runs(run, |i| !words[i].get().unmapped);
        pieces.try_for_each(|piece| self.process.mover.fill_gaps(piece))
    }

    /// Pages that have gone since they were chosen, and are the file's now.
    fn keep_what_is_of_file(&self, run: Span, sources: &mut [Source]) {
        keep_holes(sources);
        for (page, source) in run.pages().zip(sources) {
            if !source.is_collected() {
                self.process.mover.release(Span::page_of(page.start()));
                self.region.word(page).unprotect();
            }
        }
    }

    /// Marks the pages in RAM, and says which are news; the others are `Kept`.
    fn mark_protected(&self, span: Span, sources: &mut [Source], news: &mut [bool]) {
        let words = self.region.words_in(span);
        let of_file = pages_of_file(self, span);
        for (i, page) in span.pages().enumerate() {
            if words[i].get().dropped {
                let page = Span::page_of(page.start());
                self.process.settle_holes(&self.region, page);
            }
            let state = words[i].get();
            sources[i] = match state.place {
                Place::Device(device) | Place::Leaving(device) | Place::Coherent(device) => {
                    Source::Kept(KeptReason::OnDevice(device))
                }
                _ if state.unmapped => Source::Kept(KeptReason::Unmapped),
                _ if state.dropped => Source::Kept(KeptReason::Dropped),
                Place::Collected => Source::Kept(KeptReason::Busy),
                Place::System if of_file.contains(i) => Source::Kept(KeptReason::OfFile),
                Place::System => {
                    news[i] = words[i].protect();
                    Source::Hole
                }
            };
        }
    }

    /// Lets the protected pages of `span` be written; nobody reads them in copies any more. For
    /// handlers too: nothing is allocated.
    pub(crate) fn unprotect(&self, span: Span, reason: Reason) {
        self.unprotect_those(span, reason, |_| true);
    }

    /// As `unprotect`, those that `which` names.
    pub(crate) fn unprotect_those(
        &self,
        span: Span,
        reason: Reason,
        which: impl Fn(WordState) -> bool,
    ) {
        let words = self.region.words_in(span);
        let mut goes = [false; PAGES_PER_BLOCK];
        for (goes, word) in goes.iter_mut().zip(words) {
            let word = word.get();
            *goes = word.protected && which(word);
        }
        for run in runs(span, |i| goes[i]) {
            self.invalidate(run, reason);
            // What is there now may be another mapping's, and fails or says so by a fault.
            let words = self.region.words_in(run);
            for piece in runs(run, |i| !words[i].get().unmapped) {
                self.process.mover.release(piece);
            }
            words.iter().for_each(gpusvm_mm::PageWord::unprotect);
        }
    }

    /// The protected pages around `page`, which is one: what one write lets everybody write. Not less,
    /// or a huge page would not stay one; not more than the block, which is locked.
    pub(crate) fn protected_around(&self, page: PageIndex) -> Span {
        let words = self.region.words_in(self.span());
        let mut around = runs(self.span(), |i| words[i].get().protected);
        around
            .find(|run| run.contains(page.start()))
            .unwrap_or_else(|| Span::page_of(page.start()))
    }
}
