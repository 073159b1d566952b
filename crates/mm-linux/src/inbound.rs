//! Device to RAM, step by step.
//!
//! ```text
//!   mark the words -> invalidate -> find a slot -> (copy into it) -> commit: fill, words say System
//!                                      |               |
//!                                      `---- drop -----'---> words name the device pages again
//! ```

use crate::block::BlockGuard;
use crate::memories::Freed;
use crate::mover::Filled;
use crate::outbound::runs;
use crate::staging::{Leave, Slot};
use gpusvm_mm::{Block, DevicePage, Inbound, Leaving, MmError, Place, Reason};
use gpusvm_types::{PAGES_PER_BLOCK, PageCount, PageIndex, Span};
use rustix::io::Errno;

/// Device pages with RAM to copy them to.
#[derive(Debug)]
pub struct LinuxInbound<'b> {
    block: &'b BlockGuard<'b>,
    span: Span,
    leaving: [Option<Leaving>; PAGES_PER_BLOCK],
    slot: Option<Slot<'b>>,
}

impl<'b> LinuxInbound<'b> {
    pub(crate) fn collect(
        block: &'b BlockGuard<'_>,
        span: Span,
        select: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self, MmError> {
        assert!(
            block.span().covers(span),
            "{span} is not in the locked {}",
            block.span()
        );
        block.release_dropped(span);
        let mut this = Self {
            block,
            span,
            leaving: [None; PAGES_PER_BLOCK],
            slot: None,
        };
        let mut chosen = [None; PAGES_PER_BLOCK];
        for (page, chosen) in span.pages().zip(&mut chosen) {
            // An unmapped page may be about to move: it stays until that is known.
            let word = block.region.word(page).get();
            if let (Place::Device(device), false) = (word.place, word.unmapped) {
                *chosen = select(page, device).then_some(device);
            }
        }
        if chosen.iter().all(Option::is_none) {
            return Ok(this);
        }
        let process = block.process;
        let warm_up = |from, to| process.mover.warm_up(from, to);
        let slot = process
            .staging
            .take_warm(warm_up)
            .ok_or(MmError::NoStaging { span })?;
        for ((page, device), leaving) in span.pages().zip(chosen).zip(&mut this.leaving) {
            let Some(from) = device else { continue };
            block.region.word(page).mark_leaving(from);
            *leaving = Some(Leaving {
                from,
                to: slot.dma_of(page.start()),
            });
        }
        this.slot = Some(slot);
        block.invalidate(span, Reason::Migrate(None));
        Ok(this)
    }

    /// Fills the pages of a run and lets them live in RAM.
    fn arrive(&mut self, run: Span, freed: &mut Freed<'_>) -> Result<(), Errno> {
        let Some(slot) = &mut self.slot else {
            return Ok(());
        };
        let process = self.block.process;
        match process.mover.fill(run, slot.place_of(run.start())) {
            Ok(Filled::Copied) => {}
            // All of the slot went: nothing is left to discard.
            Ok(Filled::Moved) if run.page_count().as_usize() == PAGES_PER_BLOCK => {
                slot.leave(Leave::Empty);
            }
            Ok(Filled::Moved) => slot.leave(Leave::Dirty),
            Err(errno) => {
                slot.leave(Leave::Dirty);
                return Err(errno);
            }
        }
        self.settle(run, freed);
        Ok(())
    }

    fn settle(&mut self, run: Span, freed: &mut Freed<'_>) {
        for page in run.pages() {
            let i = self.span.index_of(page);
            if let Some(leaving) = self.leaving[i].take() {
                self.block.region.word(page).settle_system();
                freed.push(leaving.from);
            }
        }
    }

    /// What becomes of the i-th page of the span.
    fn fate(&self, i: usize) -> Fate {
        let page = self.span.first_page() + PageCount::from_usize(i);
        let word = self.block.region.word(page).get();
        match self.leaving[i] {
            Some(_) if word.dropped => Fate::Forgotten,
            Some(_) if !word.unmapped => Fate::Home,
            _ => Fate::Stays,
        }
    }
}

/// What becomes of a page when the copy is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It lives in RAM.
    Home,
    /// The program gave its contents up meanwhile.
    Forgotten,
    /// It was not to move, or its mapping is gone, or about to be somewhere else.
    Stays,
}

impl Inbound for LinuxInbound<'_> {
    fn span(&self) -> Span {
        self.span
    }

    fn leaving(&self) -> &[Option<Leaving>] {
        &self.leaving[..self.span.page_count().as_usize()]
    }

    fn commit(mut self) -> Result<(), MmError> {
        let memories = &self.block.process.memories;
        let mut freed = Freed::new(memories);
        if let Some(slot) = &mut self.slot {
            slot.leave(Leave::Warm);
        }
        let mut fates = [Fate::Stays; PAGES_PER_BLOCK];
        (0..self.leaving().len()).for_each(|i| fates[i] = self.fate(i));
        let mut result = Ok(());
        for run in runs(self.span, |i| fates[i] == Fate::Home) {
            if let Err(errno) = self.arrive(run, &mut freed) {
                let errno = errno.raw_os_error();
                result = Err(MmError::System {
                    call: "putting pages in",
                    span: run,
                    errno,
                });
            }
        }
        for run in runs(self.span, |i| fates[i] == Fate::Forgotten) {
            self.settle(run, &mut freed);
        }
        result
    }
}

impl Drop for LinuxInbound<'_> {
    fn drop(&mut self) {
        for (page, leaving) in self.span.pages().zip(&self.leaving) {
            if let Some(leaving) = leaving {
                self.block.region.word(page).stay_on_device(leaving.from);
            }
        }
        self.block.process.mover.wake(self.span);
    }
}
