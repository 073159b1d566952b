//! Counters that the CPU and a device add to while their blocks migrate out and back all the time: at
//! the end, not one addition is missing.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Map, Stop, can_adopt, engine_with, within};
use gpusvm::{ByteSize, FaultInfo, FaultMode, Grid, Plan, Policy, SoftGpu, Svm, SvmPtr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const BLOCK: usize = 2 << 20;
const BLOCKS: usize = 4;
const CPU_THREADS: usize = 3;
/// Counters that everybody adds to; each in a page of its own, all over the blocks.
const SHARED: usize = 64;
const MIN_MIGRATIONS: u64 = 2_000;

/// The counter that everybody adds to, and the one of a CPU thread, for the i-th place.
fn place(i: usize) -> usize {
    (i * BLOCKS * BLOCK / SHARED) / 8
}

struct Counters {
    base: SvmPtr<u64>,
}

impl Counters {
    fn shared(&self, i: usize) -> SvmPtr<u64> {
        self.base.add(place(i % SHARED))
    }

    fn own(&self, thread: usize, i: usize) -> SvmPtr<u64> {
        self.base.add(place(i % SHARED) + 8 + thread)
    }

    fn cpu(&self, counter: SvmPtr<u64>) -> &AtomicU64 {
        // SAFETY: in the memory of the test, aligned, and only used atomically until the end.
        unsafe { AtomicU64::from_ptr(counter.as_ptr()) }
    }

    fn sum(&self) -> u64 {
        (0..SHARED)
            .map(|i| self.cpu(self.shared(i)).load(Ordering::Acquire))
            .sum()
    }
}

/// Everything moves on every touch, whatever it costs; pages that bounce stay a little longer, so that
/// lanes get on.
#[derive(Debug)]
struct AlwaysMigrate;

impl Policy for AlwaysMigrate {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        let timeslice = Duration::from_micros(50 << fault.bounces.min(6));
        Plan {
            migrate: true,
            duplicate: false,
            timeslice,
            ..Plan::default()
        }
    }
}

fn engine() -> Svm {
    let gpu = SoftGpu::builder()
        .vram(ByteSize::mib(4))
        .units(2)
        .build()
        .unwrap();
    Svm::builder()
        .device(gpu)
        .policy(Arc::new(AlwaysMigrate))
        .build()
        .unwrap()
}

/// How many blocks came home.
fn migrations(svm: &Svm) -> u64 {
    svm.stats().to_ram.bytes >> 21
}

/// Adds on the CPU, on every place in turn, to a shared counter and to one of the thread's own.
fn add_on_cpu(counters: &Counters, thread: usize, stop: &Stop) -> u64 {
    let mut added = 0;
    while !stop.is_set() {
        let i = usize::try_from(added).unwrap() + thread * 7;
        counters
            .cpu(counters.shared(i))
            .fetch_add(1, Ordering::AcqRel);
        counters
            .cpu(counters.own(thread, i))
            .fetch_add(1, Ordering::AcqRel);
        added += 1;
    }
    added
}

fn stress(svm: &Svm, base: SvmPtr<u64>, forks: bool) {
    const LANES: usize = 4_096;
    let counters = Counters { base };
    let stop = Stop::default();
    let (mut on_device, mut rounds) = (0, 0u64);
    let on_cpu: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..CPU_THREADS)
            .map(|thread| {
                let (counters, stop) = (&counters, stop.clone());
                scope.spawn(move || add_on_cpu(counters, thread, &stop))
            })
            .collect();
        while migrations(svm) < MIN_MIGRATIONS || rounds < 20 {
            let shared = Counters { base };
            // SAFETY: the counters are only used atomically, by everybody.
            let launch = unsafe {
                svm.launch(Grid::new(LANES), move |lane| {
                    lane.atomic_add(shared.shared(lane.id()), 1u64)?;
                    Ok(())
                })
            };
            launch.unwrap().wait().unwrap();
            on_device += LANES as u64;
            rounds += 1;
            if forks && rounds.is_multiple_of(8) {
                fork_and_look(&counters, on_device);
            }
        }
        stop.set();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert_eq!(counters.sum(), on_cpu + on_device, "no addition is missing");
    let own: u64 = (0..CPU_THREADS)
        .flat_map(|thread| (0..SHARED).map(move |i| (thread, i)))
        .map(|(thread, i)| {
            counters
                .cpu(counters.own(thread, i))
                .load(Ordering::Acquire)
        })
        .sum();
    assert_eq!(own, on_cpu, "no store of the CPU is missing");
    println!(
        "{} migrations, {on_cpu} on the CPU, {on_device} on the device",
        migrations(svm)
    );
}

/// A child sees everything that was added before the fork.
fn fork_and_look(counters: &Counters, at_least: u64) {
    // SAFETY: the child reads memory and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let seen = counters.sum();
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(if seen >= at_least { 0 } else { 1 }) };
    }
    assert!(child > 0, "fork");
    let mut status = 0;
    // SAFETY: our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child saw all of it");
}

fn run(svm: Svm, base: SvmPtr<u64>, forks: bool) {
    within(Duration::from_secs(120), || stress(&svm, base, forks));
    let stats = svm.shutdown().unwrap();
    assert_eq!(
        (
            stats.vram_used_bytes,
            stats.pages_on_devices,
            stats.ranges_live
        ),
        (0, 0, 0)
    );
}

#[test]
fn no_addition_is_lost_in_huge_pages() {
    let svm = engine();
    let memory = svm.alloc_slice::<u64>(BLOCKS * BLOCK / 8).unwrap();
    let base = memory.device_ptr();
    run(svm, base, false);
}

#[test]
fn no_addition_is_lost_in_base_pages() {
    let svm = engine();
    if !can_adopt(&svm) {
        return;
    }
    let memory = Map::new(BLOCKS * BLOCK, false);
    let _adopted = svm
        .adopt(memory.at, ByteSize::from_usize(memory.len))
        .unwrap();
    run(svm, SvmPtr::from(memory.at.cast::<u64>()), false);
}

#[test]
fn no_addition_is_lost_across_forks() {
    let svm = engine();
    let memory = svm.alloc_slice::<u64>(BLOCKS * BLOCK / 8).unwrap();
    let base = memory.device_ptr();
    run(svm, base, true);
}

#[test]
fn no_addition_is_lost_when_launches_declare() {
    let svm = engine_with(ByteSize::mib(8), FaultMode::Declared);
    let memory = svm.alloc_slice::<u64>(2 * BLOCK / 8).unwrap();
    let base = memory.device_ptr();
    within(Duration::from_secs(60), || {
        for _ in 0..200 {
            let resident = gpusvm::Resident::new().writes(&memory);
            // SAFETY: only this thread and the launch use the memory, one after the other.
            let launch = unsafe {
                svm.launch_resident(0, Grid::new(1024), resident, move |lane| {
                    lane.atomic_add(base.add(lane.id() * 512), 1u64)?;
                    Ok(())
                })
            };
            launch.unwrap().wait().unwrap();
            // SAFETY: the launch has ended.
            unsafe { *base.as_ptr() += 1 };
        }
    });
    assert_eq!(memory[0], 400);
    assert_eq!(memory.iter().sum::<u64>(), 200 * 1024 + 200);
    drop(memory);
    assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
}
