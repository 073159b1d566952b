//! Things that happen at once, at any time: no write is lost, nothing old comes back, no page leaks.

use super::anon::is_of_unmapping;
use super::bench::value;
use super::{Bench, Kit, Part, Setup};
use crate::mirror::words_of;
use crate::world::{Feature, Kind, Prot, World};
use gpusvm_device::FaultError;
use gpusvm_sync::{Arc, yield_now};
use gpusvm_types::{Span, VirtAddr};

/// What the race is for: small, so that its pages meet often.
const PAGES: u64 = 16;
/// How often each thread does what it does.
const ROUNDS: u64 = 6;

/// Moves memory out and back.
fn shuttles<W: World>(span: Span, rounds: u64) -> Part<W> {
    Box::new(move |bench| {
        for _ in 0..rounds {
            // Whether it goes depends on the others.
            let _ = bench.mirror().migrate_to_dev(span);
            yield_now();
            let _ = bench.mirror().migrate_to_sys(span);
        }
    })
}

/// The CPU adds one to each word, again and again.
fn cpu_adds<W: World>(words: &Arc<Vec<VirtAddr>>) -> Part<W> {
    let words = Arc::clone(words);
    Box::new(move |bench| {
        for at in (0..ROUNDS).flat_map(|_| words.iter()) {
            let added = bench.world().fetch_add(*at, 1);
            assert!(added.is_ok(), "{added:?}");
        }
    })
}

/// The device adds one to each word, again and again.
fn device_adds<W: World>(words: &Arc<Vec<VirtAddr>>) -> Part<W> {
    let words = Arc::clone(words);
    Box::new(move |bench| {
        for _ in 0..ROUNDS {
            let added = bench.mirror().add(&words, 1);
            assert!(added.is_ok(), "{added:?}");
        }
    })
}

fn expect_sums<W: World>(bench: &Bench<W>, words: &[VirtAddr], adders: u64) {
    for at in words {
        assert_eq!(bench.world().read(*at), Ok(adders * ROUNDS), "{at}");
    }
}

/// Threads write to memory while it goes out and back: every write is found again.
pub fn lost_cpu_writes_in_the_copy_window<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let span = bench.memory(PAGES);
        let words = Arc::new(words_of(span));
        let adds = || cpu_adds::<W>(&words);
        bench.run(vec![adds(), adds(), adds(), shuttles(span, 3 * ROUNDS)]);
        expect_sums(bench, &words, 3);
    });
}

/// Two threads of the device fault in one block at once: both get through, none counts twice.
pub fn two_threads_fault_one_block<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let span = bench.memory(PAGES);
        let words = Arc::new(words_of(span));
        let adds = || device_adds::<W>(&words);
        bench.run(vec![adds(), adds(), shuttles(span, 2)]);
        expect_sums(bench, &words, 2);
    });
}

/// The CPU and the device fault in one block at once: both get through.
pub fn cpu_and_device_fault_one_block<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let words = Arc::new(words_of(bench.memory(PAGES)));
        let threads = vec![cpu_adds(&words), device_adds(&words), cpu_adds(&words)];
        bench.run(threads);
        expect_sums(bench, &words, 3);
    });
}

/// A device loses its memory while the CPU and the device want what is in it.
pub fn evict_racing_cpu_fault<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let words = Arc::new(words_of(bench.memory(PAGES)));
        let evicts: Part<W> = Box::new(|bench| {
            for _ in 0..2 * ROUNDS {
                // What a launch needs stays.
                let _ = bench.mirror().evict_all();
                yield_now();
            }
        });
        bench.run(vec![evicts, cpu_adds(&words), device_adds(&words)]);
        expect_sums(bench, &words, 2);
    });
}

/// Whether a device could read: what it read, unless the memory was on its way out.
fn device_reads<W: World>(bench: &Bench<W>, words: &[VirtAddr]) -> Option<Vec<u64>> {
    match bench.mirror().read(words) {
        Ok(read) => Some(read),
        // Between two looks it was unmapped, or taken away again and again.
        Err(FaultError::Gave { .. }) if !bench.is_faulting() => None,
        Err(error) => {
            assert!(is_of_unmapping(&error), "{error:?}");
            None
        }
    }
}

/// Memory is unmapped, and mapped again, while it migrates: what is there then is new.
pub fn migrate_racing_unmap<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        if !bench.can(&[Feature::Unmap]) {
            return;
        }
        let span = bench.memory(PAGES);
        let unmaps: Part<W> = Box::new(move |bench| {
            for round in 1..=ROUNDS {
                bench.fill(span, round);
                bench.expect(span, round);
                bench.world().unmap(span);
                let read = bench.world().read(span.start());
                assert!(read.is_err(), "{read:?}");
                let world = bench.world();
                world.map_again(span, Prot::ReadWrite, Kind::Mirrored);
                bench.expect_zero(span);
            }
        });
        let reads: Part<W> = Box::new(move |bench| {
            let words = words_of(span);
            for _ in 0..ROUNDS {
                let read = device_reads(bench, &words).unwrap_or_default();
                for (at, word) in words.iter().zip(read) {
                    let known = (1..=ROUNDS).any(|round| word == value(round, *at));
                    assert!(word == 0 || known, "{at} reads {word:#x}");
                }
            }
        });
        bench.run(vec![unmaps, reads, shuttles(span, ROUNDS)]);
        bench.expect_zero(span);
    });
}

/// Contents are given up while they migrate: they never come back.
pub fn migrate_racing_dontneed<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        if !bench.can(&[Feature::DropContents]) {
            return;
        }
        let span = bench.memory(PAGES);
        let drops: Part<W> = Box::new(move |bench| {
            for round in 1..=ROUNDS {
                bench.fill(span, round);
                bench.expect(span, round);
                bench.world().drop_contents(span);
                bench.expect_zero(span);
            }
        });
        let reads: Part<W> = Box::new(move |bench| {
            let words = words_of(span);
            for _ in 0..ROUNDS {
                let read = device_reads(bench, &words);
                // What a launch declared and the program dropped meanwhile is lost to the launch.
                assert!(
                    read.is_some() || !bench.is_faulting(),
                    "a device that faults reads"
                );
            }
        });
        bench.run(vec![drops, reads, shuttles(span, 2 * ROUNDS)]);
        bench.expect_zero(span);
    });
}

/// Memory gets another address while it migrates: all of it arrives.
pub fn migrate_racing_remap<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        if !bench.can(&[Feature::Remap]) {
            return;
        }
        let span = bench.memory(PAGES);
        bench.fill(span, 1);
        let moves: Part<W> = Box::new(move |bench| {
            let mut at = span;
            for round in 1..=ROUNDS {
                let to = bench.remap(at, false);
                bench.expect_moved(to, if round == 1 { span } else { at }, round);
                bench.fill(to, round + 1);
                at = to;
                // It goes from its new address too.
                let _ = bench.mirror().migrate_to_dev(at);
            }
            bench.device_expect(0, at, ROUNDS + 1);
        });
        bench.run(vec![moves, shuttles(span, 2 * ROUNDS)]);
    });
}

/// The program forks while its memory migrates: parent and child have all of it.
pub fn migrate_racing_fork<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let span = bench.memory(PAGES);
        bench.fill(span, 1);
        let forks: Part<W> = Box::new(move |bench| {
            for _ in 0..3 {
                let passed = bench.world().fork(&mut |child| {
                    let mut words = words_of(span).into_iter();
                    words.all(|at| child.read(at) == Ok(value(1, at)))
                });
                assert!(passed, "the child has all of it");
            }
        });
        let reads: Part<W> = Box::new(move |bench| {
            for _ in 0..ROUNDS {
                bench.device_expect(0, span, 1);
                bench.expect(span, 1);
            }
        });
        bench.run(vec![forks, reads, shuttles(span, 2 * ROUNDS)]);
        bench.expect(span, 1);
    });
}

/// The program ends while its memory migrates: who is at it is told so, and no device page stays.
pub fn migrate_racing_exit<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let span = bench.memory(PAGES);
        bench.fill(span, 1);
        let closes_first = bench.world().supports(Feature::ExitUnderWay).is_err();
        let ends: Part<W> = Box::new(move |bench| {
            yield_now();
            if closes_first {
                bench.mirror().vm.close();
            } else {
                bench.world().exit();
            }
        });
        let reads: Part<W> = Box::new(move |bench| {
            for _ in 0..ROUNDS {
                match bench.mirror().read(&words_of(span)) {
                    Ok(read) => {
                        let wanted = words_of(span).into_iter().map(|at| value(1, at));
                        assert_eq!(read, wanted.collect::<Vec<_>>());
                    }
                    Err(FaultError::Closed { .. }) => return,
                    Err(error) => assert!(is_of_unmapping(&error), "{error:?}"),
                }
            }
        });
        bench.run(vec![ends, reads, shuttles(span, ROUNDS)]);
        if closes_first {
            bench.expect(span, 1);
        }
        bench.world().exit();
        let used = bench.mirror().region.used();
        assert_eq!(used.get(), 0, "in use after the end");
    });
}
