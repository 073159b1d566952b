//! The error table, row by row: why the pages of a range cannot be mapped, or brought home.

use crate::lab::{Lab, RANGE, READ, WRITE, part};
use gpusvm_mm::{AddressSpace, Block, Home, MmError};
use gpusvm_mm_sim::{Backing, Prot};
use gpusvm_svm::{FaultCtx, GetPagesError, Range};
use gpusvm_types::{OwnerId, Span, VirtAddr};
use std::sync::Arc;
use std::time::Duration;

/// Pages in device memory, or nothing.
const DEVMEM: FaultCtx = FaultCtx {
    devmem_only: true,
    ..WRITE
};

/// The pages cannot be mapped, with this errno, and nothing has changed.
#[track_caller]
fn refused(
    lab: &Lab,
    range: &Range<gpusvm_mm_sim::Sim>,
    ctx: &FaultCtx,
    errno: i32,
) -> GetPagesError {
    refused_within(lab, range, ctx, true, errno)
}

#[track_caller]
fn refused_within(
    lab: &Lab,
    range: &Range<gpusvm_mm_sim::Sim>,
    ctx: &FaultCtx,
    ram: bool,
    errno: i32,
) -> GetPagesError {
    let before = (lab.state(range.span()), range.is_mapped());
    let error = lab.get_pages_within(range, ctx, ram).unwrap_err();
    assert_eq!(error.errno(), errno, "{error}");
    let after = (lab.state(range.span()), range.is_mapped());
    assert_eq!(before, after, "after {error}");
    assert_eq!(lab.log.take_of_table(), [], "after {error}");
    error
}

#[test]
fn get_pages_for_a_write_to_read_only_memory_is_eperm() {
    let lab = Lab::new(&[0]);
    let span = lab.some(Prot::Read, Backing::Mirrored);
    let range = lab
        .svm
        .range_find_or_insert(span.start(), Span::EVERYWHERE, &READ)
        .unwrap();
    let error = refused(&lab, &range, &WRITE, 1);
    assert_eq!(error, GetPagesError::ReadOnly { span });
    lab.assert_ends();
}

#[test]
fn get_pages_of_unmapped_memory_is_efault() {
    for hole in [(0, RANGE), (0, 1), (7, 2), (RANGE - 1, 1)] {
        let lab = Lab::new(&[0]);
        let range = lab.mapped_range(lab.block());
        let span = range.span();
        lab.sim.munmap(part(span, hole.0, hole.1));
        lab.log.take();
        let error = refused(&lab, &range, &WRITE, 14);
        assert_eq!(error, GetPagesError::Unmapped { span }, "{hole:?}");
        lab.assert_ends();
    }
}

#[test]
fn get_pages_in_ram_is_efault_for_device_memory_only() {
    let lab = Lab::new(&[0]);
    let range = lab.range(lab.block().start());
    for on_device in [0, 5, RANGE - 1] {
        lab.devices[0]
            .migrate(part(range.span(), 0, on_device.max(1)))
            .unwrap();
        lab.log.take();
        let at = part(range.span(), on_device.max(1), 1).start();
        let error = refused(&lab, &range, &DEVMEM, 14);
        assert_eq!(error, GetPagesError::NotOnDevice { at });
    }
    lab.devices[0].migrate(range.span()).unwrap();
    assert!(lab.get_pages(&range, &DEVMEM).unwrap().is_in_vram());
    lab.assert_ends();
}

#[test]
fn get_pages_out_of_reach_is_eopnotsupp() {
    let lab = Lab::new(&[0, 0]);
    let range = lab.range(lab.block().start());
    let at = range.span().start();
    let out_of_reach = GetPagesError::OutOfReach { at };
    // In RAM, for a device that does not reach it.
    let error = refused_within(&lab, &range, &WRITE, false, 95);
    assert_eq!(error, out_of_reach);
    // With a peer that refuses.
    lab.devices[1].migrate(range.span()).unwrap();
    lab.log.take();
    lab.devices[1].refuse_map_after(0);
    assert_eq!(refused(&lab, &range, &WRITE, 95), out_of_reach);
    // With a peer that is being unbound.
    let pagemap = lab.devices[1].pagemap();
    pagemap.unbind();
    assert_eq!(refused(&lab, &range, &WRITE, 95), out_of_reach);
    // And it can come home all the same.
    lab.svm.range_evict(&range).unwrap();
    lab.check(range.span());
    lab.assert_ends();
}

#[test]
fn get_pages_of_two_memories_is_eopnotsupp() {
    let lab = Lab::new(&[0, 0]);
    let range = lab.range(lab.block().start());
    lab.devices[0].migrate(part(range.span(), 0, 8)).unwrap();
    lab.devices[1].migrate(part(range.span(), 8, 8)).unwrap();
    lab.log.take();
    let at = part(range.span(), 8, 1).start();
    let error = refused(&lab, &range, &WRITE, 95);
    assert_eq!(error, GetPagesError::MixedPagemaps { at });
    lab.check(range.span());
    lab.assert_ends();
}

/// Somebody holds the pages on their way for much longer than anybody waits.
#[test]
fn get_pages_that_keep_moving_is_ebusy() {
    let lab = Lab::new(&[0]);
    let range = lab.range(lab.block().start());
    let span = range.span();
    let (mover, other) = (Arc::clone(&lab), Arc::clone(&lab));
    let moves = move || {
        let mut block = mover.sim.lock_block(span).unwrap();
        let outbound = block.collect(span, OwnerId(0), &mut |_, _| false).unwrap();
        mover.sim.sleep(Duration::from_secs(3));
        drop(outbound);
    };
    let maps = move || {
        while !other.homes(span).contains(&Home::Moving) {
            other.sim.yield_now();
        }
        let error = other.get_pages(&range, &WRITE).unwrap_err();
        assert_eq!(error, GetPagesError::Mm(MmError::Unstable { span }));
        assert_eq!(error.errno(), 16);
        assert!(!range.is_mapped());
        other.sim.sleep(Duration::from_secs(3));
        assert!(other.map(&range), "it is stable now");
    };
    lab.sim.run(vec![Box::new(moves), Box::new(maps)]);
    lab.check(span);
    lab.assert_ends();
}

#[test]
fn every_function_is_efault_when_the_address_space_is_gone() {
    let lab = Lab::new(&[0]);
    let range = lab.mapped_range(lab.block());
    lab.sim.exit();
    lab.log.take();
    let error = refused(&lab, &range, &WRITE, 14);
    assert_eq!(error, GetPagesError::Mm(MmError::Gone));
    let error = lab.svm.range_evict(&range).unwrap_err();
    assert_eq!((error, error.errno()), (MmError::Gone, 14));
    lab.assert_ends();
}

/// A page of a device that is nobody's peer, and whose copies fail.
#[test]
fn every_function_is_efault_when_a_page_cannot_come_home() {
    let lab = Lab::new(&[0, 1]);
    let range = lab.range(lab.block().start());
    let span = range.span();
    lab.devices[1].migrate(span).unwrap();
    lab.devices[1].set_stuck(true);
    lab.log.take();
    let at: VirtAddr = span.start();
    let error = refused(&lab, &range, &WRITE, 14);
    assert_eq!(error, GetPagesError::Mm(MmError::StuckOnDevice { at }));
    let state = lab.state(span);
    let error = lab.svm.range_evict(&range).unwrap_err();
    assert_eq!((error, error.errno()), (MmError::StuckOnDevice { at }, 14));
    assert_eq!(lab.state(span), state);
    lab.devices[1].set_stuck(false);
    assert!(lab.map(&range), "it came home before anything was read");
    lab.check(span);
    lab.assert_ends();
}

/// Part of a range is no longer mirrored: there is nothing that `range_evict` could promise of it.
#[test]
fn evict_of_what_is_no_longer_mirrored_is_ebusy() {
    let lab = Lab::new(&[0]);
    let range = lab.mapped_range(lab.block());
    let span: Span = range.span();
    lab.sim.munmap(span);
    let error = lab.svm.range_evict(&range).unwrap_err();
    assert_eq!(error.errno(), 16, "{error}");
    assert_eq!(error, MmError::NotMirrored { span });
    assert_eq!(lab.svm.collect_garbage(), 1);
    lab.assert_ends();
}

/// The kernel's order: first that kinds of pages are mixed, then what is wrong with this one.
#[test]
fn get_pages_of_mixed_kinds_is_eopnotsupp_where_that_is_not_allowed() {
    let apart = FaultCtx {
        allow_mixed: false,
        ..WRITE
    };
    let strict = FaultCtx {
        devmem_only: true,
        ..apart
    };
    let lab = Lab::new(&[0, 0]);
    let range = lab.range(lab.block().start());
    let span = range.span();
    let at = |page| part(span, page, 1).start();
    assert!(!lab.get_pages(&range, &apart).unwrap().is_in_vram());
    // Pages of RAM behind device pages: that comes before that only device memory will do.
    lab.devices[0].migrate(part(span, 0, 4)).unwrap();
    lab.log.take();
    for ctx in [apart, strict] {
        let error = refused(&lab, &range, &ctx, 95);
        assert_eq!(error, GetPagesError::Mixed { at: at(4) });
    }
    // Another device memory comes after that.
    lab.devices[1].migrate(part(span, 4, 4)).unwrap();
    lab.log.take();
    let error = refused(&lab, &range, &apart, 95);
    assert_eq!(error, GetPagesError::MixedPagemaps { at: at(4) });
    assert!(lab.get_pages(&range, &WRITE).is_err());
    // Device pages behind pages of RAM.
    lab.svm.range_evict(&range).unwrap();
    lab.devices[0].migrate(part(span, 4, RANGE - 4)).unwrap();
    lab.log.take();
    let error = refused(&lab, &range, &apart, 95);
    assert_eq!(error, GetPagesError::Mixed { at: at(4) });
    let error = refused(&lab, &range, &strict, 14);
    assert_eq!(error, GetPagesError::NotOnDevice { at: at(0) });
    assert!(lab.get_pages(&range, &WRITE).unwrap().is_partly_in_ram());
    // All in one device memory, by two allocations.
    lab.devices[0].migrate(part(span, 0, 4)).unwrap();
    assert!(lab.get_pages(&range, &apart).unwrap().is_in_vram());
    assert!(lab.get_pages(&range, &strict).unwrap().is_in_vram());
    lab.assert_ends();
}
