//! Device to RAM, step by step.
//!
//! ```text
//!   mark the words -> invalidate -> find a slot -> (copy into it) -> commit: fill, words say System
//!                                      |               |
//!                                      `---- drop -----'---> words name the device pages again
//! ```

use crate::block::BlockGuard;
use crate::mover::Filled;
use crate::outbound::{PageSet, runs};
use crate::patience::Patience;
use crate::process::Process;
use crate::region::Behind;
use crate::staging::{Content, Slot, Want};
use gpusvm_mm::{Block, DevicePage, Freed, Inbound, Leaving, MmError, Place, Reason};
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{ByteSize, PAGES_PER_BLOCK, PageCount, PageIndex, Span};
use rustix::io::Errno;

/// Device pages with RAM to copy them to.
#[derive(Debug)]
pub struct LinuxInbound<'b> {
    block: &'b BlockGuard<'b>,
    span: Span,
    leaving: [Option<Leaving>; PAGES_PER_BLOCK],
    /// Coherent pages, which are there.
    in_place: PageSet,
    slot: Option<Slot<'b>>,
}

impl<'b> LinuxInbound<'b> {
    pub(crate) fn collect(
        block: &'b BlockGuard<'_>,
        span: Span,
        select: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self, MmError> {
        gpusvm_sync::walk!("collect");
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
            in_place: PageSet::default(),
            slot: None,
        };
        let mut chosen = [None; PAGES_PER_BLOCK];
        let words = block.region.words_in(span);
        let mut count = 0;
        for (i, page) in span.pages().enumerate() {
            let word = words[i].get();
            match word.place {
                // An unmapped page may be about to move: it stays until that is known.
                _ if word.unmapped => {}
                Place::Device(device) if select(page, device) => {
                    chosen[i] = Some(device);
                    count += 1;
                }
                Place::Coherent(device) if select(page, device) => this.in_place.insert(i..i + 1),
                _ => {}
            }
        }
        if count > 0 {
            let slot = this.find_slot(PageCount::from_usize(count))?;
            for (i, page) in span.pages().enumerate() {
                let Some(from) = chosen[i] else { continue };
                words[i].mark_leaving(from);
                let to = slot.dma_of(page.start());
                this.leaving[i] = Some(Leaving { from, to });
            }
            this.slot = Some(slot);
        }
        // Not what lies between: a launch may need that where it is.
        for run in runs(span, |i| chosen[i].is_some() || this.in_place.contains(i)) {
            block.invalidate(run, Reason::Migrate(None));
        }
        Ok(this)
    }

    /// Coherent pages take up no device page any more. What was unmapped meanwhile may be about to move, and
    /// stays.
    fn settle_in_place(&self, freed: &mut Freed<'_, Process>) {
        for (i, word) in self.block.region.words_in(self.span).iter().enumerate() {
            let state = word.get();
            if let (Place::Coherent(device), true, false) =
                (state.place, self.in_place.contains(i), state.unmapped)
            {
                word.settle_system();
                freed.push(device);
            }
        }
    }

    fn find_slot(&self, count: PageCount) -> Result<Slot<'b>, MmError> {
        let process = self.block.process;
        let want = if !process.mover.moves_in(count.bytes()) {
            Want::Any
        } else if self.block.state().left_huge.load(Ordering::Relaxed)
            && !process.no_huge_page.fires()
        {
            Want::Huge
        } else {
            Want::Base
        };
        let warm_up = |from, to| process.mover.warm_up(from, to);
        let slot = process.staging.take_warm(want, warm_up);
        slot.ok_or(MmError::NoStaging { span: self.span })
    }

    /// Fills the pages that are to come home and lets them live in RAM: run by run as far as it goes,
    /// then page by page.
    fn arrive(&mut self, freed: &mut Freed<'_, Process>) -> Result<(), Errno> {
        let mut at = Some(self.span);
        let mut patience = Patience::new();
        while let Some(rest) = at {
            let Some((run, filled)) = self.fill_next(rest, freed) else {
                break;
            };
            at = Span::new(run.start() + filled.done, rest.end()).ok();
            if !filled.done.is_zero() {
                patience.renew();
            }
            match filled.errno {
                None => {}
                // An event is to be read first: then look again at what is to come home.
                Some(Errno::AGAIN) if patience.wait() => {}
                // Nobody reads it: the pages stay on the device.
                Some(Errno::AGAIN) => return Err(Errno::AGAIN),
                Some(_) => {
                    let rest = self.span.pages().filter(|page| page.start() >= run.start());
                    // Each page is tried, whatever became of those before.
                    let mut result = Ok(());
                    for page in rest {
                        result = result.and(self.arrive_alone(Span::page_of(page.start()), freed));
                    }
                    return result;
                }
            }
        }
        Ok(())
    }

    /// Fills the next run of pages of `rest` that are to come home, in one call.
    fn fill_next(&mut self, rest: Span, freed: &mut Freed<'_, Process>) -> Option<(Span, Filled)> {
        // What the program gave up, or unmapped, is marked; what it is about to, it does after.
        let _held = self.block.process.source.hold();
        let first = self.span.index_of(rest.first_page());
        let run = runs(rest, |i| self.fate(first + i) == Fate::Home).next()?;
        let run = if self.block.process.mover.moves_in(run.len()) {
            run
        } else {
            let len = run.len().min(HELD_UP_TO);
            Span::from_len(run.start(), len).expect("part of a run")
        };
        Some((run, self.fill(run, freed)))
    }

    /// The page may have been unmapped, or moved, meanwhile: that becomes known as soon as the event
    /// is read, and then it stays.
    fn arrive_alone(&mut self, page: Span, freed: &mut Freed<'_, Process>) -> Result<(), Errno> {
        let mut patience = Patience::new();
        loop {
            match self
                .fill_next(page, freed)
                .and_then(|(_, filled)| filled.errno)
            {
                // Filled, or not to come home any more.
                None => return Ok(()),
                // The file was cut off there, which ends the program's pages too.
                Some(Errno::FAULT) if self.block.region.behind() == Behind::File => {
                    self.settle(page, freed);
                    return Ok(());
                }
                // What is there stays there, and what is here, here. A mark of poison is no page.
                Some(Errno::EXIST) => return Err(Errno::EXIST),
                Some(errno) if !patience.wait() => return Err(errno),
                Some(_) => {}
            }
        }
    }

    fn fill(&mut self, run: Span, freed: &mut Freed<'_, Process>) -> Filled {
        let slot = self.slot.as_mut().expect("found before pages left");
        let filled = self
            .block
            .process
            .mover
            .fill(run, slot.place_of(run.start()));
        if filled.moved && !filled.done.is_zero() {
            let is_whole = filled.done == gpusvm_types::BLOCK_SIZE;
            let was_huge = slot.content() == Content::Huge;
            let at_home = self.block.state().left_huge.load(Ordering::Relaxed);
            slot.holds(match (is_whole, was_huge && at_home) {
                (true, true) => Content::Clean,
                (true, false) => Content::Table,
                (false, _) => Content::Some,
            });
        }
        if let Ok(done) = Span::from_len(run.start(), filled.done) {
            self.settle(done, freed);
        }
        filled
    }

    fn settle(&mut self, run: Span, freed: &mut Freed<'_, Process>) {
        let first = self.span.index_of(run.first_page());
        let words = self.block.region.words_in(run);
        for (word, leaving) in words.iter().zip(&mut self.leaving[first..]) {
            if let Some(leaving) = leaving.take() {
                word.settle_system();
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

/// Copies are made in pieces of this length, because no fault is read meanwhile.
const HELD_UP_TO: ByteSize = ByteSize::kib(64);

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

    fn in_place(&self) -> PageCount {
        let all = 0..self.span.page_count().as_usize();
        PageCount::from_usize(all.filter(|i| self.in_place.contains(*i)).count())
    }

    fn commit(mut self) -> Result<(), MmError> {
        gpusvm_sync::walk!("commit");
        let memories = &self.block.process.memories;
        let mut freed = Freed::new(memories);
        self.settle_in_place(&mut freed);
        let result = self.arrive(&mut freed).map_err(|errno| MmError::System {
            call: "putting pages in",
            span: self.span,
            errno: errno.raw_os_error(),
        });
        for (i, page) in self.span.pages().enumerate() {
            if self.fate(i) == Fate::Forgotten {
                self.settle(Span::page_of(page.start()), &mut freed);
            }
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
    }
}
