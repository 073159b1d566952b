//! Threads that do what they want, seed by seed.
#![expect(
    clippy::unwrap_used,
    reason = "the stories of tests, told by their helpers"
)]

mod common;

use common::{Device, check, expect, fill, seeded, thread, word, world};
use gpusvm_mm::AddressSpace;
use gpusvm_mm_sim::{Backing, Body, Options, Prot, Sim};
use gpusvm_sync::Mutex;
use gpusvm_types::{ByteSize, PageCount, Span};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const PAGES: u64 = 6;
const ADDS: u64 = 12;

/// Adds to every page, with the CPU.
fn adder(sim: &Arc<Sim>, span: Span) -> Body {
    let sim = Arc::clone(sim);
    thread(move || {
        for i in 0..ADDS {
            sim.fetch_add_u64(word(span, i % PAGES), 1).unwrap();
        }
    })
}

/// Takes the span again and again.
fn puller(sim: &Arc<Sim>, device: &Arc<Device>, span: Span, peer: Option<&Arc<Device>>) -> Body {
    let (sim, device, peer) = (Arc::clone(sim), Arc::clone(device), peer.cloned());
    thread(move || {
        for _ in 0..4 {
            // Unmapped, or moved: another thread's doing.
            let _ = device.pull(&sim, span, peer.as_deref());
            let wait = sim.random(60);
            sim.sleep(Duration::from_micros(wait));
        }
    })
}

fn evicter(sim: &Arc<Sim>, device: &Arc<Device>) -> Body {
    let (sim, device) = (Arc::clone(sim), Arc::clone(device));
    thread(move || {
        for _ in 0..6 {
            let pfn = u32::try_from(sim.random(PAGES)).unwrap();
            // A copy may fail: then the page stays.
            let _ = device.evict(&sim, pfn);
        }
    })
}

fn migrations(seed: u64) -> Vec<String> {
    let (sim, first, span) = world(seeded(seed), PAGES);
    let second = Device::add(&sim, 2, 64);
    first.set_window(ByteSize::kib(8));
    second.slips_out.store(10, Ordering::Release);
    fill(&sim, span, 0);
    let threads = vec![
        adder(&sim, span),
        adder(&sim, span),
        puller(&sim, &first, span, None),
        puller(&sim, &second, span, Some(&first)),
        evicter(&sim, &first),
    ];
    sim.run(threads);
    check(&sim, &first);
    check(&sim, &second);
    for i in 0..PAGES {
        let sum = sim.read_u64(word(span, i)).unwrap();
        assert_eq!(sum, i + 2 * ADDS / PAGES, "seed {seed}, page {i}");
    }
    sim.trace()
}

#[test]
fn no_addition_is_lost_under_migration() {
    for seed in 0..200 {
        migrations(seed);
    }
}

#[test]
fn one_seed_replays_one_history() {
    for seed in 0..5 {
        assert_eq!(migrations(seed), migrations(seed));
    }
    assert_ne!(migrations(1), migrations(2));
}

fn with_calls(seed: u64, late_events: bool) {
    let options = Options {
        late_events,
        ..seeded(seed)
    };
    let (sim, device, span) = world(options, PAGES);
    fill(&sim, span, 40);
    device.slips_out.store(12, Ordering::Release);
    let program = Arc::clone(&sim);
    let body = move || {
        let at = Span::of_pages(span.first_page(), PageCount::new(2));
        match program.random(5) {
            0 => program.munmap(at),
            1 => {
                program.madvise_dontneed(at);
                assert_eq!(program.read_u64(at.start()), Ok(0));
                program.write_u64(at.start(), 77).unwrap();
                let pause = program.random(300);
                program.sleep(Duration::from_micros(pause));
                assert_eq!(program.read_u64(at.start()), Ok(77));
            }
            2 => {
                let there = program.mremap(span, false);
                expect(&program, there, 40);
            }
            3 => {
                let there = program.mremap(span, true);
                let third = program.mremap(there, false);
                program.madvise_dontneed(Span::page_of(third.start()));
                assert_eq!(program.read_u64(third.start()), Ok(0));
                assert_eq!(program.read_u64(word(third, 1)), Ok(41));
                assert_eq!(program.read_u64(span.start()), Ok(0));
            }
            _ => {
                program.mmap_fixed(at, Prot::ReadWrite, Backing::Mirrored);
                assert_eq!(program.read_u64(at.start()), Ok(0));
                program.arm(at).unwrap();
                assert_eq!(program.read_u64(word(span, 3)), Ok(43));
            }
        }
    };
    let threads = vec![
        thread(body),
        puller(&sim, &device, span, None),
        puller(&sim, &device, Span::page_of(span.start()), None),
        evicter(&sim, &device),
    ];
    sim.run(threads);
    check(&sim, &device);
}

#[test]
fn calls_race_with_migrations() {
    for seed in 0..300 {
        with_calls(seed, false);
    }
}

#[test]
fn late_events_race_with_migrations() {
    for seed in 0..300 {
        with_calls(seed, true);
    }
}

/// A program that moves, drops and rewrites its memory, while devices take it wherever it is.
fn wanderer(seed: u64, late_events: bool) -> u64 {
    let options = Options {
        late_events,
        ..seeded(seed)
    };
    let (sim, device, span) = world(options, PAGES);
    fill(&sim, span, 40);
    device.slips_out.store(8, Ordering::Release);
    let place = Arc::new(Mutex::new(span));
    let (program, shared) = (Arc::clone(&sim), Arc::clone(&place));
    let body = move || {
        let mut wanted: Vec<u64> = (40..40 + PAGES).collect();
        for round in 0..6 {
            program.sleep(Duration::from_micros(program.random(150)));
            let mut at = *shared.lock();
            let i = program.random(PAGES);
            let index = usize::try_from(i).unwrap();
            match program.random(4) {
                0 => {
                    program.madvise_dontneed(Span::page_of(word(at, i)));
                    wanted[index] = 0;
                }
                1 => {
                    program.write_u64(word(at, i), round).unwrap();
                    wanted[index] = round;
                }
                kind => {
                    at = program.mremap(at, kind == 2);
                    if program.random(2) == 0 {
                        program.madvise_dontneed(Span::page_of(word(at, i)));
                        wanted[index] = 0;
                    }
                    *shared.lock() = at;
                }
            }
            let check = program.random(PAGES);
            let want = wanted[usize::try_from(check).unwrap()];
            assert_eq!(program.read_u64(word(at, check)), Ok(want), "round {round}");
        }
        for (i, want) in (0..).zip(wanted) {
            assert_eq!(program.read_u64(word(*shared.lock(), i)), Ok(want));
        }
    };
    let puller = || {
        let (sim, device, place) = (Arc::clone(&sim), Arc::clone(&device), Arc::clone(&place));
        thread(move || {
            for _ in 0..10 {
                let span = *place.lock();
                // It may not be known there yet.
                if let Ok(token) = sim.arm(span) {
                    let _ = device.pull(&sim, span, None);
                    sim.disarm(span, token);
                }
                sim.sleep(Duration::from_micros(sim.random(40)));
            }
        })
    };
    sim.run(vec![
        thread(body),
        puller(),
        puller(),
        evicter(&sim, &device),
    ]);
    check(&sim, &device);
    sim.stats().aborts
}

#[test]
fn a_program_that_moves_its_memory_finds_it_again() {
    for late_events in [false, true] {
        let aborts: u64 = (0..400).map(|seed| wanderer(seed, late_events)).sum();
        assert!(aborts > 100, "{aborts}");
    }
}

#[test]
fn exit_races_with_everything() {
    for seed in 0..100 {
        let (sim, device, span) = world(seeded(seed), PAGES);
        fill(&sim, span, 40);
        let (program, reader) = (Arc::clone(&sim), Arc::clone(&sim));
        let threads = vec![
            thread(move || program.exit()),
            thread(move || {
                for i in 0..PAGES {
                    let _ = reader.read_u64(word(span, i));
                }
            }),
            puller(&sim, &device, span, None),
            evicter(&sim, &device),
        ];
        sim.run(threads);
        check(&sim, &device);
        assert_eq!(device.held(), 0);
    }
}

#[test]
#[should_panic(expected = "deadlock")]
fn two_blocks_in_two_orders_are_a_deadlock() {
    for seed in 0..100 {
        let (sim, _device, span) = world(seeded(seed), 1024);
        let [low, high] = [0, 512].map(|i| Span::page_of(word(span, i)));
        let pair = |first: Span, second: Span| {
            let sim = Arc::clone(&sim);
            thread(move || {
                let _first = sim.lock_block(first).unwrap();
                let _second = sim.lock_block(second).unwrap();
            })
        };
        sim.run(vec![pair(low, high), pair(high, low)]);
    }
}

#[test]
fn conditions_and_locks_of_the_layers_above_are_yield_points() {
    for seed in 0..50 {
        let sim = Sim::new(seeded(seed));
        let pair = Arc::new((Mutex::new(0), gpusvm_sync::Condvar::new()));
        let (waits, tells) = (Arc::clone(&pair), Arc::clone(&pair));
        let (waiting, telling) = (Arc::clone(&sim), Arc::clone(&sim));
        let waiter = move || {
            let mut count = waits.0.lock();
            while *count < 3 {
                count = waits.1.wait(count);
                // Somebody else may run, and meet the lock held.
                waiting.yield_now();
            }
            let timeout = Duration::from_secs(5);
            assert!(waits.1.wait_timeout(count, timeout).1, "in no time at all");
        };
        let teller = move || {
            for _ in 0..3 {
                *tells.0.lock() += 1;
                tells.1.notify_one();
                telling.yield_now();
            }
        };
        sim.run(vec![thread(waiter), thread(teller)]);
        assert!(sim.thread_times()[0].waited >= Duration::from_secs(5));
    }
}
