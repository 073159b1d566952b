//! Mistakes that others made in this layer: what comes after the end, and what is counted.

use crate::gpu::Done;
use crate::lab::{Lab, RANGE, WRITE, everywhere, part};
use gpusvm_mm::{AddressSpace, Reason};
use gpusvm_mm_sim::{Backing, Options, Prot, Sim};
use gpusvm_svm::{FindError, Range};
use gpusvm_types::{ByteSize, Span};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A block, and three ranges: mapped in it, unmapped elsewhere and not collected, and one of the block
/// that is on the device and not yet mapped.
fn three_ranges(lab: &Lab) -> (Span, [Arc<Range<Sim>>; 3]) {
    let block = lab.block();
    let mapped = lab.mapped_range(block);
    let unmapped = lab.mapped_range(lab.some(Prot::ReadWrite, Backing::Mirrored));
    let waiting = lab.range_on_device(part(block, 2 * RANGE, RANGE));
    lab.sim.munmap(unmapped.span());
    (block, [mapped, unmapped, waiting])
}

/// Work that was already queued ran after the mirror had been torn down. Here: `close` waits for who
/// is inside, and whatever is called later finds nothing to do.
#[test]
fn lesson_23_nothing_happens_after_close() {
    let lab = Lab::new(&[0]);
    let (block, [mapped, unmapped, waiting]) = three_ranges(&lab);
    let prepared = lab.get_pages(&waiting, &WRITE).unwrap();
    lab.svm.close();
    assert_eq!(lab.sim.notifiers().count(), 0);
    assert_eq!((lab.svm.range_count(), lab.gpu.entries()), (0, Vec::new()));
    lab.log.take();

    assert_eq!(lab.svm.collect_garbage(), 0);
    assert!(!lab.commit(&waiting, prepared));
    let error = lab
        .svm
        .range_find_or_insert(block.start(), &WRITE, everywhere());
    assert_eq!(error.unwrap_err(), FindError::Closed);
    lab.invalidate(block, Reason::Unmap);
    for range in [&mapped, &unmapped, &waiting] {
        assert!(range.is_gone());
        assert!(!lab.svm.range_remove(range));
        lab.svm.range_unmap(range);
    }
    lab.svm.close();
    assert_eq!(lab.log.take_of_table(), []);
    assert_eq!((lab.devices[0].reached(), lab.svm.range_count()), (0, 0));

    assert_eq!(lab.svm.range_arm(&mapped, &mapped.serve()), Ok(false));
    lab.sim.bring_home(block).unwrap();
    for range in [&mapped, &waiting] {
        lab.check(range.span());
        assert!(!lab.is_watched(range.span()), "nothing stays armed");
    }
    lab.assert_ends();
}

/// As above, with others in the middle of it: after `close` has returned, the device is told nothing.
#[test]
fn lesson_23_also_when_others_are_in_the_middle() {
    for seed in 0..300 {
        let options = Options {
            seed,
            ..Options::default()
        };
        let lab = Lab::with(options, &[0], ByteSize::kib(64));
        let (block, [mapped, _, waiting]) = three_ranges(&lab);
        let neighbour = lab.mapped_range(part(block, 7 * RANGE, RANGE)).span();
        let other = Arc::clone(&lab);
        let inserts = move || {
            let at = part(block, 5 * RANGE, 1).start();
            if let Ok(range) = other.svm.range_find_or_insert(at, &WRITE, everywhere())
                && other.svm.range_arm(&range, &range.serve()).unwrap()
            {
                other.map(&range);
            }
        };
        let other = Arc::clone(&lab);
        let commits = move || {
            let _serving = waiting.serve();
            let prepared = other.get_pages(&waiting, &WRITE).unwrap();
            let bind = |runs: &[_]| other.gpu.bind_and_fail(runs);
            let _ = other.commit_with(&waiting, prepared, bind);
        };
        let other = Arc::clone(&lab);
        let removes = move || {
            other.svm.collect_garbage();
            other.svm.range_remove(&mapped);
        };
        let other = Arc::clone(&lab);
        let invalidates = move || other.invalidate(neighbour, Reason::Protect);
        let other = Arc::clone(&lab);
        let told = Arc::new(AtomicUsize::new(0));
        let at_close = Arc::clone(&told);
        let closes = move || {
            other.svm.close();
            at_close.store(of_table(&other), Ordering::Release);
        };
        lab.sim.run(vec![
            Box::new(inserts),
            Box::new(commits),
            Box::new(removes),
            Box::new(invalidates),
            Box::new(closes),
        ]);
        let told = told.load(Ordering::Acquire);
        assert_eq!(of_table(&lab), told, "seed {seed}: called after close");
        assert_eq!(lab.sim.notifiers().count(), 0, "seed {seed}: it listens");
        lab.sim.bring_home(block).unwrap();
        for first in [0, 2, 5] {
            let span = part(block, first * RANGE, RANGE);
            assert!(!lab.is_watched(span), "seed {seed}: {span} stays armed");
        }
        lab.assert_ends();
    }
}

/// How often the device was told anything about its page table, or about garbage.
fn of_table(lab: &Lab) -> usize {
    let log = lab.log.peek();
    let is_told = |done: &&Done| done.is_of_table() && !matches!(done, Done::Bind(_));
    log.iter().filter(is_told).count()
}

/// The svm half of lesson 26: what was collected was taken off the count twice, which wrapped, and the
/// next range was never collected. Here: what is counted is what was found.
#[test]
fn garbage_is_counted_once() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    let spans = [0, 1].map(|i| part(block, i * RANGE, RANGE));
    let ranges = spans.map(|span| lab.mapped_range(span));
    for (range, left) in ranges.iter().zip([1, 0]) {
        lab.sim.munmap(range.span());
        // Unmapping what is unmapped is no news.
        lab.invalidate(range.span(), Reason::Unmap);
        assert_eq!(lab.svm.collect_garbage(), 1);
        assert_eq!(lab.svm.collect_garbage(), 0);
        assert_eq!(lab.svm.range_count(), left);
    }
    let backing = Backing::Mirrored;
    lab.sim.mmap_fixed(spans[1], Prot::ReadWrite, backing);
    lab.fill(spans[1]);
    let again = lab.mapped_range(spans[1]);
    assert!(!Arc::ptr_eq(&again, &ranges[1]) && !again.is_unmapped());
    assert_eq!(lab.svm.collect_garbage(), 0);
    lab.assert_ends();
}

#[test]
fn garbage_is_counted_once_by_many() {
    for seed in 0..100 {
        let options = Options {
            seed,
            late_events: seed % 2 == 1,
            ..Options::default()
        };
        let lab = Lab::with(options, &[0], ByteSize::mib(512));
        let block = lab.block();
        let ranges = (0..9).map(|i| part(block, i * RANGE, RANGE));
        ranges.for_each(|span| drop(lab.mapped_range(span)));
        let collected = Arc::new(AtomicUsize::new(0));
        let threads = (0..3).map(|thread| {
            let (lab, collected) = (Arc::clone(&lab), Arc::clone(&collected));
            Box::new(move || {
                for i in 0..3 {
                    lab.sim.munmap(part(block, (3 * thread + i) * RANGE, RANGE));
                    collected.fetch_add(lab.svm.collect_garbage(), Ordering::AcqRel);
                }
            }) as Box<dyn FnOnce() + Send>
        });
        lab.sim.run(threads.collect());
        lab.sim.settle_events();
        let collected = collected.load(Ordering::Acquire) + lab.svm.collect_garbage();
        assert_eq!((collected, lab.svm.range_count()), (9, 0), "seed {seed}");
        assert_eq!(lab.svm.collect_garbage(), 0);
        lab.assert_ends();
    }
}
