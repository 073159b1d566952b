//! Where pages are, for who only looks; and what looks are good for.

use crate::lab::{Lab, RANGE, WRITE, part};
use gpusvm_mm::{AddressSpace, MmError, Seen};
use gpusvm_mm_sim::{Backing, Prot, Sim};
use gpusvm_pagemap::Pagemap;
use gpusvm_svm::{FaultCtx, FindError, Scan};
use gpusvm_types::{ByteSize, PageCount, Span, VirtAddr};

/// Scans, which changes nothing.
#[track_caller]
fn scan(lab: &Lab, span: Span, pagemap: Option<&Pagemap<Sim>>) -> Scan {
    let before = (lab.state(span), lab.sim.stats());
    lab.log.take();
    let scan = lab.svm.scan(span, pagemap).unwrap();
    assert_eq!(lab.log.take(), []);
    let after = (lab.state(span), lab.sim.stats());
    assert_eq!(format!("{before:?}"), format!("{after:?}"));
    scan
}

#[test]
fn a_scan_tells_where_pages_are() {
    let lab = Lab::new(&[0, 0]);
    let block = lab.block();
    let range = lab.range(block.start());
    let span = range.span();
    let [first, second] = [0, 1].map(|i| lab.devices[i].pagemap());
    for pagemap in [None, Some(&**first), Some(&**second)] {
        assert_eq!(scan(&lab, span, pagemap), Scan::System);
    }
    lab.devices[0].migrate(part(span, 0, 4)).unwrap();
    assert_eq!(scan(&lab, span, Some(first)), Scan::Mixed);
    assert_eq!(scan(&lab, part(span, 0, 4), Some(first)), Scan::Equal);
    assert_eq!(scan(&lab, part(span, 0, 4), Some(second)), Scan::Other);
    assert_eq!(scan(&lab, part(span, 0, 4), None), Scan::Other);
    assert_eq!(scan(&lab, part(span, 4, 4), Some(first)), Scan::System);
    lab.devices[1].migrate(part(span, 4, RANGE - 4)).unwrap();
    assert_eq!(scan(&lab, span, Some(first)), Scan::MixedDevice);
    lab.sim.munmap(part(span, 15, 1));
    assert_eq!(scan(&lab, span, Some(first)), Scan::Unpopulated);
    // More than a block, and what nobody mirrors.
    let other = lab
        .sim
        .mmap(PageCount::new(1030), Prot::ReadWrite, Backing::Private);
    assert_eq!(scan(&lab, other, None), Scan::Unpopulated);
    lab.fill(part(other, 0, 1029));
    assert_eq!(scan(&lab, other, None), Scan::Unpopulated);
    lab.fill(part(other, 1029, 1));
    assert_eq!(scan(&lab, other, None), Scan::System);
    lab.assert_ends();
}

/// The svm half of lesson 6: what was in the array before is nothing to a look.
#[test]
fn lesson_06_a_scan_starts_from_nothing() {
    let lab = Lab::new(&[0]);
    let span = lab.some(Prot::ReadWrite, Backing::Mirrored);
    lab.sim.munmap(part(span, 3, 2));
    lab.sim.madvise_dontneed(part(span, 7, 1));
    let mut from_nothing = vec![Seen::Unmapped; 16];
    lab.sim.snapshot(span, &mut from_nothing).unwrap();
    for before in [Seen::Absent, Seen::System, Seen::Moving] {
        let mut seen = vec![before; 16];
        lab.sim.snapshot(span, &mut seen).unwrap();
        assert_eq!(seen, from_nothing, "{before:?}");
    }
    assert_eq!(from_nothing[3], Seen::Unmapped);
    assert_eq!(from_nothing[7], Seen::Absent);
    lab.assert_ends();
}

/// The svm half of lesson 5: a refused scan let go what it had never taken.
#[test]
fn lesson_05_a_refused_scan_changes_nothing() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    let range = lab.mapped_range(block);
    lab.sim.exit();
    let before = (lab.state(block), lab.sim.notifiers().count());
    let gone = Err(MmError::Gone);
    assert_eq!(lab.svm.scan(range.span(), None), gone);
    assert_eq!(lab.svm.find_vma_start(block), Err(MmError::Gone));
    let ctx = FaultCtx {
        check_pages_threshold: ByteSize::kib(64),
        ..WRITE
    };
    let at = part(block, RANGE, 1).start();
    let error = lab.svm.range_find_or_insert(at, Span::EVERYWHERE, &ctx);
    assert_eq!(error.unwrap_err(), FindError::Mm(MmError::Gone));
    assert_eq!((lab.state(block), lab.sim.notifiers().count()), before);
    // Nothing is locked for good.
    lab.assert_ends();
}

#[test]
fn the_first_mapping_of_a_window_is_found() {
    let lab = Lab::new(&[0]);
    let span = lab.some(Prot::Read, Backing::Shared);
    lab.sim.munmap(part(span, 4, 4));
    let start = |first, count| lab.svm.find_vma_start(part(span, first, count)).unwrap();
    let page = |page| Some(part(span, page, 1).start());
    assert_eq!(start(0, 16), page(0));
    assert_eq!(start(2, 4), page(2), "not where the mapping begins");
    assert_eq!(start(4, 4), None);
    assert_eq!(start(4, 5), page(8));
    assert_eq!(start(5, 11), page(8));
    assert_eq!(start(16, 16), None);
    let far = Span::page_of(VirtAddr::new(0x7fff_ffff_f000));
    assert_eq!(lab.svm.find_vma_start(far), Ok(None));
    lab.assert_ends();
}

#[test]
fn a_range_below_the_threshold_has_all_its_pages() {
    let checked = FaultCtx {
        check_pages_threshold: ByteSize::kib(64),
        ..WRITE
    };
    // Nothing there; the page of the fault; all but one; all, one of them on a device.
    for (there, ctx, want) in [
        (0, checked, 1),
        (1, checked, 1),
        (RANGE - 1, checked, 1),
        (RANGE, checked, RANGE),
        (0, WRITE, RANGE),
        (
            RANGE - 1,
            FaultCtx {
                check_pages_threshold: ByteSize::kib(63),
                ..WRITE
            },
            RANGE,
        ),
    ] {
        let lab = Lab::new(&[0]);
        let block = lab
            .sim
            .mmap(PageCount::new(512), Prot::ReadWrite, Backing::Mirrored);
        if there > 0 {
            lab.fill(part(block, 0, there));
            let token = lab.sim.arm(block).unwrap();
            lab.devices[0].migrate(part(block, 0, 1)).unwrap();
            lab.sim.disarm(block, token);
        }
        let range = lab
            .svm
            .range_find_or_insert(block.start(), Span::EVERYWHERE, &ctx)
            .unwrap();
        let case = (there, ctx.check_pages_threshold);
        assert_eq!(range.span(), part(block, 0, want), "{case:?}");
        lab.assert_ends();
    }
}

#[test]
fn a_range_keeps_to_what_the_caller_has() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    let find = |page: u64, within: Span| {
        let at = part(block, page, 1).start();
        lab.svm.range_find_or_insert(at, within, &WRITE)
    };
    let half = part(block, 8, RANGE);
    assert_eq!(find(8, half).unwrap().span(), part(block, 8, 1));
    let outside = find(7, half).unwrap_err();
    let at = part(block, 7, 1).start();
    assert_eq!(outside, FindError::Outside { at, within: half });
    assert_eq!(outside.errno(), 22);
    let end = find(8 + RANGE, half).unwrap_err();
    assert!(matches!(end, FindError::Outside { .. }), "half open");
    // Nothing is mapped there either, but that is not what is wrong first.
    lab.sim.munmap(part(block, 7, 1));
    assert_eq!(find(7, half).unwrap_err(), outside);
    lab.assert_ends();
}

/// A range from before less was bound: its pages outside would be mapped, so it is not handed out.
#[test]
fn a_range_that_is_too_wide_is_removed_by_the_caller() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    let range = lab.mapped_range(block);
    let within = part(block, 0, 8);
    let find = || lab.svm.range_find_or_insert(block.start(), within, &WRITE);
    for _ in 0..2 {
        let error = find().unwrap_err();
        let wider = FindError::Wider {
            range: range.span(),
            within,
        };
        assert_eq!((error, error.errno()), (wider, 11));
        assert!(range.is_mapped(), "others may use it");
    }
    assert_eq!(lab.log.take_of_table(), []);
    assert!(lab.svm.range_remove(&range));
    let narrow = find().unwrap();
    assert_eq!(narrow.span(), part(block, 0, 1));
    // Its pages are where they were, and come home as ever.
    lab.check(range.span());
    lab.assert_ends();
}
