//! Two devices and the CPU take one small buffer from each other, thousands of times.
//!
//! Nobody may lose an addition, and nobody may wait for ever: every retry is bounded, and counted here.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and look at a clock"
)]

mod common;

use common::{Stay, Stop, add_one, two_devices, within};
use gpusvm::{ByteSize, SvmSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// 8 KiB.
const WORDS: usize = 1 << 10;

/// The numbers, as the CPU adds to them.
fn atomics(numbers: &SvmSlice<u64>) -> &[AtomicU64] {
    // SAFETY: as many, of the same size and alignment; everybody uses them by atomics.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast::<AtomicU64>(), numbers.len()) }
}

fn bounce(fabric: bool, rounds: u64) {
    let svm = two_devices(ByteSize::mib(4), fabric, Stay(Duration::from_micros(20)));
    let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
    let began = Instant::now();
    let stop = Stop::default();
    let mut added = vec![0u64; WORDS];
    std::thread::scope(|scope| {
        let (stop, added, numbers) = (stop.clone(), &mut added, &numbers);
        let end = stop.clone();
        scope.spawn(move || {
            let mut i = 0;
            while !stop.is_set() {
                atomics(numbers)[i].fetch_add(1, Ordering::Relaxed);
                added[i] += 1;
                i = (i + 509) % WORDS;
            }
        });
        for _ in 0..rounds {
            for device in [0, 1] {
                add_one(&svm, device, (numbers.device_ptr(), WORDS));
            }
        }
        end.set();
    });
    let took = began.elapsed();
    for (i, (number, added)) in atomics(&numbers).iter().zip(&added).enumerate() {
        assert_eq!(
            number.load(Ordering::Relaxed),
            added + 2 * rounds,
            "word {i}"
        );
    }
    drop(numbers);
    let stats = svm.shutdown().unwrap();
    println!(
        "fabric: {fabric}, {rounds} rounds in {took:?}: {} device faults, {} stale passes, \
         {} last resorts, {} CPU faults, {} delayed, {} bytes to peers, {} home",
        stats.device_faults,
        stats.stale_passes,
        stats.last_resorts,
        stats.cpu_faults,
        stats.delayed_cpu_faults,
        stats.to_peer.bytes,
        stats.to_ram.bytes,
    );
    assert_eq!((stats.failed_faults, stats.vram_used_bytes), (0, 0));
    assert!(stats.stale_passes < 8 * stats.device_faults.max(1));
    assert!(stats.cpu_faults > 0, "the CPU never took it back");
}

#[test]
fn two_devices_and_the_cpu_bounce_a_buffer_on_a_fabric() {
    within(Duration::from_secs(120), || bounce(true, 10_000));
}

#[test]
fn two_devices_and_the_cpu_bounce_a_buffer_through_ram() {
    within(Duration::from_secs(120), || bounce(false, 10_000));
}
