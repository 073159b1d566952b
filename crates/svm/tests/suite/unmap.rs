//! Memory under a range goes away: all of it, or a part.

use crate::gpu::Done;
use crate::lab::{Lab, RANGE, WRITE, everywhere, part};
use gpusvm_mm::Home;
use gpusvm_mm_sim::{Backing, Options, Prot};
use gpusvm_types::ByteSize;

/// A part at either end, in the middle, a page, all but a page.
const PARTS: [(u64, u64); 6] = [(0, 4), (12, 4), (4, 8), (0, 1), (1, 15), (15, 1)];

#[test]
fn a_partial_unmap_flags_the_range() {
    for (first, count) in PARTS {
        let lab = Lab::new(&[0]);
        let range = lab.mapped_range(lab.block());
        let span = range.span();
        lab.sim.munmap(part(span, first, count));
        assert!(range.is_unmapped() && range.is_partially_unmapped() && range.is_gone());
        assert!(!range.is_mapped());
        let told = [Done::Zap(span), Done::Flush(span), Done::Garbage];
        assert_eq!(lab.log.take_of_table(), told);
        lab.assert_ends();
    }
}

/// Ranges are not split: what is still there comes home, and the range goes.
#[test]
fn the_rest_of_a_partial_unmap_comes_home() {
    for (first, count) in PARTS {
        let lab = Lab::new(&[0]);
        let block = lab.block();
        let range = lab.mapped_range(block);
        let span = range.span();
        let hole = part(span, first, count);
        lab.sim.munmap(hole);
        assert_eq!(lab.svm.collect_garbage(), 1);
        let rests = span.without(hole).into_iter().flatten();
        for rest in rests {
            assert!(lab.is_home(rest), "{rest} of {span} without {hole}");
            lab.check(rest);
        }
        assert!(lab.homes(hole).iter().all(|home| *home == Home::Unmapped));
        assert_eq!(lab.devices[0].free_pages(), 1024);
        assert_eq!(lab.svm.range_count(), 0);

        // A new range has room beside the hole only.
        let rest = span.without(hole).into_iter().flatten().next().unwrap();
        let again = lab.mapped_range(rest);
        assert!(!again.span().overlaps(hole));
        lab.check_on_gpu(again.span());
        lab.assert_ends();
    }
}

/// Once all its ranges are collected, a block costs nothing again, also when the pages are gone that
/// it was watched for.
#[test]
fn a_block_is_let_go_by_ranges_that_were_unmapped() {
    for (first, count) in PARTS.into_iter().chain([(0, RANGE)]) {
        let lab = Lab::new(&[0]);
        let block = lab.block();
        let range = lab.mapped_range(block);
        lab.sim.munmap(part(range.span(), first, count));
        assert_eq!(lab.svm.collect_garbage(), 1);
        let hole = part(range.span(), first, count);
        let rest = part(block, 2 * RANGE, RANGE);
        assert!(!lab.is_watched(rest), "after {hole} of {}", range.span());
        lab.assert_ends();
    }
}

#[test]
fn a_whole_unmap_leaves_nothing_to_bring_home() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    let ranges = [0, 1, 2].map(|i| lab.mapped_range(part(block, i * RANGE, RANGE)));
    lab.sim.munmap(part(block, 8, 2 * RANGE));
    let flags = ranges
        .each_ref()
        .map(|range| (range.is_unmapped(), range.is_partially_unmapped()));
    assert_eq!(flags, [(true, true), (true, false), (true, true)]);
    let garbage = lab.log.take();
    let garbage = garbage.iter().filter(|done| **done == Done::Garbage);
    assert_eq!(garbage.count(), 1, "they are called for once");
    assert_eq!(lab.svm.collect_garbage(), 3);
    assert_eq!(lab.devices[0].free_pages(), 1024);
    lab.check(part(block, 0, 8));
    lab.check(part(block, 8 + 2 * RANGE, RANGE - 8));
    lab.assert_ends();
}

/// What cannot come home stays where it is: the CPU's to fault on, and the range goes all the same.
#[test]
fn garbage_that_is_stuck_is_collected() {
    let lab = Lab::new(&[0]);
    let range = lab.mapped_range(lab.block());
    let span = range.span();
    lab.sim.munmap(part(span, 0, 4));
    lab.devices[0].set_stuck(true);
    assert_eq!(lab.svm.collect_garbage(), 1);
    assert_eq!(lab.svm.range_count(), 0);
    assert!(matches!(
        lab.sim.home(part(span, 9, 1).first_page()),
        Home::Device(_)
    ));
    lab.devices[0].set_stuck(false);
    lab.check(part(span, 4, 12));
    lab.assert_ends();
}

/// The address gets another mapping before anybody has collected the old one's range.
#[test]
fn memory_that_replaces_other_gets_a_range_of_its_own() {
    for backing in [Backing::Mirrored, Backing::Private] {
        let lab = Lab::new(&[0]);
        let range = lab.mapped_range(lab.block());
        let span = range.span();
        lab.sim.mmap_fixed(span, Prot::ReadWrite, backing);
        lab.fill(span);
        assert!(range.is_unmapped());
        // Until it is collected, its place is taken, and nothing can be mapped by it.
        let found = lab
            .svm
            .range_find_or_insert(span.start(), &WRITE, everywhere())
            .unwrap();
        assert!(found.is_gone());
        if let Ok(prepared) = lab.get_pages(&found, &WRITE) {
            assert!(!lab.commit(&found, prepared));
        }
        assert_eq!(lab.svm.collect_garbage(), 1);
        let again = lab.range(span.start());
        assert_eq!(again.can_migrate(), backing == Backing::Mirrored);
        assert!(lab.map(&again));
        lab.check_on_gpu(span);
        lab.assert_ends();
    }
}

/// Its pages went with it: the range at the old address is garbage, and the new address has none yet.
#[test]
fn memory_that_moves_leaves_its_range_behind() {
    for dontunmap in [false, true] {
        let lab = Lab::new(&[0]);
        let block = lab.block();
        let range = lab.mapped_range(block);
        let there = lab.sim.mremap(block, dontunmap);
        assert!(range.is_unmapped() && !range.is_partially_unmapped());
        assert_eq!(lab.gpu.entries(), []);
        assert_eq!(lab.svm.collect_garbage(), 1);
        assert!(lab.svm.range_find(there.start()).is_none());
        let at = part(there, 3, 1).start();
        let was = part(block, 3, 1).start().get();
        assert_eq!(lab.sim.read_u64(at), Ok(was));
        let again = lab.range(there.start());
        assert!(lab.map(&again));
        lab.assert_ends();
    }
}

/// Part of a range was unmapped, and the rest of the process does not wait for the collector.
#[test]
fn an_unmap_under_a_fault_is_seen_by_its_commit() {
    for seed in 0..200 {
        let options = Options {
            seed,
            late_events: seed % 2 == 1,
            ..Options::default()
        };
        let lab = Lab::with(options, &[0], ByteSize::mib(512));
        let block = lab.block();
        let range = lab.range_on_device(block);
        let (device, program, found) = (lab.clone(), lab.clone(), range.clone());
        let maps = move || {
            let _serving = found.serve();
            let prepared = device.get_pages(&found, &WRITE);
            if let Ok(prepared) = prepared {
                device.commit(&found, prepared);
            }
        };
        let unmaps = move || program.sim.munmap(part(block, 4, 4));
        lab.sim.run(vec![Box::new(maps), Box::new(unmaps)]);
        lab.sim.settle_events();
        assert!(range.is_partially_unmapped(), "seed {seed}");
        assert_eq!(lab.gpu.entries(), [], "seed {seed}");
        assert_eq!(lab.svm.collect_garbage(), 1, "seed {seed}");
        lab.check(part(block, 0, 4));
        lab.check(part(block, 8, 8));
        lab.assert_ends();
    }
}
