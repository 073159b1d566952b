//! The error table where the driver is who says it: device memory that is full, a process that is gone, a
//! device that is unbound.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{World, within, world};
use gpusvm::driver::Declared;
use gpusvm::{ByteSize, SoftGpu};
use gpusvm_device::{Access, Device, FaultError};
use gpusvm_mm::AddressSpace;
use gpusvm_pagemap::{Cause, MigrateError};
use gpusvm_types::{PageCount, Span};
use std::sync::Arc;
use std::time::Duration;

/// A process with a device of so much memory, and a block to share.
fn small(vram: ByteSize, coherent: bool) -> (World, Span) {
    let gpu = SoftGpu::builder().vram(vram).coherent(coherent);
    let gpu: Arc<dyn Device> = gpu.build().unwrap();
    let world = world(&[gpu]);
    let span = world.process.allocate(ByteSize::mib(2)).unwrap();
    (world, span)
}

fn write_to(span: Span) -> Declared {
    let access = Access::Write;
    Declared { span, access }
}

fn part(span: Span, pages: u64) -> Span {
    Span::of_pages(span.first_page(), PageCount::new(pages))
}

#[test]
fn device_memory_that_is_full_is_enospc() {
    within(Duration::from_secs(60), || {
        // A page of device memory, which a launch needs.
        let (world, span) = small(ByteSize::kib(4), true);
        let (vm, one) = (&world.vms[0], part(span, 1));
        let lease = vm.make_resident(&[write_to(one)]).unwrap();
        assert_eq!(world.regions[0].used(), world.regions[0].total());
        let next = Span::page_of(one.end());
        let error = vm.migrate_to_devmem(next, Cause::Prefetch).unwrap_err();
        assert!(matches!(error, MigrateError::NoSpace { .. }), "{error}");
        assert_eq!(error.errno(), 28);
        drop(lease);
        vm.migrate_to_devmem(next, Cause::Prefetch).unwrap();
        assert_eq!(world.process.pages_on_devices(), PageCount::ONE);
    });
}

#[test]
fn device_memory_that_is_full_of_what_a_launch_needs_is_enospc() {
    within(Duration::from_secs(60), || {
        let (world, span) = small(ByteSize::kib(64), true);
        let vm = &world.vms[0];
        let lease = vm.make_resident(&[write_to(part(span, 16))]).unwrap();
        let other = world.process.allocate(ByteSize::mib(2)).unwrap();
        let wanted = part(other, 1);
        let error = vm.migrate_to_devmem(wanted, Cause::Prefetch).unwrap_err();
        assert_eq!(error.errno(), 28, "{error}");
        drop(lease);
        vm.migrate_to_devmem(wanted, Cause::Prefetch).unwrap();
    });
}

/// The fault path then maps the page where it is.
#[test]
fn a_fault_that_finds_device_memory_full_maps_in_place() {
    within(Duration::from_secs(60), || {
        let (world, span) = small(ByteSize::kib(4), true);
        let (vm, one) = (&world.vms[0], part(span, 1));
        let _lease = vm.make_resident(&[write_to(one)]).unwrap();
        vm.make_accessible(one.end(), Access::Write).unwrap();
        assert!(vm.svm().has_mapping(Span::page_of(one.end())));
        assert_eq!(world.process.pages_on_devices(), PageCount::ONE);
    });
}

/// Unless only device memory will do.
#[test]
fn a_fault_that_needs_device_memory_and_finds_it_full_fails() {
    within(Duration::from_secs(60), || {
        let (world, span) = small(ByteSize::kib(4), false);
        let (vm, one) = (&world.vms[0], part(span, 1));
        let lease = vm.make_resident(&[write_to(one)]).unwrap();
        let failed = vm.make_accessible(one.end(), Access::Write).unwrap_err();
        assert!(matches!(failed, FaultError::Gave { .. }), "{failed}");
        assert!(failed.to_string().contains("full"), "{failed}");
        assert!(!vm.svm().has_mapping(Span::page_of(one.end())));
        drop(lease);
        vm.make_accessible(one.end(), Access::Write).unwrap();
    });
}

#[test]
fn a_fault_in_a_process_that_is_gone_is_closed() {
    within(Duration::from_secs(60), || {
        let (world, span) = small(ByteSize::mib(4), true);
        world.process.stop();
        let at = span.start();
        let failed = world.vms[0].make_accessible(at, Access::Read);
        assert_eq!(failed, Err(FaultError::Closed { at }));
        let error = world.vms[0].migrate_to_devmem(span, Cause::Prefetch);
        assert_eq!(error.unwrap_err().errno(), 14);
        assert_eq!(world.process.find_vma(at).unwrap_err().errno(), 14);
    });
}

#[test]
fn prefetch_to_a_device_that_is_unbound_is_enodev() {
    within(Duration::from_secs(60), || {
        let (world, span) = small(ByteSize::mib(4), true);
        world.regions[0].unbind().unwrap();
        let error = world.vms[0].migrate_to_devmem(span, Cause::Prefetch);
        assert_eq!(error.unwrap_err().errno(), 19);
        world.regions[0].rebind().unwrap();
        world.vms[0]
            .migrate_to_devmem(span, Cause::Prefetch)
            .unwrap();
        assert_eq!(world.process.pages_on_devices(), PageCount::new(512));
    });
}
