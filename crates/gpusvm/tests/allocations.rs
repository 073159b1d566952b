//! The way of a CPU fault, from the message to the wake-up, allocates nothing on the global heap: a
//! thread of the program may hold the heap's lock while it waits for its page.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Stay, add_one, engine, two_devices_with, within};
use gpusvm::{ByteSize, Grid};
use gpusvm_testkit::CountingAllocator;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

#[test]
fn handlers_allocate_nothing_after_they_have_started() {
    let svm = engine(ByteSize::mib(4));
    let mut numbers = svm.alloc_slice::<u64>(3 << 18).unwrap();
    let (p, n) = (numbers.device_ptr(), numbers.len());
    let mut round = |expected: u64| {
        // SAFETY: not touched until the launch has ended.
        let launch = unsafe {
            svm.launch(Grid::new(n), move |lane| {
                lane.atomic_add(p.add(lane.id()), 1u64)?;
                Ok(())
            })
        };
        launch.unwrap().wait().unwrap();
        assert!(numbers.iter_mut().all(|x| *x == expected));
    };
    within(Duration::from_secs(60), || {
        round(1);
        let mark = ALLOCATOR.mark(&svm.handler_threads());
        let before = svm.stats().cpu_faults;
        (2..40).for_each(&mut round);
        let faults = svm.stats().cpu_faults - before;
        assert!(faults > 38, "{faults} faults");
        assert_eq!(mark.allocations(&ALLOCATOR), 0, "in {faults} faults");
    });
}

/// Also where device memory is cleared when it is given back, and reached by peers.
#[test]
fn handlers_allocate_nothing_with_peers_and_scrubbing() {
    const WORDS: usize = 1 << 18;
    let stay = Stay(Duration::ZERO);
    let svm = two_devices_with(ByteSize::mib(4), true, stay, |builder| builder.scrub(true));
    let mut numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
    let mut round = |expected: u64| {
        let all = (numbers.device_ptr(), WORDS);
        add_one(&svm, 0, all);
        add_one(&svm, 1, all);
        assert!(numbers.iter_mut().all(|x| *x == expected));
    };
    within(Duration::from_secs(60), || {
        round(2);
        let mark = ALLOCATOR.mark(&svm.handler_threads());
        let before = svm.stats().cpu_faults;
        (2..30).for_each(|n| round(2 * n));
        let faults = svm.stats().cpu_faults - before;
        assert!(faults > 20, "{faults} faults");
        assert_eq!(mark.allocations(&ALLOCATOR), 0, "in {faults} faults");
    });
}
