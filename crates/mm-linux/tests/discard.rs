//! Pages that are dropped here, because they live elsewhere now, while the program changes the mapping
//! that they are in.
//!
//! ```text
//!   the engine drops   [.................)   told of, and read
//!   the program cuts         |.....|         mprotect, and back
//!   the kernel drops   [.....)               and tells of the rest once more: no word says whose that is
//! ```

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::World;
use common::memory::{self, Memory, Pages, check_zero, pages};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, Span};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

on_userfaultfd_rungs!(
    what_is_cut_and_whole_again_while_it_goes_keeps_its_data,
    what_is_locked_and_unlocked_while_it_goes_keeps_its_data,
    what_is_sealed_stays_and_is_right,
    what_the_program_drops_while_the_same_goes_is_zero,
);

const ROUNDS: u64 = 2_000;
/// What goes to the device.
const LEN: ByteSize = ByteSize::kib(64);

/// Cuts the mapping at both ends, and mends it.
fn protect_and_back(part: Span) {
    memory::protect(part, libc::PROT_READ);
    memory::protect(part, libc::PROT_READ | libc::PROT_WRITE);
}

/// The same, and what is locked is dropped by another call.
fn lock_and_back(part: Span) {
    let (at, len) = (memory::pointer(part.start()).cast(), part.len().as_usize());
    // SAFETY: changes no byte. A limit may refuse.
    unsafe { libc::mlock2(at, len, libc::MLOCK_ONFAULT) };
    // SAFETY: as above.
    unsafe { libc::munlock(at, len) };
}

/// Runs `act` while somebody cuts and mends the middle of what goes.
fn while_cut(memory: &Memory, cut_and_mend: fn(Span), act: impl FnOnce()) {
    let (stop, middle) = (AtomicBool::new(false), memory.part(pages(6), pages(3)));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                cut_and_mend(middle);
            }
        });
        let _stopped = Stopped(&stop);
        act();
    });
}

/// Whatever happens meanwhile.
struct Stopped<'a>(&'a AtomicBool);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn what_is_cut_and_whole_again_while_it_goes_keeps_its_data(world: &World) {
    keeps_its_data(world, protect_and_back);
}

fn what_is_locked_and_unlocked_while_it_goes_keeps_its_data(world: &World) {
    keeps_its_data(world, lock_and_back);
}

fn keeps_its_data(world: &World, cut_and_mend: fn(Span)) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let part = memory.part(ByteSize::ZERO, LEN);
    memory.fill(1);
    let mut moved = PageCount::ZERO;
    while_cut(&memory, cut_and_mend, || {
        for _ in 0..ROUNDS {
            // A part that cannot be read right now stays.
            moved += world.try_out(part).unwrap_or(PageCount::ZERO);
            memory.check_part(part, 1);
        }
    });
    assert!(moved > part.page_count(), "{moved:?} went at all");
    memory.disarm(&world.process);
    memory.end(&world.process);
}

/// Read-only memory that is sealed (Linux 6.10) cannot be dropped: it lives on in RAM.
fn what_is_sealed_stays_and_is_right(world: &World) {
    const MSEAL: libc::c_long = 462;
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let part = memory.part(ByteSize::ZERO, LEN);
    memory.fill(1);
    memory::protect(memory.span(), libc::PROT_READ);
    let at = memory::pointer(memory.span().start());
    // SAFETY: it stays what it is: nobody unmaps it before the end of the process.
    let sealed = unsafe { libc::syscall(MSEAL, at, memory.span().len().as_usize(), 0) };
    if sealed != 0 {
        println!("skipped: mseal: {}", std::io::Error::last_os_error());
        memory.disarm(&world.process);
        return memory.end(&world.process);
    }
    let _ = world.try_out(part);
    assert_eq!((world.on_device(part), world.device.held()), (0, 0));
    memory.check(1);
    memory.disarm(&world.process);
    world.process.unadopt(memory.span()).unwrap();
}

fn what_the_program_drops_while_the_same_goes_is_zero(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let part = memory.part(ByteSize::ZERO, LEN);
    let (below, above) = (
        memory.part(ByteSize::ZERO, pages(6)),
        memory.part(pages(9), pages(7)),
    );
    // From the cut on, and from behind it on: to the same end.
    let given_up = |round: u64| {
        let first = 9 + round % 6;
        memory.part(pages(first), pages(16 - first))
    };
    let mut moved = PageCount::ZERO;
    while_cut(&memory, protect_and_back, || {
        std::thread::scope(|scope| {
            let (begin, rounds) = mpsc::sync_channel(0);
            let (done, ended) = mpsc::sync_channel(1);
            scope.spawn(move || {
                for round in rounds {
                    memory::advise(given_up(round), libc::MADV_DONTNEED).unwrap();
                    done.send(()).unwrap();
                }
            });
            for round in 0..ROUNDS {
                memory.fill_part(below, round);
                memory.fill_part(above, round);
                begin.send(round).unwrap();
                moved += world.try_out(part).unwrap_or(PageCount::ZERO);
                ended.recv().unwrap();
                check_zero(given_up(round));
                memory.check_part(below, round);
                if let Ok(kept) = Span::new(above.start(), given_up(round).start()) {
                    memory.check_part(kept, round);
                }
            }
        });
    });
    assert!(moved > part.page_count(), "{moved:?} went at all");
    memory.disarm(&world.process);
    memory.end(&world.process);
}
