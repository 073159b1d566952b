//! Memory that the CPU and devices read at once, in copies: what it saves, and that nothing is left of it.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and look at a clock"
)]

mod common;

use common::{Stay, built, within};
use gpusvm::{ByteSize, FaultInfo, FaultMode, Grid, Plan, Policy, Resident, SoftGpu, Stats, Svm};
use gpusvm::{SvmPtr, SvmSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Readers get copies.
#[derive(Debug)]
struct Duplicate;

impl Policy for Duplicate {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        Plan {
            duplicate: true,
            ..Stay(Duration::ZERO).on_device_fault(fault)
        }
    }
}

fn engine(vram: ByteSize, faults: FaultMode, policy: impl Policy + 'static) -> Svm {
    let gpu = SoftGpu::builder().vram(vram).units(2).fault_mode(faults);
    let gpu = gpu.build().unwrap();
    built(Svm::builder().device(gpu).policy(Arc::new(policy)))
}

/// Numbers from one on.
fn numbers(svm: &Svm, size: ByteSize) -> SvmSlice<u64> {
    let mut numbers = svm.alloc_slice::<u64>(size.as_usize() / 8).unwrap();
    (1..)
        .zip(numbers.iter_mut())
        .for_each(|(i, number)| *number = i);
    numbers
}

/// One number of each page.
const STEP: usize = 512;

fn sum_by_device(svm: &Svm, numbers: &SvmSlice<u64>) -> u64 {
    const LANES: usize = 4;
    let (p, n): (SvmPtr<u64>, usize) = (numbers.device_ptr(), numbers.len());
    let sum = Arc::new(AtomicU64::new(0));
    let of_lanes = Arc::clone(&sum);
    let declared = Resident::new().reads(numbers);
    // SAFETY: nobody writes meanwhile, and the numbers outlive the launch.
    let launch = unsafe {
        svm.launch_resident(0, Grid::new(LANES), declared, move |lane| {
            for i in (lane.id() * STEP..n).step_by(LANES * STEP) {
                of_lanes.fetch_add(lane.load(p.add(i))?, Ordering::Relaxed);
            }
            Ok(())
        })
    };
    launch.unwrap().wait().unwrap();
    sum.load(Ordering::Relaxed)
}

fn sum_by_cpu(numbers: &SvmSlice<u64>) -> u64 {
    numbers.iter().step_by(STEP).sum()
}

/// Whether copies are made here, which takes that all writes are seen; prints why not.
fn can_duplicate(svm: &Svm) -> bool {
    let can = svm.rung().number() < 3;
    if !can {
        println!("skipped: without a full userfaultfd not all writes are seen");
    }
    can
}

const SIZE: ByteSize = ByteSize::mib(64);
const ROUNDS: u64 = 6;

fn read_by_both(policy: impl Policy + 'static) -> Option<Stats> {
    let svm = engine(ByteSize::mib(80), FaultMode::Replayable, policy);
    let can = can_duplicate(&svm);
    let numbers = numbers(&svm, SIZE);
    let began = Instant::now();
    for _ in 0..ROUNDS {
        assert_eq!(sum_by_device(&svm, &numbers), sum_by_cpu(&numbers));
    }
    let took = began.elapsed();
    let stats = svm.stats();
    println!(
        "{ROUNDS} rounds: {} MiB to the device, {} MiB home, {} device faults, {} CPU faults, {took:?}",
        stats.to_device.bytes >> 20,
        stats.to_ram.bytes >> 20,
        stats.device_faults,
        stats.cpu_faults,
    );
    drop(numbers);
    assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
    can.then_some(stats)
}

/// The CPU and a device read the same 64 MiB again and again. Without copies they take them from each
/// other each time.
#[test]
fn readers_do_not_take_memory_from_each_other() {
    within(Duration::from_secs(120), || {
        let (Some(off), Some(on)) = (read_by_both(Stay(Duration::ZERO)), read_by_both(Duplicate))
        else {
            return;
        };
        assert_eq!(off.to_device.bytes, ROUNDS * SIZE.get());
        assert_eq!(off.to_ram.bytes, ROUNDS * SIZE.get());
        assert_eq!((on.to_device.bytes, on.to_ram.bytes), (SIZE.get(), 0));
        assert_eq!(on.cpu_faults, 0);
        assert_eq!((on.duplicated_ranges, on.not_duplicated), (32, 0));
        assert_eq!((off.duplicated_ranges, off.not_duplicated), (0, 0));
    });
}

/// After a write, the workers give the memory back, without being asked.
#[test]
fn copies_are_given_back_soon_after_a_write() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(16), FaultMode::Replayable, Duplicate);
        if !can_duplicate(&svm) {
            return;
        }
        let mut numbers = numbers(&svm, ByteSize::mib(8));
        for round in 0..3 {
            assert_eq!(sum_by_device(&svm, &numbers), sum_by_cpu(&numbers));
            assert_eq!(svm.stats().vram_used_bytes, ByteSize::mib(8).get());
            for (i, number) in numbers.iter_mut().enumerate() {
                *number = u64::try_from(i).unwrap() * round;
            }
            while svm.stats().vram_used_bytes > 0 {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let stats = svm.stats();
        assert_eq!(
            (stats.duplicated_ranges, stats.duplicates_invalidated),
            (12, 12)
        );
        assert_eq!(stats.to_ram.bytes, 0);
    });
}

/// The device leaves, and comes back: nothing of the copies is in its memory meanwhile.
#[test]
fn an_unbound_device_keeps_no_copies() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(16), FaultMode::Replayable, Duplicate);
        let numbers = numbers(&svm, ByteSize::mib(8));
        for _ in 0..3 {
            assert_eq!(sum_by_device(&svm, &numbers), sum_by_cpu(&numbers));
            svm.unbind(0).unwrap();
            assert_eq!(svm.stats().vram_used_bytes, 0);
            svm.rebind(0).unwrap();
        }
    });
}

/// A device that cannot fault could not lose a copy: it gets none, and that is counted.
#[test]
fn a_device_that_cannot_fault_gets_no_copies() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(16), FaultMode::Declared, Duplicate);
        let numbers = numbers(&svm, ByteSize::mib(4));
        assert_eq!(sum_by_device(&svm, &numbers), sum_by_cpu(&numbers));
        let stats = svm.stats();
        assert_eq!(stats.duplicated_ranges, 0);
        assert!(stats.not_duplicated > 0);
    });
}

/// More than device memory holds, read in circles: others make room, nothing is copied back.
#[test]
fn copies_make_room_for_others() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(4), FaultMode::Replayable, Duplicate);
        let numbers = numbers(&svm, ByteSize::mib(16));
        for _ in 0..3 {
            assert_eq!(sum_by_device(&svm, &numbers), sum_by_cpu(&numbers));
        }
        let stats = svm.stats();
        if can_duplicate(&svm) {
            assert!(stats.duplicates_dropped > 0, "{stats:?}");
            assert_eq!(stats.to_ram.bytes, 0);
        }
        assert!(stats.vram_used_bytes <= stats.vram_bytes);
    });
}
