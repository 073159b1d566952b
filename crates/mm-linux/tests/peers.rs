//! Device to device: pages that leave one memory for another without a stay in RAM.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::device::{FakeDevice, copy};
use common::memory::{self, pages};
use common::{OWNER, World, count};
use gpusvm_mm::{
    AddressSpace, Block, DeviceMemoryId, DevicePage, Home, KeptReason, Outbound, Source,
};
use gpusvm_types::{BLOCK_SIZE, DevicePfn, PageCount, Span};
use std::sync::Arc;

on_every_rung!(
    pages_leave_one_device_for_another,
    an_abort_leaves_pages_on_their_device,
    ram_and_a_peer_in_one_migration,
    what_is_not_selected_stays,
    what_is_dropped_on_the_way_is_on_no_device,
);

/// A second device, and its name.
fn peer(world: &World) -> (Arc<FakeDevice>, DeviceMemoryId) {
    let size = PageCount::new(2048);
    let device = FakeDevice::new(size);
    let ops = Arc::clone(&device);
    let id = world.process.add_device_memory(size, OWNER, ops).unwrap();
    device.is_added_as(id);
    (device, id)
}

/// Copies what was collected to pages of `to` from `first` on, from RAM and from the first device.
fn fill(world: &World, to: &FakeDevice, first: DevicePfn, sources: &[Source]) {
    assert!(to.copy_from(first, sources));
    for (i, source) in sources.iter().enumerate() {
        if let Source::Device(page) = source {
            let place = to.dma(first.offset(PageCount::from_usize(i)));
            let len = PageCount::ONE.bytes();
            assert!(copy(place, world.device.dma(page.pfn), len));
        }
    }
}

/// Moves `span` to the second device, with the pages of the first that `selected` names.
fn over(
    world: &World,
    to: &FakeDevice,
    span: Span,
    selected: impl Fn(DevicePage) -> bool,
) -> usize {
    let mut block = world.process.lock_block(span).unwrap();
    let collected = block
        .collect(span, OWNER, &mut |_, page| selected(page))
        .unwrap();
    let first = to.take(span.page_count());
    fill(world, to, first, collected.sources());
    let moved = count(collected.sources(), |source| source.is_collected());
    collected.commit(&mut |i| to.hold(first, i));
    to.let_go_unused(first, span.page_count());
    moved
}

fn memory_of(world: &World, at: Span) -> Option<DeviceMemoryId> {
    match world.home(at.start()) {
        Home::Device(page) => Some(page.memory),
        _ => None,
    }
}

fn pages_leave_one_device_for_another(world: &World) {
    let (second, id) = peer(world);
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(3);
        world.out(memory.span());
        assert_eq!(over(world, &second, memory.span(), |_| true), 512);
        assert_eq!(memory_of(world, memory.span()), Some(id));
        assert_eq!((world.device.held(), second.held()), (0, 512));
        memory.check(3);
        // With the block locked: a fault wakes its thread before the device pages are back.
        assert_eq!(world.on_device(memory.span()), 0);
        assert_eq!(second.held(), 0);
    });
    second.check_end();
}

fn an_abort_leaves_pages_on_their_device(world: &World) {
    let (second, _) = peer(world);
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(4);
        let half = memory.part(pages(0), pages(256));
        world.out(half);
        let mut block = world.process.lock_block(memory.span()).unwrap();
        let collected = block.collect(memory.span(), OWNER, &mut |_, _| true);
        let collected = collected.unwrap();
        assert_eq!(
            count(collected.sources(), |source| source.is_collected()),
            512
        );
        drop(collected);
        drop(block);
        assert_eq!(world.on_device(memory.span()), 256);
        assert_eq!((world.device.held(), second.held()), (256, 0));
        memory.check(4);
    });
}

fn ram_and_a_peer_in_one_migration(world: &World) {
    let (second, _) = peer(world);
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(5);
        for (first, len) in [(3, 1), (64, 100), (500, 12)] {
            world.out(memory.part(pages(first), pages(len)));
        }
        assert_eq!(over(world, &second, memory.span(), |_| true), 512);
        assert_eq!((world.device.held(), second.held()), (0, 512));
        memory.check(5);
    });
}

fn what_is_not_selected_stays(world: &World) {
    let (second, id) = peer(world);
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(6);
        world.out(memory.part(pages(0), pages(8)));
        let mut block = world.process.lock_block(memory.span()).unwrap();
        let collected = block.collect(memory.span(), OWNER, &mut |_, _| false);
        let stay = |source: &Source| matches!(source, Source::Kept(KeptReason::OnDevice(_)));
        assert_eq!(count(collected.unwrap().sources(), stay), 8);
        drop(block);
        assert_eq!(over(world, &second, memory.span(), |_| false), 504);
        assert_ne!(memory_of(world, memory.part(pages(7), pages(1))), Some(id));
        assert_eq!(memory_of(world, memory.part(pages(8), pages(1))), Some(id));
        memory.check(6);
    });
}

/// The program gives its pages up while one device copies them to the other.
fn what_is_dropped_on_the_way_is_on_no_device(world: &World) {
    if world.is_signals() {
        return; // no events there
    }
    let (second, _) = peer(world);
    let memory = world.memory(BLOCK_SIZE, memory::Pages::Base);
    world.out(memory.span());
    let mut block = world.process.lock_block(memory.span()).unwrap();
    let collected = block.collect(memory.span(), OWNER, &mut |_, _| true);
    let collected = collected.unwrap();
    let gone = memory.part(pages(10), pages(20));
    memory::advise(gone, libc::MADV_DONTNEED).unwrap();
    let first = second.take(memory.span().page_count());
    fill(world, &second, first, collected.sources());
    collected.commit(&mut |i| second.hold(first, i));
    drop(block);
    world.process.settle_events();
    assert_eq!((world.device.held(), second.held()), (0, 492));
    memory::check_zero(gone);
    for rest in memory.span().without(gone).into_iter().flatten() {
        memory.check_part(rest, 1);
    }
    memory.disarm(&world.process);
    memory.end(&world.process);
    second.check_end();
}
