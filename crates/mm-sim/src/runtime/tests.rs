use super::*;
use std::sync::atomic::{AtomicU64, Ordering};

fn runtime(seed: u64) -> Arc<Runtime> {
    Runtime::new(seed, 1000, 10_000)
}

fn message(run: impl FnOnce()) -> String {
    let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
    panic.downcast_ref::<String>().cloned().unwrap_or_default()
}

#[test]
fn one_seed_gives_one_order() {
    let order = |seed| {
        let world = runtime(seed);
        let bodies = (0..4).map(|i| {
            let world = Arc::clone(&world);
            let body = move || {
                for step in 0..5 {
                    world.trace(format_args!("{i} {step}"));
                    world.yield_now();
                }
            };
            Box::new(body) as Body
        });
        world.run(bodies.collect(), Vec::new());
        world.traced()
    };
    assert_eq!(order(1), order(1));
    assert!((2..10).any(|seed| order(seed) != order(1)));
}

#[test]
fn when_all_sleep_the_clock_jumps() {
    let world = runtime(3);
    let bodies = [5, 3].map(|secs| {
        let world = Arc::clone(&world);
        Box::new(move || world.sleep(Duration::from_secs(secs))) as Body
    });
    world.run(bodies.into(), Vec::new());
    let times = world.thread_times();
    assert_eq!(times[0].slept, Duration::from_secs(5));
    assert_eq!(times[1].slept, Duration::from_secs(3));
    assert_eq!(times[0].busy, Duration::ZERO);
}

#[test]
fn locks_of_others_wait_their_turn_and_a_deadlock_is_told() {
    let (a, b) = (
        Arc::new(gpusvm_sync::Mutex::new(0)),
        Arc::new(gpusvm_sync::Mutex::new(0)),
    );
    let pair = |seed, swapped: bool| {
        let world = runtime(seed);
        let bodies = [(&a, &b), if swapped { (&b, &a) } else { (&a, &b) }];
        let bodies = bodies.map(|(first, second)| {
            let (world, first, second) =
                (Arc::clone(&world), Arc::clone(first), Arc::clone(second));
            let body = move || {
                let mut first = first.lock();
                world.yield_now();
                *first += 1;
                *second.lock() += 1;
            };
            Box::new(body) as Body
        });
        world.run(bodies.into(), Vec::new());
    };
    (0..20).for_each(|seed| pair(seed, false));
    let found = (0..20).filter(|seed| {
        let run = catch_unwind(AssertUnwindSafe(|| pair(*seed, true)));
        run.is_err_and(|panic| {
            let text = panic.downcast_ref::<String>().unwrap();
            assert!(
                text.contains("deadlock") && text.contains("waits for a mutex"),
                "{text}"
            );
            assert!(text.contains(&format!("seed {seed}:")), "{text}");
            true
        })
    });
    assert!(found.count() > 0);
}

#[test]
fn a_panic_ends_the_run_and_says_the_seed() {
    let world = runtime(9);
    let other = Arc::new(AtomicU64::new(0));
    let bodies: [Body; 2] = [
        {
            let (world, other) = (Arc::clone(&world), Arc::clone(&other));
            Box::new(move || {
                loop {
                    other.fetch_add(1, Ordering::Relaxed);
                    world.yield_now();
                }
            })
        },
        Box::new(|| panic!("as it was told")),
    ];
    let text = message(|| world.run(bodies.into(), Vec::new()));
    assert!(
        text.starts_with("seed 9: thread 1 panicked: as it was told"),
        "{text}"
    );
    // The world can be used again.
    world.run(vec![Box::new(|| {})], Vec::new());
    let text = message(|| world.run(vec![Box::new(|| std::panic::panic_any(7))], Vec::new()));
    assert!(text.contains("no message"), "{text}");
}

#[test]
fn a_thread_that_spins_for_ever_is_found() {
    let world = runtime(1);
    let spins = Arc::clone(&world);
    let body = move || loop {
        spins.yield_now();
    };
    let text = message(|| world.run(vec![Box::new(body)], Vec::new()));
    assert!(text.contains("no end in sight"), "{text}");
}

#[test]
fn threads_that_wait_for_each_other_while_they_unwind_stay_behind() {
    /// Waits in its destructor for what never comes.
    struct Waits(Arc<Runtime>);
    impl Drop for Waits {
        fn drop(&mut self) {
            self.0.wait_until(&"nothing", None, &mut || false);
        }
    }
    let world = runtime(1);
    let held = Arc::clone(&world);
    let body = move || {
        let _waits = Waits(held);
        panic!("now");
    };
    let text = message(|| world.run(vec![Box::new(body)], Vec::new()));
    assert!(text.contains("now") || text.contains("deadlock"), "{text}");
}

#[test]
fn waits_with_a_timeout_end() {
    let world = runtime(1);
    let waits = Arc::clone(&world);
    let body = move || {
        let ready = waits.wait_until(&"nothing", Some(Duration::from_millis(4)), &mut || false);
        assert!(!ready);
    };
    world.run(vec![Box::new(body)], Vec::new());
    assert_eq!(world.thread_times()[0].waited, Duration::from_millis(4));
}
