//! Every step of the world fails once, and nothing is lost.

mod common;

use common::{Device, check, expect, fill, seeded, thread, world};
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_mm_sim::{Options, Sim, Step};
use gpusvm_types::Span;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

/// Out, between devices, and home: as far as it goes.
fn story(sim: &Sim, first: &Device, second: &Device, span: Span) -> Result<(), MmError> {
    let token = sim.arm(span)?;
    let moved = first
        .pull(sim, span, None)
        .and_then(|_| second.pull(sim, span, Some(first)))
        .and_then(|_| sim.bring_home(span));
    sim.disarm(span, token);
    moved
}

#[test]
fn every_step_fails_once_and_no_byte_is_lost() {
    let mut failed = BTreeSet::new();
    for n in 1.. {
        let (sim, first, span) = world(seeded(n), 5);
        let second = Device::add(&sim, 2, 16);
        fill(&sim, span, 30);
        sim.injector().fail_nth(n);
        let result = story(&sim, &first, &second, span);
        let Some(step) = sim.injector().fired() else {
            result.unwrap();
            assert_eq!(sim.injector().passed(), n - 1);
            break;
        };
        failed.insert(step);
        sim.injector().disarm();
        // A busy page is no error.
        assert_eq!(result.is_ok(), step == Step::PageBusy, "{step:?}");
        check(&sim, &first);
        check(&sim, &second);
        expect(&sim, span, 30);
        check(&sim, &first);
    }
    for step in Step::OF_THE_WORLD {
        assert!(failed.contains(&step), "{step:?} never failed");
    }
}

#[test]
fn a_failed_commit_leaves_its_page_on_the_device() {
    let (sim, device, span) = world(seeded(1), 5);
    fill(&sim, span, 3);
    device.pull(&sim, span, None).unwrap();
    sim.injector().fail_step_nth(Step::CommitIn, 3);
    let stuck = sim.bring_home(span);
    assert!(matches!(stuck, Err(MmError::StuckOnDevice { .. })));
    assert_eq!(device.held(), 1, "the others came home");
    check(&sim, &device);
    expect(&sim, span, 3);
}

#[test]
fn no_staging_slot_is_an_error_and_changes_nothing() {
    let (sim, device, span) = world(seeded(1), 5);
    fill(&sim, span, 3);
    sim.injector().fail_step_nth(Step::Staging, 1);
    let refused = device.pull(&sim, span, None);
    assert_eq!(refused, Err(MmError::NoStaging { span }));
    check(&sim, &device);
    expect(&sim, span, 3);
}

/// There is none, and none comes back.
#[test]
fn who_waits_for_a_slot_in_vain_gives_up() {
    let options = Options {
        staging_blocks: 0,
        ..seeded(1)
    };
    let (sim, device, span) = world(options, 5);
    fill(&sim, span, 3);
    let (inside, puller) = (Arc::clone(&sim), Arc::clone(&device));
    sim.run(vec![thread(move || {
        let token = inside.arm(span).expect("mirrored");
        let began = inside.now();
        let refused = puller.pull(&inside, span, None);
        assert_eq!(refused, Err(MmError::NoStaging { span }));
        assert!(inside.now().since(began) >= Duration::from_secs(10));
        inside.disarm(span, token);
    })]);
    check(&sim, &device);
    expect(&sim, span, 3);
}
