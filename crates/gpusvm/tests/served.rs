//! A range that is served: what was found out before is looked at again, and a range that is of no use
//! any more is forgotten.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

use gpusvm::FaultMode;
use gpusvm::driver::{Advice, Location, Preferred};
use gpusvm_device::Access;
use gpusvm_mm_sim::Step;
use gpusvm_pagemap::Cause;
use gpusvm_testkit::conformance::{Kit, Model, Part, Setup};
use gpusvm_testkit::world::{Simulated, World};
use gpusvm_types::PageCount;

const FAULTING: Kit = Kit {
    model: Model::Dmirror,
    faults: FaultMode::Replayable,
};

const IN_RAM: Advice = Advice::PreferredLocation(Preferred::Ram);

/// A prefetch asked what is advised, and advice changed before it had its range: nobody heard of the
/// range, and it was mapped as was advised before.
#[test]
fn a_prefetch_goes_by_what_is_advised_when_it_has_its_range() {
    FAULTING.race::<Simulated>(&Setup::default(), |bench| {
        let span = bench.memory(16);
        bench.fill(span, 1);
        let prefetches: Part<Simulated> = Box::new(move |bench| {
            let vm = &bench.mirror().vm;
            let _ = vm.prefetch(&[span], Location::Advised).wait();
        });
        let advises: Part<Simulated> = Box::new(move |bench| {
            assert_eq!(bench.mirror().vm.advise(span, IN_RAM), Ok(()));
        });
        bench.run(vec![prefetches, advises]);
        let mirror = bench.mirror();
        if mirror.vm.svm().has_mapping(span) {
            assert_eq!(mirror.on_device(span), PageCount::ZERO, "it is mapped");
        }
        bench.expect(span, 1);
    });
}

/// Memory cannot be watched: the range that was made for it would stay for ever, if the memory were not
/// mirrored any more.
#[test]
fn a_range_that_cannot_be_watched_is_forgotten_by_whoever_made_it() {
    FAULTING.once::<Simulated>(&Setup::default(), |bench| {
        let span = bench.memory(16);
        let vm = &bench.mirror().vm;
        let injector = bench.world().mm().injector();
        injector.fail_every(Step::Arm);
        assert!(vm.migrate_to_devmem(span, Cause::Prefetch).is_err());
        assert_eq!(vm.svm().range_count(), 0, "a migration made it");
        assert!(vm.prefetch(&[span], Location::Device).wait().is_err());
        assert_eq!(vm.svm().range_count(), 0, "a prefetch made it");
        assert!(vm.make_accessible(span.start(), Access::Write).is_err());
        assert_eq!(vm.svm().range_count(), 0, "a fault made it");
        injector.disarm();
        assert_eq!(bench.device_fill(0, span, 1), Ok(()));
        bench.expect(span, 1);
    });
}
