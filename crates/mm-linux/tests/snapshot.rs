//! Where pages are, for who only looks.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, Pages};
use common::{OWNER, World};
use gpusvm_mm::{AddressSpace, Block, MmError, Seen};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, Span, VirtAddr};

on_every_rung!(
    each_page_is_seen_where_it_is,
    pages_on_the_move_are_seen_and_not_waited_for,
    memory_that_nobody_mirrors_is_seen,
    many_pieces_are_seen_as_they_are,
    a_look_changes_nothing,
    nothing_is_seen_when_it_is_gone,
);

fn look(world: &World, span: Span) -> Vec<Seen> {
    // What was there before is nothing to a look.
    let mut seen = vec![Seen::Moving; span.page_count().as_usize()];
    world.process.snapshot(span, &mut seen).unwrap();
    seen
}

fn page(span: Span, page: u64) -> Span {
    Span::of_pages(span.first_page() + PageCount::new(page), PageCount::ONE)
}

fn pages(span: Span, first: u64, count: u64) -> Span {
    page(span, first).union(page(span, first + count - 1))
}

/// What was never touched, what was, what is on the device, and all of it again.
fn each_page_is_seen_where_it_is(world: &World) {
    let memory = memory::Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    let span = memory.span();
    assert_eq!(look(world, span), [Seen::Absent; 512]);
    memory.fill_part(pages(span, 0, 16), 1);
    assert_eq!(look(world, pages(span, 0, 16)), [Seen::System; 16]);
    assert_eq!(look(world, pages(span, 16, 496)), [Seen::Absent; 496]);
    memory.arm(&world.process);
    assert_eq!(look(world, pages(span, 0, 16)), [Seen::System; 16]);
    world.out(pages(span, 4, 8));
    let seen = look(world, span);
    for (i, seen) in seen.iter().enumerate() {
        let is_right = match i {
            0..4 | 12..16 => *seen == Seen::System,
            4..12 => matches!(seen, Seen::Device(_)),
            _ => *seen == Seen::Absent,
        };
        assert!(is_right, "page {i}: {seen:?}");
    }
    let numbers: Vec<u32> = seen[4..12]
        .iter()
        .map(|seen| match seen {
            Seen::Device(page) => page.pfn.get(),
            other => panic!("{other:?}"),
        })
        .collect();
    assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]));
    // A touch brings them home: RAM has them again.
    memory.check_part(pages(span, 0, 16), 1);
    // The touch does not wait for the block: the move may still have to be written down.
    drop(world.process.lock_block(span).unwrap());
    assert_eq!(look(world, pages(span, 0, 16)), [Seen::System; 16]);
    memory.disarm(&world.process);
    memory.end(&world.process);
}

fn pages_on_the_move_are_seen_and_not_waited_for(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        let span = memory.span();
        let mut block = world.process.lock_block(span).unwrap();
        let collected = block.collect(pages(span, 0, 256), OWNER, &mut |_, _| false);
        let collected = collected.unwrap();
        let seen = look(world, span);
        assert_eq!(seen[..256], [Seen::Moving; 256]);
        assert_eq!(seen[256..], [Seen::System; 256]);
        drop(collected);
        assert_eq!(
            look(world, span),
            [Seen::System; 512],
            "with its block locked"
        );
        drop(block);
        memory.check(1);
    });
}

/// A stack, a file, a mapping of the program's own, a hole in it, and what no process can map.
fn memory_that_nobody_mirrors_is_seen(world: &World) {
    let local = 5u64;
    let stack = Span::page_of(VirtAddr::from(core::ptr::from_ref(&local)));
    assert_eq!(look(world, stack), [Seen::System]);
    let text = Span::page_of(VirtAddr::from(look as *const u8));
    assert_eq!(look(world, text), [Seen::System]);
    // Far from where the system puts what others map meanwhile: a hole stays a hole.
    let far = Span::from_len(VirtAddr::new(0x1234_0000_0000), BLOCK_SIZE);
    let own = memory::map_at(far.unwrap());
    memory::advise(own, libc::MADV_NOHUGEPAGE).unwrap();
    memory::store(page(own, 2).start(), 1);
    // The page of zeros is a page.
    assert_eq!(memory::load(page(own, 3).start()), 0);
    memory::unmap(pages(own, 5, 2));
    let (a, s, u) = (Seen::Absent, Seen::System, Seen::Unmapped);
    assert_eq!(look(world, pages(own, 0, 8)), [a, a, s, s, a, u, u, a]);
    // Closed to everybody, it is still there.
    memory::protect(pages(own, 0, 4), libc::PROT_NONE);
    assert_eq!(look(world, pages(own, 0, 4)), [a, a, s, s]);
    let across = pages(own, 510, 4);
    assert_eq!(look(world, across), [a, a, u, u]);
    memory::unmap(pages(own, 0, 5));
    memory::unmap(pages(own, 7, 505));
    assert_eq!(look(world, own), [u; 512]);
    let high = Span::page_of(VirtAddr::new(0xffff_8000_0000_0000));
    assert_eq!(look(world, high), [u]);
}

/// More runs than one scan reports.
fn many_pieces_are_seen_as_they_are(world: &World) {
    let memory = memory::Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    let span = memory.span();
    let is_there = |i: u64| i.is_multiple_of(3);
    for i in (0..512).filter(|i| is_there(*i)) {
        memory.fill_part(page(span, i), 2);
    }
    for (i, seen) in (0..).zip(look(world, span)) {
        let want = if is_there(i) {
            Seen::System
        } else {
            Seen::Absent
        };
        assert_eq!(seen, want, "page {i}");
    }
    memory.end(&world.process);
}

/// Nothing is faulted in, nothing comes home.
fn a_look_changes_nothing(world: &World) {
    let memory = world.memory(ByteSize::mib(4), Pages::Base);
    let span = memory.span();
    world.out(pages(span, 100, 600));
    let before = world.process.stats();
    let seen = look(world, span);
    assert_eq!(look(world, span), seen);
    assert_eq!(world.on_device(span), 600);
    let after = world.process.stats();
    assert_eq!(
        (before.cpu_faults, before.zero_fills),
        (after.cpu_faults, after.zero_fills)
    );
    memory.check(1);
    memory.disarm(&world.process);
    memory.end(&world.process);
}

fn nothing_is_seen_when_it_is_gone(world: &World) {
    world.process.stop();
    let at = Span::page_of(VirtAddr::new(0x1000));
    let gone = world.process.snapshot(at, &mut [Seen::Absent]);
    assert_eq!(gone, Err(MmError::Gone));
}
