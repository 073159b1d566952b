//! Notifiers and their windows, and which chunk a range covers.

use crate::lab::{Lab, RANGE, WRITE, part};
use gpusvm_mm::{AddressSpace, Reason};
use gpusvm_mm_sim::{Backing, Options, Prot};
use gpusvm_svm::{Config, GpuSvm};
use gpusvm_types::{ByteSize, PageCount, Span, VirtAddr};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

/// Windows of two ranges.
fn narrow() -> Arc<Lab> {
    Lab::with(Options::default(), &[0], ByteSize::kib(128))
}

#[test]
fn a_window_is_subscribed_by_its_first_range() {
    let lab = narrow();
    let block = lab.block();
    assert_eq!(lab.sim.notifiers().count(), 0);
    let mut seen = Vec::new();
    for i in 0..4 {
        let range = lab.range(part(block, i * RANGE, 1).start());
        let window = range.notifier().window();
        assert!(window.covers(range.span()));
        assert_eq!(window, part(block, i / 2 * 2 * RANGE, 2 * RANGE));
        seen.push(lab.sim.notifiers().count());
    }
    assert_eq!(seen, [1, 1, 2, 2]);
    // It is let go with its last range.
    let mut left = Vec::new();
    for range in lab.svm.ranges_in(block) {
        assert!(lab.svm.range_remove(&range));
        left.push(lab.sim.notifiers().count());
    }
    assert_eq!(left, [2, 1, 1, 0]);
    lab.range(block.start());
    assert_eq!(lab.sim.notifiers().count(), 1);
    lab.assert_ends();
}

/// A window is let go while others make ranges in it: whoever has a range is told of everything.
#[test]
fn a_window_that_is_needed_again_is_not_lost() {
    for seed in 0..400 {
        let options = Options {
            seed,
            late_events: seed % 2 == 1,
            ..Options::default()
        };
        let lab = Lab::with(options, &[0], ByteSize::kib(128));
        let block = lab.block();
        let find = move |lab: &Lab, page| {
            let at = part(block, page, 1).start();
            let range = lab.svm.range_find_or_insert(at, Span::EVERYWHERE, &WRITE);
            range.unwrap()
        };
        let (stays, goes) = (Arc::clone(&lab), Arc::clone(&lab));
        let keeps = move || drop(find(&stays, RANGE));
        let removes = move || {
            for _ in 0..6 {
                let range = find(&goes, 0);
                goes.svm.range_remove(&range);
            }
        };
        lab.sim.run(vec![Box::new(keeps), Box::new(removes)]);
        let ranges = lab.svm.ranges_in(block);
        assert_eq!(
            (ranges.len(), lab.sim.notifiers().count()),
            (1, 1),
            "seed {seed}"
        );
        lab.sim.munmap(block);
        lab.sim.settle_events();
        for range in &ranges {
            assert!(range.is_unmapped(), "seed {seed}: {range:?} is not told");
        }
        assert_eq!(lab.svm.collect_garbage(), ranges.len(), "seed {seed}");
        assert_eq!(lab.sim.notifiers().count(), 0, "seed {seed}");
        lab.assert_ends();
    }
}

/// What goes far away is nothing to a range that is being made, however much of it there is.
#[test]
fn unmaps_elsewhere_do_not_disturb_an_insertion() {
    for seed in 0..100 {
        let options = Options {
            seed,
            ..Options::default()
        };
        let lab = Lab::with(options, &[0], ByteSize::mib(512));
        let (block, other) = (lab.block(), lab.block());
        // The window has a notifier: what happens in it is heard of.
        lab.range(part(block, 511, 1).start());
        let program = Arc::clone(&lab);
        let unmaps = move || {
            for page in 0..64 {
                program.sim.munmap(part(other, 2 * page, 1));
            }
        };
        let device = Arc::clone(&lab);
        let faults = move || {
            for i in 0..8 {
                let at = part(block, i * RANGE, 1).start();
                let range = device
                    .svm
                    .range_find_or_insert(at, Span::EVERYWHERE, &WRITE);
                assert!(!range.unwrap().is_gone(), "seed {seed}: stillborn");
            }
        };
        lab.sim.run(vec![Box::new(unmaps), Box::new(faults)]);
        assert_eq!(lab.svm.range_count(), 9, "seed {seed}");
        lab.assert_ends();
    }
}

/// What happens in one window makes nothing of another out of date.
#[test]
fn windows_are_current_apart() {
    let lab = narrow();
    let block = lab.block();
    let ranges = [0, 1, 2].map(|i| lab.range_on_device(part(block, i * RANGE, RANGE)));
    let prepared = ranges
        .each_ref()
        .map(|range| lab.get_pages(range, &WRITE).unwrap());
    lab.invalidate(part(block, 0, 1), Reason::Protect);
    let mut ranges = ranges.iter();
    let committed = prepared.map(|prepared| lab.commit(ranges.next().unwrap(), prepared));
    assert_eq!(committed, [false, false, true], "one sequence for a window");
    lab.assert_ends();
}

#[test]
fn a_mirror_hears_of_nothing_outside_its_windows() {
    let lab = narrow();
    let block = lab.block();
    let range = lab.mapped_range(block);
    let sequence = range.notifier().read_begin();
    lab.sim.munmap(part(block, 2 * RANGE, RANGE));
    assert!(range.notifier().is_current(sequence));
    lab.sim.munmap(part(block, RANGE, RANGE));
    assert!(!range.notifier().is_current(sequence));
    assert!(range.is_mapped(), "beside it");
    lab.assert_ends();
}

#[test]
fn has_mapping_looks_at_every_page_of_a_range() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    let range = lab.mapped_range(part(block, RANGE, RANGE));
    lab.range(block.start());
    let has = |first, count| lab.svm.has_mapping(part(block, first, count));
    assert!(!has(0, RANGE), "a range, but not mapped");
    assert!(has(0, RANGE + 1) && has(RANGE, 1) && has(2 * RANGE - 1, 1));
    assert!(!has(2 * RANGE, RANGE) && has(0, 512));
    lab.svm.range_unmap(&range);
    assert!(!has(0, 512));
    lab.assert_ends();
}

#[test]
fn ranges_are_found_by_their_pages() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    // The later one first, and no range between them.
    let ranges = [3, 1].map(|i| lab.range(part(block, i * RANGE, 1).start()));
    for range in &ranges {
        let span = range.span();
        let last = VirtAddr::new(span.end().get() - 1);
        for at in span.pages().map(|page| page.start()).chain([last]) {
            assert!(Arc::ptr_eq(&lab.svm.range_find(at).unwrap(), range));
        }
        assert!(
            lab.svm
                .range_find(VirtAddr::new(span.start().get() - 1))
                .is_none()
        );
        assert!(lab.svm.range_find(span.end()).is_none());
    }
    let found = |first, count| lab.svm.ranges_in(part(block, first, count));
    let [later, earlier] = &ranges;
    let both = found(0, 512);
    assert!(Arc::ptr_eq(&both[0], earlier) && Arc::ptr_eq(&both[1], later));
    assert_eq!(both.len(), 2);
    assert_eq!(found(2 * RANGE - 1, RANGE + 2).len(), 2, "a page of each");
    assert_eq!(found(2 * RANGE, RANGE).len(), 0, "what is between them");
    assert!(lab.svm.range_remove(earlier));
    assert!(lab.svm.range_find(earlier.span().start()).is_none());
    assert_eq!(found(0, 512).len(), 1);
    lab.assert_ends();
}

/// Windows and chunks that could not be looked up, or would not fit into each other.
#[test]
fn sizes_that_cannot_work_are_refused_at_once() {
    let lab = Lab::new(&[0]);
    let (mib, kib) = (ByteSize::mib, ByteSize::kib);
    let refused = |notifier_size, chunk_sizes: &[ByteSize]| {
        let config = Config {
            notifier_size,
            chunk_sizes: chunk_sizes.to_vec(),
        };
        let (sim, ops) = (Arc::clone(&lab.sim), Arc::clone(&lab.gpu));
        let new = AssertUnwindSafe(|| drop(GpuSvm::new(sim, config, [ops as _])));
        std::panic::catch_unwind(new).is_err()
    };
    assert!(refused(mib(3), &[mib(2), kib(4)]), "no power of two");
    assert!(refused(mib(1), &[mib(2), kib(4)]), "no room for a chunk");
    assert!(refused(mib(8), &[mib(4), kib(4)]), "more than a block");
    assert!(refused(mib(2), &[kib(4), kib(64)]), "ascending");
    assert!(refused(mib(2), &[mib(2), kib(64)]), "without pages");
    assert!(refused(mib(2), &[]), "no chunks");
    assert!(!refused(mib(2), &[mib(2), kib(64), kib(4)]));
    lab.assert_ends();
}

#[test]
fn a_range_is_as_large_as_fits() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    // A mapping that ends in the middle of a chunk, one that begins there, and a neighbour.
    lab.sim.munmap(part(block, 8, 2));
    let covers = |page: u64| lab.range(part(block, page, 1).start()).span();
    assert_eq!(covers(3), part(block, 3, 1));
    assert_eq!(covers(12), part(block, 12, 1));
    assert_eq!(covers(20), part(block, 16, 16));
    assert_eq!(covers(31), part(block, 16, 16), "found, not made");
    // What is mirrored, and what is not, are never in one range.
    let span = lab
        .sim
        .mmap(PageCount::new(512), Prot::ReadWrite, Backing::Private);
    lab.sim.adopt(part(span, 4, 4)).unwrap();
    let range = lab.range(span.start());
    assert_eq!(
        (range.span(), range.can_migrate()),
        (part(span, 0, 1), false)
    );
    let range = lab.range(part(span, 5, 1).start());
    assert_eq!(
        (range.span(), range.can_migrate()),
        (part(span, 5, 1), true)
    );
    lab.assert_ends();
}

/// A page that has a range of its own keeps the others from a larger one.
#[test]
fn a_range_never_covers_another() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    lab.sim.munmap(part(block, 1, 1));
    let first = lab.range(block.start());
    let backing = Backing::Mirrored;
    lab.sim
        .mmap_fixed(part(block, 1, 1), Prot::ReadWrite, backing);
    let others: Vec<Span> = (1..4)
        .map(|page| lab.range(part(block, page, 1).start()).span())
        .collect();
    assert_eq!(first.span(), part(block, 0, 1));
    assert_eq!(others, [1, 2, 3].map(|page| part(block, page, 1)));
    lab.assert_ends();
}

#[test]
fn memory_that_is_adopted_gets_new_ranges() {
    let lab = Lab::new(&[0]);
    let span = lab.some(Prot::ReadWrite, Backing::Private);
    let before = lab.range(span.start());
    assert!(lab.map(&before));
    lab.sim.adopt(span).unwrap();
    assert!(before.is_unmapped() && !before.is_mapped());
    assert_eq!(lab.svm.collect_garbage(), 1);
    let after = lab.mapped_range(span);
    assert!(after.can_migrate());
    lab.check_on_gpu(span);
    lab.sim.unadopt(span).unwrap();
    assert!(after.is_unmapped());
    lab.check(span);
    lab.assert_ends();
}
