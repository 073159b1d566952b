//! RAM to device and back: what comes home is what left.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, Memory, Pages, check_zero, pages};
use common::{OWNER, World, count, soon};
use gpusvm_mm::{AddressSpace, Block, Home, Inbound, KeptReason, MmError, Outbound, Source};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

on_every_rung!(
    round_trip_of_both_kinds,
    round_trip_many_times,
    writers_lose_nothing,
    abort_out_leaves_everything,
    abort_home_leaves_everything,
    holes_are_reported_and_come_home_as_zeroes,
    zero_pages_come_home_as_zeroes,
    partial_spans_leave_the_rest,
    odd_regions,
    windows_bring_home_no_more_than_said,
    a_second_migration_takes_only_what_is_in_ram,
    stop_brings_everything_home,
    what_cannot_come_home_is_no_zeroes_after_stop,
    free_gives_back_what_is_on_the_device,
    foreign_pages_come_home_for_a_snapshot,
    a_span_of_two_blocks_is_refused,
);

fn round_trip_of_both_kinds(world: &World) {
    world.each_kind(ByteSize::mib(4), |memory| {
        memory.fill(7);
        assert_eq!(world.out(memory.span()), PageCount::new(1024));
        assert_eq!(world.on_device(memory.span()), 1024);
        memory.check(7);
        assert_eq!(world.on_device(memory.span()), 0);
        assert_eq!(world.process.pages_on_devices(), PageCount::ZERO);
    });
    let stats = world.process.stats();
    assert_eq!(stats.cpu_faults, 4, "one for each block");
    assert_eq!(stats.failed_faults, 0);
}

fn round_trip_many_times(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        for seed in 0..200 {
            memory.fill(seed);
            world.out(memory.span());
            memory.check(seed);
        }
    });
    world.each_kind(BLOCK_SIZE, |memory| {
        for seed in 0..50 {
            memory.fill(seed);
            world.out(memory.span());
            world.process.bring_home(memory.span()).unwrap();
            assert_eq!(world.on_device(memory.span()), 0);
            memory.check(seed);
        }
    });
}

/// Lost CPU writes in the copy window: three threads count as fast as they can, each in words of
/// its own all over the block, and every count must be there in the end.
fn writers_lose_nothing(world: &World) {
    const ROUNDS: usize = 2_000;
    const THREADS: u64 = 3;
    world.each_kind(BLOCK_SIZE, |memory| {
        let stop = AtomicBool::new(false);
        let written = [(); 3].map(|()| AtomicU64::new(0));
        let slot = |thread: u64, i: u64| ByteSize::new(i % 512 * 4096 + 64 + thread * 8);
        for thread in 0..THREADS {
            (0..512).for_each(|i| memory.word(slot(thread, i)).store(0, Ordering::Relaxed));
        }
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (stop, written) = (&stop, &written);
                scope.spawn(move || {
                    let mut i = 0;
                    while !stop.load(Ordering::Relaxed) {
                        let word = memory.word(slot(thread, i));
                        // No atomic addition: a page that moves between the two is the point.
                        word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                        i += 1;
                    }
                    written[usize::try_from(thread).unwrap()].store(i, Ordering::Relaxed);
                });
            }
            for _ in 0..ROUNDS {
                world.out(memory.span());
                world.process.bring_home(memory.span()).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        for thread in 0..THREADS {
            let words = (0..512).map(|i| memory.word(slot(thread, i)).load(Ordering::Relaxed));
            let found: u64 = words.sum();
            let written = written[usize::try_from(thread).unwrap()].load(Ordering::Relaxed);
            assert_eq!(found, written, "thread {thread}, {:?}", memory.pages());
            assert!(written > 10_000, "it wrote only {written} times");
        }
    });
}

fn abort_out_leaves_everything(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        for seed in 0..20 {
            memory.fill(seed);
            let mut block = world.process.lock_block(memory.span()).unwrap();
            let collected = block
                .collect(memory.span(), OWNER, &mut |_, _| false)
                .unwrap();
            assert_eq!(count(collected.sources(), |s| s.is_collected()), 512);
            drop(collected);
            assert_eq!(block.home(memory.span().first_page()), Home::System);
            drop(block);
            memory.check(seed);
        }
        assert_eq!(world.device.held(), 0);
    });
    assert_eq!(world.process.stats().failed_faults, 0);
}

/// A copy that failed ends the same way.
fn abort_home_leaves_everything(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(3);
        world.out(memory.span());
        for _ in 0..20 {
            let mut block = world.process.lock_block(memory.span()).unwrap();
            let collected = block
                .collect_device(memory.span(), &mut |_, _| true)
                .unwrap();
            assert_eq!(collected.leaving().iter().flatten().count(), 512);
            drop(collected);
            drop(block);
            assert_eq!(world.on_device(memory.span()), 512);
        }
        memory.check(3);
    });
}

fn holes_are_reported_and_come_home_as_zeroes(world: &World) {
    if world.is_signals() {
        // Holes are not told from pages there: copied as zeroes.
        return;
    }
    let memory = Memory::new(&world.process, ByteSize::mib(4), Pages::Base);
    memory.arm(&world.process);
    // Never touched at all.
    let (low, high) = (
        memory.part(ByteSize::ZERO, BLOCK_SIZE),
        memory.part(BLOCK_SIZE, BLOCK_SIZE),
    );
    let mut block = world.process.lock_block(low).unwrap();
    let collected = block.collect(low, OWNER, &mut |_, _| false).unwrap();
    assert_eq!(count(collected.sources(), |s| *s == Source::Hole), 512);
    drop(collected);
    drop(block);
    assert_eq!(world.out(low), PageCount::new(512));
    check_zero(low);
    memory.fill_part(low, 4);
    memory.check_part(low, 4);
    // Some of it touched: every fault of armed memory fills a chunk of zeroes.
    memory.fill_part(memory.part(BLOCK_SIZE + pages(100), pages(3)), 5);
    let mut block = world.process.lock_block(high).unwrap();
    let collected = block.collect(high, OWNER, &mut |_, _| false).unwrap();
    assert_eq!(
        count(collected.sources(), |s| matches!(s, Source::Page(_))),
        3
    );
    assert_eq!(count(collected.sources(), |s| *s == Source::Hole), 509);
    drop(collected);
    drop(block);
    memory.check_part(memory.part(BLOCK_SIZE + pages(100), pages(3)), 5);
    assert_eq!(world.out(high), PageCount::new(512));
    memory.check_part(memory.part(BLOCK_SIZE + pages(100), pages(3)), 5);
    check_zero(memory.part(BLOCK_SIZE, pages(100)));
    check_zero(memory.part(BLOCK_SIZE + pages(103), pages(512 - 103)));
    memory.disarm(&world.process);
    memory.end(&world.process);
}

fn zero_pages_come_home_as_zeroes(world: &World) {
    for kind in [Pages::Huge, Pages::Base] {
        let memory = Memory::new(&world.process, BLOCK_SIZE, kind);
        // Reads of memory that is not armed bring the kernel's zero page.
        check_zero(memory.span());
        memory.arm(&world.process);
        let mut block = world.process.lock_block(memory.span()).unwrap();
        let collected = block
            .collect(memory.span(), OWNER, &mut |_, _| false)
            .unwrap();
        assert_eq!(count(collected.sources(), |s| s.is_collected()), 512);
        drop(collected);
        drop(block);
        // Writes after an abort, and after a round trip.
        memory.fill_part(memory.part(ByteSize::ZERO, pages(7)), 1);
        memory.check_part(memory.part(ByteSize::ZERO, pages(7)), 1);
        check_zero(memory.part(pages(7), pages(505)));
        assert_eq!(world.out(memory.span()), PageCount::new(512));
        check_zero(memory.part(pages(7), pages(505)));
        memory.check_part(memory.part(ByteSize::ZERO, pages(7)), 1);
        memory.fill(2);
        memory.check(2);
        memory.disarm(&world.process);
        memory.end(&world.process);
    }
}

fn partial_spans_leave_the_rest(world: &World) {
    world.each_kind(ByteSize::mib(4), |memory| {
        memory.fill(9);
        let parts = [
            (1, 1),
            (3, 2),
            (16, 16),
            (100, 300),
            (511, 1),
            (512, 5),
            (1023, 1),
        ];
        for (first, n) in parts {
            world.out(memory.part(pages(first), pages(n)));
        }
        let moved: u64 = parts.iter().map(|(_, n)| n).sum();
        assert_eq!(world.process.pages_on_devices(), PageCount::new(moved));
        assert!(world.is_on_device(memory.at(pages(399))));
        assert!(!world.is_on_device(memory.at(pages(400))));
        memory.check(9);
        assert_eq!(world.on_device(memory.span()), 0);
        assert_eq!(world.process.pages_on_devices(), PageCount::ZERO);
    });
}

/// Regions that start and end anywhere.
fn odd_regions(world: &World) {
    if world.is_signals() {
        let memory = world.memory(pages(5), Pages::Huge);
        for seed in 0..10 {
            memory.fill(seed);
            assert_eq!(world.out(memory.span()), PageCount::new(5));
            memory.check(seed);
        }
        memory.disarm(&world.process);
        memory.end(&world.process);
        return;
    }
    let outer = memory::map(ByteSize::mib(8));
    for (first, n) in [(1, 1), (511, 2), (3, 1500), (510, 4), (512, 1)] {
        let at = outer.start() + pages(first);
        // Not even whole pages: aligned inward.
        let asked = gpusvm_types::VirtAddr::new(at.get() - 8);
        let len = pages(n) + ByteSize::new(16);
        let span = world.process.adopt(asked, len).unwrap();
        assert_eq!((span.start(), span.page_count()), (at, PageCount::new(n)));
        let token = world.process.arm(span).unwrap();
        for seed in 0..5 {
            let write = |page: gpusvm_types::PageIndex| {
                memory::store(page.start(), page.get() ^ seed);
            };
            span.pages().for_each(write);
            assert_eq!(world.out(span), span.page_count());
            for page in span.pages() {
                assert_eq!(memory::load(page.start()), page.get() ^ seed);
            }
        }
        world.process.disarm(span, token);
        world.process.unadopt(span).unwrap();
    }
    memory::unmap(outer);
}

fn windows_bring_home_no_more_than_said(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        for (window, n) in [(4, 1), (64, 16), (128, 32), (1024, 256)] {
            world.device.set_window(ByteSize::kib(window));
            memory.process_round(world, n);
        }
        world.device.set_window(BLOCK_SIZE);
    });
}

trait Round {
    fn process_round(&self, world: &World, pages_of_window: usize);
}

impl Round for Memory {
    fn process_round(&self, world: &World, n: usize) {
        self.fill(n as u64);
        world.out(self.span());
        let faults = world.process.stats().cpu_faults;
        memory::load(self.at(pages(300)));
        assert_eq!(world.on_device(self.span()), 512 - n);
        self.check(n as u64);
        assert_eq!(world.on_device(self.span()), 0);
        let faults = world.process.stats().cpu_faults - faults;
        assert_eq!(faults, 512 / n as u64);
    }
}

fn a_second_migration_takes_only_what_is_in_ram(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(6);
        world.out(memory.part(pages(10), pages(20)));
        let mut block = world.process.lock_block(memory.span()).unwrap();
        let collected = block
            .collect(memory.span(), OWNER, &mut |_, _| false)
            .unwrap();
        let kept = |s: &Source| matches!(s, Source::Kept(KeptReason::OnDevice(_)));
        assert_eq!(count(collected.sources(), kept), 20);
        assert!(collected.sources()[10..30].iter().all(kept));
        drop(collected);
        drop(block);
        assert_eq!(world.on_device(memory.span()), 20);
        assert_eq!(world.out(memory.span()), PageCount::new(492));
        assert_eq!(world.out(memory.span()), PageCount::ZERO);
        memory.check(6);
    });
}

fn stop_brings_everything_home(world: &World) {
    let kinds = [Pages::Huge, Pages::Base];
    let memories = kinds.map(|kind| world.memory(ByteSize::mib(6), kind));
    memories.iter().for_each(|memory| {
        world.out(memory.span());
    });
    let handlers = world.process.handler_threads();
    assert_eq!(handlers.len(), 3);
    world.process.stop();
    for memory in &memories {
        assert!(!memory::is_registered(memory.at(ByteSize::ZERO)));
        memory.check(1);
    }
    for tid in handlers {
        let task = format!("/proc/self/task/{tid}");
        soon("handlers end", || !std::path::Path::new(&task).exists());
    }
    assert_eq!(world.process.stats().cpu_faults, 0, "nobody had to fault");
    let gone = world
        .process
        .lock_block(memories[0].part(ByteSize::ZERO, BLOCK_SIZE));
    assert!(matches!(gone, Err(MmError::Gone)));
    // Native faults: nobody is there to serve any other.
    memory::advise(memories[1].span(), libc::MADV_DONTNEED).unwrap();
    check_zero(memories[1].span());
}

/// Story: after a stop that could not bring pages home, the program read zeroes in their place.
fn what_cannot_come_home_is_no_zeroes_after_stop(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    world.out(memory.part(pages(5), pages(9)));
    world.device.fails.store(true, Ordering::Release);
    world.process.stop();
    for page in 0..512 {
        let mut byte = 0u8;
        let at = memory::pointer(memory.at(pages(page)));
        // SAFETY: a load has no side effect, and a refused one is reported.
        let read = unsafe { gpusvm_guarded::copy(&raw mut byte, at, 1) };
        assert_eq!(read.is_ok(), !(5..14).contains(&page), "page {page}");
    }
}

fn free_gives_back_what_is_on_the_device(world: &World) {
    for kind in [Pages::Huge, Pages::Base] {
        let memory = world.memory(ByteSize::mib(4), kind);
        world.out(memory.span());
        assert_eq!(world.device.held(), 1024);
        if kind == Pages::Huge {
            world.process.free(memory.span());
            assert_eq!(world.device.held(), 0);
        } else {
            memory.end(&world.process);
        }
    }
    assert_eq!(world.device.held(), 0);
}

fn foreign_pages_come_home_for_a_snapshot(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(2);
        world.out(memory.span());
        let mut homes = [Home::Unmapped; 512];
        let span = memory.span();
        world
            .process
            .range_fault(span, Some(OWNER), gpusvm_mm::Intent::Read, &mut homes)
            .unwrap();
        assert!(homes.iter().all(|home| matches!(home, Home::Device(_))));
        world
            .process
            .range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes)
            .unwrap();
        assert!(homes.iter().all(|home| *home == Home::System));
        memory.check(2);
    });
}

fn a_span_of_two_blocks_is_refused(world: &World) {
    let memory = world.memory(ByteSize::mib(4), Pages::Huge);
    let crossing = memory.part(pages(511), pages(2));
    let refused = world.process.lock_block(crossing).map(drop);
    assert_eq!(refused, Err(MmError::CrossesBlock { span: crossing }));
    let outside = gpusvm_types::Span::page_of(memory.span().end());
    let refused = world.process.lock_block(outside).map(drop);
    assert_eq!(refused, Err(MmError::NotMirrored { span: outside }));
}
