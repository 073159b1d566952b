//! The story of one CPU fault.
//!
//! ```text
//!   a thread touched a page
//!     |- an engine's own thread: it must not wait; the page is a hole: zeroes           (at once)
//!     |- the block is busy: whoever holds it wakes the thread when it is done          (at once)
//!     |- the page is read in copies: nobody reads them any more, and it can be written
//!     |- the page is RAM's: never touched, or dropped: zeroes, or the page of the file behind
//!     |- the page lives on a device: its owner brings it home, or says when
//!     `- it cannot come home: a bus error, never a hang
//! ```

use crate::block::BlockGuard;
use crate::process::Process;
use crate::region::{Behind, Region};
use crate::source::Arrival;
use crate::stats::Counters;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Block, CpuFault, FaultOutcome, Place, Reason, Time, Wanted};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, PAGE_SIZE, PageIndex, Span, VirtAddr};

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
    gpusvm_sync::walk!("serve_at_once");
    let served = answer_at_once(process, arrival);
    let tid = arrival.tid.unwrap_or_default();
    if !served && gpusvm_guarded::is_engine_thread(tid) {
        // Its translation is out of date, and whoever serves it may wait for its access to end.
        gpusvm_guarded::interrupt(tid, ByteSize::new(arrival.at.get()).as_usize());
    }
    served
}

fn answer_at_once(process: &Process, arrival: &Arrival) -> bool {
    let page = Span::page_of(arrival.at);
    let tid = arrival.tid.unwrap_or_default();
    let Some(part) = process.regions.find(arrival.at) else {
        if arrival.protected {
            // Moved here a moment ago. Copies were of its old place: nobody reads them for this one.
            process.mover.release_at_once(page);
            return true;
        }
        let is_engine = gpusvm_guarded::is_engine_thread(tid);
        return is_engine && serve_unknown(process, arrival) == Some(Urgency::Done);
    };
    let block = part.region.block(arrival.at);
    if arrival.protected && block.breaks_sharing(tid) {
        // Whoever holds the block writes it, to have it for the process alone: its protection was to be gone.
        process.mover.release_at_once(page);
        return true;
    }
    if arrival.protected {
        // Somebody who holds the block protected it, or is about to copy it; or it is read in copies.
        return block.note_fault();
    }
    // What is a hole now is filled as one: from here on, nothing is heard to move here.
    let _held = process.source.hold();
    let word = part.region.word(arrival.at.page()).get();
    let is_engine = gpusvm_guarded::is_engine_thread(tid);
    // Where another mapping arrives, what is missing is not a hole: it may be on a device.
    let arrives = word.unmapped && process.events.is_arriving(arrival.at);
    // A device in software works on the page in place, and the program dropped it: whoever takes
    // the block may be waiting for that very access to end.
    let cannot_wait = (word.place.is_in_place() && is_engine && !arrives)
        // Or whoever holds the block touched it. Not others, of what was dropped meanwhile: they write it,
        // and it may be about to be taken.
        || block.is_breaker(tid);
    // Dropped while it is read in copies: that is heard of in a moment, and no write goes unheard.
    let fill = || {
        let of_file = from_file(process, &part.region, page, word.protected);
        match (of_file, word.protected) {
            (Some(_), _) => {}
            (None, true) => process.mover.zero_fill_protected(page),
            (None, false) => drop(process.mover.zero_fill(page)),
        }
    };
    if cannot_wait {
        fill();
    }
    // Or it met a hole that has just been marked, and whoever marked it waits for it.
    let is_marked = word.place == Place::Collected && is_engine && !arrives;
    cannot_wait || (is_marked && block.clearing.fill(fill))
}

/// Serves a fault. May wait, for a copy and for devices.
pub(crate) fn serve(process: &Process, arrival: &Arrival) -> Urgency {
    gpusvm_sync::walk!("serve");
    let at = arrival.at;
    let mut block = match look_again(|| block_of(process, arrival)) {
        Some(Ok(block)) => block,
        Some(Err(urgency)) => return urgency,
        // Others lock and unlock it all the time: who is woken faults again.
        None => {
            wake(process, at);
            return Urgency::Done;
        }
    };
    let page = at.page();
    let word = block.region.word(page).get();
    if word.unmapped {
        // It moves, or is gone: the event says which in a moment.
        return Urgency::Later(process.now().after(REMAP_POLL));
    }
    if word.dropped {
        block.release_dropped(Span::page_of(at));
    }
    if block.region.word(page).get().protected {
        Counters::count(&process.counters.write_faults);
        block.unprotect(block.protected_around(page), Reason::Write);
        // Who found it missing looks again: it has no copies now.
        process.mover.wake(Span::page_of(at));
        return Urgency::Done;
    }
    match block.region.word(page).get().place {
        Place::Device(device) => bring_home(process, &mut block, at, device),
        Place::System => {
            zero_fill(process, &block, page);
            Urgency::Done
        }
        Place::Coherent(_) => {
            if !process.is_in_ram(page) {
                // It went unheard of, as the end of a file takes pages away: what is there now is no
                // device's.
                block.region.word(page).drop_contents();
                block.release_dropped(Span::page_of(at));
            }
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
    gpusvm_sync::walk!("bring_home");
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
        // Others of its window failed, or the program unmapped it meanwhile.
        FaultOutcome::Failed if !is_away(block, at) => {
            process.mover.wake(block.span());
            Urgency::Done
        }
        FaultOutcome::Failed => {
            give_up(process, at, "the page could not be brought home");
            Urgency::Done
        }
    }
}

/// Whether a page that was to come home is still on its device, and the program still wants it.
fn is_away(block: &BlockGuard<'_>, at: VirtAddr) -> bool {
    let word = block.region.word(at.page()).get();
    !word.place.is_in_place() && !word.unmapped && !word.dropped
}

/// Fills the chunk around a page that the kernel has no page for.
fn zero_fill(process: &Process, block: &BlockGuard<'_>, page: PageIndex) {
    gpusvm_sync::walk!("zero_fill");
    // Behind a file, the pages around are not holes as this one is.
    let size = match block.region.behind() {
        Behind::Zeroes => ZERO_CHUNK,
        Behind::File => PAGE_SIZE,
    };
    let chunk = Span::chunk_of(page.start(), size);
    let chunk = chunk
        .intersection(block.span())
        .unwrap_or_else(|| Span::page_of(page.start()));
    block.region.word(page).saw_hole();
    // What moved here is marked, or no page is filled: from here on, no move is heard of, and none ends.
    let held = process.source.hold();
    let is_hole = |page: PageIndex| {
        let word = block.region.word(page).get();
        // What is read in copies is not to be written unheard.
        word.place.is_in_place() && !word.dropped && !word.unmapped && !word.protected
    };
    let first = chunk.first_page();
    let mut is_there = false;
    for run in crate::outbound::runs(chunk, |i| {
        is_hole(first + gpusvm_types::PageCount::from_usize(i))
    }) {
        match from_file(process, &block.region, run, false) {
            Some(true) => {}
            None if process.mover.zero_fill(run) => {
                Counters::count(&process.counters.zero_fills);
            }
            _ => is_there |= run.contains(page.start()),
        }
    }
    // What follows may wait for an event.
    drop(held);
    if is_there {
        // After all. If it is still protected, by whoever took it and is gone, it is so no longer than
        // this.
        process.mover.release(Span::page_of(page.start()));
    }
    process.mover.wake(Span::page_of(page.start()));
}

/// The page of the file that a private mapping shows where the program has written none. `None` if there is
/// no such page: then it is zeroes.
fn from_file(process: &Process, region: &Region, page: Span, protected: bool) -> Option<bool> {
    match region.behind() {
        Behind::Zeroes => None,
        Behind::File => process.mover.fill_from_file(page, protected),
    }
}

/// Nothing is mirrored there: it was moved a moment ago, or unmapped.
pub(crate) fn serve_unknown(process: &Process, arrival: &Arrival) -> Option<Urgency> {
    let at = arrival.at;
    // What moves here is not filled with zeroes: from here on, no move is heard of, and none ends.
    let _held = process.source.hold();
    if process.events.is_remapping() {
        return Some(Urgency::Later(process.now().after(REMAP_POLL)));
    }
    if process.regions.find(at).is_some() {
        return None;
    }
    let page = Span::page_of(at);
    if arrival.told == process.events_told() {
        // Registered, but nobody's: armed once and moved away since. The kernel knows of no page, unless a
        // file has one.
        if process.mover.fill_from_file(page, false).is_none() {
            process.mover.zero_fill(page);
        }
    } else {
        // Whoever touched it may have been woken before, and what was there may have gone: userfaultfd would
        // fill whatever is there by now, also what another engine has registered. Who waits faults again.
        process.mover.wake(page);
    }
    Some(Urgency::Done)
}

/// Lets who waits for the page try again.
pub(crate) fn wake(process: &Process, at: VirtAddr) {
    process.mover.wake(Span::page_of(at));
}

/// So often a block may be locked, unlocked, made known or forgotten between two looks of a fault.
const MAX_LOOKS: u32 = 256;

/// Looks until a look finds something, so often.
fn look_again<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    (0..MAX_LOOKS).find_map(|_| look())
}

/// The block of a fault, locked; or what to do about the fault without it. `None` when that changed
/// between two looks.
fn block_of<'p>(
    process: &'p Process,
    arrival: &Arrival,
) -> Option<Result<BlockGuard<'p>, Urgency>> {
    let at = arrival.at;
    match BlockGuard::try_lock(process, at) {
        Ok(Some(block)) => Some(Ok(block)),
        Ok(None) => {
            let part = process.regions.find(at);
            let is_noted = part.is_some_and(|part| part.region.block(at).note_fault());
            is_noted.then_some(Err(Urgency::Done))
        }
        Err(_) => serve_unknown(process, arrival).map(Err),
    }
}

/// The page is lost to the CPU: a bus error for who touches it, and a report.
pub(crate) fn give_up(process: &Process, at: VirtAddr, reason: &str) {
    gpusvm_sync::walk!("give_up");
    Counters::count(&process.counters.failed_faults);
    process.report(format_args!("{reason}: the page at {at} is poisoned"));
    process.mover.poison(Span::page_of(at));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Options;
    use crate::sys::probe::{Capabilities, Rung};
    use crate::sys::testing::started;
    use gpusvm_mm::{Outbound, Source};
    use gpusvm_types::{BLOCK_SIZE, OwnerId};

    /// Story: whoever took pages out broke their sharing by a write, which was caught, since an unprotection
    /// had been cut short, and was to go on when the block was free: its own.
    #[test]
    fn who_breaks_the_sharing_of_a_protected_page_does_not_wait_for_itself() {
        if Capabilities::probe().carries(Rung::Move).is_err() {
            return;
        }
        let rung = Some(Rung::Move);
        let process = Process::start(Options {
            rung,
            ..Options::default()
        })
        .unwrap();
        let memory = process.allocate(BLOCK_SIZE).unwrap();
        let token = process.arm(memory).unwrap();
        let pointer = |page: PageIndex| {
            let at = ByteSize::new(page.start().get()).as_usize();
            std::ptr::with_exposed_provenance_mut::<u8>(at)
        };
        let pages = Span::from_len(memory.start(), ByteSize::kib(64)).unwrap();
        // SAFETY: memory of our own.
        pages
            .pages()
            .for_each(|page| unsafe { pointer(page).write_volatile(5) });
        let mut sources = [Source::Hole; 16];
        process.mover.protect(pages, &mut sources).unwrap();
        // SAFETY: the child sleeps until it is killed.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: as above.
            unsafe { libc::pause() };
        }
        let taking = Arc::clone(&process);
        let taken = started(move || {
            let mut block = taking.lock_block(pages).unwrap();
            let collected = block.collect(pages, OwnerId(1), &mut |_, _| false);
            let sources = collected.unwrap();
            sources
                .sources()
                .iter()
                .filter(|source| source.is_collected())
                .count()
        });
        let taken = taken.recv_timeout(Duration::from_secs(20));
        // SAFETY: our own child.
        unsafe { libc::kill(child, libc::SIGKILL) };
        // SAFETY: as above; its status is not asked for.
        unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        assert_eq!(taken, Ok(16), "it waits for itself");
        // SAFETY: memory of our own.
        let is_right = |page| unsafe { pointer(page).read_volatile() } == 5;
        assert!(pages.pages().all(is_right));
        process.disarm(memory, token);
        process.free(memory);
        process.stop();
    }

    #[test]
    fn a_block_that_is_never_free_nor_locked_is_looked_at_so_often() {
        let mut looks = 0;
        let mut found = |after: u32| {
            looks = 0;
            look_again(|| {
                looks += 1;
                (looks > after).then_some(looks)
            })
        };
        assert_eq!(found(0), Some(1));
        assert_eq!(found(MAX_LOOKS - 1), Some(MAX_LOOKS));
        assert_eq!(found(MAX_LOOKS), None);
        assert_eq!(looks, MAX_LOOKS);
    }
}
