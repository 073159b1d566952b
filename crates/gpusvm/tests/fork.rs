//! A fork waits for launches that cannot go on without their pages, and for no others: nobody who is
//! waited for waits for the fork.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and sleep"
)]

mod common;

use common::{Stop, engine, engine_with, within};
use gpusvm::{ByteSize, FaultMode, Grid, Resident, Svm};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Forks, and asks the child.
fn child_finds(check: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child looks at memory, and ends.
    match unsafe { libc::fork() } {
        0 => {
            let code = i32::from(!check());
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(code) }
        }
        pid => {
            assert!(pid > 0, "fork");
            let mut status = 0;
            // SAFETY: our own child, and a status of our own.
            assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
            libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

/// A kernel holds memory that was made resident for it, and faults on other memory while the process
/// forks. The fork must not wait for the kernel, which waits for the fork.
#[test]
fn a_fork_does_not_wait_for_a_launch_that_faults() {
    static FORKING: AtomicBool = AtomicBool::new(false);
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(16));
        let held = svm.alloc_slice::<u64>(512).unwrap();
        let other = svm.alloc_slice::<u64>(512).unwrap();
        let (p, q) = (held.device_ptr(), other.device_ptr());
        let resident = Resident::new().writes(&held);
        // SAFETY: nobody else uses the memory until it has ended, but the child, which has its own.
        let launch = unsafe {
            svm.launch_resident(0, Grid::new(1), resident, move |lane| {
                lane.store(p, 1)?;
                while !FORKING.load(Ordering::Acquire) {
                    std::thread::yield_now();
                }
                std::thread::sleep(Duration::from_millis(50));
                lane.store(q, 2)?;
                lane.store(p.add(1), 3)
            })
        };
        let launch = launch.unwrap();
        FORKING.store(true, Ordering::Release);
        assert!(child_finds(|| true));
        launch.wait().unwrap();
        assert_eq!((held[0], held[1], other[0]), (1, 3, 2));
        drop((held, other));
        assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
    });
}

fn launch_all(svm: &Svm, memory: &[gpusvm::SvmSlice<u64>]) {
    let declared = |resident: Resident, slice| resident.writes(slice);
    let resident = memory.iter().fold(Resident::new(), declared);
    let pointers: Vec<_> = memory.iter().map(|slice| slice.device_ptr()).collect();
    // SAFETY: nobody else uses the memory meanwhile but by atomics, and children, which have their own.
    let launch = unsafe {
        svm.launch_resident(0, Grid::new(pointers.len()), resident, move |lane| {
            lane.atomic_add(pointers[lane.id()], 1u64).map(drop)
        })
    };
    launch.unwrap().wait().unwrap();
}

/// A launch declares many ranges, one after the other, while the process forks: it must not hold some
/// and wait for the fork to get the others.
#[test]
fn a_launch_that_declares_much_and_a_fork_do_not_wait_for_each_other() {
    within(Duration::from_secs(120), || {
        let svm = engine_with(ByteSize::mib(64), FaultMode::Declared);
        let slices = (0..16).map(|_| svm.alloc_slice::<u64>(1 << 17).unwrap());
        let memory: Vec<_> = slices.collect();
        let stop = Stop::default();
        let launches = std::thread::scope(|scope| {
            let (ends, svm, memory) = (stop.clone(), &svm, &memory);
            let launcher = scope.spawn(move || {
                let mut launches = 0;
                while !ends.is_set() {
                    launch_all(svm, memory);
                    launches += 1;
                }
                launches
            });
            for _ in 0..40 {
                assert!(child_finds(|| memory
                    .iter()
                    .all(|slice| slice[0] <= 1 << 32)));
            }
            stop.set();
            launcher.join().unwrap()
        });
        assert!(launches > 0 && memory.iter().all(|slice| slice[0] == launches));
        drop(memory);
        assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
    });
}
