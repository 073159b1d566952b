//! An engine that marks pages which are elsewhere: what it takes for a hole, and what it does not.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{Memory, Pages, pages};
use common::{OWNER, World, count};
use gpusvm_mm::{AddressSpace, Block, Outbound, Source};
use gpusvm_mm_linux::{Options, Process};
use gpusvm_types::{BLOCK_SIZE, ByteSize};

on_userfaultfd_rungs!(what_is_protected_to_be_taken_is_no_marker);

/// Story: where pages are taken in place, they are write-protected first, which marked the holes among them; and
/// what shows as swapped out was copied. A page of zeroes came for that, which nothing protected: what was written
/// there meanwhile was lost.
fn what_is_protected_to_be_taken_is_no_marker(world: &World) {
    let process = Process::start(Options {
        rung: Some(world.rung),
        markers: true,
    });
    let process = process.unwrap();
    if process.leaves_markers() {
        let memory = Memory::new(&process, BLOCK_SIZE, Pages::Base);
        let touched = memory.part(pages(100), pages(3));
        memory.fill_part(touched, 5);
        memory.arm(&process);
        // Such memory does not move: it is copied where it is.
        protect(&memory, libc::PROT_READ);
        for _ in 0..2 {
            let mut block = process.lock_block(memory.span()).unwrap();
            let collected = block.collect(memory.span(), OWNER, &mut |_, _| false);
            let collected = collected.unwrap();
            let is_page = |source| matches!(source, Source::Page(_));
            assert_eq!(count(collected.sources(), |it| is_page(*it)), 3);
            assert_eq!(count(collected.sources(), |it| *it == Source::Hole), 509);
        }
        protect(&memory, libc::PROT_READ | libc::PROT_WRITE);
        memory.check_part(touched, 5);
        common::memory::check_zero(memory.part(ByteSize::ZERO, pages(100)));
        memory.disarm(&process);
        memory.end(&process);
    } else {
        eprintln!("skipped: pages cannot be marked here");
    }
    process.stop();
}

fn protect(memory: &Memory, access: i32) {
    let span = memory.span();
    let at = std::ptr::with_exposed_provenance_mut(ByteSize::new(span.start().get()).as_usize());
    // SAFETY: permissions of the test's own memory, which nobody refers to.
    let done = unsafe { libc::mprotect(at, span.len().as_usize(), access) };
    assert_eq!(done, 0);
}
