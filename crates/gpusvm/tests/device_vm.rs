//! Several address spaces of one device.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Stop, add_one, engine, engine_with, within};
use gpusvm::{
    ByteSize, DeviceVm, Error, FaultError, FaultMode, Grid, LaneError, Launch, LaunchError,
    Resident, SvmPtr,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// 2 MiB.
const WORDS: usize = 1 << 18;

/// One to every 64th number, by eight lanes.
fn add_in(vm: &DeviceVm, (p, n): (SvmPtr<u64>, usize)) {
    // SAFETY: by atomics; the numbers outlive the launch.
    let launch = unsafe {
        vm.launch(Grid::new(8), move |lane| {
            for i in (lane.id()..n / 64).step_by(8) {
                lane.atomic_add(p.add(i * 64), 1u64)?;
            }
            Ok(())
        })
    };
    launch.unwrap().wait().unwrap();
}

/// Adds to one number after the other until it is told to stop, or cannot.
fn add_forever(vm: &DeviceVm, (p, n): (SvmPtr<u64>, usize), stop: &Stop) -> Launch {
    let stop = stop.clone();
    // SAFETY: by atomics; the numbers outlive the launch.
    let launch = unsafe {
        vm.launch(Grid::new(2), move |lane| {
            while !stop.is_set() {
                for i in (0..n).step_by(512) {
                    lane.atomic_add(p.add(i), 1u64)?;
                }
            }
            Ok(())
        })
    };
    launch.unwrap()
}

fn is_closed(error: &Error) -> bool {
    matches!(
        error,
        Error::Launch(LaunchError::Lanes {
            first: LaneError::Fault(FaultError::Closed { .. }),
            ..
        })
    )
}

#[test]
fn two_address_spaces_work_on_the_same_memory() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(4));
        let numbers = svm.alloc_slice::<u64>(3 * WORDS).unwrap();
        let all = (numbers.device_ptr(), numbers.len());
        let vms = [svm.create_vm(0).unwrap(), svm.create_vm(0).unwrap()];
        std::thread::scope(|scope| {
            for vm in &vms {
                scope.spawn(move || (0..10).for_each(|_| add_in(vm, all)));
            }
        });
        assert!(numbers.iter().step_by(64).all(|x| *x == 20));
        let faults = vms.each_ref().map(|vm| vm.stats().faults);
        assert!(faults.iter().all(|faults| *faults > 0), "{faults:?}");
        assert_eq!(svm.vm(0).unwrap().stats().faults, 0);
        assert_eq!(svm.stats().device_faults, faults.iter().sum::<u64>());
        drop((numbers, vms));
        assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
    });
}

#[test]
fn two_address_spaces_work_on_memory_of_their_own() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(4));
        // More than the device has, together.
        let slices = [0, 1].map(|_| svm.alloc_slice::<u64>(2 * WORDS).unwrap());
        let more = svm.create_vm(0).unwrap();
        let vms = [svm.vm(0).unwrap(), &more];
        std::thread::scope(|scope| {
            for (vm, slice) in vms.iter().zip(&slices) {
                let all = (slice.device_ptr(), slice.len());
                scope.spawn(move || (0..10).for_each(|_| add_in(vm, all)));
            }
        });
        for (vm, slice) in vms.iter().zip(&slices) {
            assert!(slice.iter().step_by(64).all(|x| *x == 10));
            assert!(vm.stats().ranges_live <= 2, "only what is its own");
        }
    });
}

#[test]
fn one_is_closed_while_the_other_works() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(4));
        let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
        let all = (numbers.device_ptr(), numbers.len());
        let stop = Stop::default();
        let launch = add_forever(svm.vm(0).unwrap(), all, &stop);
        for round in 0..20 {
            let vm = svm.create_vm(0).unwrap();
            let never = Stop::default();
            let other = (round % 2 == 0).then(|| add_forever(&vm, all, &never));
            if other.is_none() {
                add_in(&vm, all);
            }
            let stats = vm.close();
            assert_eq!(stats.ranges_live, 0);
            if let Some(other) = other {
                let error = other.wait().unwrap_err();
                assert!(is_closed(&error), "{error}");
            }
        }
        assert!(!launch.is_done(), "it is none of its business");
        stop.set();
        launch.wait().unwrap();
    });
}

/// The number of an address space goes to no other while something runs in it: its faults would be
/// served there, and it would try again for ever.
#[test]
fn a_launch_that_outlives_its_address_space_is_told_so() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(4));
        let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
        let p = numbers.device_ptr();
        let vm = svm.create_vm(0).unwrap();
        let go = Stop::default();
        let begin = go.clone();
        // SAFETY: only this launch writes there, until it has ended.
        let launch = unsafe {
            vm.launch(Grid::new(1), move |lane| {
                while !begin.is_set() {
                    std::thread::yield_now();
                }
                lane.store(p, 1u64)
            })
        };
        let launch = launch.unwrap();
        drop(vm);
        let next = svm.create_vm(0).unwrap();
        add_in(&next, (p.add(64), 64));
        go.set();
        let error = launch.wait().unwrap_err();
        assert!(is_closed(&error), "{error}");
        assert_eq!((numbers[0], numbers[64]), (0, 1));
        add_in(&next, (p, 64));
    });
}

#[test]
fn without_faults_a_closed_address_space_has_nothing_declared() {
    within(Duration::from_secs(60), || {
        let svm = engine_with(ByteSize::mib(4), FaultMode::Declared);
        let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
        let all = (numbers.device_ptr(), numbers.len());
        let vms = [svm.create_vm(0).unwrap(), svm.create_vm(0).unwrap()];
        let never = Stop::default();
        let declared = || Resident::new().writes(&numbers);
        let [forever, once] = [true, false].map(|forever| {
            let (stop, (p, n)) = (never.clone(), all);
            // SAFETY: by atomics; the numbers outlive the launch.
            let launch = unsafe {
                vms[usize::from(forever)].launch_resident(Grid::new(1), declared(), move |lane| {
                    loop {
                        for i in (0..n).step_by(512) {
                            lane.atomic_add(p.add(i), 1u64)?;
                        }
                        if !forever || stop.is_set() {
                            return Ok(());
                        }
                    }
                })
            };
            launch.unwrap()
        });
        let [other, closed] = vms;
        drop(closed);
        let error = forever.wait().unwrap_err();
        assert!(
            matches!(
                &error,
                Error::Launch(LaunchError::Lanes {
                    first: LaneError::Fault(FaultError::NotDeclared { .. }),
                    ..
                })
            ),
            "{error}"
        );
        once.wait().unwrap();
        drop(other);
        drop(numbers);
        assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
    });
}

#[test]
fn what_closed_address_spaces_did_stays_counted() {
    let svm = engine(ByteSize::mib(4));
    let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
    let all = (numbers.device_ptr(), numbers.len());
    let mut faults = 0;
    for _ in 0..5 {
        let vm = svm.create_vm(0).unwrap();
        add_in(&vm, all);
        assert_eq!(svm.stats().ranges_live, 1);
        let stats = vm.close();
        assert!(stats.faults > 0);
        faults += stats.faults;
        let stats = svm.stats();
        assert_eq!(stats.device_faults, faults);
        assert_eq!(stats.device_fault_time.count, faults);
    }
    add_one(&svm, 0, all);
    let stats = svm.stats();
    let first = svm.vm(0).unwrap().stats();
    assert_eq!(stats.device_faults, faults + first.faults);
    assert_eq!(stats.ranges_live, first.ranges_live);
}

#[test]
fn a_device_has_room_for_so_many_address_spaces() {
    within(Duration::from_secs(120), || {
        /// More than a `softgpu` has.
        const TOO_MANY: usize = 2_000;
        let svm = engine(ByteSize::mib(2));
        let mut vms = Vec::new();
        let refused = loop {
            match svm.create_vm(0) {
                Ok(vm) => vms.push(vm),
                Err(error) => break error,
            }
            assert!(vms.len() < TOO_MANY);
        };
        assert!(matches!(refused, Error::CreateVm { device: 0, .. }));
        assert_eq!(refused.errno(), 28, "ENOSPC");
        assert!(
            refused.to_string().contains("no further address space"),
            "{refused}"
        );
        assert!(vms.len() > 500, "{}", vms.len());
        // The last one works, and its room is another's when it is gone.
        let numbers = svm.alloc_slice::<u64>(64).unwrap();
        let all = (numbers.device_ptr(), numbers.len());
        for _ in 0..3 {
            add_in(&vms.pop().unwrap(), all);
            vms.push(svm.create_vm(0).unwrap());
        }
        assert_eq!(numbers[0], 3);
        assert!(matches!(svm.create_vm(1), Err(Error::NoDevice)));
    });
}

#[test]
fn the_engine_closes_all_of_them() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(4));
        let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
        let all = (numbers.device_ptr(), numbers.len());
        let vms = [0, 1, 2].map(|_| svm.create_vm(0).unwrap());
        let never = Stop::default();
        let launches = vms.each_ref().map(|vm| add_forever(vm, all, &never));
        let stats = svm.shutdown().unwrap();
        assert_eq!((stats.ranges_live, stats.vram_used_bytes), (0, 0));
        // Those that began before end at their next fault; with three units all have begun by now, or
        // find nothing there.
        for launch in launches {
            let error = launch.wait().unwrap_err();
            assert!(is_closed(&error), "{error}");
        }
        for vm in vms {
            // SAFETY: it does not begin.
            let refused = unsafe { vm.launch(Grid::new(1), |_| Ok(())) };
            let refused = refused.unwrap_err();
            assert!(matches!(refused, Error::VmClosed { device: 0 }));
            assert_eq!(refused.errno(), 2, "ENOENT");
        }
    });
}

/// Sixteen queues: each thread has launches of its own in flight, in one address space.
#[test]
fn sixteen_threads_have_launches_in_flight() {
    const THREADS: usize = 16;
    const ROUNDS: u64 = 8;
    within(Duration::from_secs(120), || {
        let svm = engine(ByteSize::mib(4));
        let vm = svm.create_vm(0).unwrap();
        let numbers = svm.alloc_slice::<u64>(3 * WORDS).unwrap();
        let (p, n) = (numbers.device_ptr(), numbers.len());
        let launched = Arc::new(AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (vm, launched) = (&vm, &launched);
                scope.spawn(move || {
                    for _ in 0..ROUNDS {
                        let all = Arc::clone(launched);
                        // SAFETY: by atomics; the numbers outlive the launch.
                        let launch = unsafe {
                            vm.launch(Grid::new(32), move |lane| {
                                // In the first round nobody ends before all have begun.
                                while all.load(Ordering::Acquire) < THREADS {
                                    std::thread::yield_now();
                                }
                                let first = thread + lane.id() * THREADS;
                                for i in (first..n / 64).step_by(32 * THREADS) {
                                    lane.atomic_add(p.add(i * 64), 1u64)?;
                                }
                                Ok(())
                            })
                        };
                        let launch = launch.unwrap();
                        launched.fetch_add(1, Ordering::AcqRel);
                        launch.wait().unwrap();
                    }
                });
            }
        });
        assert!(numbers.iter().step_by(64).all(|x| *x == ROUNDS));
    });
}
