//! What the program does to its mappings while pages are elsewhere, or on the way.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, Memory, Pages, check_moved, check_zero, pages};
use common::{OWNER, World, soon};
use gpusvm_mm::{AddressSpace, Block, Home, Inbound, Mirror, Outbound};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, Span};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

on_userfaultfd_rungs!(
    munmap_gives_device_pages_back,
    munmap_of_half_leaves_the_rest,
    dontneed_is_zeroes_and_gives_device_pages_back,
    dontneed_of_ram_is_zeroes,
    mremap_takes_device_pages_along,
    mremap_dontunmap_leaves_an_empty_place,
    read_only_memory_leaves_and_comes_home,
    memory_protected_while_away_comes_home,
    changes_while_out,
    changes_while_coming_home,
    a_hole_in_a_block_leaves_two_parts,
    many_removals_at_once,
    drops_and_migrations_race,
);

fn settled(world: &World, held: usize) {
    world.process.settle_events();
    assert_eq!(world.device.held(), held);
}

/// A mapping of the program's own, filled and armed: it may be unmapped behind the engine's back.
fn own(world: &World, len: ByteSize) -> Memory {
    world.memory(len, Pages::Base)
}

fn munmap_gives_device_pages_back(world: &World) {
    let memory = own(world, ByteSize::mib(4));
    world.out(memory.span());
    memory::unmap(memory.span());
    settled(world, 0);
    let mirror = world.process.mirrored(memory.span().start());
    assert!(matches!(mirror, Mirror::Gap(_)), "{mirror:?}");
    // The same addresses again are other memory.
    let again = memory::map_at(memory.span());
    check_zero(again);
    assert_eq!(world.process.adopt(again.start(), again.len()), Ok(again));
    let token = world.process.arm(again).unwrap();
    memory.fill(5);
    world.out(again);
    memory.check(5);
    world.process.disarm(again, token);
    world.process.unadopt(again).unwrap();
    memory::unmap(again);
}

fn munmap_of_half_leaves_the_rest(world: &World) {
    for (gone, n) in [(0, 256), (256, 256), (100, 17), (511, 1)] {
        let memory = own(world, BLOCK_SIZE);
        memory.fill(n);
        world.out(memory.span());
        let hole = memory.part(pages(gone), pages(n));
        memory::unmap(hole);
        settled(world, 512 - usize::try_from(n).unwrap());
        for part in memory.span().without(hole).into_iter().flatten() {
            memory.check_part(part, n);
            memory.fill_part(part, 9);
            assert_eq!(world.out(part), part.page_count());
            memory.check_part(part, 9);
            memory::unmap(part);
        }
        settled(world, 0);
    }
}

fn dontneed_is_zeroes_and_gives_device_pages_back(world: &World) {
    for kind in [Pages::Huge, Pages::Base] {
        let memory = world.memory(BLOCK_SIZE, kind);
        memory.fill(2);
        world.out(memory.span());
        let part = memory.part(pages(10), pages(300));
        memory::advise(part, libc::MADV_DONTNEED).unwrap();
        check_zero(part);
        settled_soon(world, 0);
        memory.check_part(memory.part(ByteSize::ZERO, pages(10)), 2);
        // All of it, without a touch before.
        world.out(memory.span());
        memory::advise(memory.span(), libc::MADV_DONTNEED).unwrap();
        settled(world, 0);
        check_zero(memory.span());
        memory.fill(3);
        assert_eq!(world.out(memory.span()), PageCount::new(512));
        memory.check(3);
        memory.disarm(&world.process);
        memory.end(&world.process);
    }
}

/// The CPU brings the rest home meanwhile.
fn settled_soon(world: &World, held: usize) {
    world.process.settle_events();
    let memory = &world.device;
    if held == 0 {
        world.process.stop_migrations();
    }
    assert_eq!(memory.held(), held);
}

fn dontneed_of_ram_is_zeroes(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    memory::advise(memory.span(), libc::MADV_DONTNEED).unwrap();
    // Not touched since: the next migration finds holes.
    world.process.settle_events();
    assert_eq!(world.out(memory.span()), PageCount::new(512));
    check_zero(memory.span());
    memory.fill(1);
    memory::advise(memory.span(), libc::MADV_DONTNEED).unwrap();
    check_zero(memory.span());
    memory.fill(2);
    assert_eq!(world.out(memory.span()), PageCount::new(512));
    memory.check(2);
    // Dropped while nobody watches, and used again: nothing of it may stick.
    memory::advise(memory.span(), libc::MADV_DONTNEED).unwrap();
    memory.disarm(&world.process);
    memory.fill(3);
    memory.arm(&world.process);
    assert_eq!(world.out(memory.span()), PageCount::new(512));
    memory.check(3);
    memory.disarm(&world.process);
    memory.end(&world.process);
}

fn mremap_takes_device_pages_along(world: &World) {
    for part in [(0, 512), (0, 256), (200, 100)] {
        let memory = own(world, BLOCK_SIZE);
        memory.fill(4);
        world.out(memory.span());
        let target = memory::map(BLOCK_SIZE);
        let from = memory.part(pages(part.0), pages(part.1));
        let to = Span::from_len(target.start(), from.len()).unwrap();
        memory::remap(from, to.start(), false);
        // Read at once: before or after the engine knows.
        check_moved(to, from, 4);
        world.process.settle_events();
        let mirror = world.process.mirrored(to.start());
        assert_eq!(mirror, Mirror::Mapping(to));
        for rest in memory.span().without(from).into_iter().flatten() {
            if rest != from {
                memory.check_part(rest, 4);
            }
        }
        // And out again from the new place.
        let token = world.process.arm(to).unwrap();
        assert_eq!(world.out(to), to.page_count());
        check_moved(to, from, 4);
        world.process.disarm(to, token);
        world.process.unadopt(to).unwrap();
        memory::unmap(target);
        memory::unmap(memory.span());
        world.process.settle_events();
    }
}

fn mremap_dontunmap_leaves_an_empty_place(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    memory.fill(6);
    world.out(memory.span());
    let target = memory::map(BLOCK_SIZE);
    memory::remap(memory.span(), target.start(), true);
    check_zero(memory.span());
    check_moved(target, memory.span(), 6);
    world.process.settle_events();
    // Both are mirrored now.
    memory.fill(7);
    for span in [memory.span(), target] {
        let token = world.process.arm(span).unwrap();
        assert_eq!(world.out(span), PageCount::new(512));
        world.process.disarm(span, token);
    }
    memory.check(7);
    check_moved(target, memory.span(), 6);
    world.process.unadopt(target).unwrap();
    memory::unmap(target);
    memory.end(&world.process);
}

fn read_only_memory_leaves_and_comes_home(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    for (first, n) in [(0, 512), (100, 200)] {
        memory.fill(n);
        let closed = memory.part(pages(first), pages(n));
        memory::protect(closed, libc::PROT_READ);
        for _ in 0..3 {
            assert_eq!(world.out(memory.span()), PageCount::new(512));
            memory.check(n);
            abort_out(world, memory.span());
            memory.check(n);
        }
        memory::protect(closed, libc::PROT_READ | libc::PROT_WRITE);
        memory.fill(8);
        memory.check(8);
    }
    memory.disarm(&world.process);
    memory.end(&world.process);
}

fn abort_out(world: &World, span: Span) {
    let mut block = world.process.lock_block(span).unwrap();
    drop(block.collect(span, OWNER, &mut |_, _| false).unwrap());
}

fn memory_protected_while_away_comes_home(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    memory.fill(1);
    let closed = memory.part(pages(7), pages(90));
    for _ in 0..3 {
        world.out(memory.span());
        memory::protect(closed, libc::PROT_READ);
        memory.check(1);
        memory::protect(closed, libc::PROT_READ | libc::PROT_WRITE);
        // While it is collected, and put back.
        let mut block = world.process.lock_block(memory.span()).unwrap();
        let collected = block
            .collect(memory.span(), OWNER, &mut |_, _| false)
            .unwrap();
        memory::protect(closed, libc::PROT_READ);
        drop(collected);
        drop(block);
        memory.check(1);
        memory::protect(closed, libc::PROT_READ | libc::PROT_WRITE);
        memory.fill(1);
    }
    memory.disarm(&world.process);
    memory.end(&world.process);
}

/// What the program can do to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Unmap,
    Drop,
    Remap,
    RemapKept,
}

const CHANGES: [Change; 4] = [
    Change::Unmap,
    Change::Drop,
    Change::Remap,
    Change::RemapKept,
];

/// Between collect and the end: with a commit, or an abort; of all of the block, or a part.
fn changes_while_out(world: &World) {
    for change in CHANGES {
        for (first, n) in [(0, 512), (128, 256)] {
            for commits in [true, false] {
                eprintln!("{change:?} of {n} pages, commits: {commits}");
                let memory = own(world, BLOCK_SIZE);
                memory.fill(3);
                let span = memory.span();
                let part = memory.part(pages(first), pages(n));
                let mut block = world.process.lock_block(span).unwrap();
                let collected = block.collect(span, OWNER, &mut |_, _| false).unwrap();
                let to = apply(change, part);
                let taken = world.device.take(span.page_count());
                if commits && world.device.copy_from(taken, collected.sources()) {
                    collected.commit(&mut |i| world.device.hold(taken, i));
                } else {
                    drop(collected);
                }
                world.device.let_go_unused(taken, span.page_count());
                drop(block);
                check_change(world, &memory, change, part, to);
            }
        }
    }
    assert_eq!(world.process.stats().failed_faults, 0);
}

/// The same on the way home.
fn changes_while_coming_home(world: &World) {
    for change in CHANGES {
        for (first, n) in [(0, 512), (128, 256)] {
            for commits in [true, false] {
                eprintln!("{change:?} of {n} pages, commits: {commits}");
                let memory = own(world, BLOCK_SIZE);
                memory.fill(3);
                let span = memory.span();
                let part = memory.part(pages(first), pages(n));
                world.out(span);
                let mut block = world.process.lock_block(span).unwrap();
                let collected = block.collect_device(span, &mut |_, _| true).unwrap();
                let to = apply(change, part);
                world.device.copy_to(collected.leaving());
                if commits {
                    collected.commit().unwrap();
                } else {
                    drop(collected);
                }
                drop(block);
                check_change(world, &memory, change, part, to);
            }
        }
    }
    assert_eq!(world.process.stats().failed_faults, 0);
}

/// Changes a part; where it went, if it moved.
fn apply(change: Change, part: Span) -> Option<Span> {
    match change {
        Change::Unmap => {
            memory::unmap(part);
            None
        }
        Change::Drop => {
            memory::advise(part, libc::MADV_DONTNEED).unwrap();
            None
        }
        Change::Remap | Change::RemapKept => {
            let target = memory::map(part.len());
            memory::remap(part, target.start(), change == Change::RemapKept);
            Some(target)
        }
    }
}

fn check_change(world: &World, memory: &Memory, change: Change, part: Span, to: Option<Span>) {
    let span = memory.span();
    for rest in span
        .without(part)
        .into_iter()
        .flatten()
        .filter(|rest| *rest != part)
    {
        memory.check_part(rest, 3);
    }
    match change {
        Change::Unmap => {}
        Change::Drop | Change::RemapKept => check_zero(part),
        Change::Remap => {}
    }
    if let Some(to) = to {
        check_moved(to, part, 3);
    }
    world.process.settle_events();
    world.process.stop_migrations();
    assert_eq!(world.device.held(), 0, "{change:?} of {part}");
    if let Some(to) = to {
        check_moved(to, part, 3);
        memory::unmap(to);
    }
    memory::unmap(span);
    world.process.settle_events();
    assert!(matches!(
        world.process.mirrored(span.start()),
        Mirror::Gap(_)
    ));
}

/// Both parts share one lock and one state: what is armed later must be armed for both.
fn a_hole_in_a_block_leaves_two_parts(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    memory::unmap(memory.part(pages(200), pages(100)));
    world.process.settle_events();
    memory.disarm(&world.process);
    let (low, high) = (
        memory.part(ByteSize::ZERO, pages(200)),
        memory.part(pages(300), pages(212)),
    );
    for (first, second) in [(low, high), (high, low)] {
        let one = world.process.arm(first).unwrap();
        let two = world.process.arm(second).unwrap();
        for span in [low, high] {
            memory.fill_part(span, 3);
            assert!(memory::is_registered(span.start()));
            assert_eq!(world.out(span), span.page_count());
        }
        // One is let go while the other is away.
        world.process.disarm(first, one);
        memory.check_part(low, 3);
        memory.check_part(high, 3);
        world.process.disarm(second, two);
        assert!(!memory::is_registered(low.start()) && !memory::is_registered(high.start()));
    }
    // One is forgotten while the other is away.
    let token = world.process.arm(high).unwrap();
    memory.fill_part(high, 4);
    world.out(high);
    world.process.unadopt(low).unwrap();
    memory.check_part(high, 4);
    world.process.disarm(high, token);
    world.process.unadopt(high).unwrap();
    memory::unmap(low);
    memory::unmap(high);
}

/// More than the queue of jobs holds, while the event thread cannot get on.
fn many_removals_at_once(world: &World) {
    let memory = own(world, ByteSize::mib(8));
    world.out(memory.span());
    {
        let busy = world
            .process
            .lock_block(memory.part(ByteSize::ZERO, BLOCK_SIZE));
        let busy = busy.unwrap();
        for page in (0..2048).step_by(2) {
            memory::advise(memory.part(pages(page), pages(1)), libc::MADV_DONTNEED).unwrap();
        }
        drop(busy);
    }
    for page in memory.span().pages() {
        let page = Span::page_of(page.start());
        if page.first_page().get().is_multiple_of(2) {
            check_zero(page);
        } else {
            memory.check_part(page, 1);
        }
    }
    memory::unmap(memory.span());
    settled(world, 0);
}

/// A thread that drops and checks for zeroes, and one that migrates.
fn drops_and_migrations_race(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stops = Stops(&stop);
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                world.out(memory.span());
                world.process.bring_home(memory.span()).unwrap();
            }
        });
        for round in 0..300 {
            let part = memory.part(pages(round % 8 * 64), pages(64));
            memory.fill_part(part, round);
            memory.check_part(part, round);
            memory::advise(part, libc::MADV_DONTNEED).unwrap();
            check_zero(part);
        }
    });
    memory.disarm(&world.process);
    memory.end(&world.process);
}

/// A test that fails ends its threads too.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

on_rungs!(
    rung_1_only,
    gpusvm_mm_linux::Rung::Move,
    protection_has_no_event
);

/// A permission change is not heard of: the words do not change.
fn protection_has_no_event(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    world.out(memory.span());
    let events = world.process.stats().events;
    memory::protect(memory.span(), libc::PROT_READ);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(world.process.stats().events, events);
    assert!(matches!(world.home(memory.span().start()), Home::Device(_)));
    memory.check(1);
    memory.disarm(&world.process);
    memory::unmap(memory.span());
    soon("forgotten", || {
        world.process.settle_events();
        world.device.held() == 0
    });
}
