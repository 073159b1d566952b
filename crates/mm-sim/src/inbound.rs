//! Device to RAM, step by step.
//!
//! ```text
//!   mark the words -> invalidate -> find a slot -> (copy into it) -> commit: fill, words say System
//!                                      |               |
//!                                      `---- drop -----'---> words name the device pages again
//! ```

use crate::block::BlockGuard;
use crate::injector::Step;
use crate::outbound::{EAGAIN, runs};
use crate::staging::Slot;
use crate::stats::Counters;
use gpusvm_mm::{Block, DevicePage, Freed, Inbound, Leaving, MmError, Place, Reason};
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{ByteSize, PAGES_PER_BLOCK, PageCount, PageIndex, Span};

/// Device pages with RAM to copy them to.
#[derive(Debug)]
pub struct SimInbound<'b> {
    block: &'b BlockGuard<'b>,
    span: Span,
    leaving: Vec<Option<Leaving>>,
    /// Coherent pages, which are there.
    in_place: Vec<PageIndex>,
    slot: Option<Slot<'b>>,
    settled: bool,
}

impl<'b> SimInbound<'b> {
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
        let sim = block.sim;
        sim.step(format_args!("collect_device {span}"));
        Counters::count(&sim.counters.device_collects);
        block.release_dropped(span);
        let mut this = Self {
            block,
            span,
            leaving: vec![None; span.page_count().as_usize()],
            in_place: Vec::new(),
            slot: None,
            settled: false,
        };
        let mut chosen = Vec::new();
        for page in span.pages() {
            // An unmapped page may be about to move: it stays until that is known.
            let word = block.region.word(page).get();
            match word.place {
                _ if word.unmapped => {}
                Place::Device(device) if select(page, device) => chosen.push((page, device)),
                Place::Coherent(device) if select(page, device) => this.in_place.push(page),
                _ => {}
            }
        }
        if !chosen.is_empty() {
            this.find_room(chosen)?;
        }
        // Not what lies between: a launch may need that where it is.
        let (leaving, in_place) = (&this.leaving, &this.in_place);
        let goes = |page: PageIndex| {
            leaving[span.index_of(page)].is_some() || in_place.binary_search(&page).is_ok()
        };
        let first = span.first_page();
        let leave: Vec<Span> = runs(span, |i| goes(first + PageCount::from_usize(i))).collect();
        for run in leave {
            block.invalidate(run, Reason::Migrate(None));
        }
        Ok(this)
    }

    fn find_room(&mut self, chosen: Vec<(PageIndex, DevicePage)>) -> Result<(), MmError> {
        let (block, span) = (self.block, self.span);
        let sim = block.sim;
        if sim.injector.step(Step::Staging) {
            return Err(MmError::NoStaging { span });
        }
        let slot = sim.staging.take(&sim.runtime);
        let slot = slot.ok_or(MmError::NoStaging { span })?;
        let frames = sim.kernel.lock().frames.clone();
        for (page, from) in chosen {
            block.region.word(page).mark_leaving(from);
            slot.prepare(page.start(), &frames);
            let to = slot.dma_of(page.start());
            self.leaving[span.index_of(page)] = Some(Leaving { from, to });
        }
        self.slot = Some(slot);
        Ok(())
    }

    /// Coherent pages take up no device page any more. What was unmapped meanwhile may be about to move, and
    /// stays.
    fn settle_in_place(&self) {
        let mut freed = Freed::new(&self.block.sim.memories);
        for page in &self.in_place {
            let word = self.block.region.word(*page);
            let state = word.get();
            if let (Place::Coherent(device), false) = (state.place, state.unmapped) {
                word.settle_system();
                freed.push(device);
            }
        }
    }

    /// Puts the pages in that are to come home, piece by piece.
    fn arrive(&mut self) -> Result<(), i32> {
        let sim = self.block.sim;
        let leaving = &self.leaving;
        let runs: Vec<Span> = runs(self.span, |i| leaving[i].is_some()).collect();
        let mut result = Ok(());
        for run in runs {
            for piece in pieces_of(run) {
                sim.step(format_args!("put in {piece}"));
                let freed = self.arrive_piece(piece, &mut result);
                // Outside of the kernel's lock: the owner is called.
                let mut back = Freed::new(&sim.memories);
                freed.into_iter().for_each(|page| back.push(page));
            }
        }
        result
    }

    /// In one step with what the words say: the program may have dropped or moved the pages.
    fn arrive_piece(&mut self, piece: Span, result: &mut Result<(), i32>) -> Vec<DevicePage> {
        let sim = self.block.sim;
        let slot = self.slot.as_ref().expect("found before pages left");
        let mut freed = Vec::new();
        let mut kernel = sim.kernel.lock();
        for page in piece.pages() {
            let i = self.span.index_of(page);
            let word = self.block.region.word(page);
            let state = word.get();
            let Some(leaving) = self.leaving[i] else {
                continue;
            };
            if !state.dropped {
                if state.unmapped {
                    // Its mapping is gone, or about to be somewhere else.
                    continue;
                }
                if sim.injector.step(Step::CommitIn) {
                    *result = result.and(Err(EAGAIN));
                    continue;
                }
                let frame = slot.remove(page.start()).expect("prepared for it");
                if let Err(errno) = kernel.put(page, &frame) {
                    slot.put(page.start(), frame);
                    *result = result.and(Err(errno));
                    continue;
                }
            }
            self.leaving[i] = None;
            word.settle_system();
            freed.push(leaving.from);
        }
        freed
    }

    fn came_whole(&self) -> bool {
        self.span.page_count().as_usize() == PAGES_PER_BLOCK
            && self.leaving.iter().all(Option::is_some)
            && self.block.state().left_huge.load(Ordering::Relaxed)
    }
}

/// A step puts in so many pages at most, so that the world can change between.
const PIECE: ByteSize = ByteSize::kib(64);

fn pieces_of(run: Span) -> impl Iterator<Item = Span> {
    let mut rest = Some(run);
    core::iter::from_fn(move || {
        let left = rest?;
        let piece = left.intersection(Span::chunk_of(left.start(), PIECE))?;
        rest = Span::new(piece.end(), left.end()).ok();
        Some(piece)
    })
}

impl Inbound for SimInbound<'_> {
    fn span(&self) -> Span {
        self.span
    }

    fn leaving(&self) -> &[Option<Leaving>] {
        &self.leaving
    }

    fn in_place(&self) -> PageCount {
        PageCount::from_usize(self.in_place.len())
    }

    fn commit(mut self) -> Result<(), MmError> {
        let sim = self.block.sim;
        self.settle_in_place();
        let whole = self.came_whole();
        let result = self.arrive();
        if whole && result.is_ok() && self.leaving.iter().all(Option::is_none) {
            sim.kernel.lock().join_huge(self.span);
        }
        self.settled = true;
        Counters::count(&sim.counters.device_commits);
        result.map_err(|errno| MmError::System {
            call: "putting pages in",
            span: self.span,
            errno,
        })
    }
}

impl Drop for SimInbound<'_> {
    fn drop(&mut self) {
        if !self.settled {
            Counters::count(&self.block.sim.counters.device_aborts);
        }
        for (page, leaving) in self.span.pages().zip(&self.leaving) {
            if let Some(leaving) = leaving {
                self.block.region.word(page).stay_on_device(leaving.from);
            }
        }
    }
}
