//! Objects come and go while lanes work, and while the process forks.

use crate::common::{Stop, engine, within};
use crate::{WORDS, block, words_of};
use gpusvm::{ByteSize, DeviceVm, FaultError, Grid, LaneError, Launch, SvmPtr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Adds to the pages of one block until it is told to stop. Counts rounds, and additions in a hole.
fn add_until(
    vm: &DeviceVm,
    p: SvmPtr<u64>,
    stop: &Stop,
    [rounds, failed]: [&Arc<AtomicU64>; 2],
) -> Launch {
    let (stop, rounds, failed) = (stop.clone(), Arc::clone(rounds), Arc::clone(failed));
    // SAFETY: by atomics on both sides; the numbers outlive the launch.
    let launch = unsafe {
        vm.launch(Grid::new(1), move |lane| {
            while !stop.is_set() {
                for i in (0..WORDS).step_by(512) {
                    match lane.atomic_add(p.add(i), 1u64) {
                        Ok(_) => {}
                        Err(LaneError::Fault(FaultError::NotBound { .. })) => {
                            failed.fetch_add(1, Ordering::AcqRel);
                        }
                        Err(error) => return Err(error),
                    }
                }
                rounds.fetch_add(1, Ordering::AcqRel);
            }
            Ok(())
        })
    };
    launch.unwrap()
}

/// Objects and holes come and go, while lanes work there and beside them.
#[test]
fn binding_under_load() {
    const ROUNDS: usize = 60;
    within(Duration::from_secs(120), || {
        let svm = engine(ByteSize::mib(16));
        let vm = svm.vm(0).unwrap();
        let numbers = svm.alloc_slice::<u64>(3 * WORDS).unwrap();
        let (p, span) = (numbers.device_ptr(), numbers.span());
        let stop = Stop::default();
        let [done, rounds, failed, never] = [(); 4].map(|()| Arc::new(AtomicU64::new(0)));
        let launches = [
            add_until(vm, p, &stop, [&done, &never]),
            add_until(vm, p.add(WORDS), &stop, [&rounds, &failed]),
        ];
        let here = block(span, 1);
        let mut objects = 0;
        for round in 0..ROUNDS {
            let object = svm.create_object(0, ByteSize::mib(2)).unwrap();
            // Until it is home for a moment: the device wants it back at once.
            loop {
                svm.touch(numbers[WORDS..].as_ptr(), ByteSize::mib(2))
                    .unwrap();
                match vm.bind_object(here, &object, ByteSize::ZERO) {
                    Ok(()) => break,
                    Err(error) => assert_eq!(error.errno(), 16, "{error}"),
                }
            }
            while words_of(&object)[0] == 0 {
                std::thread::yield_now();
            }
            if round % 2 == 0 {
                let before = failed.load(Ordering::Acquire);
                vm.unbind(here).unwrap();
                while failed.load(Ordering::Acquire) == before {
                    std::thread::yield_now();
                }
            }
            vm.bind_mirror(here).unwrap();
            objects += words_of(&object).iter().sum::<u64>();
        }
        stop.set();
        for launch in launches {
            launch.wait().unwrap();
        }
        assert_eq!(never.load(Ordering::Acquire), 0, "beside it");
        assert!(objects > 0 && failed.load(Ordering::Acquire) > 0);
        let done = done.load(Ordering::Acquire);
        assert!(numbers[..WORDS].iter().step_by(512).all(|x| *x == done));
        drop(numbers);
        let stats = svm.shutdown().unwrap();
        assert_eq!(
            (stats.vram_used_bytes, stats.failed_faults),
            (0, failed.load(Ordering::Acquire))
        );
    });
}

/// A child has no units: it must not wait for what was in flight in its parent.
#[test]
fn a_child_of_fork_takes_an_engine_with_objects_down() {
    within(Duration::from_secs(60), || {
        let svm = std::mem::ManuallyDrop::new(engine(ByteSize::mib(8)));
        let vm = svm.vm(0).unwrap();
        let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
        let p = numbers.device_ptr();
        let object = svm.create_object(0, ByteSize::mib(2)).unwrap();
        vm.bind_object(numbers.span(), &object, ByteSize::ZERO)
            .unwrap();
        let stop = Stop::default();
        let stopped = stop.clone();
        // SAFETY: by atomics; what is bound outlives the launch.
        let launch = unsafe {
            vm.launch(Grid::new(3), move |lane| {
                while !stopped.is_set() {
                    for i in 0..512 {
                        lane.atomic_add(p.add(i), 1u64)?;
                    }
                }
                Ok(())
            })
        };
        let launch = launch.unwrap();
        while words_of(&object)[511] == 0 {
            std::thread::yield_now();
        }
        for _ in 0..10 {
            // SAFETY: the child takes the engine down, and ends.
            let child = unsafe { libc::fork() };
            if child == 0 {
                drop(std::mem::ManuallyDrop::into_inner(svm));
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(0) };
            }
            let mut status = 0;
            // SAFETY: our own child.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert_eq!(status, 0);
        }
        stop.set();
        launch.wait().unwrap();
        drop(object);
        drop(numbers);
        assert_eq!(
            std::mem::ManuallyDrop::into_inner(svm)
                .shutdown()
                .unwrap()
                .vram_used_bytes,
            0
        );
    });
}
