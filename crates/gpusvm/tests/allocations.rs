//! The way of a CPU fault, from the message to the wake-up, allocates and frees nothing on the global
//! heap: a thread of the program may hold the heap's lock while it waits for its page.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Stay, add_one, built, engine, two_devices_with, within};
use gpusvm::{ByteSize, Grid, SoftGpu, Svm};
use gpusvm_testkit::CountingAllocator;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator::new();

/// One test at a time: what is live is counted for the process.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn handlers_allocate_nothing_after_they_have_started() {
    let _alone = alone();
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
        assert_eq!(mark.frees(&ALLOCATOR), 0, "in {faults} faults");
    });
}

/// Also where device memory is cleared when it is given back, and reached by peers.
#[test]
fn handlers_allocate_nothing_with_peers_and_scrubbing() {
    const WORDS: usize = 1 << 18;
    let _alone = alone();
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
        assert_eq!(mark.frees(&ALLOCATOR), 0, "in {faults} faults");
    });
}

/// Pages that bounce leave nothing behind, however long others stay. What came first was once all that
/// was looked at: behind an allocation that stayed, every other was kept for ever.
#[test]
fn pages_that_bounce_behind_others_that_stay_keep_no_memory() {
    const PAGE: usize = 512;
    let _alone = alone();
    let gpu = SoftGpu::with_vram(ByteSize::mib(4)).unwrap();
    let stay = Arc::new(Stay(Duration::ZERO));
    let svm = built(Svm::builder().device(gpu).policy(stay));
    let stays = svm.alloc_slice::<u64>(PAGE).unwrap();
    let mut bounces = svm.alloc_slice::<u64>(PAGE).unwrap();
    within(Duration::from_secs(60), || {
        add_one(&svm, 0, (stays.device_ptr(), 1));
        let mut round = || {
            add_one(&svm, 0, (bounces.device_ptr(), 1));
            bounces[0] += 1;
        };
        (0..100).for_each(|_| round());
        let before = ALLOCATOR.live();
        (0..1000).for_each(|_| round());
        let grown = ALLOCATOR.live().saturating_sub(before);
        assert!(grown < 300, "{grown} more after 1000 rounds");
    });
}
