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
use gpusvm_types::{BLOCK_SIZE, ByteSize, Span};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

on_userfaultfd_rungs!(
    what_is_cut_and_whole_again_while_it_goes_keeps_its_data,
    what_the_program_drops_while_the_same_goes_is_zero,
);

const ROUNDS: u64 = 2_000;
/// What goes to the device.
const LEN: ByteSize = ByteSize::kib(64);

/// Cuts the mapping at both ends of `part`, and mends it, until it is told to stop.
fn cut_and_mend(part: Span, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        memory::protect(part, libc::PROT_READ);
        memory::protect(part, libc::PROT_READ | libc::PROT_WRITE);
    }
}

/// Runs `act` while somebody cuts and mends the middle of what goes.
fn while_cut(memory: &Memory, act: impl FnOnce()) {
    let (stop, middle) = (AtomicBool::new(false), memory.part(pages(6), pages(3)));
    std::thread::scope(|scope| {
        scope.spawn(|| cut_and_mend(middle, &stop));
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
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let part = memory.part(ByteSize::ZERO, LEN);
    memory.fill(1);
    while_cut(&memory, || {
        for _ in 0..ROUNDS {
            // A part that cannot be read right now stays.
            let _ = world.try_out(part);
            memory.check_part(part, 1);
        }
    });
    memory.disarm(&world.process);
    memory.end(&world.process);
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
    while_cut(&memory, || {
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
                let _ = world.try_out(part);
                ended.recv().unwrap();
                check_zero(given_up(round));
                memory.check_part(below, round);
                if let Ok(kept) = Span::new(above.start(), given_up(round).start()) {
                    memory.check_part(kept, round);
                }
            }
        });
    });
    memory.disarm(&world.process);
    memory.end(&world.process);
}
