//! A CPU that touches pages within their timeslice sleeps until it is over: it does not spin.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]
#![allow(clippy::disallowed_methods, reason = "it is about time")]

mod common;

use common::{Stay, add_one, built, within};
use gpusvm::{ByteSize, SoftGpu, Svm};
use gpusvm_mm_linux::Rung;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SLICE: Duration = Duration::from_millis(50);

/// How long this thread was on a CPU so far.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the place for the answer is ours.
    let rc = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    assert_eq!(rc, 0);
    let (seconds, nanos) = (u64::try_from(time.tv_sec), u32::try_from(time.tv_nsec));
    Duration::new(seconds.unwrap(), nanos.unwrap())
}

/// Lets the device have the numbers for a timeslice, and touches one, again and again. Who spins does so every
/// time; a thread that waits for a CPU, or whose machine is not always there, does not.
fn touch_within_the_timeslice(rung: Option<Rung>) {
    let gpu = SoftGpu::builder().vram(ByteSize::mib(8)).build().unwrap();
    let builder = Svm::builder().device(gpu).policy(Arc::new(Stay(SLICE)));
    let svm = match rung {
        Some(_) => builder.rung(rung).build().unwrap(),
        None => built(builder),
    };
    let mut numbers = svm.alloc_slice::<u64>(1024).unwrap();
    let mut least = (Duration::MAX, Duration::MAX);
    for round in 1..=5 {
        let began = Instant::now();
        add_one(&svm, 0, (numbers.device_ptr(), 1024));
        // SAFETY: the slice lives on.
        let first = unsafe { AtomicU64::from_ptr(numbers.as_mut_ptr()) };
        let (touched, cpu) = (Instant::now(), cpu_time());
        let found = first.load(Ordering::Acquire);
        let (used, slept) = (cpu_time() - cpu, touched.elapsed());
        let stayed = began.elapsed();
        println!("{:?}: slept {slept:?}, on a CPU for {used:?}", svm.rung());
        assert_eq!(found, round);
        assert!(stayed >= SLICE, "home after {stayed:?}");
        least = (least.0.min(slept), least.1.min(used));
    }
    let (slept, used) = least;
    assert!(slept < SLICE * 20, "long after its timeslice: {slept:?}");
    assert!(used < Duration::from_millis(5), "it spun for {used:?}");
    assert!(svm.stats().delayed_cpu_faults >= 5);
    svm.shutdown().unwrap();
}

#[test]
fn a_cpu_fault_in_a_timeslice_is_served_after_it_and_does_not_spin() {
    within(Duration::from_secs(60), || touch_within_the_timeslice(None));
}

#[test]
fn so_it_is_without_userfaultfd() {
    within(Duration::from_secs(60), || {
        touch_within_the_timeslice(Some(Rung::Signals));
    });
}
