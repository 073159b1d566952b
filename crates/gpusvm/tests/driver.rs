//! The driver layer by its own interface, on this process.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Stay, World, within, world};
use gpusvm::driver::{Vm, worker};
use gpusvm::{Access, ByteSize, Fabric, FaultError, Grid, SoftGpu, Span, SvmPtr};
use gpusvm_device::{Device, DeviceFault, FaultId, Verdict};
use gpusvm_mm_linux::Allocation;
use gpusvm_pagemap::{Cause, MigrateError};
use gpusvm_types::PageCount;
use std::sync::Arc;
use std::time::Duration;

const BLOCK: usize = 2 << 20;

fn gpus(count: usize) -> Vec<Arc<SoftGpu>> {
    let gpu = || {
        let gpu = SoftGpu::builder().vram(ByteSize::mib(4)).units(2);
        gpu.fabric(Fabric(9)).build().unwrap()
    };
    (0..count).map(|_| gpu()).collect()
}

fn world_of(gpus: &[Arc<SoftGpu>]) -> World {
    let devices: Vec<Arc<dyn Device>> = gpus.iter().map(|gpu| gpu.clone() as _).collect();
    world(&devices)
}

#[test]
fn two_address_spaces_of_one_device_share_its_memory() {
    within(Duration::from_secs(60), || {
        let gpus = gpus(1);
        let world = world_of(&gpus);
        let region = &world.regions[0];
        let other = Vm::new(region, Arc::new(Stay(Duration::ZERO))).unwrap();
        let workers = worker::start(region).unwrap();
        let numbers = Allocation::<u64>::new(&world.process, 3 * BLOCK / 8).unwrap();
        let p = SvmPtr::from(numbers.as_ptr().cast_mut());
        let n = numbers.len();
        for _ in 0..5 {
            let launches = [&world.vms[0], &other].map(|vm| {
                // SAFETY: by atomics; the numbers outlive the launch.
                let launch = unsafe {
                    gpus[0].launch(vm.id(), Grid::new(n / 64), move |lane| {
                        lane.atomic_add(p.add(lane.id() * 64), 1u64)?;
                        Ok(())
                    })
                };
                launch.unwrap()
            });
            for launch in launches {
                launch.wait().unwrap();
            }
        }
        assert!(world.vms[0].stats().faults > 0 && other.stats().faults > 0);
        assert!(region.used() <= region.total());
        other.close();
        assert_eq!(region.vms().len(), 1);
        assert!(numbers.iter().step_by(64).all(|x| *x == 10));
        gpus[0].fault_queue().unwrap().close();
        workers
            .into_iter()
            .for_each(|worker| worker.join().unwrap());
    });
}

/// Half of a range on each device, where it has to stay for a while.
#[test]
fn a_range_on_two_devices_is_gathered_in_ram() {
    within(Duration::from_secs(60), || {
        let world = world_of(&gpus(2));
        let bytes = halves(&world, Duration::from_millis(50));
        let (vm, span) = (&world.vms[0], bytes.span());
        vm.make_accessible(span.start(), Access::Write).unwrap();
        let stats = vm.stats();
        assert_eq!((stats.gathered, stats.last_resorts), (1, 0));
        assert_eq!(world.regions[0].used(), span.page_count());
        assert_eq!(world.regions[1].used(), PageCount::ZERO);
        assert!(bytes.iter().all(|x| *x == 8));
    });
}

/// Pages of a memory that is being unbound, which nobody can map any more.
#[test]
fn pages_of_an_unbound_memory_come_home_on_a_fault() {
    within(Duration::from_secs(60), || {
        let world = world_of(&gpus(2));
        let bytes = halves(&world, Duration::from_millis(50));
        world
            .regions
            .iter()
            .for_each(|region| region.pagemap().unbind());
        let (vm, span) = (&world.vms[0], bytes.span());
        vm.make_accessible(span.start(), Access::Write).unwrap();
        assert!(vm.stats().gathered >= 1);
        assert_eq!(world.process.pages_on_devices(), PageCount::ZERO);
        assert!(bytes.iter().all(|x| *x == 8));
    });
}

/// Two MiB, the first half on one device, the second on the other.
fn halves(world: &World, timeslice: Duration) -> Allocation<u8> {
    let mut bytes = Allocation::<u8>::new(&world.process, BLOCK).unwrap();
    bytes.fill(8);
    let span = bytes.span();
    // Watched from here on.
    world.vms[0].migrate_to_devmem(span, Cause::Asked).unwrap();
    world.vms[0].migrate_to_ram(span).unwrap();
    let half = PageCount::new(span.page_count().get() / 2);
    let firsts = [span.first_page(), span.first_page() + half];
    for (first, region) in firsts.into_iter().zip(&world.regions) {
        let part = Span::of_pages(first, half);
        let moved = region.pagemap().populate(part, timeslice, Cause::Asked);
        moved.unwrap();
    }
    bytes
}

#[test]
fn a_closed_address_space_refuses_everything() {
    let world = world_of(&gpus(1));
    let vm = &world.vms[0];
    let bytes = Allocation::<u8>::new(&world.process, BLOCK).unwrap();
    let (span, at) = (bytes.span(), bytes.span().start());
    vm.migrate_to_devmem(span, Cause::Prefetch).unwrap();
    vm.make_accessible(at, Access::Read).unwrap();
    vm.close();
    vm.close();
    let closed = FaultError::Closed { at };
    assert_eq!(vm.make_accessible(at, Access::Read), Err(closed));
    let fault = DeviceFault {
        id: FaultId(1),
        vm: vm.id(),
        at,
        access: Access::Read,
        stale: false,
    };
    assert_eq!(vm.serve(&fault), Verdict::Fail(closed));
    let refused = vm.migrate_to_devmem(span, Cause::Prefetch);
    assert!(matches!(refused, Err(MigrateError::Mm(_))));
    assert_eq!(vm.svm().range_count(), 0);
    assert!(vm.svm().range_find(at).is_none());
    assert_eq!(world.regions[0].used(), span.page_count(), "pages stay");
    vm.migrate_to_ram(span).unwrap();
    assert_eq!(world.regions[0].used(), PageCount::ZERO);
}

/// Whoever loses the entries of an object gets them back by the next fault, and no range.
#[test]
fn a_binding_that_was_lost_is_made_again() {
    within(Duration::from_secs(60), || {
        let gpus = gpus(1);
        let world = world_of(&gpus);
        let (vm, region) = (&world.vms[0], &world.regions[0]);
        let workers = worker::start(region).unwrap();
        let bytes = Allocation::<u8>::new(&world.process, BLOCK).unwrap();
        let span = bytes.span();
        let object = region.create_object(span.len()).unwrap();
        vm.bind_object(span, &object, ByteSize::ZERO).unwrap();
        let p = SvmPtr::<u64>::new(span.start());
        for round in 0..3 {
            // SAFETY: only this launch uses it.
            let launch = unsafe {
                gpus[0].launch(vm.id(), Grid::new(1), move |lane| {
                    let old = lane.load(p)?;
                    assert_eq!(old, round);
                    lane.store(p, old + 1)
                })
            };
            launch.unwrap().wait().unwrap();
            let tables = gpus[0].page_tables();
            tables.zap(vm.id(), span);
            tables.flush(vm.id(), span);
        }
        let stats = vm.stats();
        assert_eq!((stats.rebound, stats.faults), (2, 2));
        assert_eq!(stats.ranges_live, 0);
        // What is fetched beforehand, or declared, is there already.
        vm.migrate_to_devmem(span, Cause::Prefetch).unwrap();
        assert_eq!(vm.stats().ranges_live, 0);
        vm.unbind(span).unwrap();
        let refused = vm.migrate_to_devmem(span, Cause::Prefetch).unwrap_err();
        assert!(matches!(refused, MigrateError::NoMapping { .. }));
        drop(object);
        assert_eq!(region.stats().objects, 0);
        assert_eq!(region.used(), PageCount::ZERO);
        gpus[0].fault_queue().unwrap().close();
        workers
            .into_iter()
            .for_each(|worker| worker.join().unwrap());
    });
}
