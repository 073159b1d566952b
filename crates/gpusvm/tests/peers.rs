//! Two devices: on one fabric, pages go from one to the other, or are reached where they are; without
//! one, they go through RAM.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and look at a clock"
)]

mod common;

use common::{Stay, add_one, two_devices, two_devices_with, within};
use gpusvm::{ByteSize, Error, Grid, Resident, Svm, SvmSlice};
use std::time::{Duration, Instant};

/// 2 MiB.
const WORDS: usize = 1 << 18;
const BYTES: u64 = 2 << 20;

fn numbers(svm: &Svm) -> SvmSlice<u64> {
    svm.alloc_slice::<u64>(WORDS).unwrap()
}

fn on_both(svm: &Svm, numbers: &SvmSlice<u64>) {
    for device in [0, 1] {
        add_one(svm, device, (numbers.device_ptr(), WORDS));
    }
}

#[test]
fn pages_go_from_device_to_device_on_a_fabric() {
    let svm = two_devices(ByteSize::mib(8), true, Stay(Duration::ZERO));
    let numbers = numbers(&svm);
    on_both(&svm, &numbers);
    let stats = svm.stats();
    assert_eq!((stats.to_peer.bytes, stats.to_ram.bytes), (BYTES, 0));
    assert_eq!(stats.pages_on_devices, BYTES / 4096);
    assert_eq!(stats.vram_used_bytes, BYTES, "the first device is empty");
    assert!(numbers.iter().all(|x| *x == 2));
    assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
}

#[test]
fn pages_go_through_ram_without_a_fabric() {
    let svm = two_devices(ByteSize::mib(8), false, Stay(Duration::ZERO));
    let numbers = numbers(&svm);
    on_both(&svm, &numbers);
    let stats = svm.stats();
    assert_eq!((stats.to_peer.bytes, stats.to_ram.bytes), (0, BYTES));
    assert_eq!(stats.to_device.bytes, 2 * BYTES);
    assert!(numbers.iter().all(|x| *x == 2));
}

#[test]
fn a_page_in_its_timeslice_is_reached_where_it_is_on_a_fabric() {
    const TIMESLICE: Duration = Duration::from_secs(4);
    let svm = two_devices(ByteSize::mib(8), true, Stay(TIMESLICE));
    let numbers = numbers(&svm);
    let began = Instant::now();
    on_both(&svm, &numbers);
    on_both(&svm, &numbers);
    assert!(began.elapsed() < TIMESLICE, "nobody waited");
    let stats = svm.stats();
    assert_eq!((stats.to_peer.bytes, stats.to_ram.bytes), (0, 0));
    assert_eq!(stats.vram_used_bytes, BYTES, "on the first device only");
    assert!(numbers.iter().all(|x| *x == 4));
}

#[test]
fn a_page_in_its_timeslice_is_waited_for_without_a_fabric() {
    const TIMESLICE: Duration = Duration::from_millis(300);
    let svm = two_devices(ByteSize::mib(8), false, Stay(TIMESLICE));
    let numbers = numbers(&svm);
    add_one(&svm, 0, (numbers.device_ptr(), WORDS));
    let there = Instant::now();
    add_one(&svm, 1, (numbers.device_ptr(), WORDS));
    assert!(there.elapsed() > TIMESLICE / 2, "it came home too early");
    let stats = svm.stats();
    assert_eq!((stats.to_peer.bytes, stats.to_ram.bytes), (0, BYTES));
    svm.touch(numbers.as_ptr(), ByteSize::new(BYTES)).unwrap();
    assert!(numbers.iter().all(|x| *x == 2));
}

/// What a launch declared stays on its device as long as it runs, and the other device reaches it there.
#[test]
fn declared_pages_are_reached_where_they_are_while_the_launch_runs() {
    within(Duration::from_secs(60), || {
        let svm = two_devices(ByteSize::mib(8), true, Stay(Duration::ZERO));
        let numbers = numbers(&svm);
        let gate = svm.alloc_slice::<u64>(1).unwrap();
        let (p, open) = (numbers.device_ptr(), gate.device_ptr());
        let declared = Resident::new().writes(&numbers);
        // SAFETY: by atomics on all sides; both outlive the launch.
        let launch = unsafe {
            svm.launch_resident(0, Grid::new(1), declared, move |lane| {
                while lane.atomic_add(open, 0u64)? == 0 {
                    std::thread::yield_now();
                }
                lane.atomic_add(p, 1u64)?;
                Ok(())
            })
        };
        let launch = launch.unwrap();
        add_one(&svm, 1, (p, WORDS));
        let stats = svm.stats();
        assert_eq!(stats.to_peer.bytes, 0, "a launch needs them where they are");
        // SAFETY: in the slice, by an atomic.
        let gate = unsafe { &*gate.as_ptr().cast::<std::sync::atomic::AtomicU64>() };
        gate.store(1, std::sync::atomic::Ordering::SeqCst);
        launch.wait().unwrap();
        assert_eq!((numbers[0], numbers[1]), (2, 1));
    });
}

/// The CPU takes 64 KiB out of the middle each time, so that ranges are in pieces.
#[test]
fn ranges_in_pieces_go_back_and_forth() {
    within(Duration::from_secs(60), || {
        let stay = Stay(Duration::from_millis(5));
        let svm = two_devices_with(ByteSize::mib(8), true, stay, |builder| {
            builder.cpu_fault_window(ByteSize::kib(64))
        });
        let numbers = numbers(&svm);
        for round in 0..50u64 {
            on_both(&svm, &numbers);
            assert_eq!(numbers[WORDS / 2], 2 * round + 2);
        }
        assert!(numbers.iter().all(|x| *x == 100));
        let stats = svm.shutdown().unwrap();
        assert_eq!((stats.vram_used_bytes, stats.pages_on_devices), (0, 0));
    });
}

#[test]
fn an_unbound_device_takes_no_launches_and_has_no_pages() {
    let svm = two_devices(ByteSize::mib(8), true, Stay(Duration::from_millis(1)));
    let numbers = numbers(&svm);
    add_one(&svm, 0, (numbers.device_ptr(), WORDS));
    svm.unbind(0).unwrap();
    assert_eq!(svm.stats().pages_on_devices, 0);
    // SAFETY: it is refused.
    let refused = unsafe { svm.launch(Grid::new(1), |_| Ok(())) };
    let refused = refused.unwrap_err();
    assert!(matches!(refused, Error::Unbound { device: 0 }));
    assert_eq!(refused.errno(), 19);
    add_one(&svm, 1, (numbers.device_ptr(), WORDS));
    svm.rebind(0).unwrap();
    assert!(matches!(
        svm.rebind(0),
        Err(Error::Rebind { device: 0, .. })
    ));
    assert!(matches!(svm.unbind(2), Err(Error::NoDevice)));
    add_one(&svm, 0, (numbers.device_ptr(), WORDS));
    assert!(numbers.iter().all(|x| *x == 3));
}
