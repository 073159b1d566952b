//! The story of one CPU fault.
//!
//! ```text
//!   a thread touched a page
//!     |- an engine's own thread: it must not wait; the page was dropped: zeroes        (at once)
//!     |- the block is busy: whoever holds it wakes the thread when it is done          (at once)
//!     |- the page is RAM's: never touched, or dropped: zeroes
//!     |- the page lives on a device: its owner brings it home, or says when
//!     `- it cannot come home: a bus error, never a hang
//! ```

use crate::block::BlockGuard;
use crate::process::Process;
use crate::source::Arrival;
use crate::stats::Counters;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Block, CpuFault, FaultOutcome, Place, Time, Wanted};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, PageIndex, Span, VirtAddr};

/// What becomes of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Whoever waits tries again, now or when the block is free.
    Done,
    /// Look again then.
    Later(Time),
}

/// A fault of memory that was never touched is answered for this much.
const ZERO_CHUNK: ByteSize = ByteSize::kib(64);
/// How soon to look again at an address that a remap is about to make known.
const REMAP_POLL: Duration = Duration::from_micros(200);

/// Serves what needs no waiting. Whether that was all.
pub(crate) fn serve_at_once(process: &Process, arrival: &Arrival) -> bool {
    if arrival.tid.is_some_and(gpusvm_guarded::is_engine_thread) {
        // A device in software works on the page in place, and the program dropped it. Whoever
        // takes the block may be waiting for that very access to end.
        process.mover.zero_fill(Span::page_of(arrival.at));
        return true;
    }
    if arrival.protected {
        // Write-protected means that somebody holds the block; if not any more, try again.
        let noted = process.regions.find(arrival.at);
        if !noted.is_some_and(|part| part.region.block(arrival.at).note_fault()) {
            wake(process, arrival.at);
        }
        return true;
    }
    false
}

/// Serves a fault. May wait, for a copy and for devices.
pub(crate) fn serve(process: &Process, at: VirtAddr) -> Urgency {
    let mut block = loop {
        match BlockGuard::try_lock(process, at) {
            Ok(Some(block)) => break block,
            Ok(None) => {
                let part = process.regions.find(at);
                if part.is_some_and(|part| part.region.block(at).note_fault()) {
                    return Urgency::Done;
                }
                // It was unlocked between the two looks.
            }
            Err(_) => return serve_unknown(process, at),
        }
    };
    let page = at.page();
    let word = block.region.word(page).get();
    if word.dropped || word.unmapped {
        let span = Span::page_of(at);
        block.release_dropped(span);
    }
    match block.region.word(page).get().place {
        Place::Device(device) => bring_home(process, &mut block, at, device),
        Place::System => {
            Counters::count(&process.counters.zero_fills);
            zero_fill(process, &block, page);
            Urgency::Done
        }
        // Only the holder of the lock, which is us, sees these.
        Place::Collected | Place::Leaving(_) => {
            debug_assert!(false, "a page is on the move and nobody moves it");
            process.mover.wake(Span::page_of(at));
            Urgency::Done
        }
    }
}

fn bring_home(
    process: &Process,
    block: &mut BlockGuard<'_>,
    at: VirtAddr,
    page: gpusvm_mm::DevicePage,
) -> Urgency {
    let ops = Arc::clone(&process.memories.of(page).ops);
    let fault = CpuFault {
        at,
        page,
        wanted: Wanted::Touched,
    };
    match ops.migrate_to_ram(process, block, &fault) {
        FaultOutcome::Served => {
            Counters::count(&process.counters.cpu_faults);
            process.mover.wake(block.span());
            Urgency::Done
        }
        FaultOutcome::NotBefore(due) => Urgency::Later(due),
        FaultOutcome::Failed => {
            give_up(process, at, "the page could not be brought home");
            Urgency::Done
        }
    }
}

/// Fills the chunk around a page that the kernel has no page for.
fn zero_fill(process: &Process, block: &BlockGuard<'_>, page: PageIndex) {
    let chunk = Span::chunk_of(page.start(), ZERO_CHUNK);
    let chunk = chunk
        .intersection(block.span())
        .unwrap_or_else(|| Span::page_of(page.start()));
    block.region.word(page).saw_hole();
    let is_hole = |page: PageIndex| {
        let word = block.region.word(page).get();
        word.place == Place::System && !word.dropped && !word.unmapped
    };
    let first = chunk.first_page();
    for run in crate::outbound::runs(chunk, |i| {
        is_hole(first + gpusvm_types::PageCount::from_usize(i))
    }) {
        process.mover.zero_fill(run);
    }
    process.mover.wake(Span::page_of(page.start()));
}

/// Nothing is mirrored there: it was moved a moment ago, or unmapped.
fn serve_unknown(process: &Process, at: VirtAddr) -> Urgency {
    if process.events.is_remapping() {
        return Urgency::Later(process.now().after(REMAP_POLL));
    }
    // Registered, but nobody's: armed once and moved away since. The kernel knows of no page.
    process.mover.zero_fill(Span::page_of(at));
    Urgency::Done
}

/// Lets who waits for the page try again.
pub(crate) fn wake(process: &Process, at: VirtAddr) {
    process.mover.wake(Span::page_of(at));
}

/// The page is lost to the CPU: a bus error for who touches it, and a report.
pub(crate) fn give_up(process: &Process, at: VirtAddr, reason: &str) {
    Counters::count(&process.counters.failed_faults);
    process.report(format_args!("{reason}: the page at {at} is poisoned"));
    process.mover.poison(Span::page_of(at));
}
