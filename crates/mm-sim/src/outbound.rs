//! RAM to device, step by step.
//!
//! ```text
//!   mark the words -> invalidate -> take the pages out -> (copy) -> commit: words name device pages
//!                                        |                  |
//!                                        `----- drop -------'---> put back, words say System
//! ```

mod coherent; // pages that are taken from nobody

use crate::Sim;
use crate::block::BlockGuard;
use crate::events::Job;
use crate::injector::Step;
use crate::kernel::{Kernel, Pte, translate};
use crate::staging::Slot;
use crate::stats::Counters;
use core::iter;
use gpusvm_mm::{
    Block, DevicePage, Freed, KeptReason, MmError, Outbound, PageWord, Place, Reason, Source,
};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{OwnerId, PAGES_PER_BLOCK, PageCount, PageIndex, Span};

/// Pages that were taken out of the process.
#[derive(Debug)]
pub struct SimOutbound<'b> {
    block: &'b BlockGuard<'b>,
    span: Span,
    // INVARIANT: whatever of RAM is not taken out right now is `Kept`.
    sources: Vec<Source>,
    slot: Option<Slot<'b>>,
    /// All of the block went as one huge page.
    huge: bool,
    settled: bool,
}

/// What there is to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Marked {
    Nothing,
    /// Pages of other devices only.
    Devices,
    /// Pages of RAM, and maybe of other devices.
    Ram,
}

impl<'b> SimOutbound<'b> {
    pub(crate) fn collect(
        block: &'b BlockGuard<'_>,
        span: Span,
        owner: OwnerId,
        peers: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self, MmError> {
        assert!(
            block.span().covers(span),
            "{span} is not in the locked {}",
            block.span()
        );
        let sim = block.sim;
        sim.step(format_args!("collect {span}"));
        Counters::count(&sim.counters.collects);
        let mut this = Self {
            block,
            span,
            sources: vec![Source::Kept(KeptReason::Busy); span.page_count().as_usize()],
            slot: None,
            huge: false,
            settled: false,
        };
        let clearing = &block.state().clearing;
        clearing.store(true, Ordering::Release);
        let marked = this.mark(peers);
        if marked != Marked::Nothing {
            block.invalidate(span, Reason::Migrate(Some(owner)));
        }
        clearing.store(false, Ordering::Release);
        if marked == Marked::Nothing {
            return Ok(this);
        }
        // From here on, dropping `this` puts everything back.
        if marked == Marked::Ram {
            if sim.injector.step(Step::Staging) {
                return Err(MmError::NoStaging { span });
            }
            let slot = sim.staging.take(&sim.runtime);
            this.slot = Some(slot.ok_or(MmError::NoStaging { span })?);
        }
        let runs: Vec<Span> = marked_runs(block.region.words_in(span), span).collect();
        for run in runs {
            this.take_out(run).map_err(|errno| MmError::System {
                call: "taking pages out",
                span: run,
                errno,
            })?;
        }
        Ok(this)
    }

    /// Marks the words of the pages that can be taken.
    fn mark(&mut self, peers: &mut dyn FnMut(PageIndex, DevicePage) -> bool) -> Marked {
        let mut marked = Marked::Nothing;
        for (i, page) in self.span.pages().enumerate() {
            let word = self.block.region.word(page);
            let mut state = word.get();
            if state.dropped && state.place == Place::System {
                self.block.sim.settle_hole(page, word);
                state = word.get();
            }
            let is_wanted = !state.dropped && !state.unmapped;
            self.sources[i] = match state.place {
                Place::Device(device) if is_wanted && peers(page, device) => {
                    word.mark_leaving(device);
                    marked = marked.max(Marked::Devices);
                    Source::Device(device)
                }
                Place::Device(device) | Place::Leaving(device) | Place::Coherent(device) => {
                    Source::Kept(KeptReason::OnDevice(device))
                }
                _ if state.unmapped => Source::Kept(KeptReason::Unmapped),
                _ if state.dropped => Source::Kept(KeptReason::Dropped),
                Place::System | Place::Collected => {
                    word.mark_collected();
                    marked = Marked::Ram;
                    continue;
                }
            };
        }
        marked
    }

    fn take_out(&mut self, run: Span) -> Result<(), i32> {
        let sim = self.block.sim;
        sim.step(format_args!("take out {run}"));
        let fails = sim.injector.step(Step::TakeOut);
        let slot = self.slot.as_ref().expect("found before pages are taken");
        let first = self.span.index_of(run.first_page());
        let mut kernel = sim.kernel.lock();
        let whole = run.page_count().as_usize() == PAGES_PER_BLOCK;
        self.huge = whole && kernel.huge.contains(&run.start());
        kernel.split_huge(run);
        kernel.unprotect(run);
        for (source, page) in self.sources[first..].iter_mut().zip(run.pages()) {
            *source = match fails {
                true => Source::Kept(KeptReason::Busy),
                false => sim.take_page(&mut kernel, page, slot),
            };
            if !source.is_collected() {
                // What could not be taken lives where it lived.
                self.huge = false;
                self.block.region.word(page).settle_system();
            }
        }
        if fails { Err(EAGAIN) } else { Ok(()) }
    }

    /// What was taken out goes back to where it was, or is now.
    fn put_back(&self) {
        let sim = self.block.sim;
        let pieces = runs(self.span, |i| is_taken(self.sources[i]));
        for piece in pieces {
            sim.step(format_args!("put back {piece}"));
            let mut kernel = sim.kernel.lock();
            for page in piece.pages() {
                self.put_page_back(&mut kernel, page);
            }
            if self.huge {
                kernel.join_huge(piece);
            }
        }
        for (source, page) in self.sources.iter().zip(self.span.pages()) {
            let word = self.block.region.word(page);
            match (source, word.get().place) {
                (Source::Device(device), Place::Leaving(_)) => drop(word.stay_on_device(*device)),
                (_, Place::Collected) => drop(word.settle_system()),
                _ => {}
            }
        }
    }

    /// In one step with what the word says: the program may have dropped or moved the page.
    fn put_page_back(&self, kernel: &mut Kernel, page: PageIndex) {
        let state = self.block.region.word(page).get();
        let slot = self.slot.as_ref().expect("pages were taken");
        let frame = slot.remove(page.start());
        let (Some(frame), false) = (frame, state.dropped) else {
            return;
        };
        let to = match state.unmapped {
            false => Some(page),
            true => moved_to(kernel, page),
        };
        let Some(to) = to else { return };
        if let Err(errno) = kernel.put(to, &frame) {
            let lost = format!("{page:?}, now {to:?}, could not be put back: errno {errno}");
            kernel.lost.push(lost);
        }
    }
}

/// What a failed step of the world says.
pub(crate) const EAGAIN: i32 = 11;

impl Sim {
    /// Clears the mark of a dropped page that the kernel has taken by now.
    pub(crate) fn settle_hole(&self, page: PageIndex, word: &PageWord) {
        if !self.kernel.lock().pages.contains_key(&page) {
            word.saw_hole();
        }
    }

    fn take_page(&self, kernel: &mut Kernel, page: PageIndex, slot: &Slot<'_>) -> Source {
        if kernel.mapping(page.start()).is_none() {
            return Source::Kept(KeptReason::Unmapped);
        }
        if kernel.pinned.contains(&page) || self.injector.step(Step::PageBusy) {
            return Source::Kept(KeptReason::Busy);
        }
        match kernel.pages.remove(&page) {
            Some(Pte::Frame(mut frame)) => {
                // Shared with a child of fork: it becomes ours first.
                if Arc::strong_count(&frame) > 1 {
                    Counters::count(&self.counters.unshared);
                    Arc::make_mut(&mut frame);
                }
                slot.put(page.start(), frame);
                Source::Page(slot.dma_of(page.start()))
            }
            Some(Pte::Poisoned) => {
                kernel.pages.insert(page, Pte::Poisoned);
                Source::Kept(KeptReason::Busy)
            }
            Some(Pte::Zero) | None => {
                // Whatever an earlier migration left there is not this page's.
                drop(slot.remove(page.start()));
                Source::Hole
            }
        }
    }
}

/// Where a page is that was unmapped from here, if it was moved and is still wanted: what the jobs
/// that the engine has yet to do say, in their order.
fn moved_to(kernel: &Kernel, page: PageIndex) -> Option<PageIndex> {
    let (mut at, mut moved) = (page, false);
    for job in &kernel.jobs {
        match *job {
            Job::Remapped { from, to, .. } => {
                if let Some(there) = translate(at, from, to) {
                    (at, moved) = (there, true);
                }
            }
            Job::Unmapped { span, .. } if span.contains(at.start()) => return None,
            Job::Removed { span } if moved && span.contains(at.start()) => return None,
            _ => {}
        }
    }
    moved.then_some(at)
}

impl Outbound for SimOutbound<'_> {
    fn span(&self) -> Span {
        self.span
    }

    fn sources(&self) -> &[Source] {
        &self.sources
    }

    fn commit(mut self, home: &mut dyn FnMut(usize) -> DevicePage) {
        let sim = self.block.sim;
        sim.step(format_args!("commit {} to the device", self.span));
        // Pages that were given up meanwhile live nowhere.
        let mut freed = Freed::new(&sim.memories);
        for (i, page) in self.span.pages().enumerate() {
            if !self.sources[i].is_collected() {
                continue;
            }
            let device = home(i);
            sim.memories.of(device).rmap.set(device.pfn, page);
            let word = self.block.region.word(page);
            let settled = match self.sources[i] {
                Source::InPlace => word.settle_coherent(device),
                _ => word.settle_device(device),
            };
            if settled.is_err() {
                freed.push(device);
            }
            if let Source::Device(left) = self.sources[i] {
                freed.push(left);
            }
        }
        drop(freed);
        let state = self.block.state();
        state.left_huge.store(self.huge, Ordering::Relaxed);
        self.settled = true;
        Counters::count(&sim.counters.commits);
    }
}

impl Drop for SimOutbound<'_> {
    fn drop(&mut self) {
        if !self.settled {
            Counters::count(&self.block.sim.counters.aborts);
            self.put_back();
        }
        // The slot keeps its frames for pages that come home.
    }
}

const fn is_taken(source: Source) -> bool {
    matches!(source, Source::Page(_) | Source::Hole)
}

/// The pieces of `span` whose pages are marked to be taken.
fn marked_runs(words: &[PageWord], span: Span) -> impl Iterator<Item = Span> {
    runs(span, |i| words[i].get().place == Place::Collected)
}

/// The longest pieces of `span` in which `is_in` holds for every page, by its place in the span.
pub(crate) fn runs(span: Span, is_in: impl Fn(usize) -> bool) -> impl Iterator<Item = Span> {
    let (first, len) = (span.first_page(), span.page_count().as_usize());
    let mut next = 0;
    iter::from_fn(move || {
        let start = (next..len).find(|i| is_in(*i))?;
        let end = (start..len).find(|i| !is_in(*i)).unwrap_or(len);
        next = end;
        let count = PageCount::from_usize(end - start);
        Some(Span::of_pages(first + PageCount::from_usize(start), count))
    })
}
