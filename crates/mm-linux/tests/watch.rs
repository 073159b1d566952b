//! Memory that nobody armed, whose end is heard of.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and look at a clock"
)]

mod common;

use common::World;
use common::memory::{self, Pages, check_zero, pages};
use gpusvm_mm::{
    AddressSpace, ArmToken, IntervalNotifier, Invalidation, Mirror, MmError, Reason, Subscriber,
};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, Span, VirtAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

on_userfaultfd_rungs!(
    an_unmap_of_memory_that_nobody_armed_is_heard_of,
    other_memory_at_the_same_address_is_told_apart,
    memory_that_is_watched_can_be_armed_and_let_go,
    memory_that_is_watched_is_armed_in_part_and_forgotten_in_whole,
    what_is_given_up_where_it_is_watched_can_leave_afterwards,
    a_remap_of_watched_memory_is_followed,
    whoever_ends_it_hears_no_more,
    first_touches_stay_the_kernels,
);
on_rungs!(
    rung_4_signals,
    gpusvm_mm_linux::Rung::Signals,
    memory_that_is_freed_is_heard_of
);

/// Notes what is unmapped.
#[derive(Debug, Default)]
struct Unmaps(Mutex<Vec<Span>>);

impl Subscriber for Unmaps {
    fn invalidate(&self, _: &IntervalNotifier, event: &Invalidation) {
        if event.reason == Reason::Unmap {
            self.0.lock().unwrap().push(event.span);
        }
    }
}

impl Unmaps {
    /// Of all memory, in the order of addresses, one for each place that was told of.
    fn since(&self) -> Option<Span> {
        let told = std::mem::take(&mut *self.0.lock().unwrap());
        told.into_iter().reduce(Span::union)
    }
}

fn listening(world: &World) -> (Arc<Unmaps>, Arc<IntervalNotifier>) {
    let unmaps = Arc::new(Unmaps::default());
    let everything = Span::new(VirtAddr::new(0), VirtAddr::new(0x7fff_ffff_f000)).unwrap();
    let notifiers = world.process.notifiers();
    let notifier = notifiers.subscribe(everything, Arc::clone(&unmaps) as _);
    (unmaps, notifier)
}

/// Mirrored memory of the program's own that is watched, and was never touched.
fn watched(world: &World, len: ByteSize) -> (Span, ArmToken) {
    let span = memory::map(len);
    assert_eq!(world.process.adopt(span.start(), len), Ok(span));
    (span, world.process.watch(span).unwrap())
}

fn an_unmap_of_memory_that_nobody_armed_is_heard_of(world: &World) {
    let (unmaps, notifier) = listening(world);
    let (span, token) = watched(world, ByteSize::mib(6));
    assert_eq!(unmaps.since(), Some(span), "it is mirrored from now on");
    let hole = Span::of_pages(span.first_page() + PageCount::new(500), PageCount::new(40));
    memory::unmap(hole);
    // At once, whether anybody was told or not.
    assert_eq!(world.process.watched(hole.start(), token), None);
    let below = Span::page_of(span.start() + pages(499));
    assert_eq!(world.process.watched(below.start(), token), Some(below));
    let above = world.process.watched(hole.end(), token).unwrap();
    assert_eq!(above.start(), hole.end());
    world.process.settle_events();
    assert_eq!(unmaps.since(), Some(hole));
    let mirror = world.process.mirrored(hole.start());
    assert_eq!(mirror, Mirror::Gap(hole));
    let refused = world.process.watch(span);
    assert!(matches!(refused, Err(MmError::NotMirrored { .. })));
    memory::unmap(span);
    world.process.settle_events();
    world.process.notifiers().unsubscribe(&notifier);
}

/// Mapped and mirrored again: nothing of before is true of it.
fn other_memory_at_the_same_address_is_told_apart(world: &World) {
    let (span, token) = watched(world, BLOCK_SIZE);
    memory::unmap(span);
    assert_eq!(memory::map_at(span), span);
    assert_eq!(world.process.watched(span.start(), token), None);
    assert_eq!(world.process.adopt(span.start(), span.len()), Ok(span));
    assert_eq!(world.process.watched(span.start(), token), None);
    let again = world.process.watch(span).unwrap();
    assert_ne!(again, token);
    assert_eq!(world.process.watched(span.start(), again), Some(span));
    // Nothing is done to what is not what was watched.
    world.process.unwatch(span, token);
    memory::unmap(span);
    assert_eq!(world.process.watched(span.start(), again), None);
    world.process.settle_events();
    assert!(matches!(
        world.process.mirrored(span.start()),
        Mirror::Gap(_)
    ));
}

fn memory_that_is_watched_can_be_armed_and_let_go(world: &World) {
    let memory = memory::Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    let span = memory.span();
    let token = world.process.watch(span).unwrap();
    for round in 1..4 {
        memory.fill(round);
        memory.arm(&world.process);
        assert!(world.out(span) > PageCount::ZERO);
        memory.check(round);
        memory.disarm(&world.process);
        assert_eq!(world.process.watch(span), Ok(token), "watched already");
    }
    memory::unmap(memory.part(pages(7), pages(9)));
    world.process.settle_events();
    let mirror = world.process.mirrored(memory.at(pages(7)));
    assert!(matches!(mirror, Mirror::Gap(_)), "it is still heard of");
    assert_eq!(world.process.watched(memory.at(pages(8)), token), None);
    world.process.unwatch(span, token);
    memory::unmap(span);
    world.process.settle_events();
}

/// Given up, filled again, and only then wanted by a device.
fn what_is_given_up_where_it_is_watched_can_leave_afterwards(world: &World) {
    let memory = memory::Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    memory.fill(1);
    let token = world.process.watch(memory.span()).unwrap();
    memory::advise(memory.span(), libc::MADV_DONTNEED).unwrap();
    check_zero(memory.span());
    memory.fill(2);
    memory.arm(&world.process);
    assert_eq!(world.out(memory.span()), memory.span().page_count());
    memory.check(2);
    memory.disarm(&world.process);
    world.process.unwatch(memory.span(), token);
    memory.end(&world.process);
}

fn a_remap_of_watched_memory_is_followed(world: &World) {
    let (span, token) = watched(world, BLOCK_SIZE);
    let there = memory::map(BLOCK_SIZE);
    memory::remap(span, there.start(), false);
    assert_eq!(world.process.watched(span.start(), token), None);
    world.process.settle_events();
    assert_eq!(
        world.process.mirrored(there.start()),
        Mirror::Mapping(there)
    );
    assert_eq!(world.process.watched(there.start(), token), None);
    let armed = world.process.arm(there).unwrap();
    world.out(there);
    check_zero(there);
    world.process.disarm(there, armed);
    memory::unmap(there);
    world.process.settle_events();
}

fn whoever_ends_it_hears_no_more(world: &World) {
    let (unmaps, notifier) = listening(world);
    let (span, token) = watched(world, BLOCK_SIZE);
    world.process.unwatch(span, token);
    assert_eq!(unmaps.since(), Some(span));
    memory::unmap(span);
    world.process.settle_events();
    assert_eq!(unmaps.since(), None, "nothing is registered");
    world.process.notifiers().unsubscribe(&notifier);
    let _ = world.process.unadopt(span);
}

/// A message would be a hundred times dearer; nothing here depends on how fast the machine is.
fn first_touches_stay_the_kernels(world: &World) {
    let len = ByteSize::mib(16);
    let touch = |span: Span| {
        memory::advise(span, libc::MADV_NOHUGEPAGE).unwrap();
        let began = Instant::now();
        span.pages().for_each(|page| memory::store(page.start(), 1));
        began.elapsed()
    };
    let mut times = [Duration::MAX; 2];
    for _ in 0..4 {
        let plain = memory::map(len);
        assert_eq!(world.process.adopt(plain.start(), len), Ok(plain));
        times[0] = times[0].min(touch(plain));
        world.process.unadopt(plain).unwrap();
        memory::unmap(plain);
        let (span, _) = watched(world, len);
        times[1] = times[1].min(touch(span));
        memory::unmap(span);
        world.process.settle_events();
    }
    println!(
        "4096 first touches: plain {:?}, watched {:?}",
        times[0], times[1]
    );
    assert_eq!(world.process.stats().zero_fills, 0, "no message was sent");
}

/// Nothing else is heard of there.
fn memory_that_is_freed_is_heard_of(world: &World) {
    let (unmaps, notifier) = listening(world);
    let span = world.process.allocate(BLOCK_SIZE).unwrap();
    let token = world.process.watch(span).unwrap();
    assert_eq!(world.process.watched(span.start(), token), Some(span));
    unmaps.since();
    world.process.free(span);
    assert_eq!(unmaps.since(), Some(span));
    assert_eq!(world.process.watched(span.start(), token), None);
    world.process.notifiers().unsubscribe(&notifier);
}

/// A device touched a page of it: all of the block is armed, and nothing of it stays registered.
fn memory_that_is_watched_is_armed_in_part_and_forgotten_in_whole(world: &World) {
    let (span, _) = watched(world, BLOCK_SIZE);
    let middle = Span::page_of(span.start() + pages(100));
    let token = world.process.arm(middle).unwrap();
    for page in [0, 100, 511] {
        assert!(memory::is_registered(span.start() + pages(page)), "{page}");
    }
    world.process.disarm(middle, token);
    world.process.unadopt(span).unwrap();
    assert!(!memory::is_registered_anyhow(span.start()));
    // As the allocator gives it out again: other pieces of the same.
    for (first, count) in [(90, 20), (0, 512), (50, 100)] {
        let part = Span::of_pages(
            span.first_page() + PageCount::new(first),
            PageCount::new(count),
        );
        assert_eq!(world.process.adopt(part.start(), part.len()), Ok(part));
        let watch = world.process.watch(part).unwrap();
        let page = Span::page_of(part.start());
        let token = world.process.arm(page).unwrap();
        assert!(memory::is_registered(part.start() + pages(count - 1)));
        world.process.unadopt(part).unwrap();
        world.process.unwatch(part, watch);
        world.process.disarm(page, token);
        assert!(!memory::is_registered_anyhow(part.start()));
    }
    memory::unmap(span);
}
