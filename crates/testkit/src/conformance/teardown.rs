//! A device leaves while all are at work: nothing hangs, nobody is told what is not so, nothing leaks.
//!
//! ```text
//!   the device reads and writes  \
//!   prefetches out and home       |--- meanwhile: unbound and rebound | its address space closed
//!   the CPU adds                 /
//! ```

use super::anon::is_of_unmapping;
use super::{Bench, Kit, Part, Setup};
use crate::mirror::words_of;
use crate::world::World;
use gpusvm::driver::{Location, PrefetchError, PrefetchReason};
use gpusvm_device::FaultError;
use gpusvm_pagemap::MigrateError;
use gpusvm_sync::{Arc, Mutex, yield_now};
use gpusvm_types::{Span, VirtAddr};

const PAGES: u64 = 16;
const ROUNDS: u64 = 6;

/// What the device may be told.
fn is_fine(error: &FaultError, is_faulting: bool) -> bool {
    // A launch that declares may find its pages taken again and again.
    let gave = matches!(error, FaultError::Gave { .. }) && !is_faulting;
    gave || matches!(error, FaultError::Closed { .. }) || is_of_unmapping(error)
}

/// What a prefetch may be told.
fn is_fine_to_prefetch(error: &PrefetchError) -> bool {
    matches!(
        error.reason,
        PrefetchReason::Fault(FaultError::Closed { .. })
            | PrefetchReason::Migrate(
                MigrateError::Unbound { .. } | MigrateError::NothingCollected { .. }
            )
    )
}

/// The device adds, until it is told that it cannot. How often it did.
fn device_adds<W: World>(words: &Arc<Vec<VirtAddr>>, done: &Arc<Mutex<u64>>) -> Part<W> {
    let (words, done) = (Arc::clone(words), Arc::clone(done));
    Box::new(move |bench| {
        for _ in 0..ROUNDS {
            for word in words.iter() {
                match bench.mirror().add(&[*word], 1) {
                    Ok(_) => *done.lock() += 1,
                    Err(error) => assert!(is_fine(&error, bench.is_faulting()), "{error}"),
                }
            }
        }
    })
}

fn cpu_adds<W: World>(words: &Arc<Vec<VirtAddr>>, done: &Arc<Mutex<u64>>) -> Part<W> {
    let (words, done) = (Arc::clone(words), Arc::clone(done));
    Box::new(move |bench| {
        for at in (0..ROUNDS).flat_map(|_| words.iter()) {
            let added = bench.world().fetch_add(*at, 1);
            assert!(added.is_ok(), "{added:?}");
            *done.lock() += 1;
        }
    })
}

fn prefetches<W: World>(span: Span) -> Part<W> {
    Box::new(move |bench| {
        for to in (0..ROUNDS).flat_map(|_| [Location::Device, Location::Ram]) {
            let waited = bench.mirror().vm.prefetch(&[span], to).wait();
            let fine = waited.as_ref().err().is_none_or(is_fine_to_prefetch);
            assert!(fine, "{waited:?}");
        }
    })
}

/// All at work, and what happens meanwhile: every addition that was made is there.
fn under_way<W: World>(bench: &Arc<Bench<W>>, meanwhile: Part<W>) {
    let span = bench.memory(PAGES);
    let words = Arc::new(words_of(span));
    let done = Arc::new(Mutex::new(0));
    bench.run(vec![
        device_adds(&words, &done),
        prefetches(span),
        cpu_adds(&words, &done),
        meanwhile,
    ]);
    let read = |at: &VirtAddr| bench.world().read(*at).expect("it is mapped");
    let sum: u64 = words.iter().map(read).sum();
    assert_eq!(sum, *done.lock(), "every addition, and each once");
}

/// A device is taken out of use, and into use again, while all are at work.
pub fn unbind_with_work_under_way<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let unbinds: Part<W> = Box::new(|bench| {
            for _ in 0..ROUNDS {
                yield_now();
                let region = &bench.mirror().region;
                // A launch that declared pages keeps them there.
                if region.unbind().is_ok() {
                    assert_eq!(region.used().get(), 0);
                    assert_eq!(bench.mirror().pagemap().pages_in_use().get(), 0);
                }
                // Pages that stayed keep it from that.
                let _ = region.rebind();
            }
        });
        under_way(bench, unbinds);
    });
}

/// The address space of a device is closed while all are at work: who waits for it is told.
pub fn close_with_work_under_way<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        let closes: Part<W> = Box::new(|bench| {
            (0..ROUNDS).for_each(|_| yield_now());
            bench.mirror().vm.close();
            bench.mirror().region.close_prefetches();
        });
        under_way(bench, closes);
        let mirror = bench.mirror();
        assert_eq!(mirror.gpu.mappings(), [], "mapped after the end");
        let closed = mirror.vm.prefetch(&[bench.memory(1)], Location::Device);
        let waited = closed.wait();
        assert!(
            waited.as_ref().is_err_and(is_fine_to_prefetch),
            "{waited:?}"
        );
    });
}
