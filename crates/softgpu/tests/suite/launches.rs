//! Launches: order, errors, panics, cancellation, teardown, children.

use crate::common::{BASE, Driver, bind_vram, no_fault, pages, run, small_gpu};
use gpusvm_device::{Device, FaultError, Verdict, VmId};
use gpusvm_softgpu::{Grid, Lane, LaneError, Launch, LaunchError, SoftGpu, SoftGpuError, SvmPtr};
use gpusvm_types::ByteSize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

fn launch<F>(gpu: &Arc<SoftGpu>, vm: VmId, lanes: usize, kernel: F) -> Launch
where
    F: Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + 'static,
{
    // SAFETY: only VRAM is mapped in these tests.
    unsafe { gpu.launch(vm, Grid::new(lanes), kernel) }.unwrap()
}

#[test]
fn every_lane_runs_once_whatever_the_grid() {
    let (gpu, vm) = small_gpu();
    for lanes in [0usize, 1, 2, 31, 32, 33, 1000, 70_000] {
        let seen: Arc<[AtomicUsize]> = (0..lanes).map(|_| AtomicUsize::new(0)).collect();
        let counted = Arc::clone(&seen);
        let report = run(&gpu, vm, lanes, move |lane| {
            assert_eq!(lane.grid().lanes(), counted.len());
            assert!(lane.unit() < 2);
            counted[lane.id()].fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        assert_eq!(report.unwrap().lanes, lanes);
        assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
    }
}

#[test]
fn panic_stops_its_lane_and_the_unit_lives_on() {
    let (gpu, vm) = small_gpu();
    for _ in 0..3 {
        let result = run(&gpu, vm, 1000, |lane| {
            assert!(
                lane.id() != 500 && lane.id() != 501,
                "this panic is part of the test"
            );
            Ok(())
        });
        let first = LaneError::Panicked;
        assert_eq!(
            result,
            Err(LaunchError::Lanes {
                failed: 2,
                first_lane: 500,
                first
            })
        );
    }
    assert!(run(&gpu, vm, 1000, |_| Ok(())).is_ok());
}

#[test]
fn callbacks_run_before_wait_returns_or_at_once() {
    let (gpu, vm) = small_gpu();
    let go = Arc::new(AtomicBool::new(false));
    let (called, waits) = (Arc::new(AtomicUsize::new(0)), Arc::clone(&go));
    let count = |by: usize| {
        let called = Arc::clone(&called);
        move || {
            called.fetch_add(by, Ordering::Relaxed);
        }
    };
    let first = launch(&gpu, vm, 4, move |_| {
        while !waits.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        Ok(())
    });
    first.on_done(count(1));
    first.on_done(|| panic!("this panic is part of the test"));
    first.on_done(count(10));
    assert!(!first.is_done());
    go.store(true, Ordering::Relaxed);
    first.wait().unwrap();
    assert_eq!(called.load(Ordering::Relaxed), 11);
    let second = launch(&gpu, vm, 0, |_| Ok(()));
    assert!(second.is_done());
    second.on_done(count(100));
    assert_eq!(called.load(Ordering::Relaxed), 111);
}

/// Story: whoever waited for the last launch was the only owner of what the kernels captured, or not yet.
#[test]
fn what_a_kernel_captured_is_given_back_before_wait_returns() {
    let (gpu, vm) = small_gpu();
    for round in 0..500 {
        let captured = Arc::new(AtomicUsize::new(0));
        let inside = Arc::clone(&captured);
        let launched = launch(&gpu, vm, round % 40, move |_| {
            inside.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        launched.wait().unwrap();
        assert_eq!(
            Arc::into_inner(captured).map(AtomicUsize::into_inner),
            Some(round % 40)
        );
    }
}

#[test]
fn launches_overlap_and_all_end() {
    let (gpu, vm) = small_gpu();
    bind_vram(&gpu, vm, pages(0, 1), 0, true);
    let at = SvmPtr::<u64>::new(BASE);
    let launches: Vec<Launch> = (0..50)
        .map(|_| launch(&gpu, vm, 300, move |lane| lane.atomic_add(at, 1).map(drop)))
        .collect();
    for launch in launches.into_iter().rev() {
        launch.wait().unwrap();
    }
    run(&gpu, vm, 1, move |lane| {
        assert_eq!(lane.load(at)?, 15_000);
        Ok(())
    })
    .unwrap();
    // One that nobody waits for.
    drop(launch(&gpu, vm, 300, |_| Ok(())));
}

#[test]
fn cancel_reaches_loops_and_lanes_that_wait_in_faults() {
    let (gpu, vm) = small_gpu();
    bind_vram(&gpu, vm, pages(0, 1), 0, true);
    let at = SvmPtr::<u64>::new(BASE);
    let spin = launch(&gpu, vm, 1000, move |lane| {
        loop {
            lane.load(at)?;
        }
    });
    std::thread::sleep(Duration::from_millis(5));
    spin.cancel();
    let all = |first| {
        Err(LaunchError::Lanes {
            failed: 1000,
            first_lane: 0,
            first,
        })
    };
    assert_eq!(spin.wait(), all(LaneError::Cancelled));

    let faults = launch(&gpu, vm, 1000, move |lane| lane.load(at.add(512)).map(drop));
    // One is taken, one stays in the buffer.
    let queue = gpu.fault_queue().unwrap();
    let mut taken = [no_fault()];
    assert_eq!(queue.take(&mut taken, Duration::from_secs(60)), 1);
    std::thread::sleep(Duration::from_millis(5));
    faults.cancel();
    assert_eq!(faults.wait(), all(LaneError::Cancelled));
    // The verdict comes too late, and harms nobody. Nothing is left in the buffer.
    queue.resolve(&taken[0], Verdict::Replay);
    assert_eq!(queue.take(&mut taken, Duration::from_millis(1)), 0);
    run(&gpu, vm, 100, move |lane| lane.store(at, 1)).unwrap();
}

#[test]
fn teardown_with_outstanding_faults_does_not_hang() {
    let (gpu, vm) = small_gpu();
    let at = SvmPtr::<u64>::new(BASE);
    let waiting = launch(&gpu, vm, 100, move |lane| lane.load(at).map(drop));
    let queued = launch(&gpu, vm, 100, |_| Ok(()));
    std::thread::sleep(Duration::from_millis(5));
    drop(gpu);
    let cancelled = |result| {
        matches!(
            result,
            Err(LaunchError::Lanes {
                failed: 100,
                first: LaneError::Cancelled,
                ..
            })
        )
    };
    assert!(cancelled(waiting.wait()));
    assert!(cancelled(queued.wait()));
}

/// The last reference may go on a unit: in a callback, or with the kernel.
#[test]
fn last_reference_may_be_dropped_on_a_unit() {
    let (gpu, vm) = small_gpu();
    let go = Arc::new(AtomicBool::new(false));
    let (waits, kept) = (Arc::clone(&go), Arc::clone(&gpu));
    let last = launch(&gpu, vm, 10, move |_| {
        while !waits.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        Ok(())
    });
    last.on_done(move || drop(kept));
    drop(gpu);
    go.store(true, Ordering::Relaxed);
    last.wait().unwrap();
}

#[test]
fn closed_queue_fails_faults_and_wakes_takers() {
    let (gpu, vm) = small_gpu();
    let taker = {
        let gpu = Arc::clone(&gpu);
        let wait = move || {
            gpu.fault_queue()
                .unwrap()
                .take(&mut [no_fault()], Duration::MAX)
        };
        std::thread::Builder::new().spawn(wait).unwrap()
    };
    let queue = gpu.fault_queue().unwrap();
    std::thread::sleep(Duration::from_millis(5));
    assert!(!queue.is_closed());
    queue.close();
    assert_eq!(taker.join().unwrap(), 0);
    assert!(queue.is_closed());
    let result = run(&gpu, vm, 1, |lane| {
        lane.load(SvmPtr::<u8>::new(BASE)).map(drop)
    });
    let first = LaneError::Fault(FaultError::Closed { at: BASE });
    assert_eq!(
        result,
        Err(LaunchError::Lanes {
            failed: 1,
            first_lane: 0,
            first
        })
    );
}

#[test]
fn take_gives_each_fault_once_and_as_many_as_fit() {
    let gpu = SoftGpu::builder()
        .vram(ByteSize::mib(2))
        .units(6)
        .build()
        .unwrap();
    let vm = gpu.page_tables().create_vm().unwrap();
    let base = SvmPtr::<u8>::new(BASE);
    let faults = launch(&gpu, vm, 6, move |lane| {
        lane.load(base.add(lane.id())).map(drop)
    });
    let queue = gpu.fault_queue().unwrap();
    assert_eq!(queue.take(&mut [], Duration::ZERO), 0);
    let (mut all, mut some) = (Vec::new(), [no_fault(); 4]);
    while all.len() < 6 {
        let count = queue.take(&mut some, Duration::from_secs(60));
        assert!((1..=4).contains(&count));
        all.extend_from_slice(&some[..count]);
    }
    assert_eq!(queue.take(&mut some, Duration::ZERO), 0);
    all.sort_by_key(|fault| fault.at);
    for (offset, fault) in all.iter().enumerate() {
        assert_eq!((fault.at, fault.vm), (base.add(offset).addr(), vm));
    }
    bind_vram(&gpu, vm, pages(0, 1), 0, true);
    all.iter()
        .for_each(|fault| queue.resolve(fault, Verdict::Replay));
    faults.wait().unwrap();
}

#[test]
fn devices_that_cannot_be_are_refused() {
    let build = |vram, units| SoftGpu::builder().vram(vram).units(units).build();
    assert!(matches!(
        build(ByteSize::ZERO, 1),
        Err(SoftGpuError::NoVram)
    ));
    assert!(matches!(
        build(ByteSize::new(5000), 1),
        Err(SoftGpuError::UnalignedVram { .. })
    ));
    assert!(matches!(
        build(ByteSize::gib(1 << 30), 1),
        Err(SoftGpuError::TooMuchVram { .. })
    ));
    assert!(matches!(
        build(ByteSize::mib(1), 0),
        Err(SoftGpuError::UnitCount { .. })
    ));
    assert!(matches!(
        build(ByteSize::mib(1), 1000),
        Err(SoftGpuError::UnitCount { .. })
    ));
    let gpu = SoftGpu::with_vram(ByteSize::kib(4)).unwrap();
    assert_eq!((gpu.caps().vram, gpu.units()), (ByteSize::kib(4), 4));
    // SAFETY: nothing is mapped.
    let no_vm = unsafe { gpu.launch(VmId(3), Grid::new(1), |_| Ok(())) };
    assert!(matches!(no_vm, Err(SoftGpuError::NoVm { vm: VmId(3) })));
    let text = format!("{}", build(ByteSize::new(5000), 1).unwrap_err());
    assert_eq!(text, "5000 B of device memory are not a multiple of 4 KiB");
}

#[test]
fn child_of_fork_gets_an_error() {
    let (gpu, vm) = small_gpu();
    // SAFETY: the child only launches, which fails first, and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: nothing is mapped.
        let refused = unsafe { gpu.launch(vm, Grid::new(1), |_| Ok(())) };
        let ok = matches!(refused, Err(SoftGpuError::Forked));
        drop(gpu);
        // SAFETY: it has no preconditions.
        unsafe { libc::_exit(if ok { 0 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: a child of ours.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0);
    run(&gpu, vm, 10, |_| Ok(())).unwrap();
}

/// Many units fault on few pages while the driver serves slowly.
#[test]
fn fault_storm_ends() {
    let gpu = SoftGpu::builder()
        .vram(ByteSize::mib(2))
        .units(8)
        .build()
        .unwrap();
    let vm = gpu.page_tables().create_vm().unwrap();
    let _driver = Driver::start(&gpu, move |gpu, fault| {
        let span = gpusvm_types::Span::page_of(fault.at);
        gpu.page_tables().zap(vm, pages(0, 64));
        gpu.page_tables().flush(vm, pages(0, 64));
        bind_vram(gpu, vm, span, span.start().offset_from(BASE).get(), true);
        Verdict::Replay
    });
    let base = SvmPtr::<u64>::new(BASE);
    let storm = run(&gpu, vm, 2_000, move |lane| {
        lane.atomic_add(base.add(lane.id() * 37 % (64 * 512)), 1)
            .map(drop)
    });
    storm.unwrap();
    assert!(gpu.counters().faults >= 64);
}
