//! Leases, against migrations home that looked at them just before; and memory that a launch declared
//! and reaches in RAM, against everybody who would take it from there.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{InPlace, within, world, world_with};
use gpusvm::driver::Declared;
use gpusvm::{Access, ByteSize, FaultMode, Grid, SoftGpu, SvmPtr};
use gpusvm_device::{CopyOp, Device};
use gpusvm_mm::{AddressSpace, Block, Inbound};
use gpusvm_mm_linux::Allocation;
use gpusvm_pagemap::{Cause, MigrateError};
use gpusvm_testkit::conformance::{Kit, Model, Part, Places, Setup};
use gpusvm_testkit::world::{Linux, Simulated, World};
use gpusvm_types::Span;
use std::sync::Arc;
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
                    assert!(lease.count() == 0 || range.is_mapped());
                    std::thread::yield_now();
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    });
}

fn declared_gpu() -> Arc<SoftGpu> {
    let gpu = SoftGpu::builder().vram(ByteSize::mib(4)).units(1);
    gpu.fault_mode(FaultMode::Declared).build().unwrap()
}

/// A launch of a device that cannot fault runs on pages of RAM. Another device wants them meanwhile, and
/// so does a prefetch to its own. Once they were moved under the launch, which lost its mapping.
#[test]
fn what_a_launch_declared_and_reaches_in_ram_stays_there_until_it_ends() {
    within(Duration::from_secs(60), || {
        let gpus = [declared_gpu(), declared_gpu()];
        let world = world_with(&gpus.clone().map(|gpu| gpu as _), InPlace(None));
        let (process, vms) = (&world.process, &world.vms);
        let mut bytes = Allocation::<u8>::new(process, 2 << 20).unwrap();
        bytes.fill(7);
        let span = bytes.span();
        let declared = [Declared {
            span: Span::page_of(span.start()),
            access: Access::Read,
        }];
        let lease = vms[0].make_resident(&declared).unwrap();
        let (started, go_on) = (Arc::new(AtomicBool::new(false)), common::Stop::default());
        let (starts, goes_on) = (Arc::clone(&started), go_on.clone());
        // SAFETY: nobody writes there until the launch has ended.
        let launch = unsafe {
            gpus[0].launch(vms[0].id(), Grid::new(1), move |lane| {
                starts.store(true, Ordering::Release);
                while !goes_on.is_set() {
                    std::thread::yield_now();
                }
                assert_eq!(lane.load(SvmPtr::<u8>::new(span.start()))?, 7);
                Ok(())
            })
        };
        let launch = launch.unwrap();
        launch.on_done(move || drop(lease));
        while !started.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        for vm in vms {
            let moved = vm.migrate_to_devmem(span, Cause::Prefetch);
            assert_eq!(moved, Err(MigrateError::NothingCollected { span }));
        }
        assert_eq!(process.pages_on_devices().get(), 0);
        go_on.set();
        launch.wait().unwrap();
        for vm in vms {
            assert_eq!(vm.migrate_to_devmem(span, Cause::Prefetch), Ok(()));
            assert_eq!(process.pages_on_devices(), span.page_count());
        }
        assert!(bytes.iter().all(|x| *x == 7));
    });
}

/// A range that is mapped in RAM for want of something better is unmapped after a while, so that it
/// faults and gets another chance. It is not while a launch needs it that cannot fault.
#[test]
fn the_second_look_at_a_range_waits_for_launches_that_declared_it() {
    within(Duration::from_secs(60), || {
        let world = world_with(&[declared_gpu() as _], InPlace(Some(Duration::ZERO)));
        let vm = &world.vms[0];
        let bytes = Allocation::<u8>::new(&world.process, 2 << 20).unwrap();
        let declared = [Declared {
            span: bytes.span(),
            access: Access::Write,
        }];
        let lease = vm.make_resident(&declared).unwrap();
        vm.tend();
        assert!(vm.svm().has_mapping(bytes.span()), "a launch needs it");
        drop(lease);
        while vm.svm().has_mapping(bytes.span()) {
            std::thread::sleep(Duration::from_millis(1));
            vm.tend();
        }
    });
}

/// A launch that declares memory twice gets what needs device memory first: the other way around it
/// would keep its own pages in RAM.
#[test]
fn a_launch_does_not_keep_its_own_pages_in_ram() {
    let setup = Setup {
        places: Places::InPlace,
        atomics_on_ram: false,
        ..Setup::default()
    };
    KIT.once::<Simulated>(&setup, |bench| {
        let span = bench.memory(16);
        let both = [Access::Read, Access::Atomic].map(|access| Declared { span, access });
        let lease = bench.mirror().vm.make_resident(&both);
        assert!(lease.is_ok(), "{lease:?}");
    });
}

/// What a launch reaches in RAM is not to be had for another that needs it elsewhere.
#[test]
fn what_a_launch_reaches_in_ram_is_refused_to_a_device_that_cannot() {
    within(Duration::from_secs(60), || {
        let gpu = SoftGpu::builder().vram(ByteSize::mib(4)).units(1);
        let gpu = gpu.fault_mode(FaultMode::Declared).coherent(false);
        let gpus = [gpu.build().unwrap() as _, declared_gpu() as _];
        let world = world_with(&gpus, InPlace(None));
        let bytes = Allocation::<u8>::new(&world.process, 2 << 20).unwrap();
        let (span, access) = (bytes.span(), Access::Read);
        let declared = [Declared { span, access }];
        let lease = world.vms[1].make_resident(&declared).unwrap();
        assert!(world.vms[0].make_resident(&declared).is_err());
        drop(lease);
        assert!(world.vms[0].make_resident(&declared).is_ok());
    });
}

const KIT: Kit = Kit::new(Model::Dmirror, FaultMode::Declared);

fn reads_while_others_take<W: World>(places: Places) {
    const ROUNDS: usize = 8;
    let setup = Setup {
        devices: 2,
        places,
        ..Setup::default()
    };
    KIT.race::<W>(&setup, |bench| {
        let span = bench.memory(16);
        bench.fill(span, 1);
        let reads: Part<W> = Box::new(move |bench| {
            (0..ROUNDS).for_each(|_| bench.device_expect(0, span, 1));
        });
        let takes = |device: usize| -> Part<W> {
            Box::new(move |bench| {
                for _ in 0..ROUNDS {
                    // Whether it goes depends on the others.
                    let _ = bench.mirror_at(device).migrate_to_dev(span);
                }
            })
        };
        bench.run(vec![reads, takes(0), takes(1)]);
        bench.expect(span, 1);
    });
}

#[test]
fn a_launch_that_declares_reads_whatever_prefetches_do_in_the_simulated_world() {
    [Places::InPlace, Places::Device]
        .into_iter()
        .for_each(reads_while_others_take::<Simulated>);
}

#[test]
fn a_launch_that_declares_reads_whatever_prefetches_do() {
    [Places::InPlace, Places::Device]
        .into_iter()
        .for_each(reads_while_others_take::<Linux>);
}
