//! Pages that somebody asks back: those, and no others.

use crate::lab::{Lab, part};
use gpusvm_mm::AddressSpace;
use gpusvm_mm::range_fault::HELD_TIMEOUT;
use gpusvm_mm_sim::Step;
use gpusvm_pagemap::migrate_back::migrate_back;
use gpusvm_pagemap::{Cause, Holder, Mode};
use gpusvm_types::PageCount;
use std::sync::Arc;
use std::time::Duration;

/// What was asked for comes, and is counted; what came to the device together with it stays there.
#[test]
fn pages_that_are_asked_back_come_and_no_others() {
    let lab = Lab::new(&[0, 0]);
    let span = lab.block(2);
    lab.device().migrate(part(span, 0, 100)).unwrap();
    lab.device().migrate(part(span, 100, 100)).unwrap();
    lab.devices[1].migrate(part(span, 200, 100)).unwrap();
    let pagemap = lab.device().pagemap();
    let back = |piece| migrate_back(&pagemap, piece, Cause::Asked).unwrap().get();
    assert_eq!(back(part(span, 7, 3)), 3);
    assert_eq!(lab.on_device(span), 297);
    assert_eq!(lab.on_device(part(span, 7, 3)), 0);
    assert_eq!(
        back(part(span, 5, 10)),
        7,
        "what is home already is not counted"
    );
    // Of two allocations, and none of the other device.
    assert_eq!(back(part(span, 90, 150)), 110);
    assert_eq!(lab.on_device(part(span, 200, 100)), 100);
    assert_eq!(back(part(span, 300, 212)), 0);
    lab.assert_sound();
    lab.check(span, 2);
    lab.assert_empty();
}

/// A launch that needs a page keeps it, and is waited for, but not for ever; a timeslice does not hold.
#[test]
fn pages_that_a_launch_needs_are_waited_for() {
    for (launch, comes) in [
        (Duration::from_millis(5), true),
        (Duration::from_secs(60), false),
    ] {
        let lab = Arc::new(Lab::new(&[0]));
        let span = lab.block(2);
        let hour = Duration::from_secs(3600);
        lab.device().migrate_as(span, Mode::Partial, hour).unwrap();
        let (devmem, _) = lab.device().pagemap().live().remove(0);
        devmem.lease(Holder::CannotFault);
        let (asks, ends) = (Arc::clone(&lab), Arc::clone(&lab));
        lab.sim.run(vec![
            Box::new(move || {
                let (pagemap, began) = (asks.device().pagemap(), asks.sim.now());
                let back = migrate_back(&pagemap, part(span, 9, 4), Cause::Asked);
                match comes {
                    true => assert_eq!(back, Ok(PageCount::new(4))),
                    false => assert_eq!(back.map_err(|error| error.errno()), Err(16)),
                }
                let took = asks.sim.now().since(began);
                let enough = if comes { Duration::ZERO } else { HELD_TIMEOUT };
                assert!((enough..HELD_TIMEOUT * 2).contains(&took), "{took:?}");
            }),
            Box::new(move || {
                ends.sim.sleep(launch);
                devmem.unlease(Holder::CannotFault);
            }),
        ]);
        assert_eq!(lab.on_device(span), if comes { 508 } else { 512 });
        lab.device().pagemap().evict_all(Cause::Asked).unwrap();
        lab.check(span, 2);
        lab.assert_empty();
    }
}

/// A copy that fails leaves all as it was.
#[test]
fn pages_that_are_asked_back_and_cannot_come_stay() {
    let lab = Lab::new(&[0]);
    let span = lab.block(2);
    lab.device().migrate(span).unwrap();
    let pagemap = lab.device().pagemap();
    let back = || migrate_back(&pagemap, part(span, 9, 4), Cause::Asked);
    for step in [Step::CopyToRam, Step::Staging] {
        lab.bus.injector.fail_step_nth(step, 1);
        let refused = back();
        lab.bus.injector.disarm();
        assert!(refused.is_err(), "{step:?}");
        assert_eq!(lab.on_device(span), 512);
        lab.assert_sound();
    }
    lab.sim.munmap(part(span, 10, 1));
    assert_eq!(back(), Ok(PageCount::new(3)), "what is gone does not come");
    lab.check(part(span, 0, 10), 2);
    lab.check(part(span, 11, 501), 2);
    lab.assert_empty();
}
