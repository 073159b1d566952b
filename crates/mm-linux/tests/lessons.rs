//! Mistakes that others made with time: see the lessons in docs/kernel-map.md.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]
#![allow(clippy::disallowed_methods, reason = "it is about time")]

mod common;

use common::memory::{self, pages};
use common::{OWNER, World};
use gpusvm_mm::{AddressSpace, Block, Home, MmError};
use gpusvm_types::{BLOCK_SIZE, ByteSize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

on_every_rung!(
    lesson_08_progress_is_not_charged_to_the_timeout,
    a_span_that_never_settles_is_refused_in_time,
);

/// A deadline for all of the work was also charged for the work that went well. Here: seventy pages
/// come home one by one, and each takes its time; only together that is longer than the timeout.
fn lesson_08_progress_is_not_charged_to_the_timeout(world: &World) {
    let memory = world.memory(BLOCK_SIZE, memory::Pages::Base);
    let span = memory.part(pages(0), pages(70));
    world.out(span);
    world.device.set_window(ByteSize::kib(4));
    world.device.set_slow(Duration::from_millis(20));
    let mut homes = [Home::Unmapped; 70];
    let began = Instant::now();
    world
        .process
        .range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes)
        .unwrap();
    assert!(
        began.elapsed() > Duration::from_secs(1),
        "else it shows nothing"
    );
    assert!(homes.iter().all(|home| *home == Home::System));
    world.device.set_slow(Duration::ZERO);
    memory.check(1);
    memory.disarm(&world.process);
    memory.end(&world.process);
}

/// A device that hangs in a copy holds the block: whoever looks at its pages is told so.
fn a_span_that_never_settles_is_refused_in_time(world: &World) {
    let memory = world.memory(BLOCK_SIZE, memory::Pages::Base);
    let (span, moving, done) = (
        memory.span(),
        AtomicBool::new(false),
        AtomicBool::new(false),
    );
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut block = world.process.lock_block(span).unwrap();
            let collected = block.collect(span, OWNER, &mut |_, _| false).unwrap();
            moving.store(true, Ordering::Release);
            while !done.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(5));
            }
            drop(collected);
        });
        while !moving.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let (mut homes, began) = ([Home::System; 512], Instant::now());
        let refused = world
            .process
            .range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes);
        let took = began.elapsed();
        done.store(true, Ordering::Release);
        assert_eq!(refused, Err(MmError::Unstable { span }));
        assert_eq!(MmError::Unstable { span }.errno(), 16);
        let (least, most) = (Duration::from_millis(900), Duration::from_secs(15));
        assert!(took > least && took < most, "{took:?}");
    });
    memory.check(1);
    memory.disarm(&world.process);
    memory.end(&world.process);
}
