//! The error table, row by row, for each function of this layer that can return it.

use crate::device::request;
use crate::lab::{BLOCK, Lab, part};
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_mm_sim::{Backing, Prot, Step};
use gpusvm_pagemap::evict::{EVICT_TRIES, evict_to_ram};
use gpusvm_pagemap::migrate::migrate_to_devmem;
use gpusvm_pagemap::{
    Cause, Devmem, DevmemError, EvictError, Holder, MigrateError, Mode, Pagemap, PagemapSpec, Peer,
    RebindError,
};
use gpusvm_types::{OwnerId, PageCount, Span};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The migration fails with this errno, and nothing is left of it.
#[track_caller]
fn refused(lab: &Lab, span: Span, mode: Mode, errno: i32) -> MigrateError {
    let homes = lab.homes(span);
    let error = lab
        .device()
        .migrate_as(span, mode, Duration::from_secs(1))
        .unwrap_err();
    assert_eq!(error.errno(), errno, "{error}");
    assert_eq!(lab.homes(span), homes, "after {error}");
    lab.assert_sound();
    error
}

/// An allocation that lives in the first device, and its span.
fn resident(lab: &Lab) -> (Arc<Devmem>, Span) {
    let span = lab.block(1);
    let devmem = lab.device().allocate(BLOCK).unwrap();
    let request = request(span, Mode::Partial, Duration::ZERO);
    migrate_to_devmem(&lab.device().pagemap(), &devmem, &request).unwrap();
    (devmem, span)
}

#[test]
fn migrate_without_a_mapping_is_enoent() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    lab.sim.munmap(span);
    let error = refused(&lab, span, Mode::Partial, 2);
    assert_eq!(error, MigrateError::NoMapping { span });
    lab.assert_empty();
}

#[test]
fn migrate_across_the_end_of_a_mapping_is_einval() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    lab.sim.munmap(part(span, 500, 12));
    let error = refused(&lab, span, Mode::Partial, 22);
    let mapping = part(span, 0, 500);
    assert_eq!(error, MigrateError::CrossesMapping { span, mapping });
    lab.check(mapping, 1);
    lab.assert_empty();
}

#[test]
fn migrate_across_blocks_is_einval() {
    let lab = Lab::new(&[0]);
    let span = lab.untouched(PageCount::new(1024));
    let crossing = part(span, 500, 24);
    let error = refused(&lab, crossing, Mode::Partial, 22);
    let inner = MmError::CrossesBlock { span: crossing };
    assert_eq!(error, MigrateError::Mm(inner));
}

#[test]
fn migrate_into_too_small_an_allocation_is_einval() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    let devmem = lab.device().allocate(PageCount::new(511)).unwrap();
    let request = request(span, Mode::Partial, Duration::ZERO);
    let error = migrate_to_devmem(&lab.device().pagemap(), &devmem, &request).unwrap_err();
    assert_eq!(error.errno(), 22);
    assert!(devmem.is_detached(), "consumed on an error");
    lab.check(span, 1);
    lab.assert_empty();
}

#[test]
fn migrate_of_shared_memory_is_ebusy() {
    let lab = Lab::new(&[0]);
    let span = lab.sim.mmap(BLOCK, Prot::ReadWrite, Backing::Shared);
    let error = refused(&lab, span, Mode::Partial, 16);
    assert_eq!(error, MigrateError::NotAnonymous { span });
    lab.assert_empty();
}

#[test]
fn migrate_of_memory_that_is_not_mirrored_is_ebusy() {
    let lab = Lab::new(&[0]);
    let span = lab.sim.mmap(BLOCK, Prot::ReadWrite, Backing::Private);
    let error = refused(&lab, span, Mode::Partial, 16);
    assert_eq!(error, MigrateError::Mm(MmError::NotMirrored { span }));
}

#[test]
fn migrate_of_nothing_collectable_is_efault() {
    let lab = Lab::new(&[0, 1]);
    let span = lab.block(1);
    lab.devices[1].migrate(span).unwrap();
    for mode in [Mode::Partial, Mode::AllOrNothing] {
        let error = refused(&lab, span, mode, 14);
        assert_eq!(error, MigrateError::NothingCollected { span });
    }
    lab.check(span, 1);
    lab.assert_empty();
}

/// In the patch, pages that are here already are not collected, so nothing is; in newer kernels, and
/// by default here, that is what was asked for.
#[test]
fn migrate_of_what_is_here_already_is_efault_only_for_all_or_nothing() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    lab.device().migrate(span).unwrap();
    refused(&lab, span, Mode::AllOrNothing, 14);
    let again = lab.device().migrate(span).unwrap();
    assert_eq!((again.moved, again.kept), (PageCount::ZERO, BLOCK));
    lab.check(span, 1);
    lab.assert_empty();
}

#[test]
fn migrate_of_not_all_collectable_is_ebusy_for_all_or_nothing() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    lab.device().migrate(part(span, 7, 1)).unwrap();
    let error = refused(&lab, span, Mode::AllOrNothing, 16);
    let collected = PageCount::new(511);
    assert_eq!(error, MigrateError::NotAllCollected { span, collected });
    let moved = lab.device().migrate(span).unwrap();
    assert_eq!((moved.moved, moved.kept), (collected, PageCount::ONE));
    lab.check(span, 1);
    lab.assert_empty();
}

#[test]
fn every_function_is_efault_when_the_address_space_is_gone() {
    let lab = Lab::new(&[0]);
    let (devmem, span) = resident(&lab);
    let pagemap = lab.device().pagemap();
    lab.sim.exit();
    assert!(
        devmem.is_detached(),
        "the end of the process frees its pages"
    );
    let error = lab.device().migrate(span).unwrap_err();
    assert_eq!(error, MigrateError::Mm(MmError::Gone));
    assert_eq!(error.errno(), 14);
    let error = pagemap.populate(span, Duration::ZERO, Cause::Prefetch);
    assert_eq!(error.unwrap_err().errno(), 14);
    lab.assert_empty();
}

#[test]
fn every_function_is_efault_when_the_address_space_was_dropped() {
    let lab = Lab::new(&[0]);
    let (devmem, span) = resident(&lab);
    let (device, pagemap) = (Arc::clone(lab.device()), lab.device().pagemap());
    drop(lab);
    let error = evict_to_ram(&pagemap, &devmem, Cause::Eviction);
    assert_eq!(error, Err(EvictError::Gone));
    assert_eq!(EvictError::Gone.errno(), 14);
    let error = device.migrate(span).unwrap_err();
    assert_eq!(error.errno(), 14, "{error}");
    let populated = device
        .pagemap()
        .populate(span, Duration::ZERO, Cause::Asked);
    assert_eq!(populated.unwrap_err().errno(), 14);
}

#[test]
fn populate_of_an_unbound_memory_is_enodev() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    lab.device().pagemap().unbind();
    let error = refused(&lab, span, Mode::Partial, 19);
    assert_eq!(error, MigrateError::Unbound { span });
    let pagemap = lab.device().pagemap();
    let error = pagemap.populate(span, Duration::ZERO, Cause::Prefetch);
    assert_eq!(error, Err(MigrateError::Unbound { span }));
    lab.assert_empty();
}

#[test]
fn a_driver_without_memory_is_enospc() {
    let lab = Lab::on(
        gpusvm_mm_sim::Sim::new(gpusvm_mm_sim::Options::default()),
        &[0],
        PageCount::new(64),
    );
    let span = lab.block(1);
    let pagemap = lab.device().pagemap();
    let error = pagemap.populate(span, Duration::ZERO, Cause::Prefetch);
    assert_eq!(error, Err(MigrateError::NoSpace { span }));
    assert_eq!(error.unwrap_err().errno(), 28);
    lab.check(span, 1);
}

#[test]
fn a_peer_that_cannot_be_reached_is_eopnotsupp() {
    let lab = Lab::new(&[0, 0]);
    let span = lab.block(1);
    lab.devices[1].migrate(span).unwrap();
    lab.device().wired.store(false, Ordering::Release);
    let error = refused(&lab, span, Mode::Partial, 95);
    let unsupported = matches!(
        error,
        MigrateError::Devmem {
            error: DevmemError::Unsupported { .. },
            ..
        }
    );
    assert!(unsupported, "{error}");
    lab.peek(span, 1);
    lab.check(span, 1);
    lab.assert_empty();
}

#[test]
fn evict_of_what_a_launch_needs_is_ebusy() {
    let lab = Lab::new(&[0]);
    let (devmem, span) = resident(&lab);
    devmem.lease(Holder::CannotFault);
    let error = evict_to_ram(&lab.device().pagemap(), &devmem, Cause::Eviction).unwrap_err();
    let (left, tries) = (BLOCK, EVICT_TRIES);
    assert_eq!(error, EvictError::Busy { left, tries });
    assert_eq!(error.errno(), 16);
    assert_eq!(lab.on_device(span), 512);
    devmem.unlease(Holder::CannotFault);
    evict_to_ram(&lab.device().pagemap(), &devmem, Cause::Eviction).unwrap();
    lab.check(span, 1);
    lab.assert_empty();
}

/// An allocation that nothing lives in yet: somebody is about to put it to use, or has died in doing so.
#[test]
fn evict_does_not_wait_for_ever_for_what_nobody_gives_back() {
    let lab = Lab::new(&[0]);
    let devmem = lab.device().allocate(BLOCK).unwrap();
    let (left, tries) = (PageCount::ZERO, EVICT_TRIES);
    for cause in [Cause::Eviction, Cause::Asked] {
        let error = evict_to_ram(&lab.device().pagemap(), &devmem, cause).unwrap_err();
        assert_eq!(error, EvictError::Busy { left, tries });
    }
    drop(devmem);
    lab.assert_empty();
}

#[test]
fn a_device_that_cannot_copy_is_eio() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    lab.bus.injector.fail_step_nth(Step::CopyToDevmem, 1);
    refused(&lab, span, Mode::Partial, 5);
    lab.bus.injector.disarm();
    let (devmem, span) = resident(&lab);
    for _ in 0..EVICT_TRIES {
        assert_eq!(lab.on_device(span), 512);
        fail_every(&lab, Step::CopyToRam);
        let error = evict_to_ram(&lab.device().pagemap(), &devmem, Cause::Eviction).unwrap_err();
        assert_eq!(error.errno(), 5);
        lab.bus.injector.disarm();
    }
    lab.peek(span, 1);
    lab.assert_sound();
}

/// Every such step fails until `disarm`.
pub(crate) fn fail_every(lab: &Lab, step: Step) {
    lab.bus.injector.fail_every(step);
}

#[test]
fn rebind_of_a_bound_or_used_memory_is_ebusy() {
    let lab = Lab::new(&[0]);
    let (_, span) = resident(&lab);
    let pagemap = lab.device().pagemap();
    let ops = || Arc::new(crate::device::Ops(Arc::clone(lab.device())));
    assert_eq!(pagemap.rebind(ops()), Err(RebindError::Bound));
    pagemap.unbind();
    let in_use = RebindError::InUse { left: BLOCK };
    assert_eq!(pagemap.rebind(ops()), Err(in_use));
    assert_eq!(in_use.errno(), 16);
    lab.check(span, 1);
    assert_eq!(pagemap.rebind(ops()), Ok(()));
    lab.assert_empty();
}

#[test]
fn a_memory_too_many_is_enospc() {
    let lab = Lab::new(&[0]);
    let ops = || Arc::new(crate::device::Ops(Arc::clone(lab.device())));
    let add = |number| {
        let spec = PagemapSpec {
            peer: Peer(number),
            owner: OwnerId(0),
            pages: PageCount::ONE,
            coherent: false,
        };
        Pagemap::new(&lab.pagemaps, spec, ops())
    };
    let error = (1..1000).find_map(|number| add(number).err()).unwrap();
    assert_eq!(error, MmError::TooManyDevices);
    assert_eq!(error.errno(), 28);
    let all = lab.pagemaps.all();
    assert!(all.len() > 1 && all.iter().all(|pagemap| pagemap.is_bound()));
    assert_eq!(add(1000).unwrap_err(), error);
    assert_eq!(lab.pagemaps.all().len(), all.len(), "it is in no list");
    lab.device().migrate(lab.block(1)).unwrap();
}

#[test]
fn range_fault_of_what_cannot_come_home_is_efault() {
    let lab = Lab::new(&[0]);
    let (_, span) = resident(&lab);
    fail_every(&lab, Step::CopyToRam);
    let mut homes = vec![gpusvm_mm::Home::System; 512];
    let error = lab
        .sim
        .range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes)
        .unwrap_err();
    assert_eq!(error, MmError::StuckOnDevice { at: span.start() });
    assert_eq!(error.errno(), 14);
    lab.bus.injector.disarm();
    lab.sim
        .range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes)
        .unwrap();
    lab.check(span, 1);
    lab.assert_empty();
}

#[test]
fn what_a_device_fails_at_has_an_errno() {
    assert_eq!(DevmemError::Pages.errno(), 22);
    assert_eq!(DevmemError::Unsupported { what: "" }.errno(), 95);
    assert_eq!(DevmemError::Copy { reason: "" }.errno(), 5);
}
