//! What moves and what stays: holes, huge pages, partial residency, windows, timeslices.

use crate::device::Call;
use crate::lab::{BLOCK, Lab, part};
use gpusvm_mm::{AddressSpace, Home};
use gpusvm_mm_sim::{Options, Sim, Step};
use gpusvm_pagemap::{Holder, Mode, ToDevmem};
use gpusvm_types::{ByteSize, PageCount};
use std::sync::Arc;
use std::time::Duration;

/// How many bytes the last copy to a device copied, and cleared.
fn copied_and_cleared(lab: &Lab) -> (u64, u64) {
    let mut sums = (0, 0);
    for (_, call) in lab.bus.take_log() {
        let Call::ToDevmem(pieces, _) = call else {
            continue;
        };
        for piece in pieces {
            match piece {
                ToDevmem::Copy { len, .. } => sums.0 += len.get() / 4096,
                ToDevmem::Clear { len, .. } => sums.1 += len.get() / 4096,
            }
        }
    }
    sums
}

#[test]
fn holes_are_cleared_on_the_device_and_not_copied() {
    let lab = Lab::new(&[0]);
    let span = lab.untouched(BLOCK);
    lab.fill(part(span, 10, 20), 3);
    assert_eq!(lab.device().migrate(span).unwrap().moved, BLOCK);
    assert_eq!(copied_and_cleared(&lab), (20, 492));
    assert_eq!(lab.peek_word(part(span, 100, 1).start()), 0);
    lab.check(part(span, 10, 20), 3);
    assert_eq!(lab.sim.read_u64(part(span, 400, 1).start()), Ok(0));
    lab.assert_empty();
}

#[test]
fn a_huge_page_stays_whole_on_the_way_out_and_home() {
    let sim = Sim::new(Options {
        huge: true,
        ..Options::default()
    });
    let lab = Lab::on(sim, &[0], PageCount::new(1024));
    let span = lab.block(5);
    assert!(lab.sim.is_huge(span.start()));
    for _ in 0..3 {
        assert_eq!(lab.device().migrate(span).unwrap().moved, BLOCK);
        lab.check(span, 5);
        assert!(lab.sim.is_huge(span.start()), "home as it went");
    }
    lab.device().migrate(part(span, 3, 1)).unwrap();
    lab.check(span, 5);
    assert!(!lab.sim.is_huge(span.start()), "a page of it went alone");
    lab.assert_empty();
}

#[test]
fn pages_that_cannot_be_collected_stay_and_the_others_go() {
    let lab = Lab::new(&[0]);
    let span = lab.block(2);
    lab.bus.injector.fail_step_nth(Step::PageBusy, 100);
    let moved = lab.device().migrate(span).unwrap();
    lab.bus.injector.disarm();
    assert_eq!(
        (moved.moved, moved.kept),
        (PageCount::new(511), PageCount::ONE)
    );
    assert_eq!(lab.on_device(span), 511);
    lab.assert_sound();
    lab.check(span, 2);
    lab.assert_empty();
}

#[test]
fn a_fault_brings_home_the_allocation_and_nothing_else() {
    let lab = Lab::new(&[0]);
    let span = lab.block(2);
    lab.device().migrate(part(span, 0, 16)).unwrap();
    lab.device().migrate(part(span, 16, 16)).unwrap();
    lab.check(part(span, 3, 1), 2);
    assert_eq!(lab.on_device(part(span, 0, 16)), 0);
    assert_eq!(
        lab.on_device(part(span, 16, 16)),
        16,
        "of another allocation"
    );
    lab.check(span, 2);
    lab.assert_empty();
}

#[test]
fn a_fault_brings_home_no_more_than_the_window() {
    for (window, pages) in [(ByteSize::kib(64), 16), (ByteSize::kib(4), 1)] {
        let lab = Lab::new(&[0]);
        let span = lab.block(2);
        lab.device().migrate(span).unwrap();
        lab.device().pagemap().set_cpu_fault_window(window);
        lab.check(part(span, 37, 1), 2);
        assert_eq!(lab.on_device(span), 512 - pages);
        let aligned = 37 / pages as u64 * pages as u64;
        assert_eq!(lab.on_device(part(span, aligned, pages as u64)), 0);
        lab.check(span, 2);
        lab.assert_empty();
    }
}

#[test]
fn a_window_is_clipped_to_the_mapping() {
    let lab = Lab::new(&[0]);
    let span = lab.block(2);
    lab.device().migrate(span).unwrap();
    lab.sim.munmap(part(span, 0, 100));
    lab.sim.munmap(part(span, 400, 112));
    lab.check(part(span, 100, 300), 2);
    lab.assert_empty();
}

#[test]
fn a_fault_in_a_timeslice_sleeps_until_it_is_over() {
    let lab = Arc::new(Lab::new(&[0]));
    let span = lab.block(2);
    let slice = Duration::from_millis(50);
    lab.device().migrate_as(span, Mode::Partial, slice).unwrap();
    let began = lab.sim.now();
    let toucher = {
        let lab = Arc::clone(&lab);
        move || lab.check(part(span, 9, 1), 2)
    };
    lab.sim.run(vec![Box::new(toucher)]);
    let took = lab.sim.now().since(began);
    assert!(took >= slice - Duration::from_millis(1), "{took:?}");
    assert!(took < slice + Duration::from_millis(5), "{took:?}");
    let busy = lab.sim.thread_times()[0].busy;
    assert!(busy < slice / 50, "it slept, and did not spin: {busy:?}");
    assert_eq!(lab.sim.stats().delayed_faults, 1);
    lab.assert_empty();
}

#[test]
fn a_timeslice_does_not_hold_for_who_evicts_or_asks() {
    let lab = Lab::new(&[0]);
    let span = lab.block(2);
    let hour = Duration::from_secs(3600);
    lab.device().migrate_as(span, Mode::Partial, hour).unwrap();
    let began = lab.sim.now();
    lab.device()
        .pagemap()
        .evict_all(gpusvm_pagemap::Cause::Eviction)
        .unwrap();
    assert!(lab.sim.now().since(began) < Duration::from_secs(1));
    assert!(lab.homes(span).iter().all(|home| *home == Home::System));
    lab.check(span, 2);
    lab.assert_empty();
}

#[test]
fn a_failed_migration_starts_no_timeslice() {
    let lab = Lab::new(&[0]);
    let span = lab.block(2);
    lab.bus.injector.fail_step_nth(Step::CopyToDevmem, 1);
    let hour = Duration::from_secs(3600);
    lab.device()
        .migrate_as(span, Mode::Partial, hour)
        .unwrap_err();
    lab.bus.injector.disarm();
    let began = lab.sim.now();
    lab.device().migrate(span).unwrap();
    lab.check(span, 2);
    assert!(lab.sim.now().since(began) < Duration::from_secs(1));
    lab.assert_empty();
}

/// A launch whose device faults gets its pages back; and its faults wait for the fork.
#[test]
fn a_fork_waits_for_leases_of_launches_that_cannot_fault_only() {
    let lab = Arc::new(Lab::new(&[0]));
    let span = lab.block(2);
    lab.device().migrate(span).unwrap();
    let (devmem, _) = lab.device().pagemap().live().remove(0);
    devmem.lease(Holder::Faults);
    drop(lab.sim.fork());
    assert_eq!(lab.on_device(span), 0);
    devmem.unlease(Holder::Faults);

    lab.device().migrate(span).unwrap();
    let (devmem, _) = lab.device().pagemap().live().remove(0);
    devmem.lease(Holder::CannotFault);
    let (began, launch) = (lab.sim.now(), Duration::from_millis(5));
    let (forks, ends) = (Arc::clone(&lab), Arc::clone(&lab));
    lab.sim.run(vec![
        Box::new(move || drop(forks.sim.fork())),
        Box::new(move || {
            ends.sim.sleep(launch);
            devmem.unlease(Holder::CannotFault);
        }),
    ]);
    assert!(lab.sim.now().since(began) >= launch, "the fork waited");
    assert_eq!(lab.on_device(span), 0);
    lab.check(span, 2);
    lab.assert_empty();
}
