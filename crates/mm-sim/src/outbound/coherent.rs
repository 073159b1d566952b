//! Pages that become coherent: they stay where they are, and CPUs go on using them.
//!
//! ```text
//!   unprotect -> choose -> no holes -> invalidate -> commit: words name device pages
//! ```

use super::{EAGAIN, SimOutbound, runs};
use crate::block::BlockGuard;
use crate::injector::Step;
use crate::kernel::Pte;
use crate::stats::Counters;
use gpusvm_mm::{Block, KeptReason, MmError, Place, Reason, Source};
use gpusvm_types::{OwnerId, PageIndex, Span};

impl<'b> SimOutbound<'b> {
    /// Nothing is taken from anybody: see [`Block::collect_coherent`].
    pub(crate) fn collect_coherent(
        block: &'b BlockGuard<'_>,
        span: Span,
        owner: OwnerId,
    ) -> Result<Self, MmError> {
        assert!(block.span().covers(span), "{span} is not in the block");
        let sim = block.sim;
        sim.step(format_args!("collect_coherent {span}"));
        Counters::count(&sim.counters.collects);
        block.unprotect(span, Reason::Write);
        let mut this = Self {
            block,
            span,
            sources: Vec::new(),
            slot: None,
            huge: false,
            settled: false,
        };
        let choose = |page: PageIndex| {
            let word = block.region.word(page);
            sim.settle_hole(page, word);
            let state = word.get();
            match state.place {
                Place::Device(device) | Place::Leaving(device) | Place::Coherent(device) => {
                    Source::Kept(KeptReason::OnDevice(device))
                }
                _ if state.unmapped => Source::Kept(KeptReason::Unmapped),
                _ if state.dropped => Source::Kept(KeptReason::Dropped),
                Place::Collected => Source::Kept(KeptReason::Busy),
                Place::System => Source::InPlace,
            }
        };
        this.sources = span.pages().map(choose).collect();
        sim.step(format_args!("fill holes of {span}"));
        if sim.injector.step(Step::FillHoles) {
            let call = "filling holes";
            let errno = EAGAIN;
            return Err(MmError::System { call, span, errno });
        }
        this.fill_holes();
        let chosen = runs(span, |i| this.sources[i] == Source::InPlace);
        chosen.for_each(|run| block.invalidate(run, Reason::Migrate(Some(owner))));
        Ok(this)
    }

    /// What was never touched becomes zeroes, unless it is gone by now.
    fn fill_holes(&self) {
        let mut kernel = self.block.sim.kernel.lock();
        let pages = self.span.pages().zip(&self.sources);
        for (page, _) in pages.filter(|(_, source)| **source == Source::InPlace) {
            let word = self.block.region.word(page).get();
            if !word.unmapped && kernel.mapping(page.start()).is_some() {
                kernel.pages.entry(page).or_insert(Pte::Zero);
            }
        }
    }
}
