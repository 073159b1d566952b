//! Pages that become coherent: they stay where they are, and CPUs go on using them.
//!
//! ```text
//!   unprotect -> choose -> no holes -> invalidate -> commit: words name device pages
//! ```
//!
//! Nothing is taken from anybody and nothing is copied, so there is nothing to put back, and no write to
//! lose: what devices map before, meanwhile and after is the same page at the same address. Devices are told
//! all the same, since they ask anew where pages live.
//!
//! What the kernel does with such a page by itself is no matter here: a copy for a child of fork, one huge
//! page of many, another frame. The page is named by its address, for CPUs and for devices.

use super::{LinuxOutbound, PageSet, pages_of_file, runs};
use crate::block::BlockGuard;
use crate::staging::Content;
use gpusvm_mm::{Block, KeptReason, MmError, Place, Reason, Source};
use gpusvm_types::{OwnerId, PAGES_PER_BLOCK, Span};

impl<'b> LinuxOutbound<'b> {
    pub(crate) fn collect_coherent(
        block: &'b BlockGuard<'_>,
        span: Span,
        owner: OwnerId,
    ) -> Result<Self, MmError> {
        gpusvm_sync::walk!("collect_coherent");
        assert!(
            block.span().covers(span),
            "{span} is not in the locked {}",
            block.span()
        );
        // What the program gave up before is marked.
        block.process.source.fence();
        // Nobody reads copies of them.
        block.unprotect(span, Reason::Write);
        let this = Self {
            block,
            span,
            sources: choose(block, span),
            in_place: PageSet::default(),
            slot: None,
            content: Content::Some,
            settled: false,
            was_protected: PageSet::default(),
        };
        let sources = &this.sources;
        let is_chosen = |i: usize| sources[i] == Source::InPlace;
        for run in runs(span, is_chosen) {
            block.fill_gaps(run).map_err(|errno| MmError::System {
                call: "filling holes",
                span: run,
                errno: errno.raw_os_error(),
            })?;
        }
        for run in runs(span, is_chosen) {
            block.invalidate(run, Reason::Migrate(Some(owner)));
        }
        Ok(this)
    }
}

/// Those of RAM, but for what the program gave up, and what is a file's.
fn choose(block: &BlockGuard<'_>, span: Span) -> [Source; PAGES_PER_BLOCK] {
    let mut sources = [Source::Kept(KeptReason::Busy); PAGES_PER_BLOCK];
    let of_file = pages_of_file(block, span);
    for (i, page) in span.pages().enumerate() {
        let word = block.region.word(page);
        if word.get().dropped {
            let page = Span::page_of(page.start());
            block.process.settle_holes(&block.region, page);
        }
        let state = word.get();
        sources[i] = match state.place {
            Place::Device(device) | Place::Leaving(device) | Place::Coherent(device) => {
                Source::Kept(KeptReason::OnDevice(device))
            }
            _ if state.unmapped => Source::Kept(KeptReason::Unmapped),
            _ if state.dropped => Source::Kept(KeptReason::Dropped),
            Place::System if of_file.contains(i) => Source::Kept(KeptReason::OfFile),
            Place::System => Source::InPlace,
            Place::Collected => Source::Kept(KeptReason::Busy),
        };
    }
    sources
}
