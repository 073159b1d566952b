//! A range that is served: what was found out before is looked at again, and a range that is of no use
//! any more is forgotten.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{InPlace, within, world_with};
use gpusvm::driver::{Advice, Declared, Location, Preferred, Vm};
use gpusvm::{ByteSize, FaultError, FaultMode, SoftGpu};
use gpusvm_device::Access;
use gpusvm_mm_linux::{Allocation, Process};
use gpusvm_mm_sim::Step;
use gpusvm_pagemap::Cause;
use gpusvm_testkit::conformance::{Kit, Model, Part, Setup};
use gpusvm_testkit::world::{Simulated, World};
use gpusvm_types::PageCount;
use std::time::Duration;

const FAULTING: Kit = Kit::new(Model::Dmirror, FaultMode::Replayable);

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

/// The program protects a part of what a launch has declared whose device cannot fault: a range of the
/// whole cannot be mapped anew. Another launch on that device wants it so, and once took it from the
/// first. A device that faults has a range of its own, and need not wait for any launch.
#[test]
fn a_range_that_was_cut_stays_with_the_launch_that_declared_it() {
    within(Duration::from_secs(60), || {
        let gpu = || SoftGpu::builder().vram(ByteSize::mib(4)).units(1);
        let declares = gpu().fault_mode(FaultMode::Declared).build().unwrap();
        let gpus = [declares as _, gpu().build().unwrap() as _];
        let world = world_with(&gpus, InPlace(None));
        let [declares, faults] = [&world.vms[0], &world.vms[1]];
        let bytes = Allocation::<u8>::new(&world.process, 2 << 20).unwrap();
        let (span, access) = (bytes.span(), Access::Read);
        let declared = [Declared { span, access }];
        let protect = |len, access| {
            let first = bytes.as_ptr().cast_mut().cast();
            // SAFETY: memory of the test, which nobody uses.
            let done = unsafe { libc::mprotect(first, len, access) };
            assert_eq!(done, 0);
        };
        protect(2 << 20, libc::PROT_READ);
        let lease = declares.make_resident(&declared).unwrap();
        let make = |vm: &Vm<Process>, access| vm.make_accessible(span.start(), access);
        assert_eq!(make(faults, Access::Read), Ok(()));
        protect((2 << 20) - 4096, libc::PROT_READ | libc::PROT_WRITE);
        let refused = make(declares, Access::Write);
        let is_refused = matches!(refused, Err(FaultError::Gave { .. }));
        assert!(declares.svm().has_mapping(span), "a launch needs it");
        assert!(is_refused, "{refused:?}");
        assert_eq!(make(faults, Access::Write), Ok(()));
        drop(lease);
        assert_eq!(make(declares, Access::Write), Ok(()));
        protect(2 << 20, libc::PROT_READ | libc::PROT_WRITE);
    });
}
