//! Pages of a device that the CPU uses in place: they take up a device page, and stay where they are.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, Memory, Pages, check_zero, pages};
use common::{Meanwhile, OWNER, World, count, soon};
use gpusvm_mm::{AddressSpace, Block, Home, Inbound, Intent, Outbound, Seen, Source};
use gpusvm_types::{BLOCK_SIZE, PageCount, Span};

on_every_rung!(
    they_stay_and_take_up_device_pages,
    an_aborted_collection_leaves_everything,
    an_aborted_homecoming_leaves_everything,
    holes_become_zeroes,
    no_write_waits_and_none_is_lost,
    the_end_of_the_engine_leaves_them,
    asked_for_without_an_owner_they_come_home,
);
/// What the program does to memory that is watched.
mod watched {
    use super::*;
    on_userfaultfd_rungs!(
        pages_read_in_copies_become_writable,
        given_up_while_they_come_they_do_not,
        given_up_while_they_leave_they_are_gone,
        they_go_with_their_mapping,
    );
}

/// Makes the pages of a block coherent.
fn share(world: &World, span: Span) -> PageCount {
    let mut block = world.process.lock_block(span).unwrap();
    let collected = block.collect_coherent(span, OWNER).unwrap();
    let first = world.device.take(span.page_count());
    let shared = count(collected.sources(), |source| *source == Source::InPlace);
    collected.commit(&mut |i| world.device.hold(first, i));
    world.device.let_go_unused(first, span.page_count());
    PageCount::from_usize(shared)
}

/// Ends it.
fn take_home(world: &World, span: Span) -> PageCount {
    let mut block = world.process.lock_block(span).unwrap();
    let collected = block.collect_device(span, &mut |_, _| true).unwrap();
    assert!(
        collected.leaving().iter().all(Option::is_none),
        "nothing to copy"
    );
    let pages = collected.in_place();
    collected.commit().unwrap();
    pages
}

fn coherent(world: &World, span: Span) -> usize {
    let home = |page: gpusvm_types::PageIndex| world.home(page.start());
    let is_coherent = |home: &Home| matches!(home, Home::Coherent(_));
    span.pages().map(home).filter(is_coherent).count()
}

fn end(world: &World, memory: &Memory) {
    memory.disarm(&world.process);
    memory.end(&world.process);
}

fn they_stay_and_take_up_device_pages(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(3);
        let span = memory.span();
        assert_eq!(share(world, span), PageCount::new(512));
        assert_eq!(coherent(world, span), 512);
        assert_eq!(world.process.pages_on_devices(), PageCount::new(512));
        let mut seen = [Seen::Absent; 512];
        world.process.snapshot(span, &mut seen).unwrap();
        assert!(seen.iter().all(|seen| matches!(seen, Seen::Coherent(_))));
        memory.check(3);
        memory.fill(4);
        assert_eq!(share(world, span), PageCount::ZERO, "they are there");
        assert_eq!(
            take_home(world, memory.part(pages(0), pages(100))).get(),
            100
        );
        assert_eq!(coherent(world, span), 412);
        assert_eq!(take_home(world, span).get(), 412);
        memory.check(4);
    });
    assert_eq!(world.process.stats().cpu_faults, 0);
}

fn an_aborted_collection_leaves_everything(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let span = memory.span();
    let mut block = world.process.lock_block(span).unwrap();
    drop(block.collect_coherent(span, OWNER).unwrap());
    assert_eq!(block.home(span.first_page()), Home::System);
    drop(block);
    assert_eq!(coherent(world, span), 0);
    memory.check(1);
    end(world, &memory);
}

fn an_aborted_homecoming_leaves_everything(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let span = memory.span();
    share(world, span);
    let mut block = world.process.lock_block(span).unwrap();
    drop(block.collect_device(span, &mut |_, _| true).unwrap());
    drop(block);
    assert_eq!(coherent(world, span), 512);
    memory.check(1);
    take_home(world, span);
    end(world, &memory);
}

fn holes_become_zeroes(world: &World) {
    let memory = Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    let span = memory.span();
    // Before anybody watches: a handler counts after it has answered.
    memory.fill_part(memory.part(pages(5), pages(5)), 1);
    memory.arm(&world.process);
    let before = world.process.stats().zero_fills;
    assert_eq!(share(world, span), PageCount::new(512));
    check_zero(memory.part(pages(10), pages(502)));
    memory.check_part(memory.part(pages(5), pages(5)), 1);
    assert_eq!(world.process.stats().zero_fills, before, "no touch faults");
    memory.fill(2);
    take_home(world, span);
    memory.check(2);
    end(world, &memory);
}

/// Writers go on while the block is locked, and nothing of it is ever taken from them.
fn no_write_waits_and_none_is_lost(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Huge);
    let span = memory.span();
    let word = memory.word(pages(7));
    word.store(0, std::sync::atomic::Ordering::Relaxed);
    let adds = || {
        for _ in 0..100_000 {
            word.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let adders = [scope.spawn(adds), scope.spawn(adds)];
        while adders.iter().any(|adder| !adder.is_finished()) {
            share(world, span);
            take_home(world, span);
        }
    });
    assert_eq!(word.load(std::sync::atomic::Ordering::Relaxed), 200_000);
    assert_eq!(world.process.stats().cpu_faults, 0);
    end(world, &memory);
}

fn the_end_of_the_engine_leaves_them(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    share(world, memory.span());
    world.process.stop();
    assert_eq!(world.process.pages_on_devices(), PageCount::ZERO);
    memory.check(1);
}

fn asked_for_without_an_owner_they_come_home(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let span = memory.span();
    share(world, span);
    let mut homes = [Home::Moving; 512];
    let other = Some(gpusvm_types::OwnerId(77));
    let look = world
        .process
        .range_fault(span, other, Intent::Write, &mut homes);
    assert_eq!(look, Ok(()));
    assert!(homes.iter().all(|home| matches!(home, Home::Coherent(_))));
    let look = world
        .process
        .range_fault(span, None, Intent::Read, &mut homes);
    assert_eq!(look, Ok(()));
    assert_eq!(homes, [Home::System; 512]);
    memory.check(1);
    end(world, &memory);
}

fn pages_read_in_copies_become_writable(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let span = memory.span();
    if world.process.can_watch_writes() {
        let mut sources = [Source::Hole; 512];
        let mut block = world.process.lock_block(span).unwrap();
        block.write_protect(span, &mut sources).unwrap();
        drop(block);
        share(world, span);
        memory.fill(2);
        assert_eq!(world.process.stats().write_faults, 0);
        memory.check(2);
        take_home(world, span);
    }
    end(world, &memory);
}

/// Runs `act` while devices are told of a migration in `span`.
fn meanwhile(
    world: &World,
    span: Span,
    act: impl FnOnce() + Send + 'static,
    migrate: impl FnOnce() -> PageCount,
) {
    let notifier = world
        .process
        .notifiers()
        .subscribe(span, Meanwhile::new(act));
    migrate();
    world.process.notifiers().unsubscribe(&notifier);
}

fn given_up_while_they_come_they_do_not(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let (span, gone) = (memory.span(), memory.part(pages(8), pages(16)));
    let drops = move || memory::advise(gone, libc::MADV_DONTNEED).unwrap();
    meanwhile(world, span, drops, || share(world, span));
    world.process.settle_events();
    assert_eq!(coherent(world, span), 496);
    check_zero(gone);
    assert_eq!(share(world, gone).get(), 16);
    take_home(world, span);
    end(world, &memory);
}

fn given_up_while_they_leave_they_are_gone(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let (span, gone) = (memory.span(), memory.part(pages(8), pages(16)));
    share(world, span);
    let drops = move || memory::advise(gone, libc::MADV_DONTNEED).unwrap();
    meanwhile(world, span, drops, || take_home(world, span));
    world.process.settle_events();
    assert_eq!(world.process.pages_on_devices(), PageCount::ZERO);
    check_zero(gone);
    memory.check_part(memory.part(pages(24), pages(488)), 1);
    end(world, &memory);
}

fn they_go_with_their_mapping(world: &World) {
    let from = memory::map(BLOCK_SIZE);
    let to = memory::map(BLOCK_SIZE);
    for page in from.pages() {
        memory::store(page.start(), page.get());
    }
    world.process.adopt(from.start(), from.len()).unwrap();
    let token = world.process.arm(from).unwrap();
    share(world, from);
    memory::remap(from, to.start(), false);
    world.process.settle_events();
    assert_eq!(coherent(world, to), 512);
    for (old, new) in from.pages().zip(to.pages()) {
        assert_eq!(memory::load(new.start()), old.get());
    }
    world.process.disarm(from, token);
    memory::unmap(to);
    soon("device pages go back", || {
        world.process.pages_on_devices() == PageCount::ZERO
    });
}
