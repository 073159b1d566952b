//! Loops of the fault path, driven to their bounds: see `docs/bounds.md`. In the simulated world, by
//! its own thread: what happens between two steps is what a test puts there.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

use gpusvm::driver::{
    Declared, Devices, Location, MAX_PASSES, MAX_PASSES_IN_PLACE, MAX_SLIPS, PrefetchReason, Vm,
    VramRegion,
};
use gpusvm::{Access, FaultError, FaultInfo, MigrateOnTouch, Plan, Policy, Span, VirtAddr};
use gpusvm_device::{
    Caps, CopyEngine, Device, DeviceError, DeviceFault, FaultId, FaultQueue, Mapping, PageTables,
    Verdict, VmId,
};
use gpusvm_mm_sim::Sim;
use gpusvm_pagemap::{Cause, MigrateError, Pagemap, PagemapAddr, PagemapOps, Peer};
use gpusvm_testkit::dmirror::{Dmirror, Interconnect, Spec};
use gpusvm_testkit::world::{Kind, Prot, Simulated, World};
use gpusvm_types::{DevicePfn, PageCount};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

const ALL_PASSES: u32 = MAX_PASSES + MAX_PASSES_IN_PLACE;
const GAVE: &str = "it was not stable for long enough";
const INVALIDATED: &str =
    "it was not stable for long enough: what was found keeps being invalidated";
const NOT_THERE: &str = "it was not stable for long enough: pages that only device memory will do for could not \
                         move there";

struct Lab {
    vm: Arc<Vm<Sim>>,
    region: Arc<VramRegion<Sim>>,
    span: Span,
    // Last: all of it lives there.
    world: Arc<Simulated>,
}

impl Lab {
    fn new(world: &Arc<Simulated>, device: Arc<dyn Device>, policy: Arc<dyn Policy>) -> Self {
        let devices = Devices::new(world.mm());
        let region = VramRegion::new(&devices, device).unwrap();
        Self {
            vm: Vm::new(&region, policy).unwrap(),
            region,
            span: world.map(PageCount::new(512), Prot::ReadWrite, Kind::Mirrored),
            world: Arc::clone(world),
        }
    }

    fn fault(&self, access: Access) -> (Verdict, u32) {
        let fault = DeviceFault {
            id: FaultId(0),
            vm: self.vm.id(),
            at: self.span.start(),
            access,
            stale: false,
        };
        let verdict = self.vm.serve(&fault);
        (verdict, self.vm.last_fault().unwrap().passes)
    }

    fn gave(&self, reason: &'static str) -> FaultError {
        let at = self.span.start();
        FaultError::Gave { at, reason }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.vm.close();
    }
}

fn dmirror(world: &Arc<Simulated>, spec: &Spec) -> Arc<Dmirror> {
    Dmirror::new(&Interconnect::new(world.bus()), spec)
}

/// Whenever it is asked, the memory is unmapped and mapped again: no pass ends with what it began with.
#[derive(Debug)]
struct Unmaps {
    world: Weak<Simulated>,
    asked: Mutex<Vec<FaultInfo>>,
}

impl Policy for Unmaps {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        self.asked.lock().unwrap().push(*fault);
        let world = self.world.upgrade().unwrap();
        let span = Span::block_of(fault.at);
        world.unmap(span);
        world.map_again(span, Prot::ReadWrite, Kind::Mirrored);
        MigrateOnTouch::default().on_device_fault(fault)
    }
}

fn never_stable() -> (Lab, Arc<Unmaps>) {
    let world = Simulated::start(0).unwrap();
    let policy = Arc::new(Unmaps {
        world: Arc::downgrade(&world),
        asked: Mutex::default(),
    });
    let device = dmirror(&world, &Spec::default());
    (Lab::new(&world, device, Arc::clone(&policy) as _), policy)
}

#[test]
fn a_fault_that_is_never_stable_ends_after_all_its_passes() {
    let (lab, policy) = never_stable();
    let (verdict, passes) = lab.fault(Access::Write);
    assert_eq!(verdict, Verdict::Fail(lab.gave(INVALIDATED)));
    assert_eq!(passes, ALL_PASSES);
    let stats = lab.vm.stats();
    assert_eq!(stats.stale_passes, u64::from(ALL_PASSES));
    assert_eq!((stats.last_resorts, stats.failed), (1, 1));
    let attempts: Vec<_> = policy
        .asked
        .lock()
        .unwrap()
        .iter()
        .map(|it| it.attempt)
        .collect();
    assert_eq!(attempts, (0..ALL_PASSES).collect::<Vec<_>>());
}

#[test]
fn a_prefetch_that_is_never_stable_ends_after_its_passes() {
    let (lab, policy) = never_stable();
    let error = lab
        .vm
        .prefetch(&[lab.span], Location::Advised)
        .wait()
        .unwrap_err();
    assert_eq!(error.span.start(), lab.span.start());
    assert_eq!(error.reason, PrefetchReason::Fault(lab.gave(GAVE)));
    assert_eq!(policy.asked.lock().unwrap().len(), ALL_PASSES as usize);
}

/// Writes down how long pages were to stay, and moves none.
#[derive(Debug, Default)]
struct Recording(Mutex<Vec<Duration>>);

impl PagemapOps<Sim> for Recording {
    fn populate(
        &self,
        _: &Arc<Pagemap<Sim>>,
        span: Span,
        timeslice: Duration,
        _: Cause,
    ) -> Result<(), MigrateError> {
        self.0.lock().unwrap().push(timeslice);
        Err(MigrateError::NothingCollected { span })
    }

    fn device_map(&self, _: DevicePfn, _: Peer) -> Option<PagemapAddr> {
        None
    }

    fn device_unmap(&self, _: PagemapAddr, _: Peer) {}
}

/// Timeslices that `populate` was asked for, by one fault whose pages never move.
fn timeslices(access: Access) -> (Vec<Duration>, Verdict, Lab) {
    let world = Simulated::start(0).unwrap();
    let spec = Spec {
        atomics_on_ram: false,
        ..Spec::default()
    };
    let lab = Lab::new(
        &world,
        dmirror(&world, &spec),
        Arc::new(MigrateOnTouch::default()),
    );
    let recording = Arc::new(Recording::default());
    lab.region.unbind().unwrap();
    lab.region
        .pagemap()
        .rebind(Arc::clone(&recording) as _)
        .unwrap();
    let (verdict, _) = lab.fault(access);
    let asked = recording.0.lock().unwrap().clone();
    (asked, verdict, lab)
}

#[test]
fn an_atomic_that_needs_device_memory_asks_for_longer_and_longer() {
    let (asked, verdict, lab) = timeslices(Access::Atomic);
    assert_eq!(verdict, Verdict::Fail(lab.gave(NOT_THERE)));
    let micros: Vec<_> = asked.iter().map(Duration::as_micros).collect();
    // It doubles, up to a bound; and device memory is tried to the end: there is no other place.
    assert_eq!(micros[..7], [500, 1000, 2000, 4000, 8000, 16_000, 16_000]);
    assert!(micros[6..].iter().all(|it| *it == 16_000));
    assert_eq!(micros.len(), ALL_PASSES as usize);
    // An access that RAM will do for is served there at once.
    let (asked, verdict, _) = timeslices(Access::Write);
    assert_eq!((asked.len(), verdict), (1, Verdict::Replay));
}

/// A device that has something happen between a mapping and the next look at what it can do: when a
/// range was made accessible, and is to be leased.
#[derive(Debug)]
struct Slippery {
    device: Arc<Dmirror>,
    bound: AtomicBool,
    vm: Mutex<Weak<Vm<Sim>>>,
    at: Mutex<Option<VirtAddr>>,
}

impl Device for Slippery {
    fn caps(&self) -> &Caps {
        if self.bound.swap(false, Ordering::AcqRel) {
            let vm = self.vm.lock().unwrap().upgrade().unwrap();
            let at = self.at.lock().unwrap().unwrap();
            let range = vm.svm().range_find(at).unwrap();
            vm.svm().range_unmap(&range);
        }
        self.device.caps()
    }

    fn copy_engine(&self) -> &dyn CopyEngine {
        self.device.copy_engine()
    }

    fn page_tables(&self) -> &dyn PageTables {
        self
    }

    fn fault_queue(&self) -> Option<&dyn FaultQueue> {
        None
    }
}

impl PageTables for Slippery {
    fn create_vm(&self) -> Result<VmId, DeviceError> {
        self.device.page_tables().create_vm()
    }

    fn destroy_vm(&self, vm: VmId) {
        self.device.page_tables().destroy_vm(vm);
    }

    fn bind(&self, vm: VmId, mapping: &Mapping) -> Result<(), DeviceError> {
        self.bound
            .store(self.at.lock().unwrap().is_some(), Ordering::Release);
        self.device.page_tables().bind(vm, mapping)
    }

    fn zap(&self, vm: VmId, span: Span) -> PageCount {
        self.device.page_tables().zap(vm, span)
    }

    fn flush(&self, vm: VmId, span: Span) {
        self.device.page_tables().flush(vm, span);
    }

    fn test_and_clear_accessed(&self, vm: VmId, span: Span) -> PageCount {
        self.device.page_tables().test_and_clear_accessed(vm, span)
    }
}

#[test]
fn a_range_that_slips_away_each_time_is_given_up() {
    let world = Simulated::start(0).unwrap();
    let device = Arc::new(Slippery {
        device: dmirror(&world, &Spec::default()),
        bound: AtomicBool::new(false),
        vm: Mutex::default(),
        at: Mutex::default(),
    });
    let lab = Lab::new(
        &world,
        Arc::clone(&device) as _,
        Arc::new(MigrateOnTouch::default()),
    );
    *device.vm.lock().unwrap() = Arc::downgrade(&lab.vm);
    *device.at.lock().unwrap() = Some(lab.span.start());
    let declared = [Declared {
        span: lab.span,
        access: Access::Read,
    }];
    let refused = lab.vm.make_resident(&declared).unwrap_err();
    let reason = "it was taken away again before the launch began";
    assert_eq!(refused, lab.gave(reason));
    assert_eq!(lab.vm.stats().slips, u64::from(MAX_SLIPS));
    *device.at.lock().unwrap() = None;
    let lease = lab.vm.make_resident(&declared).unwrap();
    assert_eq!(lease.count(), 1);
}

/// Pages stay where they are, and get a second look at once.
#[derive(Debug)]
struct LooksAgain;

impl Policy for LooksAgain {
    fn on_device_fault(&self, _: &FaultInfo) -> Plan {
        Plan {
            ask_again: Some(Duration::ZERO),
            ..Plan::default()
        }
    }
}

#[test]
fn second_looks_come_to_each_range_once_and_wait_for_nobody() {
    let world = Simulated::start(0).unwrap();
    let lab = Lab::new(
        &world,
        dmirror(&world, &Spec::default()),
        Arc::new(LooksAgain),
    );
    let other = world.map(PageCount::new(512), Prot::ReadWrite, Kind::Mirrored);
    for span in [lab.span, other] {
        lab.vm.make_accessible(span.start(), Access::Write).unwrap();
    }
    let has_mapping = || [lab.span, other].map(|span| lab.vm.svm().has_mapping(span));
    assert_eq!(has_mapping(), [true, true]);
    let range = lab.vm.svm().range_find(lab.span.start()).unwrap();
    let serving = range.serve();
    lab.vm.tend();
    assert_eq!(has_mapping(), [true, false], "one is being served");
    drop(serving);
    lab.world.mm().sleep(Duration::from_secs(1));
    lab.vm.tend();
    assert_eq!(has_mapping(), [false, false]);
}

/// A launch holds an allocation whose memory is gone already. The region does not wait for it for long,
/// and keeps nothing of it.
#[test]
fn a_region_ends_while_a_launch_holds_what_is_gone() {
    let world = Simulated::start(0).unwrap();
    let device = dmirror(&world, &Spec::default());
    let policy = Arc::new(MigrateOnTouch::default());
    let lab = Lab::new(&world, Arc::clone(&device) as _, policy);
    let declared = [Declared {
        span: lab.span,
        access: Access::Write,
    }];
    let lease = lab.vm.make_resident(&declared).unwrap();
    assert_eq!(lease.count(), 1);
    world.unmap(lab.span);
    assert_eq!(lab.region.used(), PageCount::ZERO, "its memory is free");
    lab.region.pagemap().unbind();
    drop(lab);
    assert!(
        Arc::strong_count(&device) > 1,
        "the launch holds the allocation"
    );
    drop(lease);
    world.exit();
    drop(world);
    assert_eq!(Arc::strong_count(&device), 1, "nothing was left behind");
}
