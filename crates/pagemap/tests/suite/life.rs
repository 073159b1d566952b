//! The life of a pagemap: bound, unbound, bound again; and who may go first.

use crate::device::{Ops, request};
use crate::lab::{BLOCK, Lab, part};
use gpusvm_mm::{AddressSpace, Home};
use gpusvm_pagemap::migrate::migrate_to_devmem;
use gpusvm_pagemap::{Cause, Mode};
use gpusvm_types::{DevicePfn, OwnerId, PageCount};
use std::sync::Arc;
use std::time::Duration;

#[test]
fn unbind_lets_nothing_in_and_evict_all_brings_everything_home() {
    let lab = Lab::new(&[0]);
    let (first, second) = (lab.block(1), lab.block(2));
    lab.device().migrate(first).unwrap();
    lab.device().migrate(part(second, 0, 100)).unwrap();
    let pagemap = lab.device().pagemap();
    pagemap.unbind();
    assert_eq!(lab.device().migrate(second).unwrap_err().errno(), 19);
    assert_eq!(pagemap.pages_in_use(), PageCount::new(612));
    pagemap.evict_all(Cause::Asked).unwrap();
    assert_eq!(pagemap.pages_in_use(), PageCount::ZERO);
    lab.check(first, 1);
    lab.check(second, 2);
    lab.assert_empty();
}

#[test]
fn bound_again_it_takes_pages_as_before() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    let pagemap = lab.device().pagemap();
    let memory = pagemap.page(DevicePfn::new(0)).memory;
    for _ in 0..100 {
        lab.device().migrate(span).unwrap();
        pagemap.unbind();
        pagemap.evict_all(Cause::Asked).unwrap();
        pagemap
            .rebind(Arc::new(Ops(Arc::clone(lab.device()))))
            .unwrap();
        assert!(pagemap.is_bound());
    }
    let found = lab.pagemaps.of_peer(lab.device().peer).unwrap();
    assert_eq!(
        found.page(DevicePfn::new(0)).memory,
        memory,
        "no new memory"
    );
    lab.check(span, 1);
    lab.assert_empty();
}

/// Each memory numbers its pages from zero, has a number of its own in the address space, and is found
/// by its device and by each of its pages.
#[test]
fn memories_of_one_address_space_are_told_apart() {
    let lab = Lab::new(&[0, 0]);
    let numbers = lab.devices.iter().map(|device| {
        let span = lab.block(1);
        device.migrate(span).unwrap();
        let pagemap = device.pagemap();
        let found = lab.pagemaps.of_peer(device.peer).unwrap();
        assert!(Arc::ptr_eq(&found, &pagemap));
        assert_eq!((found.peer(), found.owner()), (device.peer, OwnerId(0)));
        let (devmem, _) = pagemap.live().remove(0);
        let pages = lab.homes(span).into_iter().map(|home| {
            let Home::Device(page) = home else {
                panic!("it is {home:?}");
            };
            let found = lab.pagemaps.page_to_pagemap(page).unwrap();
            assert!(Arc::ptr_eq(&found, &pagemap));
            assert!(Arc::ptr_eq(&found.devmem_of(page).unwrap(), &devmem));
            assert_eq!(page, pagemap.page(page.pfn));
            page.pfn.get()
        });
        assert!(pages.eq(0..512));
        lab.check(span, 1);
        pagemap.page(DevicePfn::new(0)).memory
    });
    let numbers: Vec<_> = numbers.collect();
    assert_ne!(numbers[0], numbers[1]);
    lab.assert_empty();
}

#[test]
fn pages_come_home_by_touch_from_an_unbound_memory() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    lab.device().migrate(span).unwrap();
    lab.device().pagemap().unbind();
    lab.check(span, 1);
    lab.assert_empty();
}

/// Unbinding lets go of the driver's part, though pages still live there: they hold their own.
#[test]
fn unbind_drops_the_driver_but_not_the_allocations() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    let before = Arc::strong_count(lab.device());
    lab.device().migrate(span).unwrap();
    assert_eq!(
        Arc::strong_count(lab.device()),
        before + 1,
        "the allocation"
    );
    lab.device().pagemap().unbind();
    assert_eq!(Arc::strong_count(lab.device()), before, "the driver's part");
    lab.check(span, 1);
    assert_eq!(Arc::strong_count(lab.device()), before - 1);
}

/// Threads migrate while another unbinds: after it returned, nothing comes any more.
#[test]
fn unbind_waits_for_migrations_under_way() {
    for seed in 0..50 {
        let lab = Arc::new(Lab::seeded(seed, &[0]));
        let spans = [lab.block(1), lab.block(2)];
        let mover = |span| {
            let lab = Arc::clone(&lab);
            let run: Box<dyn FnOnce() + Send> = Box::new(move || {
                for _ in 0..4 {
                    let _ = lab.device().migrate(span);
                    lab.check(part(span, 0, 1), if span == spans[0] { 1 } else { 2 });
                }
            });
            run
        };
        let unbinder = {
            let lab = Arc::clone(&lab);
            Box::new(move || {
                let pagemap = lab.device().pagemap();
                pagemap.unbind();
                pagemap.evict_all(Cause::Asked).unwrap();
                assert_eq!(pagemap.pages_in_use(), PageCount::ZERO);
            })
        };
        lab.sim
            .run(vec![mover(spans[0]), mover(spans[1]), unbinder]);
        assert_eq!(lab.on_device(spans[0]) + lab.on_device(spans[1]), 0);
        lab.check(spans[0], 1);
        lab.check(spans[1], 2);
        lab.assert_empty();
    }
}

#[test]
fn an_allocation_that_nothing_filled_is_given_back_when_dropped() {
    let lab = Lab::new(&[0]);
    let devmem = lab.device().allocate(BLOCK).unwrap();
    assert_eq!(lab.device().free_pages(), 1536);
    drop(devmem);
    assert_eq!(lab.device().free_pages(), 2048);
}

#[test]
fn an_allocation_is_consumed_on_success_and_on_error() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    let devmem = lab.device().allocate(BLOCK).unwrap();
    let request = request(span, Mode::Partial, Duration::ZERO);
    migrate_to_devmem(&lab.device().pagemap(), &devmem, &request).unwrap();
    assert!(!devmem.is_detached());
    let mut homes = vec![Home::System; 512];
    lab.sim
        .range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes)
        .unwrap();
    assert!(devmem.is_detached(), "its last page is gone");
    lab.assert_empty();
}
