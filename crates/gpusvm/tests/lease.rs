//! Leases, against migrations home that looked at them just before.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{within, world};
use gpusvm::driver::Declared;
use gpusvm::{Access, ByteSize, SoftGpu};
use gpusvm_device::{CopyOp, Device};
use gpusvm_mm::{AddressSpace, Block, Inbound};
use gpusvm_mm_linux::Allocation;
use gpusvm_pagemap::Cause;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Pages come home by a migration that found them not leased, and was slow from then on. `make_resident`
/// finds the range mapped meanwhile. It once took its lease without the block lock, in between.
#[test]
fn a_lease_is_not_taken_behind_a_migration_home() {
    within(Duration::from_secs(60), || {
        let gpu = SoftGpu::with_vram(ByteSize::mib(4)).unwrap();
        let world = world(&[gpu.clone() as _]);
        let (process, vm) = (&world.process, &world.vms[0]);
        let mut bytes = Allocation::<u8>::new(process, 2 << 20).unwrap();
        bytes.fill(7);
        let span = bytes.span();
        let declared = [Declared {
            span,
            access: Access::Write,
        }];
        drop(vm.make_resident(&declared).unwrap());
        assert_eq!(process.pages_on_devices(), span.page_count());

        let leased = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // From here on it is a migration home: the lease was looked at, with the block locked.
            let mut block = process.lock_block(span).unwrap();
            let thread = scope.spawn(|| {
                let lease = vm.make_resident(&declared).unwrap();
                leased.store(true, Ordering::SeqCst);
                lease
            });
            std::thread::sleep(Duration::from_millis(50));
            assert!(!leased.load(Ordering::SeqCst), "pages are about to leave");
            let collected = block.collect_device(span, &mut |_, _| true).unwrap();
            for page in collected.leaving().iter().flatten() {
                let op = CopyOp::ToRam {
                    from: page.from.pfn.dev_addr(),
                    to: page.to,
                    len: ByteSize::kib(4),
                };
                let fence = gpu.copy_engine().submit(&[op]).unwrap();
                gpu.copy_engine().wait(fence).unwrap();
            }
            collected.commit().unwrap();
            drop(block);
            let lease = thread.join().unwrap();
            assert_eq!(lease.count(), 1);
            assert_eq!(process.pages_on_devices(), span.page_count());
        });
        assert!(vm.stats().slips >= 1, "it noticed");
        assert!(bytes.iter().all(|x| *x == 7));
    });
}

/// A victim of eviction is off the list of who lives in device memory. It can be leased all the same.
#[test]
fn pages_that_are_being_evicted_are_leased_or_seen_as_gone() {
    within(Duration::from_secs(60), || {
        // Room for one of two.
        let gpu = SoftGpu::with_vram(ByteSize::mib(2)).unwrap();
        let world = world(&[gpu as _]);
        let (process, vm) = (&world.process, &world.vms[0]);
        let one = Allocation::<u8>::new(process, 2 << 20).unwrap();
        let other = Allocation::<u8>::new(process, 2 << 20).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // Has no room as long as the other is leased.
                    let _ = vm.migrate_to_devmem(other.span(), Cause::Prefetch);
                }
            });
            let declared = [Declared {
                span: one.span(),
                access: Access::Write,
            }];
            for _ in 0..200 {
                let lease = vm.make_resident(&declared).unwrap();
                for _ in 0..10 {
                    let range = vm.svm().range_find(one.span().start()).unwrap();
                    assert!(lease.count() == 0 || range.pages().is_mapped());
                    std::thread::yield_now();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}
