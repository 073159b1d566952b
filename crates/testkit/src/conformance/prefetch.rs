//! Memory that is brought to a device before it touches it.
//!
//! In a simulated world no threads work in the background: simulated ones do, or who waits.

use super::{Bench, Kit, Part, Setup};
use crate::mirror::words_of;
use crate::world::{Feature, Kind, Prot, World};
use gpusvm::driver::{Location, PrefetchError, PrefetchReason};
use gpusvm_device::FaultError;
use gpusvm_pagemap::MigrateError;
use gpusvm_sync::{Arc, yield_now};
use gpusvm_types::Span;

/// What races are for: small, so that its pages meet often.
const PAGES: u64 = 16;
/// How often each thread does what it does.
const ROUNDS: u64 = 6;
/// Several blocks: what can be cancelled between.
const BLOCKS: u64 = 3;

/// What was prefetched, to the device or to RAM, costs the device no fault, to read or to write.
pub fn prefetch_then_no_fault<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(600);
        bench.fill(span, 1);
        let mirror = bench.mirror();
        for (to, tag) in [
            (Location::Device, 1),
            (Location::Ram, 2),
            (Location::Device, 3),
        ] {
            let done = mirror.vm.prefetch(&[span], to).wait();
            let done = done.expect("nothing is in the way");
            assert_eq!((done.invalid, done.failed, done.cancelled), (0, 0, false));
            let there = mirror.on_device(span);
            match to {
                Location::Device => assert_eq!(there, span.page_count()),
                _ => assert_eq!(there.get(), 0),
            }
            let ((), faults) = mirror.faults_of(|| {
                bench.device_expect(0, span, tag);
                let written = bench.device_fill(0, span, tag + 1);
                assert_eq!(written, Ok(()));
            });
            assert_eq!(faults, 0, "prefetched to {to:?}");
        }
        bench.expect(span, 4);
    });
}

/// A prefetch is cancelled while another thread works on it: what has begun is done, the rest did not
/// begin, all is right.
pub fn prefetch_cancelled<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let span = bench.memory(BLOCKS * 512);
        let ends = Span::of_pages(span.first_page(), gpusvm_types::PageCount::new(PAGES));
        bench.fill(ends, 1);
        let prefetch = Arc::new(bench.mirror().vm.prefetch(&[span], Location::Device));
        let handle = Arc::clone(&prefetch);
        let works: Part<W> = Box::new(|bench| while bench.mirror().region.work_on_prefetches() {});
        let cancels: Part<W> = Box::new(move |_| {
            yield_now();
            handle.cancel();
            assert!(handle.is_done());
        });
        bench.run(vec![works, cancels]);
        let done = prefetch.wait().expect("nothing is in the way");
        assert!(
            done.moved <= BLOCKS && done.cancelled == (done.moved < BLOCKS),
            "{done:?}"
        );
        let moved = done.moved * 512;
        assert_eq!(bench.mirror().on_device(span).get(), moved);
        bench.device_expect(0, ends, 1);
    });
}

/// What a prefetch may be told about memory that is being unmapped.
fn is_of_unmapping(error: &PrefetchError) -> bool {
    matches!(
        error.reason,
        PrefetchReason::Fault(FaultError::Unmapped { .. })
            | PrefetchReason::Migrate(_)
            | PrefetchReason::Mm(_)
    )
}

/// Memory is unmapped, and mapped again, while it is prefetched: what is there then is new.
pub fn prefetch_racing_unmap<W: World>(kit: &Kit) {
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
                bench
                    .world()
                    .map_again(span, Prot::ReadWrite, Kind::Mirrored);
                bench.expect_zero(span);
            }
        });
        let prefetches = |to: Location| -> Part<W> {
            Box::new(move |bench| {
                for _ in 0..ROUNDS {
                    let waited = bench.mirror().vm.prefetch(&[span], to).wait();
                    let fine = waited.as_ref().err().is_none_or(is_of_unmapping);
                    assert!(fine, "{waited:?}");
                }
            })
        };
        let parts = [Location::Device, Location::Ram].map(prefetches);
        bench.run(parts.into_iter().chain([unmaps]).collect());
        bench.expect_zero(span);
        bench.device_expect_zero(0, span);
    });
}

/// The CPU writes memory while it is prefetched out and home: every write is found again.
pub fn prefetch_racing_cpu_touch<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let span = bench.memory(PAGES);
        let words = Arc::new(words_of(span));
        let adds = || -> Part<W> {
            let words = Arc::clone(&words);
            Box::new(move |bench: &Arc<Bench<W>>| {
                for at in (0..ROUNDS).flat_map(|_| words.iter()) {
                    let added = bench.world().fetch_add(*at, 1);
                    assert!(added.is_ok(), "{added:?}");
                }
            })
        };
        let prefetches: Part<W> = Box::new(move |bench| {
            for to in (0..ROUNDS).flat_map(|_| [Location::Device, Location::Advised, Location::Ram])
            {
                let waited = bench.mirror().vm.prefetch(&[span], to).wait();
                // Pages that the CPU has its hands on now stay with it.
                let is_busy = |error: &PrefetchError| {
                    matches!(
                        error.reason,
                        PrefetchReason::Migrate(MigrateError::NothingCollected { .. })
                    )
                };
                let fine = waited.as_ref().err().is_none_or(is_busy);
                assert!(fine, "{waited:?}");
            }
        });
        bench.run(vec![adds(), adds(), prefetches]);
        for at in words.iter() {
            assert_eq!(bench.world().read(*at), Ok(2 * ROUNDS), "{at}");
        }
    });
}
