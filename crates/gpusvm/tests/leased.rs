//! Pages that a launch needs where they are, as long as it runs: nobody waits for it with a range served,
//! so others of the same block go on.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{World, is_so_within, wait_until, within, world_with};
use gpusvm::driver::{Advice, Location, MigrateOnTouch, Preferred, PrefetchReason};
use gpusvm::{Access, ByteSize, Fabric, SoftGpu};
use gpusvm_mm::{AddressSpace, Block, Home};
use gpusvm_mm_linux::Allocation;
use gpusvm_pagemap::{Cause, Devmem, Holder, MigrateError};
use gpusvm_types::{PageCount, Span};
use std::sync::Arc;
use std::time::Duration;

const BLOCK: usize = 2 << 20;
const LONG: Duration = Duration::from_secs(120);
/// Less than anybody waits for a lease, and more than a busy machine takes for a fault.
const SOON: Duration = Duration::from_secs(3);

/// What a launch holds.
struct Leased(Arc<Devmem>);

impl Drop for Leased {
    fn drop(&mut self) {
        self.0.unlease(Holder::Faults);
    }
}

fn gpu() -> gpusvm_softgpu::Builder {
    SoftGpu::builder().vram(ByteSize::mib(4)).units(1)
}

/// Devices on one fabric, which do as is advised.
fn devices(count: usize) -> World {
    let gpu = || gpu().fabric(Fabric(7)).build().unwrap() as _;
    let gpus: Vec<_> = (0..count).map(|_| gpu()).collect();
    world_with(&gpus, MigrateOnTouch::default())
}

/// A block of memory.
fn block(world: &World) -> Allocation<u8> {
    let mut bytes = Allocation::<u8>::new(&world.process, BLOCK).unwrap();
    bytes.fill(8);
    bytes
}

/// A launch on a device needs a page that lives there.
fn lease(world: &World, device: usize, page: Span) -> Leased {
    let block = world.process.lock_block(page).unwrap();
    let Home::Device(page) = block.home(page.first_page()) else {
        panic!("{page} is in RAM");
    };
    let devmem = world.regions[device].pagemap().devmem_of(page).unwrap();
    devmem.lease(Holder::Faults);
    Leased(devmem)
}

/// The prefetch once waited for the lease, four seconds long, and every fault of the block for the
/// prefetch.
#[test]
fn a_fault_does_not_wait_for_a_prefetch_to_ram_of_what_a_launch_needs() {
    within(LONG, || {
        let world = devices(1);
        let (vm, bytes) = (&world.vms[0], block(&world));
        let span = bytes.span();
        vm.migrate_to_devmem(span, Cause::Prefetch).unwrap();
        let lease = lease(&world, 0, Span::page_of(span.start()));
        let range = vm.svm().range_find(span.start()).unwrap();
        let prefetch = vm.prefetch(&[span], Location::Ram);
        let (done, was_served) = std::thread::scope(|scope| {
            let waits = scope.spawn(|| prefetch.wait());
            wait_until("the prefetch begins", || {
                range.try_serve().is_none() || waits.is_finished()
            });
            let last = span.start() + ByteSize::from_usize(BLOCK - 4096);
            let faults = scope.spawn(move || vm.make_accessible(last, Access::Write));
            let was_served = is_so_within(SOON, || faults.is_finished());
            drop(lease);
            assert_eq!(faults.join().unwrap(), Ok(()));
            (waits.join().unwrap(), was_served)
        });
        assert!(was_served, "a fault waited for a lease that is not its own");
        let error = done.unwrap_err();
        let reason = PrefetchReason::Migrate(MigrateError::NothingCollected { span });
        assert_eq!((error.span, error.reason), (span, reason));
        let done = prefetch.progress();
        assert_eq!((done.in_place, done.home, done.failed), (1, 0, 1));
        assert_eq!(world.process.pages_on_devices(), span.page_count());
        assert!(bytes.iter().all(|x| *x == 8));
    });
}

/// A device that does not reach RAM asks where the pages are. They are on another, out of its reach. To look
/// once meant to bring them home, and to wait for the launch there.
#[test]
fn a_prefetch_looks_where_pages_are_and_waits_for_nobody() {
    within(LONG, || {
        let gpus = [gpu().coherent(false), gpu()].map(|gpu| gpu.build().unwrap() as _);
        let world = world_with(&gpus, MigrateOnTouch::default());
        let (vm, bytes) = (&world.vms[0], block(&world));
        let span = bytes.span();
        world.vms[1]
            .migrate_to_devmem(span, Cause::Prefetch)
            .unwrap();
        let lease = lease(&world, 1, Span::page_of(span.start()));
        let prefetch = vm.prefetch(&[span], Location::Ram);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| prefetch.wait());
            let was_told = is_so_within(SOON, || waits.is_finished());
            drop(lease);
            let error = waits.join().unwrap().unwrap_err();
            let reason = PrefetchReason::Migrate(MigrateError::NothingCollected { span });
            assert_eq!((error.span, error.reason), (span, reason));
            assert!(was_told, "it waited");
        });
        let again = vm.prefetch(&[span], Location::Ram).wait().unwrap();
        assert_eq!((again.home, again.valid), (1, 0));
        let again = vm.prefetch(&[span], Location::Ram).wait().unwrap();
        assert_eq!((again.home, again.valid), (0, 1));
    });
}

/// Half of a range on each device: a fault gathers it in RAM, and waits for the launch that needs the
/// other half; but not with the range served.
#[test]
fn a_range_is_free_for_others_while_a_fault_waits_to_gather_it() {
    within(LONG, || {
        let world = devices(2);
        let (vm, bytes) = (&world.vms[0], block(&world));
        let span = bytes.span();
        vm.migrate_to_devmem(span, Cause::Asked).unwrap();
        vm.migrate_to_ram(span).unwrap();
        let half = PageCount::new(span.page_count().get() / 2);
        let halves = [PageCount::ZERO, half].map(|from| span.first_page() + from);
        let halves = halves.map(|first| Span::of_pages(first, half));
        for (part, region) in halves.into_iter().zip(&world.regions) {
            let moved = region
                .pagemap()
                .populate(part, Duration::ZERO, Cause::Asked);
            moved.unwrap();
        }
        let lease = lease(&world, 1, Span::page_of(halves[1].start()));
        std::thread::scope(|scope| {
            let faults = scope.spawn(|| vm.make_accessible(span.start(), Access::Write));
            wait_until("it wants to gather", || vm.stats().gathered > 0);
            let range = vm.svm().range_find(span.start()).unwrap();
            let is_free = is_so_within(SOON, || range.try_serve().is_some());
            let waits = !faults.is_finished();
            drop(lease);
            assert_eq!(faults.join().unwrap(), Ok(()));
            assert!(is_free, "nobody can serve the range");
            assert!(waits, "a page was taken from a launch");
        });
        assert_eq!(world.regions[0].used(), span.page_count());
        assert!(bytes.iter().all(|x| *x == 8));
    });
}

/// Copies are made of pages in RAM. Those of a launch are not brought there: they are read where they are.
#[test]
fn a_fault_that_would_copy_does_not_wait_for_a_launch() {
    within(LONG, || {
        let world = devices(2);
        let (vm, bytes) = (&world.vms[0], block(&world));
        let span = bytes.span();
        world.vms[1]
            .migrate_to_devmem(span, Cause::Prefetch)
            .unwrap();
        let lease = lease(&world, 1, Span::page_of(span.start()));
        vm.advise(span, Advice::ReadMostly(true)).unwrap();
        std::thread::scope(|scope| {
            let faults = scope.spawn(|| vm.make_accessible(span.start(), Access::Read));
            let was_served = is_so_within(SOON, || faults.is_finished());
            drop(lease);
            assert_eq!(faults.join().unwrap(), Ok(()));
            assert!(was_served, "it waited");
        });
        assert_eq!(vm.stats().not_duplicated, 1);
        assert_eq!(world.regions[1].used(), span.page_count());
    });
}

/// Pages that shall live in RAM, and that a launch needs on the device, are mapped there: for a while, not
/// for ever.
#[test]
fn what_could_not_come_home_for_a_launch_is_tried_again() {
    within(LONG, || {
        let world = devices(1);
        let (vm, bytes) = (&world.vms[0], block(&world));
        let span = bytes.span();
        vm.migrate_to_devmem(span, Cause::Prefetch).unwrap();
        let in_ram = Advice::PreferredLocation(Preferred::Ram);
        vm.advise(span, in_ram).unwrap();
        let lease = lease(&world, 0, Span::page_of(span.start()));
        let touch = || vm.make_accessible(span.start(), Access::Read);
        assert_eq!(touch(), Ok(()));
        assert_eq!(world.process.pages_on_devices(), span.page_count());
        drop(lease);
        wait_until("a second look", || {
            vm.tend();
            !vm.svm().has_mapping(span)
        });
        assert_eq!(touch(), Ok(()));
        assert_eq!(world.process.pages_on_devices(), PageCount::ZERO);
        assert!(bytes.iter().all(|x| *x == 8));
    });
}
