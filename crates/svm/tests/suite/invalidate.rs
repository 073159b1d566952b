//! An invalidation: many zaps, one flush, and then what was mapped is given back.

use crate::gpu::Done;
use crate::lab::{Lab, RANGE, WRITE, part};
use gpusvm_mm::{AddressSpace, Reason};
use gpusvm_types::{ByteSize, Span};
use std::sync::Arc;

/// Ranges `0..count` of a block, all mapped.
fn many(lab: &Lab, count: u64) -> Span {
    let block = lab.block();
    for i in 0..count {
        lab.mapped_range(part(block, i * RANGE, RANGE));
    }
    part(block, 0, count * RANGE)
}

/// The flush is what is expensive: it is done once, over all of them, after the last zap; what the
/// device reached is given back only then.
#[test]
fn many_zaps_are_one_flush() {
    let lab = Lab::new(&[0]);
    let span = many(&lab, 6);
    let ranges = lab.svm.ranges_in(span);
    lab.invalidate(part(span, RANGE + 3, 3 * RANGE), Reason::Protect);
    let log = lab.log.take();
    let hit = part(span, RANGE, 4 * RANGE);
    let zaps = (1..5).map(|i| Done::Zap(part(span, i * RANGE, RANGE)));
    let told: Vec<Done> = zaps.chain([Done::Flush(hit)]).collect();
    assert_eq!(log[..5], told);
    let unmaps = &log[5..];
    assert_eq!(unmaps.len(), 64);
    assert!(unmaps.iter().all(|done| matches!(done, Done::Unmap(..))));
    let mapped: Vec<bool> = ranges.iter().map(|range| range.is_mapped()).collect();
    assert_eq!(mapped, [true, false, false, false, false, true]);
    lab.check_on_gpu(part(span, 0, RANGE));
    lab.check_on_gpu(part(span, 5 * RANGE, RANGE));
    lab.assert_ends();
}

#[test]
fn the_flush_covers_what_was_zapped_and_no_more() {
    let lab = Lab::new(&[0]);
    let span = many(&lab, 4);
    let at = |i: u64| part(span, i * RANGE, RANGE);
    // The outer two are not mapped: nobody zaps or flushes them.
    for i in [0, 3] {
        let range = lab.svm.range_find(at(i).start()).unwrap();
        lab.svm.range_unmap(&range);
    }
    lab.log.take();
    lab.invalidate(span, Reason::Clear);
    let union = part(span, RANGE, 2 * RANGE);
    let told = [Done::Zap(at(1)), Done::Zap(at(2)), Done::Flush(union)];
    assert_eq!(lab.log.take_of_table(), told);
    // Nothing is mapped any more: nobody is told anything.
    lab.invalidate(span, Reason::Clear);
    assert_eq!(lab.log.take(), []);
    lab.assert_ends();
}

#[test]
fn an_invalidation_beside_all_ranges_tells_nobody() {
    let lab = Lab::new(&[0]);
    let span = many(&lab, 2);
    let entries = lab.gpu.entries();
    for reason in [Reason::Unmap, Reason::Migrate(None), Reason::Protect] {
        lab.invalidate(part(span, 2 * RANGE, 5 * RANGE), reason);
    }
    assert_eq!(lab.log.take(), []);
    assert_eq!(lab.gpu.entries(), entries);
    assert_eq!(lab.svm.collect_garbage(), 0);
    lab.assert_ends();
}

/// Only an unmap makes garbage; the others let the range be mapped again.
#[test]
fn a_range_survives_all_but_an_unmap() {
    let lab = Lab::new(&[0]);
    let span = many(&lab, 1);
    let range = lab.svm.range_find(span.start()).unwrap();
    for reason in [
        Reason::Clear,
        Reason::Protect,
        Reason::Migrate(None),
        Reason::Migrate(WRITE.owner),
    ] {
        lab.invalidate(span, reason);
        assert!(!range.is_mapped() && !range.is_gone());
        assert!(!lab.log.take().contains(&Done::Garbage));
        assert_eq!(lab.svm.collect_garbage(), 0);
        assert!(lab.map(&range), "after {reason:?}");
    }
    lab.log.take();
    lab.invalidate(span, Reason::Unmap);
    let told = [Done::Zap(span), Done::Flush(span), Done::Garbage];
    assert_eq!(lab.log.take_of_table(), told);
    assert!(range.is_unmapped() && !range.is_partially_unmapped());
    lab.assert_ends();
}

/// Each notifier hears for itself, and cuts the event to its window.
#[test]
fn windows_are_flushed_apart() {
    let lab = Lab::with(gpusvm_mm_sim::Options::default(), &[0], ByteSize::kib(128));
    let span = many(&lab, 4);
    assert_eq!(lab.sim.notifiers().count(), 2, "two ranges each");
    lab.invalidate(span, Reason::Protect);
    let log = lab.log.take_of_table();
    let halves = [part(span, 0, 2 * RANGE), part(span, 2 * RANGE, 2 * RANGE)];
    for half in halves {
        let flushes = log.iter().filter(|done| **done == Done::Flush(half));
        assert_eq!(flushes.count(), 1);
    }
    assert_eq!(log.len(), 6);
    lab.assert_ends();
}

/// A page that moves takes the mapping of its range only.
#[test]
fn a_touch_of_the_cpu_unmaps_one_range() {
    let lab = Lab::new(&[0]);
    let span = many(&lab, 3);
    let middle = part(span, RANGE, RANGE);
    assert_eq!(lab.sim.read_u64(middle.start()), Ok(middle.start().get()));
    let log = lab.log.take_of_table();
    assert_eq!(log, [Done::Zap(middle), Done::Flush(middle)]);
    assert!(lab.svm.has_mapping(part(span, 0, RANGE)));
    assert!(!lab.svm.has_mapping(middle));
    assert!(lab.svm.has_mapping(part(span, 2 * RANGE, RANGE)));
    assert!(lab.svm.has_mapping(part(span, RANGE - 1, RANGE)));
    lab.assert_ends();
}

#[test]
fn a_range_is_unmapped_on_request_once() {
    let lab = Lab::new(&[0]);
    let span = many(&lab, 2);
    let first = part(span, 0, RANGE);
    let range = lab.svm.range_find(first.start()).unwrap();
    lab.svm.range_unmap(&range);
    lab.svm.range_unmap(&range);
    let told = [Done::Zap(first), Done::Flush(first)];
    assert_eq!(lab.log.take_of_table(), told);
    assert!(!range.is_gone() && lab.map(&range), "it is still a range");
    lab.check_on_gpu(span);
    lab.assert_ends();
}

/// While somebody keeps invalidations out, none runs; then all do.
#[test]
fn no_invalidation_runs_while_it_is_quiet() {
    for seed in 0..20 {
        let options = gpusvm_mm_sim::Options {
            seed,
            ..gpusvm_mm_sim::Options::default()
        };
        let lab = Lab::with(options, &[0], ByteSize::mib(2));
        let span = many(&lab, 2);
        let (quiet, other) = (Arc::clone(&lab), Arc::clone(&lab));
        let keeps_out = move || {
            let _proof = quiet.svm.quiesce();
            let before = quiet.log.peek();
            (0..30).for_each(|_| quiet.sim.yield_now());
            assert_eq!(quiet.log.peek(), before);
        };
        let invalidates = move || {
            other.sim.yield_now();
            other.invalidate(span, Reason::Protect);
        };
        lab.sim
            .run(vec![Box::new(keeps_out), Box::new(invalidates)]);
        assert!(!lab.svm.has_mapping(span));
        lab.assert_ends();
    }
}
