//! RAM to device, step by step.
//!
//! ```text
//!   mark the words -> invalidate -> take the pages out -> (copy) -> commit: words name device pages
//!                                        |                  |
//!                                        `----- drop -------'---> put back, words say System
//! ```

use crate::block::BlockGuard;
use crate::fork::Pass;
use crate::memories::Freed;
use crate::staging::{Leave, Slot};
use core::iter;
use core::time::Duration;
use gpusvm_mm::{Block, DevicePage, KeptReason, MmError, Outbound, Place, Reason, Source};
use gpusvm_types::{OwnerId, PAGES_PER_BLOCK, PageCount, PageIndex, Span, VirtAddr};
use rustix::io::Errno;

/// Pages of RAM that were taken out of the process.
#[derive(Debug)]
pub struct LinuxOutbound<'b> {
    block: &'b BlockGuard<'b>,
    span: Span,
    sources: [Source; PAGES_PER_BLOCK],
    slot: Option<Slot<'b>>,
    settled: bool,
    /// Keeps fork out.
    _pass: Pass<'b>,
}

impl<'b> LinuxOutbound<'b> {
    pub(crate) fn collect(
        block: &'b BlockGuard<'_>,
        span: Span,
        owner: OwnerId,
    ) -> Result<Self, MmError> {
        assert!(
            block.span().covers(span),
            "{span} is not in the locked {}",
            block.span()
        );
        let process = block.process;
        let pass = process.gate.pass().ok_or(MmError::Gone)?;
        let mut this = Self {
            block,
            span,
            sources: [Source::Hole; PAGES_PER_BLOCK],
            slot: None,
            settled: false,
            _pass: pass,
        };
        if this.mark() == 0 {
            return Ok(this);
        }
        block.invalidate(span, Reason::Migrate(Some(owner)));
        // From here on, dropping `this` puts everything back.
        if process.mover.takes_to_slot() {
            this.slot = Some(
                process
                    .staging
                    .take_empty()
                    .ok_or(MmError::NoStaging { span })?,
            );
        }
        for run in this.marked_runs() {
            this.take_out(run).map_err(|errno| MmError::System {
                call: "taking pages out",
                span: run,
                errno: errno.raw_os_error(),
            })?;
        }
        Ok(this)
    }

    /// Marks the words of the pages that can be taken, and says how many there are.
    fn mark(&mut self) -> usize {
        let region = &self.block.region;
        self.block.process.settle_holes(region, self.span);
        for (page, source) in self.span.pages().zip(&mut self.sources) {
            let word = region.word(page);
            let state = word.get();
            let kept = match state.place {
                Place::Device(device) | Place::Leaving(device) => KeptReason::OnDevice(device),
                _ if state.unmapped => KeptReason::Unmapped,
                _ if state.dropped => KeptReason::Dropped,
                Place::System | Place::Collected => {
                    word.mark_collected();
                    continue;
                }
            };
            *source = Source::Kept(kept);
        }
        self.sources()
            .iter()
            .filter(|source| source.is_collected())
            .count()
    }

    /// The pieces of the span whose pages are to be taken.
    fn marked_runs(&self) -> impl Iterator<Item = Span> + use<> {
        let taken = self.sources.map(Source::is_collected);
        runs(self.span, move |i| taken[i])
    }

    fn take_out(&mut self, run: Span) -> Result<(), Errno> {
        let at = self.slot_place(run.start());
        let first = self.span.index_of(run.first_page());
        let sources = &mut self.sources[first..first + run.page_count().as_usize()];
        let taken = self.block.process.mover.take_out(run, at, sources);
        if taken.is_err() {
            sources.fill(Source::Kept(KeptReason::Busy));
        }
        // What could not be taken lives where it lived.
        for (page, _) in run
            .pages()
            .zip(&*sources)
            .filter(|(_, source)| !source.is_collected())
        {
            self.block.region.word(page).settle_system();
        }
        taken
    }

    fn slot_place(&self, at: VirtAddr) -> VirtAddr {
        self.slot.as_ref().map_or(at, |slot| slot.place_of(at))
    }

    fn collected(&self) -> impl Iterator<Item = (usize, PageIndex)> + '_ {
        let pages = self.span.pages().enumerate();
        pages.filter(|(i, _)| self.sources[*i].is_collected())
    }

    /// The slot keeps its pages for the next block that comes home, if it has all of them.
    fn leave_slot(&mut self) {
        let full = self
            .sources
            .iter()
            .all(|source| matches!(source, Source::Page(_)))
            && self.span.page_count().as_usize() == PAGES_PER_BLOCK;
        if let Some(slot) = &mut self.slot {
            slot.leave(if full { Leave::Warm } else { Leave::Dirty });
        }
    }

    fn put_back(&mut self) {
        let block = self.block;
        let first = self.span.first_page();
        let is_dropped = |i| {
            block
                .region
                .word(first + PageCount::from_usize(i))
                .get()
                .dropped
        };
        for run in runs(self.span, |i| {
            self.sources[i].is_collected() && !is_dropped(i)
        }) {
            self.put_run_back(run);
        }
        for (_, page) in self.collected() {
            block.region.word(page).settle_system();
        }
    }

    /// The run may have been unmapped, or moved, meanwhile: in the latter case its pages go to where
    /// it is now, which becomes known as soon as the event is read.
    fn put_run_back(&self, run: Span) {
        let process = self.block.process;
        let first = self.span.index_of(run.first_page());
        let sources = &self.sources[first..first + run.page_count().as_usize()];
        let at = self.slot_place(run.start());
        let Err(errno) = process.mover.put_back(run, at, sources) else {
            return;
        };
        for _ in 0..MOVED_POLLS {
            if let Some(moved) = process.events.moved_to(run) {
                if let Err(errno) = process.mover.put_back(moved, at, sources) {
                    process.report_lost(moved, errno);
                }
                return;
            }
            if self.block.region.word(run.first_page()).get().unmapped {
                return;
            }
            std::thread::sleep(MOVED_POLL);
        }
        process.report_lost(run, errno);
    }
}

/// How often, and how soon, to look for the event that says what became of a run.
const MOVED_POLLS: u32 = 10_000;
const MOVED_POLL: Duration = Duration::from_micros(100);

impl Outbound for LinuxOutbound<'_> {
    fn span(&self) -> Span {
        self.span
    }

    fn sources(&self) -> &[Source] {
        &self.sources[..self.span.page_count().as_usize()]
    }

    fn commit(mut self, home: &mut dyn FnMut(usize) -> DevicePage) {
        let process = self.block.process;
        // Pages that were given up, or unmapped, meanwhile live nowhere.
        let mut freed = Freed::new(&process.memories);
        for (i, page) in self.collected() {
            let device = home(i);
            process.memories.of(device).rmap.set(device.pfn, page);
            if self.block.region.word(page).settle_device(device).is_err() {
                freed.push(device);
            }
        }
        drop(freed);
        process
            .mover
            .settle(self.span, self.sources(), self.block.state());
        self.settled = true;
    }
}

impl Drop for LinuxOutbound<'_> {
    fn drop(&mut self) {
        if self.settled {
            self.leave_slot();
        } else {
            self.put_back();
            if let Some(slot) = &mut self.slot {
                slot.leave(Leave::Dirty);
            }
        }
        // Who touched a page meanwhile waits without a fault that was seen: wake always.
        self.block.process.mover.wake(self.span);
    }
}

/// The longest pieces of `span` in which `is_in` holds for every page, by its place in the span.
pub(crate) fn runs(span: Span, is_in: impl Fn(usize) -> bool) -> impl Iterator<Item = Span> {
    let mut pages = span.pages().enumerate().peekable();
    iter::from_fn(move || {
        let (_, first) = pages.find(|(i, _)| is_in(*i))?;
        let mut run = Span::page_of(first.start());
        while let Some((_, page)) = pages.next_if(|(i, _)| is_in(*i)) {
            run = run.union(Span::page_of(page.start()));
        }
        Some(run)
    })
}
