//! A device goes out of use, and comes back, while the program works.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Stay, Stop, add_one, engine, two_devices, within, world};
use gpusvm::{Access, ByteSize, Error, Grid, Resident, SoftGpu};
use gpusvm_mm_linux::Allocation;
use gpusvm_pagemap::{Cause, MigrateError, RebindError};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// 2 MiB.
const WORDS: usize = 1 << 18;

#[test]
fn a_launch_goes_on_in_ram_when_its_device_is_unbound() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(4));
        let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
        let p = numbers.device_ptr();
        let stop = Stop::default();
        let stopped = stop.clone();
        let rounds = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&rounds);
        // SAFETY: by atomics on both sides; the slice outlives the launch.
        let launch = unsafe {
            svm.launch(Grid::new(1), move |lane| {
                while !stopped.is_set() {
                    for i in (0..WORDS).step_by(512) {
                        lane.atomic_add(p.add(i), 1u64)?;
                    }
                    counted.fetch_add(1, Ordering::Release);
                }
                Ok(())
            })
        };
        let launch = launch.unwrap();
        let wait_for_rounds = |more: u64| {
            let enough = rounds.load(Ordering::Acquire) + more;
            while rounds.load(Ordering::Acquire) < enough {
                std::thread::yield_now();
            }
        };
        for _ in 0..20 {
            wait_for_rounds(3);
            svm.unbind(0).unwrap();
            wait_for_rounds(3);
            let stats = svm.stats();
            assert_eq!((stats.vram_used_bytes, stats.pages_on_devices), (0, 0));
            svm.rebind(0).unwrap();
        }
        stop.set();
        launch.wait().unwrap();
        let rounds = rounds.load(Ordering::Acquire);
        assert!(numbers.iter().step_by(512).all(|x| *x == rounds));
    });
}

#[test]
fn what_a_launch_declared_keeps_a_device_from_being_emptied() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(4));
        let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
        let stop = Stop::default();
        let stopped = stop.clone();
        let declared = Resident::new().writes(&numbers);
        // SAFETY: it touches nothing.
        let launch = unsafe {
            svm.launch_resident(0, Grid::new(1), declared, move |_| {
                while !stopped.is_set() {
                    std::thread::yield_now();
                }
                Ok(())
            })
        };
        let busy = svm.unbind(0).unwrap_err();
        assert!(matches!(busy, Error::Unbind { device: 0, .. }));
        assert_eq!(busy.errno(), 16);
        let in_use = svm.rebind(0).unwrap_err();
        assert_eq!(in_use.errno(), 16, "pages of before are still there");
        stop.set();
        launch.unwrap().wait().unwrap();
        svm.unbind(0).unwrap();
        assert_eq!(svm.stats().vram_used_bytes, 0);
        svm.rebind(0).unwrap();
        add_one(&svm, 0, (numbers.device_ptr(), WORDS));
        assert!(svm.stats().vram_used_bytes > 0);
    });
}

#[test]
fn devices_on_a_fabric_are_unbound_in_turn_while_both_work() {
    within(Duration::from_secs(60), || {
        let svm = two_devices(ByteSize::mib(4), true, Stay(Duration::from_micros(100)));
        let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
        let all = (numbers.device_ptr(), WORDS);
        for round in 0..50 {
            let (one, other) = (round % 2, (round + 1) % 2);
            add_one(&svm, one, all);
            std::thread::scope(|scope| {
                scope.spawn(|| add_one(&svm, other, all));
                svm.unbind(one).unwrap();
            });
            svm.rebind(one).unwrap();
        }
        assert!(numbers.iter().all(|x| *x == 100));
        assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
    });
}

/// By the driver's own interface: what is refused, and that nothing is left behind.
#[test]
fn an_unbound_region_refuses_pages_and_forgets_nothing_else() {
    within(Duration::from_secs(60), || {
        let world = world(&[SoftGpu::with_vram(ByteSize::mib(4)).unwrap() as _]);
        let (region, vm) = (&world.regions[0], &world.vms[0]);
        let mut bytes = Allocation::<u8>::new(&world.process, 4 << 20).unwrap();
        bytes
            .iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x = i.to_le_bytes()[1]);
        let span = bytes.span();
        for _ in 0..100 {
            vm.migrate_to_devmem(span, Cause::Prefetch).unwrap();
            assert_eq!(region.used(), span.page_count());
            region.unbind().unwrap();
            assert_eq!(region.used().get(), 0);
            region.unbind().unwrap();
            let refused = vm.migrate_to_devmem(span, Cause::Prefetch).unwrap_err();
            assert!(matches!(refused, MigrateError::Unbound { .. }));
            assert_eq!(refused.errno(), 19);
            vm.make_accessible(span.start(), Access::Write).unwrap();
            assert_eq!(region.used().get(), 0, "it is mapped in RAM");
            region.rebind().unwrap();
            assert_eq!(region.rebind(), Err(RebindError::Bound));
            assert_eq!(world.devices.pagemaps().all().len(), 1);
        }
        vm.migrate_to_devmem(span, Cause::Prefetch).unwrap();
        vm.migrate_to_ram(span).unwrap();
        assert_eq!(region.used().get(), 0);
        assert!(
            bytes
                .iter()
                .enumerate()
                .all(|(i, x)| *x == i.to_le_bytes()[1])
        );
    });
}
