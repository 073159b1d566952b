//! The story of one CPU fault.
//!
//! ```text
//!   a thread touched a page
//!     |- the block is busy: the thread waits until it is free, and tries again
//!     |- the page was unmapped, or moved: the event will say, a little later
//!     |- the page is read in copies: nobody reads them any more, and it can be written
//!     |- the page is RAM's: never touched, or dropped: zeroes
//!     |- the page lives on a device: its owner brings it home, or says when
//!     `- it cannot come home: a bus error, never a hang
//! ```

use crate::Sim;
use crate::block::BlockGuard;
use crate::kernel::{Kernel, Pte};
use crate::stats::Counters;
use gpusvm_mm::{Block, CpuFault, DevicePage, FaultOutcome, Place, Reason, Time, Wanted};
use gpusvm_types::{ByteSize, PageIndex, Span, VirtAddr};
use std::time::Duration;

/// What becomes of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Whoever waits tries again.
    Done,
    /// Then.
    Later(Time),
}

/// A fault of memory that was never touched is answered for this much.
const ZERO_CHUNK: ByteSize = ByteSize::kib(64);
/// How soon to look again at an address that an event is about to make known.
const EVENT_POLL: Duration = Duration::from_micros(200);

impl Sim {
    /// Serves a fault. May wait, for a copy and for devices.
    pub(crate) fn serve_fault(&self, at: VirtAddr) -> Urgency {
        self.step(format_args!("fault {at}"));
        let mut block = match BlockGuard::try_lock(self, at) {
            Ok(Some(block)) => block,
            Ok(None) => {
                self.wait_for_block(at);
                return Urgency::Done;
            }
            // Moved here a moment ago; or the touch that comes now finds it gone.
            Err(_) if self.kernel.lock().is_arriving(at) => return self.later(),
            Err(_) => return Urgency::Done,
        };
        let page = at.page();
        let word = block.region.word(page).get();
        if word.unmapped {
            // It moves, or is gone: the event says which in a moment.
            return self.later();
        }
        if word.dropped {
            block.release_dropped(Span::page_of(at));
        }
        if block.region.word(page).get().protected {
            Counters::count(&self.counters.write_faults);
            block.unprotect(block.protected_around(page), Reason::Write);
            return Urgency::Done;
        }
        match block.region.word(page).get().place {
            Place::Device(device) => self.bring_page_home(&mut block, at, device),
            Place::System => {
                Counters::count(&self.counters.zero_fills);
                let mut kernel = self.kernel.lock();
                // Protected, and not marked: by whoever is gone.
                kernel.protected.remove(&page);
                zero_fill(&mut kernel, &block, page);
                Urgency::Done
            }
            // A hole of a page that was to be coherent, or its protection: as in RAM.
            Place::Coherent(_) => {
                let mut kernel = self.kernel.lock();
                kernel.protected.remove(&page);
                zero_fill(&mut kernel, &block, page);
                Urgency::Done
            }
            // Only the holder of the lock, which is us, sees these.
            place => panic!("seed {}: nobody moves {page:?}, {place:?}", self.seed()),
        }
    }

    /// A thread sleeps until a page may come home, or an event has been handled.
    pub(crate) fn wait_for_page(&self, due: Time) {
        if self.runtime.me().is_none() {
            // Nobody else would.
            self.settle_events();
        }
        self.sleep_until(due);
    }

    fn later(&self) -> Urgency {
        Urgency::Later(self.time().after(EVENT_POLL))
    }

    fn wait_for_block(&self, at: VirtAddr) {
        Counters::count(&self.counters.busy_faults);
        let region = {
            let kernel = self.kernel.lock();
            let part = kernel.parts.find(at);
            part.map(|part| part.region.clone())
        };
        let Some(region) = region else { return };
        let what = format_args!("the block at {}, in a fault", at.block_start());
        let state = region.block(at);
        self.runtime
            .wait_until(&what, None, &mut || state.is_free());
    }

    fn bring_page_home(
        &self,
        block: &mut BlockGuard<'_>,
        at: VirtAddr,
        page: DevicePage,
    ) -> Urgency {
        let wanted = Wanted::Touched;
        match block.migrate_to_ram(&CpuFault { at, page, wanted }) {
            FaultOutcome::Served => Counters::count(&self.counters.cpu_faults),
            FaultOutcome::NotBefore(due) => {
                Counters::count(&self.counters.delayed_faults);
                return Urgency::Later(due);
            }
            // Others of its window failed, or the program unmapped it meanwhile.
            FaultOutcome::Failed if !block.is_away(at.page()) => {}
            FaultOutcome::Failed => {
                Counters::count(&self.counters.failed_faults);
                self.note(format_args!("{at} is lost"));
                self.kernel.lock().pages.insert(at.page(), Pte::Poisoned);
            }
        }
        Urgency::Done
    }
}

/// Fills the chunk around a page that the kernel has no page for.
fn zero_fill(kernel: &mut Kernel, block: &BlockGuard<'_>, page: PageIndex) {
    let chunk = Span::chunk_of(page.start(), ZERO_CHUNK);
    let chunk = chunk.intersection(block.span());
    let chunk = chunk.unwrap_or_else(|| Span::page_of(page.start()));
    block.region.word(page).saw_hole();
    for page in chunk.pages() {
        let word = block.region.word(page).get();
        let is_hole = word.place.is_in_place() && !word.dropped && !word.unmapped;
        if is_hole && kernel.mapping(page.start()).is_some() {
            kernel.pages.entry(page).or_insert(Pte::Zero);
        }
    }
}
