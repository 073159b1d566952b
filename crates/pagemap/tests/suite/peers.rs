//! Device to device.

use crate::device::Call;
use crate::lab::{BLOCK, Lab, part};
use gpusvm_mm::Home;
use gpusvm_mm_sim::Step;
use gpusvm_pagemap::{Cause, Holder, Mode, PagemapAddr, Peer};
use gpusvm_types::{PageCount, Span};
use std::time::Duration;

/// Where the copies of the log went: to RAM, and to peers, in pages.
fn home_and_over(lab: &Lab) -> (u64, u64) {
    let mut sums = (0, 0);
    for (_, call) in lab.bus.take_log() {
        let Call::ToRam(pieces, _) = call else {
            continue;
        };
        for piece in pieces {
            match piece.to {
                PagemapAddr::System(_) => sums.0 += piece.len.get() / 4096,
                _ => sums.1 += piece.len.get() / 4096,
            }
        }
    }
    sums
}

fn all_on(lab: &Lab, device: usize, span: Span) -> bool {
    let pagemap = lab.devices[device].pagemap();
    let is_there = |home: &Home| matches!(home, Home::Device(page) if pagemap.contains(*page));
    lab.homes(span).iter().all(is_there)
}

#[test]
fn peers_of_one_owner_copy_directly() {
    let lab = Lab::new(&[0, 0]);
    let span = lab.block(4);
    lab.devices[1].migrate(span).unwrap();
    let moved = lab.devices[0].migrate(span).unwrap();
    assert_eq!(moved.moved, BLOCK);
    assert_eq!(home_and_over(&lab), (0, 512), "not through RAM");
    assert!(all_on(&lab, 0, span));
    assert_eq!(lab.devices[1].free_pages(), 2048, "given back at once");
    lab.peek(span, 4);
    lab.check(span, 4);
    lab.assert_empty();
}

#[test]
fn pages_of_another_owner_are_not_taken() {
    let lab = Lab::new(&[0, 1]);
    let span = lab.block(4);
    lab.devices[1].migrate(part(span, 0, 256)).unwrap();
    let moved = lab.devices[0].migrate(span).unwrap();
    let half = PageCount::new(256);
    assert_eq!((moved.moved, moved.kept), (half, half));
    assert!(all_on(&lab, 1, part(span, 0, 256)));
    assert!(all_on(&lab, 0, part(span, 256, 256)));
    lab.check(span, 4);
    lab.assert_empty();
}

#[test]
fn several_allocations_ram_and_holes_in_one_migration() {
    let lab = Lab::new(&[0, 0, 0]);
    let span = lab.untouched(BLOCK);
    lab.fill(part(span, 0, 500), 4);
    lab.devices[1].migrate(part(span, 0, 10)).unwrap();
    lab.devices[2].migrate(part(span, 10, 10)).unwrap();
    lab.devices[1].migrate(part(span, 30, 100)).unwrap();
    let moved = lab.devices[0].migrate(span).unwrap();
    assert_eq!(moved.moved, BLOCK);
    assert_eq!(home_and_over(&lab), (0, 120));
    assert!(all_on(&lab, 0, span));
    lab.check(part(span, 0, 500), 4);
    lab.assert_empty();
}

#[test]
fn a_page_in_its_timeslice_is_not_taken_by_a_peer() {
    let lab = Lab::new(&[0, 0]);
    let span = lab.block(4);
    let slice = Duration::from_millis(5);
    lab.devices[1]
        .migrate_as(part(span, 0, 8), Mode::Partial, slice)
        .unwrap();
    let moved = lab.devices[0].migrate(span).unwrap();
    assert_eq!(moved.kept, PageCount::new(8));
    lab.sim.sleep(slice);
    let moved = lab.devices[0].migrate(part(span, 0, 8)).unwrap();
    assert_eq!(moved.moved, PageCount::new(8));
    lab.check(span, 4);
    lab.assert_empty();
}

#[test]
fn a_leased_page_is_not_taken_by_a_peer() {
    let lab = Lab::new(&[0, 0]);
    let span = lab.block(4);
    lab.devices[1].migrate(span).unwrap();
    let (devmem, _) = lab.devices[1].pagemap().live().remove(0);
    devmem.lease(Holder::CannotFault);
    lab.devices[0].migrate(span).unwrap_err();
    assert!(all_on(&lab, 1, span));
    devmem.unlease(Holder::CannotFault);
    lab.devices[0].migrate(span).unwrap();
    lab.check(span, 4);
    lab.assert_empty();
}

#[test]
fn what_is_mapped_for_a_peer_is_unmapped_also_on_failure() {
    for fail in [None, Some(Step::CopyToPeer), Some(Step::DeviceMap)] {
        let lab = Lab::new(&[0, 0]);
        let span = lab.block(4);
        lab.devices[1].migrate(span).unwrap();
        lab.bus.take_log();
        if let Some(step) = fail {
            lab.bus.injector.fail_step_nth(step, 1);
        }
        let result = lab.devices[0].migrate(span);
        assert_eq!(result.is_ok(), fail.is_none());
        lab.bus.injector.disarm();
        let log = lab.bus.take_log();
        let count = |is: &dyn Fn(&Call) -> bool| log.iter().filter(|(_, call)| is(call)).count();
        let maps = count(&|call| matches!(call, Call::Map(_, Peer(1))));
        let unmaps = count(&|call| matches!(call, Call::Unmap(PagemapAddr::Peer(_), Peer(1))));
        assert_eq!(maps, unmaps, "{fail:?}");
        lab.check(span, 4);
        lab.assert_empty();
    }
}

#[test]
fn a_peer_evicts_what_came_directly() {
    let lab = Lab::new(&[0, 0]);
    let span = lab.block(4);
    lab.devices[1].migrate(span).unwrap();
    lab.devices[0].migrate(span).unwrap();
    lab.devices[0].pagemap().evict_all(Cause::Eviction).unwrap();
    assert_eq!(home_and_over(&lab), (512, 512));
    lab.check(span, 4);
    lab.assert_empty();
}
