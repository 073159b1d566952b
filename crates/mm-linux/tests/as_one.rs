//! Memory that is adopted as one stays one mapping of the kernel, so that the program can move all of it.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{
    self, check_moved, check_zero, is_any_registered, is_registered, is_registered_anyhow, pages,
};
use common::{World, exit_code, forked, soon};
use gpusvm_mm::{AddressSpace, ArmToken};
use gpusvm_mm_linux::AdoptError;
use gpusvm_types::{BLOCK_SIZE, ByteSize, PAGES_PER_BLOCK, Span};
use std::sync::atomic::{AtomicBool, Ordering};

on_userfaultfd_rungs!(
    it_is_registered_as_a_whole_from_the_first_need_to_the_end,
    all_of_it_moves_with_one_block_on_the_device,
    what_is_left_behind_is_empty_and_one_too,
    what_moved_is_one_and_so_is_a_part_of_it,
    a_part_of_it_is_protected_and_another_unmapped,
    what_is_watched_is_registered_as_a_whole,
    what_came_where_a_part_went_unheard_is_not_registered,
    memory_of_another_userfaultfd_is_taken,
    it_is_let_go_when_the_engine_stops,
    a_child_of_fork_has_plain_memory,
    nothing_is_registered_behind_the_end_of_the_adoption,
);

const BLOCKS: u64 = 3;

/// A mapping of three blocks, on small pages, adopted as one.
fn adopted(world: &World) -> Span {
    let span = memory::map(ByteSize::new(BLOCK_SIZE.get() * BLOCKS));
    memory::advise(span, libc::MADV_NOHUGEPAGE).unwrap();
    adopt(world, span);
    span
}

fn adopt(world: &World, span: Span) {
    let adopted = world.process.adopt_as_one(span.start(), span.len());
    assert_eq!(adopted, Ok(span));
}

/// One of its blocks.
fn block(span: Span, n: u64) -> Span {
    Span::from_len(span.start() + pages(512 * n), BLOCK_SIZE).unwrap()
}

fn fill(part: Span, seed: u64) {
    for page in part.pages() {
        let at = page.start();
        for at in [at, at + ByteSize::new(4088)] {
            memory::store(at, memory::value(seed, at.get()));
        }
    }
}

/// Arms one of its blocks and moves it to the device.
fn out(world: &World, block: Span) -> ArmToken {
    let token = world.process.arm(block).unwrap();
    assert_eq!(world.out(block), block.page_count());
    token
}

/// Which blocks are registered.
fn registered(span: Span) -> Vec<bool> {
    let blocks = span.blocks().map(|block| is_registered(block.start()));
    blocks.collect()
}

/// Ends the adoption: it is plain memory again, and nothing is registered any more.
fn end(world: &World, span: Span) {
    world.process.settle_events();
    world.process.unadopt(span).unwrap();
    assert!(!is_any_registered(span), "{span}");
    memory::unmap(span);
    world.process.settle_events();
    assert_eq!(world.device.held(), 0);
}

/// Moves it to where nothing is mapped that anybody wants. Where it is now.
fn remap(from: Span, keep: bool) -> Span {
    let to = memory::map(from.len());
    memory::remap(from, to.start(), keep);
    to
}

fn it_is_registered_as_a_whole_from_the_first_need_to_the_end(world: &World) {
    let span = adopted(world);
    assert_eq!(registered(span), [false; 3], "no device needs it yet");
    fill(block(span, 0), 1);
    assert_eq!(world.process.stats().zero_fills, 0);
    let token = world.process.arm(block(span, 1)).unwrap();
    assert_eq!(registered(span), [true; 3]);
    check_zero(block(span, 2));
    let is_message = || world.process.stats().zero_fills == 32;
    soon("a message for 64 KiB", is_message);
    world.process.disarm(block(span, 1), token);
    assert_eq!(registered(span), [true; 3], "it stays so");
    check_moved(block(span, 0), block(span, 0), 1);
    end(world, span);
}

/// Story: the block on the device was a mapping of its own, and `mremap` of all of them `EFAULT`.
fn all_of_it_moves_with_one_block_on_the_device(world: &World) {
    for n in 0..BLOCKS {
        let span = adopted(world);
        let [away, cpu] = [n, n + 1].map(|n| block(span, n % BLOCKS));
        fill(away, 6);
        out(world, away);
        fill(cpu, 7);
        let faults = world.process.stats().cpu_faults;
        let to = remap(span, false);
        world.process.settle_events();
        let [away_now, cpu_now, untouched_now] = [n, n + 1, n + 2].map(|n| block(to, n % BLOCKS));
        assert_eq!(world.on_device(away_now), PAGES_PER_BLOCK);
        assert_eq!(world.on_device(to), PAGES_PER_BLOCK);
        assert_eq!(world.process.stats().cpu_faults, faults, "none came home");
        check_zero(untouched_now);
        check_moved(cpu_now, cpu, 7);
        check_moved(away_now, away, 6);
        end(world, to);
    }
}

/// With `MREMAP_DONTUNMAP` what stays is empty, mirrored, and one as before.
fn what_is_left_behind_is_empty_and_one_too(world: &World) {
    let span = adopted(world);
    fill(span, 6);
    out(world, block(span, 1));
    let to = remap(span, true);
    world.process.settle_events();
    assert_eq!(world.on_device(to), PAGES_PER_BLOCK);
    check_moved(to, span, 6);
    end(world, to);

    check_zero(block(span, 0));
    fill(span, 8);
    out(world, block(span, 2));
    let to = remap(span, false);
    world.process.settle_events();
    assert_eq!(world.on_device(block(to, 2)), PAGES_PER_BLOCK);
    check_moved(to, span, 8);
    end(world, to);
}

fn what_moved_is_one_and_so_is_a_part_of_it(world: &World) {
    let first = adopted(world);
    fill(first, 6);
    out(world, block(first, 0));
    let second = remap(first, false);
    world.process.settle_events();
    assert_eq!(registered(second), [true; 3]);
    out(world, block(second, 1));
    // From the middle of one block to the end of the next.
    let part = Span::from_len(second.start() + pages(256), pages(768)).unwrap();
    let there = remap(part, false);
    world.process.settle_events();
    let last = block(second, 2);
    assert_eq!(world.on_device(there), 768);
    assert_eq!(world.on_device(last), 0);
    let third = remap(there, false);
    assert_eq!(registered(third), [true; 2]);
    let old = |from: u64, count| Span::from_len(first.start() + pages(from), pages(count)).unwrap();
    check_moved(third, old(256, 768), 6);
    let head = Span::from_len(second.start(), pages(256)).unwrap();
    check_moved(head, old(0, 256), 6);
    check_moved(last, old(1024, 512), 6);
    for part in [third, head, last] {
        world.process.settle_events();
        world.process.unadopt(part).unwrap();
        assert!(!is_registered_anyhow(part.start()));
        memory::unmap(part);
    }
    world.process.settle_events();
    assert_eq!(world.device.held(), 0);
}

fn a_part_of_it_is_protected_and_another_unmapped(world: &World) {
    let span = adopted(world);
    fill(span, 6);
    out(world, block(span, 0));
    let read_only = Span::from_len(span.start() + pages(100), pages(700)).unwrap();
    memory::protect(read_only, libc::PROT_READ);
    check_moved(block(span, 0), block(span, 0), 6);
    assert_eq!(registered(span), [true; 3]);
    memory::protect(read_only, libc::PROT_READ | libc::PROT_WRITE);
    out(world, block(span, 1));
    // One mapping again.
    let to = remap(span, false);
    let gone = block(to, 1);
    memory::unmap(gone);
    world.process.settle_events();
    assert_eq!(world.device.held(), 0);
    for n in [0, 2] {
        check_moved(block(to, n), block(span, n), 6);
        out(world, block(to, n));
        check_moved(block(to, n), block(span, n), 6);
        world.process.unadopt(block(to, n)).unwrap();
        assert!(!is_registered_anyhow(block(to, n).start()));
        memory::unmap(block(to, n));
    }
    world.process.settle_events();
    assert_eq!(world.device.held(), 0);
}

/// Registered for something else, a block would be a mapping of its own.
fn what_is_watched_is_registered_as_a_whole(world: &World) {
    let span = adopted(world);
    let watched = block(span, 1);
    let token = world.process.watch(watched).unwrap();
    assert_eq!(registered(span), [true; 3]);
    assert!(world.process.watched(watched.start(), token).is_some());
    out(world, block(span, 2));
    let to = remap(span, false);
    world.process.settle_events();
    assert!(world.process.watched(watched.start(), token).is_none());
    world.process.unwatch(watched, token);
    assert_eq!(world.on_device(to), PAGES_PER_BLOCK);
    assert_eq!(registered(to), [true; 3]);
    let token = world.process.watch(block(to, 0)).unwrap();
    world.process.unwatch(block(to, 0), token);
    assert_eq!(registered(to), [true; 3], "it stays so");
    end(world, to);
}

fn what_came_where_a_part_went_unheard_is_not_registered(world: &World) {
    let span = adopted(world);
    let (gone, rest) = (block(span, 1), block(span, 2));
    memory::unmap(gone);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let at = memory::pointer(gone.start()).cast();
    // SAFETY: nothing that is there is replaced.
    let shared = unsafe { libc::mmap(at, gone.len().as_usize(), access, flags, -1, 0) };
    assert_eq!(shared, at);
    fill(rest, 6);
    out(world, rest);
    assert_eq!(registered(span), [true, false, true]);
    check_moved(rest, rest, 6);
    memory::unmap(gone);
    for part in [block(span, 0), rest] {
        world.process.unadopt(part).unwrap();
        assert!(!is_registered_anyhow(part.start()));
        memory::unmap(part);
    }
    world.process.settle_events();
}

fn memory_of_another_userfaultfd_is_taken(world: &World) {
    let options = gpusvm_mm_linux::Options {
        rung: Some(world.rung),
        ..gpusvm_mm_linux::Options::default()
    };
    let other = gpusvm_mm_linux::Process::start(options).unwrap();
    let span = memory::map(ByteSize::new(BLOCK_SIZE.get() * BLOCKS));
    let theirs = block(span, 1);
    assert_eq!(other.adopt_as_one(theirs.start(), theirs.len()), Ok(theirs));
    let token = other.arm(theirs).unwrap();
    other.disarm(theirs, token);
    let adopt = |span: Span| world.process.adopt_as_one(span.start(), span.len());
    assert_eq!(adopt(span), Err(AdoptError::Taken { span: theirs }));
    assert_eq!(registered(span), [false, true, false]);
    other.unadopt(theirs).unwrap();
    assert_eq!(adopt(span), Ok(span));
    other.stop();
    out(world, block(span, 2));
    end(world, remap(span, false));
}

fn it_is_let_go_when_the_engine_stops(world: &World) {
    let span = adopted(world);
    fill(span, 6);
    out(world, block(span, 1));
    let to = remap(span, false);
    world.process.stop();
    assert!(!is_any_registered(to));
    check_moved(to, span, 6);
    memory::unmap(to);
}

fn a_child_of_fork_has_plain_memory(world: &World) {
    let span = adopted(world);
    fill(block(span, 0), 6);
    out(world, block(span, 0));
    let child = forked(|| {
        let first = block(span, 0).start();
        let is_right = memory::load(first) == memory::value(6, first.get())
            && memory::load(block(span, 1).start()) == 0;
        i32::from(!is_right)
    });
    assert_eq!(exit_code(child), 0);
    check_moved(block(span, 0), block(span, 0), 6);
    end(world, span);
}

/// A device needs the last block while the adoption of the others ends, one after the other.
fn nothing_is_registered_behind_the_end_of_the_adoption(world: &World) {
    let mut random = 1u64;
    for round in 0..100 {
        let span = memory::map(ByteSize::mib(64));
        adopt(world, span);
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let spins = (random >> 33) % 60_000;
        let begins = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                begins.store(true, Ordering::Release);
                (0..spins).for_each(|_| std::hint::spin_loop());
                let last = block(span, 31);
                // Or the adoption has ended.
                if let Ok(token) = world.process.arm(last) {
                    world.process.disarm(last, token);
                }
            });
            while !begins.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            world.process.unadopt(span).unwrap();
        });
        assert!(!is_any_registered(span), "round {round}");
        memory::unmap(span);
    }
}
