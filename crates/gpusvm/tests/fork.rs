//! A fork waits for launches that cannot go on without their pages, and for no others: nobody who is
//! waited for waits for the fork. A child has what was in memory, and may build an engine of its own; what it
//! inherits does nothing there, and ends.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and sleep"
)]

mod common;

use common::{Stop, add_one, built, can_adopt, engine, engine_with, within};
use gpusvm::{Advice, ByteSize, Error, Fabric, FaultMode, Grid, LaunchError, Resident, SoftGpu};
use gpusvm::{SoftGpuError, Svm};
use gpusvm_mm::MmError;
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

/// Runs `work` in a child, which may do what it likes. The child ends with 0, unless an assertion fails, which
/// it says, or it hangs, which ends it after a while.
fn child_does(work: impl FnOnce()) -> Child {
    // SAFETY: the child allocates and starts threads, which glibc lets it; and ends.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: it has no preconditions.
            unsafe { libc::alarm(60) };
            std::panic::set_hook(Box::new(|panic| {
                let what = format!("in a child: {panic}\n");
                // SAFETY: as many bytes as it has.
                unsafe { libc::write(2, what.as_ptr().cast(), what.len()) };
            }));
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(i32::from(worked.is_err())) }
        }
        pid => {
            assert!(pid > 0, "fork");
            Child(pid)
        }
    }
}

struct Child(libc::pid_t);

impl Child {
    /// Whether it ended with 0. `None` as long as it runs, if that is not waited for.
    fn ended(&self, waits: bool) -> Option<bool> {
        let mut status = 0;
        let flags = if waits { 0 } else { libc::WNOHANG };
        // SAFETY: our own child, and a status of our own.
        let ended = unsafe { libc::waitpid(self.0, &raw mut status, flags) };
        assert!(ended == self.0 || (ended == 0 && !waits));
        (ended != 0).then_some(status == 0)
    }
}

const N: usize = 1 << 18;

/// An engine is built, memory goes to the device and comes home.
fn works() {
    let svm = engine(ByteSize::mib(16));
    let mut slice = svm.alloc_slice::<u64>(N).unwrap();
    for round in 1..4 {
        slice.fill(round);
        add_one(&svm, 0, (slice.device_ptr(), N));
        assert!(svm.stats().pages_on_devices >= 512, "{:?}", svm.stats());
        assert!(slice.iter().all(|value| *value == round + 1));
    }
    if can_adopt(&svm) {
        let mut own = vec![3u64; N];
        let len = ByteSize::from_usize(size_of_val(&own[..]));
        let adopted = svm.adopt(own.as_ptr(), len).unwrap();
        add_one(&svm, 0, (own.as_mut_ptr().into(), N));
        drop(adopted);
        assert!(own.iter().all(|value| *value == 4));
    }
    drop(slice);
    assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
}

/// While the parent's goes on, and the child's forks in its turn.
#[test]
fn a_child_and_a_grandchild_have_engines_of_their_own() {
    within(Duration::from_secs(120), || {
        let svm = engine(ByteSize::mib(16));
        let slice = svm.alloc_slice::<u64>(N).unwrap();
        add_one(&svm, 0, (slice.device_ptr(), N));
        let child = child_does(|| {
            assert!(slice.iter().all(|value| *value == 1), "its parent's");
            works();
            let own = engine(ByteSize::mib(16));
            let kept = own.alloc_slice::<u64>(N).unwrap();
            add_one(&own, 0, (kept.device_ptr(), N));
            assert!(own.stats().pages_on_devices >= 512);
            let grandchild = child_does(|| {
                assert!(slice.iter().chain(&kept[..]).all(|value| *value == 1));
                works();
                assert!(slice.iter().chain(&kept[..]).all(|value| *value == 1));
            });
            add_one(&own, 0, (kept.device_ptr(), N));
            assert!(kept.iter().all(|value| *value == 2));
            assert_eq!(grandchild.ended(true), Some(true));
            drop(kept);
            assert_eq!(own.shutdown().unwrap().vram_used_bytes, 0);
        });
        let mut rounds = 1;
        let ended = loop {
            add_one(&svm, 0, (slice.device_ptr(), N));
            rounds += 1;
            if let Some(ended) = child.ended(false) {
                break ended;
            }
        };
        assert!(ended && slice.iter().all(|value| *value == rounds));
    });
}

fn is_gone<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Mm(MmError::Gone)))
}

/// Everything there is of an engine is in use in the parent: in the child all of it is refused, and then
/// dropped, with an engine of the child's at work, whose threads have the places of the parent's.
#[test]
fn what_is_inherited_is_refused_and_ends_in_a_child() {
    static STOP: AtomicBool = AtomicBool::new(false);
    within(Duration::from_secs(120), || {
        let gpu = SoftGpu::builder().vram(ByteSize::mib(16)).units(3);
        let gpu = gpu.fabric(Fabric(7)).build().unwrap();
        let svm = built(Svm::builder().device(gpu.clone()));
        let slice = svm.alloc_slice::<u64>(N).unwrap();
        add_one(&svm, 0, (slice.device_ptr(), N));
        let spin = |_: &mut gpusvm::Lane<'_>| {
            while !STOP.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            Ok(())
        };
        // SAFETY: it touches nothing.
        let spins = unsafe { svm.launch(Grid::new(1), spin) }.unwrap();
        let vm = svm.create_vm(0).unwrap();
        let object = svm.create_object(0, ByteSize::mib(1)).unwrap();
        let len = ByteSize::mib(2);
        let prefetch = svm.prefetch(0, slice.as_ptr(), len).unwrap();
        let all = (svm, slice, spins, vm, object, prefetch, gpu);
        for builds in [false, true] {
            let child = child_does(|| {
                // SAFETY: the child ends without using the originals.
                let copies = unsafe { core::ptr::read(&raw const all) };
                let (svm, slice, spins, vm, object, prefetch, gpu) = copies;
                let own = builds.then(|| engine(ByteSize::mib(16)));
                let again = Svm::builder().device(gpu.clone()).build();
                assert!(matches!(again, Err(Error::SoftGpu(SoftGpuError::Forked))));
                // SAFETY: it touches nothing.
                assert!(is_gone(unsafe { svm.launch(Grid::new(1), |_| Ok(())) }));
                assert!(matches!(svm.alloc_slice::<u64>(1), Err(Error::Memory(_))));
                assert!(svm.is_inherited() && own.as_ref().is_none_or(|own| !own.is_inherited()));
                assert!(is_gone(svm.create_vm(0)) && is_gone(svm.create_object(0, len)));
                assert!(is_gone(svm.unbind(0)) && is_gone(svm.rebind(0)));
                assert!(is_gone(svm.prefetch(0, slice.as_ptr(), len)));
                assert!(is_gone(svm.advise_slice(&slice, Advice::ReadMostly(true))));
                assert!(is_gone(svm.advice(slice.as_ptr(), len)) && is_gone(svm.last_fault(0)));
                assert!(is_gone(vm.bind_mirror(slice.span())) && is_gone(prefetch.wait()));
                assert!(is_gone(vm.bind_object(
                    slice.span(),
                    &object,
                    ByteSize::ZERO
                )));
                assert!(is_gone(object.read(ByteSize::ZERO, &mut [0])));
                assert!(svm.touch(slice.as_ptr(), len).is_ok() && prefetch.is_done());
                assert_eq!(svm.stats().pages_on_devices, 0);
                assert!(spins.is_done());
                spins.cancel();
                let waited = spins.wait();
                assert!(matches!(waited, Err(Error::Launch(LaunchError::Forked))));
                svm.settle();
                assert!(slice.iter().all(|value| *value == 1));
                drop((slice, vm, object, prefetch));
                drop(svm);
                drop(gpu);
                drop(own);
                works();
            });
            assert_eq!(child.ended(true), Some(true));
        }
        STOP.store(true, Ordering::Release);
        let (svm, slice, spins, vm, object, prefetch, gpu) = all;
        spins.wait().unwrap();
        prefetch.wait().unwrap();
        drop((vm, object, gpu));
        assert!(slice.iter().all(|value| *value == 1));
        drop(slice);
        assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
    });
}

/// A program forks, and both return from their `main`, as `exit` does it: with an engine, and memory on the
/// device.
#[test]
fn a_child_that_returns_from_main_ends() {
    within(Duration::from_secs(120), || {
        for _ in 0..5 {
            let svm = engine(ByteSize::mib(16));
            let slice = svm.alloc_slice::<u64>(N).unwrap();
            add_one(&svm, 0, (slice.device_ptr(), N));
            let all = (slice, svm);
            let child = child_does(|| {
                // SAFETY: the child ends without using the original.
                drop(unsafe { core::ptr::read(&raw const all) });
                std::process::exit(0);
            });
            assert_eq!(child.ended(true), Some(true));
            assert!(all.0.iter().all(|value| *value == 1));
        }
    });
}
