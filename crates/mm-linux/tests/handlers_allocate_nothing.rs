//! Handler threads allocate nothing after they have started: the heap may be in the very page that
//! they are to bring home, or its lock held by a thread that waits for them.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::World;
use common::memory;
use common::memory::pages;
use gpusvm_mm::AddressSpace;
use gpusvm_testkit::CountingAllocator;
use gpusvm_types::{BLOCK_SIZE, ByteSize};
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

on_every_rung!(faults_of_all_kinds_allocate_nothing);

fn faults_of_all_kinds_allocate_nothing(world: &World) {
    let handlers = world.process.handler_threads();
    assert_eq!(handlers.len(), 3);
    // Some come into the world late: what they do before their first wait does not count.
    std::thread::sleep(Duration::from_millis(20));
    let mark = ALLOCATOR.mark(&handlers);
    world.each_kind(ByteSize::mib(4), |memory| {
        for window in [4, 64, 2048] {
            world.device.set_window(ByteSize::kib(window));
            memory.fill(window);
            world.out(memory.span());
            memory.check(window);
        }
        world.out(memory.span());
        world
            .device
            .set_timeslice(world.process.now(), Duration::from_millis(20));
        memory.check(2048);
        if !world.is_signals() {
            world.out(memory.span());
            memory::advise(memory.part(pages(7), BLOCK_SIZE), libc::MADV_DONTNEED).unwrap();
            memory::check_zero(memory.part(pages(7), BLOCK_SIZE));
            world.process.settle_events();
        }
    });
    assert_eq!(mark.allocations(&ALLOCATOR), 0, "by {handlers:?}");
    let this = ALLOCATOR.mark(&[ALLOCATOR.this_thread()]);
    drop(std::hint::black_box(vec![1]));
    assert_eq!(this.allocations(&ALLOCATOR), 1, "it does count");
}
