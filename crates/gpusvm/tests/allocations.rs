//! The way of a CPU fault, from the message to the wake-up, allocates nothing on the global heap: a
//! thread of the program may hold the heap's lock while it waits for its page.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{engine, within};
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
