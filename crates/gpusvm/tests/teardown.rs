//! The end of an engine with work in flight: faults, prefetches, touches of the CPU. Nothing hangs, every
//! lane is told, no byte is lost.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::gated::Gated;
use common::{Stay, Stop, built, wait_until, within, world_with};
use gpusvm::driver::{Location, worker};
use gpusvm::{ByteSize, Error, FaultError, Grid, LaneError, LaunchError, SoftGpu, Svm, SvmPtr};
use gpusvm_device::FaultQueue;
use gpusvm_mm_linux::Allocation;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);
const BLOCK: usize = 2 << 20;
const WORDS: usize = BLOCK / 8;
const LANES: usize = 6;

/// A lane's end, if it was stopped by the end of the engine.
fn is_of_closing(error: &LaneError) -> bool {
    matches!(error, LaneError::Fault(FaultError::Closed { .. }))
}

/// The device and the CPU add to all pages of four blocks, which are prefetched out and home all the
/// time, in device memory for two. The engine ends in the midst of it.
#[test]
fn an_engine_ends_while_all_are_at_work() {
    within(LONG, || {
        for round in 0..12 {
            let gpu = SoftGpu::builder().vram(ByteSize::mib(4)).units(LANES);
            let svm = built(Svm::builder().device(gpu.build().unwrap()));
            let mut memory = svm.alloc_slice::<u64>(4 * WORDS).unwrap();
            let p: SvmPtr<u64> = memory.device_ptr();
            let done = Arc::new(AtomicU64::new(0));
            let counts = Arc::clone(&done);
            // SAFETY: by atomics; the memory outlives the launch.
            let launch = unsafe {
                svm.launch(Grid::new(LANES), move |lane| {
                    for i in (lane.id()..4 * WORDS).step_by(512) {
                        lane.atomic_add(p.add(i), 1u64)?;
                        counts.fetch_add(1, Ordering::AcqRel);
                    }
                    Ok(())
                })
            };
            let launch = launch.unwrap();
            let len = ByteSize::from_usize(4 * BLOCK);
            let out = svm.prefetch(0, memory.as_ptr(), len).unwrap();
            let home = svm.prefetch_to_ram(memory.as_ptr(), len).unwrap();
            drop(svm.prefetch(0, memory.as_ptr(), len).unwrap());
            let stop = Stop::default();
            let words = memory.as_mut_ptr().addr();
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while !stop.is_set() {
                        for i in (3..4 * WORDS).step_by(512) {
                            let word =
                                std::ptr::with_exposed_provenance_mut::<u64>(words).wrapping_add(i);
                            // SAFETY: the memory outlives the thread; by atomics.
                            unsafe { AtomicU64::from_ptr(word) }.fetch_add(0, Ordering::AcqRel);
                        }
                    }
                });
                let waits = scope.spawn(move || [out.wait(), home.wait()].map(|it| it.err()));
                std::thread::sleep(Duration::from_micros(200 * round));
                drop(svm);
                for error in waits.join().unwrap().into_iter().flatten() {
                    assert!(matches!(error, Error::Prefetch(_)), "{error}");
                }
                if let Err(error) = launch.wait() {
                    let Error::Launch(LaunchError::Lanes { first, .. }) = &error else {
                        panic!("{error}");
                    };
                    assert!(is_of_closing(first), "{error}");
                }
                stop.set();
            });
            // Plain memory now.
            let sum: u64 = memory.iter().sum();
            assert_eq!(sum, done.load(Ordering::Acquire), "round {round}");
        }
    });
}

/// The device is unbound while copies to it are held, faults are parked, and a prefetch is under way: all
/// of them go on in RAM.
#[test]
fn lanes_go_on_in_place_when_their_device_is_unbound() {
    within(LONG, || {
        let gpu = Gated::new(ByteSize::mib(64), 8);
        let world = world_with(&[Arc::clone(&gpu) as _], Stay(Duration::ZERO));
        let region = &world.regions[0];
        let workers = worker::start(region).unwrap();
        let mut words = Allocation::<u64>::new(&world.process, 3 * WORDS).unwrap();
        words.fill(0);
        let p = SvmPtr::from(words.as_ptr().cast_mut());
        gpu.hold(2);
        // SAFETY: by atomics; the words outlive the launch.
        let launch = unsafe {
            gpu.gpu
                .launch(world.vms[0].id(), Grid::new(LANES), move |lane| {
                    lane.atomic_add(p.add(lane.id() * 512), 1u64)?;
                    lane.atomic_add(p.add(WORDS + lane.id() * 512), 1u64)?;
                    Ok(())
                })
        };
        gpu.wait_held(1);
        wait_until("all are taken", || gpu.taken() == LANES);
        let last = words.span();
        let prefetch = world.vms[0].prefetch(&[last], Location::Device);
        gpu.wait_held(2);
        std::thread::scope(|scope| {
            let unbinds = scope.spawn(|| region.unbind());
            // It waits for the copies, most likely; who asks the memory anything would wait for it.
            std::thread::sleep(Duration::from_millis(20));
            assert!(!unbinds.is_finished(), "copies are under way");
            gpu.open();
            unbinds.join().unwrap().unwrap();
        });
        launch.unwrap().wait().unwrap();
        // What began behind the end of the device found none.
        let _ = prefetch.wait();
        assert_eq!(region.used().get(), 0);
        assert_eq!(words.iter().sum::<u64>(), 2 * LANES as u64);
        gpu.close();
        workers.into_iter().for_each(|it| it.join().unwrap());
        gpu.assert_each_resolved_once();
    });
}
