//! The n-th step that can fail fails, for n = 1, 2, ... until none is left to fail. After each, what
//! must always hold, holds; and what failed can be done.

use crate::lab::{BLOCK, Lab, part};
use gpusvm_mm::{AddressSpace, Home};
use gpusvm_mm_sim::Step;
use gpusvm_pagemap::Cause;
use gpusvm_pagemap::evict::evict_to_ram;
use gpusvm_types::{PageCount, Span};
use std::collections::BTreeMap;

/// The seed of what the memory holds.
const SEED: u64 = 7;

/// A block with a bit of everything: RAM, holes, and two allocations of a peer.
fn mixed(lab: &Lab) -> Span {
    let span = lab.untouched(BLOCK);
    for (first, count) in [(0, 100), (110, 290), (440, 72)] {
        lab.fill(part(span, first, count), SEED);
    }
    for (first, count) in [(110, 50), (300, 30)] {
        lab.devices[1].migrate(part(span, first, count)).unwrap();
    }
    span
}

/// A block on the first device.
fn on_device(lab: &Lab) -> Span {
    let span = lab.block(SEED);
    for (first, count) in [(0, 64), (64, 448)] {
        lab.device().migrate(part(span, first, count)).unwrap();
    }
    span
}

/// Everything that a failure must leave as it was.
#[derive(PartialEq, Eq)]
struct Before {
    homes: Vec<Home>,
    bytes: Vec<u64>,
    in_use: Vec<PageCount>,
    free: Vec<usize>,
    allocations: Vec<usize>,
}

impl Before {
    fn of(lab: &Lab, span: Span) -> Self {
        let devices = || lab.devices.iter();
        let live = |device: &std::sync::Arc<crate::device::Device>| device.pagemap().live();
        Self {
            homes: lab.homes(span),
            bytes: span
                .pages()
                .map(|page| lab.peek_word(page.start()))
                .collect(),
            in_use: devices().map(|d| d.pagemap().pages_in_use()).collect(),
            free: devices().map(|d| d.free_pages()).collect(),
            allocations: devices().map(|d| live(d).len()).collect(),
        }
    }
}

/// Fails the n-th step of `action` for every n. How many steps of each kind failed.
fn fail_each_step(
    prepare: impl Fn(&Lab) -> Span,
    action: impl Fn(&Lab, Span) -> Result<(), i32>,
) -> BTreeMap<String, u64> {
    let mut covered = BTreeMap::new();
    for n in 1.. {
        let lab = Lab::new(&[0, 0]);
        let span = prepare(&lab);
        let before = Before::of(&lab, span);
        lab.bus.injector.fail_nth(n);
        let result = action(&lab, span);
        let fired = lab.bus.injector.fired();
        lab.bus.injector.disarm();
        lab.assert_sound();
        let after = Before::of(&lab, span);
        assert!(after.bytes == before.bytes, "step {n}, {fired:?}: bytes");
        // Pages come home one by one: those before the one that could not are there.
        if result.is_err() && fired != Some(Step::CommitIn) {
            assert!(after == before, "step {n}, {fired:?}: {result:?}");
        }
        let Some(step) = fired else {
            assert_eq!(result, Ok(()), "nothing was left to fail");
            break;
        };
        *covered.entry(format!("{step:?}")).or_insert(0) += 1;
        // Whatever it was, it can be done now, and undone.
        assert_eq!(action(&lab, span), Ok(()), "after step {n}, {step:?}");
        let mut homes = vec![Home::System; 512];
        lab.sim
            .range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes)
            .unwrap();
        assert!(Before::of(&lab, span).bytes == before.bytes);
        lab.assert_empty();
    }
    covered
}

#[track_caller]
fn assert_covers(what: &str, covered: &BTreeMap<String, u64>, kinds: &[Step]) {
    let total: u64 = covered.values().sum();
    println!("{what}: {total} steps failed, one at a time: {covered:?}");
    for kind in kinds {
        let kind = format!("{kind:?}");
        assert!(covered.contains_key(&kind), "{what} never met {kind}");
    }
}

#[test]
fn each_step_of_migrate_to_devmem_can_fail() {
    let covered = fail_each_step(mixed, |lab, span| {
        let moved = lab.device().migrate(span).map_err(|error| error.errno())?;
        assert!(moved.moved > PageCount::ZERO);
        Ok(())
    });
    let kinds = [
        Step::Allocate,
        Step::PopulatePfn,
        Step::Staging,
        Step::TakeOut,
        Step::PageBusy,
        Step::CopyToDevmem,
        Step::DeviceMap,
        Step::CopyToPeer,
    ];
    assert_covers("migrate_to_devmem", &covered, &kinds);
}

#[test]
fn each_step_of_migrate_to_ram_can_fail() {
    let covered = fail_each_step(on_device, |lab, span| {
        // As a CPU fault, of one allocation; not the CPU itself, whose page would be poisoned.
        let mut homes = [Home::System; 64];
        let first = part(span, 0, 64);
        lab.sim
            .range_fault(first, None, gpusvm_mm::Intent::Read, &mut homes)
            .map_err(|error| error.errno())
    });
    let kinds = [Step::Staging, Step::CopyToRam, Step::CommitIn];
    assert_covers("migrate_to_ram", &covered, &kinds);
}

/// One failure is tried again; so here every step of a kind fails from the n-th on.
#[test]
fn each_step_of_evict_to_ram_can_fail() {
    let evict = |lab: &Lab, span: Span| {
        let Home::Device(page) = lab.home(span.start()) else {
            return Ok(());
        };
        let devmem = lab.device().pagemap().devmem_of(page).unwrap();
        let result = evict_to_ram(&lab.device().pagemap(), &devmem, Cause::Eviction);
        result.map_err(|error| error.errno())
    };
    let covered = fail_each_step(on_device, evict);
    let kinds = [
        Step::PopulatePfn,
        Step::Staging,
        Step::CopyToRam,
        Step::CommitIn,
    ];
    assert_covers("evict_to_ram", &covered, &kinds);
    for step in kinds {
        let lab = Lab::new(&[0]);
        let span = on_device(&lab);
        let before = Before::of(&lab, span);
        lab.bus.injector.fail_every(step);
        evict(&lab, span).unwrap_err();
        lab.bus.injector.disarm();
        assert!(Before::of(&lab, span) == before, "{step:?}");
        lab.assert_sound();
        evict(&lab, span).unwrap();
        lab.check(span, SEED);
        lab.assert_empty();
    }
}

#[test]
fn a_cpu_fault_that_fails_is_a_bus_error_and_loses_nothing() {
    for step in [Step::Staging, Step::CopyToRam, Step::CommitIn] {
        let lab = Lab::new(&[0]);
        let span = on_device(&lab);
        lab.bus.injector.fail_every(step);
        let touched = part(span, 70, 1).start();
        assert_eq!(
            lab.sim.read_u64(touched),
            Err(gpusvm_mm_sim::Signal::Bus),
            "{step:?}"
        );
        lab.bus.injector.disarm();
        assert_eq!(lab.on_device(span), 512, "{step:?}");
        lab.peek(span, SEED);
        lab.assert_sound();
    }
}
