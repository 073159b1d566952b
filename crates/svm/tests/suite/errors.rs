//! The error table, row by row: why there is no range, and why it cannot be watched.

use crate::lab::{Lab, RANGE, READ, WRITE, everywhere, part};
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_mm_sim::{Backing, Prot, Step};
use gpusvm_svm::{FaultCtx, FindError};
use gpusvm_types::{Span, VirtAddr};

/// There is no range, with this errno, and nothing has changed.
#[track_caller]
fn refused(lab: &Lab, at: VirtAddr, ctx: &FaultCtx, errno: i32) -> FindError {
    let around = Span::page_of(at);
    let (state, notifiers) = (lab.state(around), lab.sim.notifiers().count());
    let error = lab
        .svm
        .range_find_or_insert(at, ctx, everywhere())
        .unwrap_err();
    assert_eq!(error.errno(), errno, "{error}");
    assert_eq!(lab.state(around), state, "after {error}");
    assert_eq!(lab.sim.notifiers().count(), notifiers, "after {error}");
    assert_eq!(lab.log.take(), [], "after {error}");
    error
}

#[test]
fn find_without_a_mapping_is_enoent() {
    let lab = Lab::new(&[0]);
    let span = lab.some(Prot::ReadWrite, Backing::Mirrored);
    // Above a mapping, below one, and where one was.
    let above = span.end();
    assert_eq!(
        refused(&lab, above, &WRITE, 2),
        FindError::NoMapping { at: above }
    );
    let below = VirtAddr::new(0x1000);
    assert_eq!(
        refused(&lab, below, &READ, 2),
        FindError::NoMapping { at: below }
    );
    lab.sim.munmap(span);
    let at = span.start();
    assert_eq!(refused(&lab, at, &READ, 2), FindError::NoMapping { at });
    lab.assert_ends();
}

/// No mirror can be found for the last page of the address space: nothing reaches around it.
#[test]
fn find_where_no_chunk_fits_is_einval() {
    let lab = Lab::new(&[0]);
    let at = VirtAddr::new(0x7fff_ffff_f000);
    let below = VirtAddr::new(at.get() - 0x1000);
    let mapping = Span::page_of(below).union(Span::page_of(at));
    lab.sim
        .mmap_fixed(mapping, Prot::ReadWrite, Backing::Private);
    assert_eq!(lab.range(below).span(), Span::page_of(below));
    let error = refused(&lab, at, &WRITE, 22);
    assert_eq!(error, FindError::NoChunk { at, mapping });
    lab.assert_ends();
}

#[test]
fn find_for_a_write_to_read_only_memory_is_eperm() {
    let lab = Lab::new(&[0]);
    for backing in [Backing::Mirrored, Backing::Private, Backing::Shared] {
        let mapping = lab.some(Prot::Read, backing);
        let at = part(mapping, 3, 1).start();
        let error = refused(&lab, at, &WRITE, 1);
        assert_eq!(error, FindError::ReadOnly { at, mapping });
        // Also when its range is there already.
        lab.svm
            .range_find_or_insert(at, &READ, everywhere())
            .unwrap();
        let error = refused(&lab, at, &WRITE, 1);
        assert_eq!(error, FindError::ReadOnly { at, mapping });
    }
    lab.assert_ends();
}

#[test]
fn find_in_unreadable_memory_is_efault() {
    let lab = Lab::new(&[0]);
    let mapping = lab.some(Prot::None, Backing::Mirrored);
    let at = mapping.start();
    for ctx in [READ, WRITE] {
        assert_eq!(
            refused(&lab, at, &ctx, 14),
            FindError::NotReadable { at },
            "{ctx:?}"
        );
    }
    lab.assert_ends();
}

#[test]
fn find_is_efault_when_the_address_space_is_gone() {
    let lab = Lab::new(&[0]);
    let span = lab.block();
    lab.mapped_range(span);
    lab.sim.exit();
    lab.log.take();
    for at in [span.start(), part(span, RANGE, 1).start()] {
        let error = refused(&lab, at, &WRITE, 14);
        assert_eq!(error, FindError::Mm(MmError::Gone));
    }
    lab.assert_ends();
}

/// A closed mirror hears of no change, so no range of it could ever be trusted.
#[test]
fn find_is_efault_when_the_mirror_is_closed() {
    let lab = Lab::new(&[0]);
    let span = lab.block();
    lab.mapped_range(span);
    lab.svm.close();
    lab.log.take();
    for at in [span.start(), part(span, RANGE, 1).start()] {
        assert_eq!(refused(&lab, at, &WRITE, 14), FindError::Closed);
    }
    lab.assert_ends();
}

#[test]
fn arm_of_what_is_no_longer_mirrored_is_ebusy() {
    let lab = Lab::new(&[0]);
    let span = lab.some(Prot::ReadWrite, Backing::Mirrored);
    let range = lab
        .svm
        .range_find_or_insert(span.start(), &WRITE, everywhere())
        .unwrap();
    lab.sim.unadopt(span).unwrap();
    let state = lab.state(span);
    let error = lab.svm.range_arm(&range, &range.serve()).unwrap_err();
    assert_eq!(error, FindError::Mm(MmError::NotMirrored { span }));
    assert_eq!(error.errno(), 16);
    assert_eq!(lab.state(span), state);
    // The next one is made for memory that stays where it is.
    assert_eq!(lab.svm.collect_garbage(), 1);
    let range = lab.range(span.start());
    assert!(!range.can_migrate());
    assert!(lab.map(&range));
    lab.assert_ends();
}

#[test]
fn arm_is_efault_when_the_address_space_is_gone() {
    let lab = Lab::new(&[0]);
    let span = lab.block();
    let range = lab
        .svm
        .range_find_or_insert(span.start(), &WRITE, everywhere())
        .unwrap();
    lab.sim.exit();
    let state = lab.state(span);
    let error = lab.svm.range_arm(&range, &range.serve()).unwrap_err();
    assert_eq!(error, FindError::Mm(MmError::Gone));
    assert_eq!(error.errno(), 14);
    assert_eq!(lab.state(span), state);
    lab.assert_ends();
}

#[test]
fn arm_tells_what_the_system_refused() {
    let lab = Lab::new(&[0]);
    let span = part(lab.block(), 0, RANGE);
    let range = lab
        .svm
        .range_find_or_insert(span.start(), &WRITE, everywhere())
        .unwrap();
    let state = lab.state(span);
    lab.sim.injector().fail_step_nth(Step::Arm, 1);
    let error = lab.svm.range_arm(&range, &range.serve()).unwrap_err();
    assert_eq!(error.errno(), 11, "{error}");
    assert_eq!(lab.state(span), state);
    assert!(!lab.is_watched(span));
    // Once the system has what it lacked, it goes on from there.
    lab.sim.injector().disarm();
    assert_eq!(lab.svm.range_arm(&range, &range.serve()), Ok(true));
    assert!(lab.is_watched(span));
    lab.svm.range_remove(&range);
    assert!(!lab.is_watched(span));
    lab.assert_ends();
}

/// Not an error: who removed it looked for something to disarm too early.
#[test]
fn arm_of_a_removed_range_leaves_nothing_armed() {
    let lab = Lab::new(&[0]);
    let span = part(lab.block(), 0, RANGE);
    let range = lab
        .svm
        .range_find_or_insert(span.start(), &WRITE, everywhere())
        .unwrap();
    assert!(lab.svm.range_remove(&range));
    assert_eq!(lab.svm.range_arm(&range, &range.serve()), Ok(false));
    assert!(!lab.is_watched(span));
    lab.assert_ends();
}

/// A driver bounds the range by what its address space has there.
#[test]
fn a_range_lies_inside_what_it_is_given() {
    let lab = Lab::new(&[0]);
    let span = lab.some(Prot::ReadWrite, Backing::Mirrored);
    let page = Span::page_of(span.start());
    let range = lab.svm.range_find_or_insert(page.start(), &WRITE, page);
    assert_eq!(range.unwrap().span(), page);
    // The next one fits beside it, and does not reach out of what it is given either.
    let [_, rest] = span.without(page);
    let at = rest.unwrap().start();
    let range = lab.svm.range_find_or_insert(at, &WRITE, rest.unwrap());
    let range = range.unwrap();
    assert!(rest.unwrap().covers(range.span()), "{}", range.span());
    let elsewhere = Span::page_of(span.end());
    let at = part(span, RANGE - 1, 1).start();
    let refused = lab.svm.range_find_or_insert(at, &WRITE, elsewhere);
    assert!(matches!(refused, Err(FindError::NoChunk { .. })));
}
