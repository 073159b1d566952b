//! Pages that are read in copies: nobody writes them unheard.
//!
//! ```text
//!   mark the words -> invalidate -> protect the pages -> (copy)
//!
//!   a write is refused -> invalidate -> unprotect the pages -> clear the words -> it is tried again
//! ```

use crate::block::BlockGuard;
use crate::injector::Step;
use crate::kernel::Pte;
use crate::outbound::{EAGAIN, runs};
use crate::stats::Counters;
use gpusvm_mm::{Block, KeptReason, MmError, Place, Reason, Source, WordState};
use gpusvm_types::{DmaAddr, PageIndex, Span};

impl BlockGuard<'_> {
    /// See [`Block::write_protect`].
    pub(crate) fn protect(&self, span: Span, sources: &mut [Source]) -> Result<(), MmError> {
        assert!(self.span().covers(span), "{span} is not in the block");
        assert_eq!(sources.len(), span.page_count().as_usize());
        let sim = self.sim;
        sim.step(format_args!("write-protect {span}"));
        Counters::count(&sim.counters.protections);
        let news = self.mark_protected(span, sources);
        for run in runs(span, |i| news[i]) {
            self.invalidate(run, Reason::Write);
        }
        sim.step(format_args!("protect {span}"));
        if sim.injector.step(Step::Protect) {
            for (word, _) in self
                .region
                .words_in(span)
                .iter()
                .zip(news)
                .filter(|it| it.1)
            {
                word.unprotect();
            }
            return Err(MmError::System {
                call: "write-protecting pages",
                span,
                errno: EAGAIN,
            });
        }
        for (source, page) in sources.iter_mut().zip(span.pages()) {
            if source.is_collected() {
                *source = self.protect_page(page);
            }
        }
        Ok(())
    }

    /// Marks the pages in RAM; the others are `Kept`. Says which are news.
    fn mark_protected(&self, span: Span, sources: &mut [Source]) -> Vec<bool> {
        let mark = |(page, source): (PageIndex, &mut Source)| {
            let word = self.region.word(page);
            self.sim.settle_hole(page, word);
            let state = word.get();
            *source = match state.place {
                Place::Device(device) | Place::Leaving(device) | Place::Coherent(device) => {
                    Source::Kept(KeptReason::OnDevice(device))
                }
                _ if state.unmapped => Source::Kept(KeptReason::Unmapped),
                _ if state.dropped => Source::Kept(KeptReason::Dropped),
                Place::Collected => Source::Kept(KeptReason::Busy),
                Place::System => Source::Hole,
            };
            source.is_collected() && word.protect()
        };
        span.pages().zip(sources).map(mark).collect()
    }

    /// In one step with the page table: what is nowhere becomes the zero page.
    fn protect_page(&self, page: PageIndex) -> Source {
        let mut kernel = self.sim.kernel.lock();
        if kernel.mapping(page.start()).is_none() {
            self.region.word(page).unprotect();
            return Source::Kept(KeptReason::Unmapped);
        }
        let source = match kernel.pages.entry(page).or_insert(Pte::Zero) {
            Pte::Frame(_) => Source::Page(DmaAddr::new(page.start().get())),
            Pte::Zero => Source::Hole,
            Pte::Poisoned => {
                self.region.word(page).unprotect();
                return Source::Kept(KeptReason::Busy);
            }
        };
        kernel.protected.insert(page);
        source
    }

    /// Lets the protected pages of `span` be written; nobody reads them in copies any more.
    pub(crate) fn unprotect(&self, span: Span, reason: Reason) -> bool {
        self.unprotect_those(span, reason, |_| true)
    }

    /// As `unprotect`, those that `which` names. Whether there were any.
    pub(crate) fn unprotect_those(
        &self,
        span: Span,
        reason: Reason,
        which: impl Fn(WordState) -> bool,
    ) -> bool {
        let words = self.region.words_in(span);
        let goes = |i: usize| {
            let word = words[i].get();
            word.protected && which(word)
        };
        let found: Vec<Span> = runs(span, goes).collect();
        for run in &found {
            self.invalidate(*run, reason);
            let mut kernel = self.sim.kernel.lock();
            for page in run.pages() {
                let word = self.region.word(page);
                // What is there now may be another mapping's.
                if !word.get().unmapped {
                    kernel.protected.remove(&page);
                }
                word.unprotect();
            }
        }
        !found.is_empty()
    }

    /// The protected pages around `page`, which is one.
    pub(crate) fn protected_around(&self, page: PageIndex) -> Span {
        let words = self.region.words_in(self.span());
        let mut around = runs(self.span(), |i| words[i].get().protected);
        around
            .find(|run| run.contains(page.start()))
            .unwrap_or_else(|| Span::page_of(page.start()))
    }
}
