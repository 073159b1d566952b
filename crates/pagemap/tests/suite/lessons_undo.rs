//! The lessons about what a failure leaves behind.

use crate::device::Call;
use crate::lab::{BLOCK, Lab, part};
use gpusvm_mm::{Home, MmError};
use gpusvm_mm_sim::Step;
use gpusvm_pagemap::evict::evict_to_ram;
use gpusvm_pagemap::{Cause, PagemapAddr, Peer, ToDevmem};
use gpusvm_types::PageCount;
use std::sync::atomic::Ordering;

/// A failure in the middle undid what had not been done, and counted as a success.
#[test]
fn lesson_09_a_failure_undoes_only_what_was_done() {
    let places = [
        (Step::PopulatePfn, 1),
        (Step::CopyToDevmem, 1),
        (Step::CopyToDevmem, 3),
        (Step::CopyToDevmem, 5),
    ];
    for (step, nth) in places {
        let lab = Lab::new(&[0]);
        let span = lab.untouched(BLOCK);
        // Three runs of pages, with holes between them: five pieces.
        let runs = [(0, 100), (105, 200), (400, 112)].map(|(first, n)| part(span, first, n));
        runs.iter().for_each(|run| lab.fill(*run, 6));
        lab.bus.injector.fail_step_nth(step, nth);
        lab.device().migrate(span).unwrap_err();
        assert_eq!(lab.bus.injector.fired(), Some(step));
        lab.bus.injector.disarm();
        lab.assert_empty();
        assert_eq!(lab.device().releases.load(Ordering::Acquire), 1);
        runs.iter().for_each(|run| lab.peek(*run, 6));
        let moved = lab.device().migrate(span).unwrap();
        assert_eq!(moved.moved, BLOCK);
        runs.iter().for_each(|run| lab.check(*run, 6));
        assert_eq!(lab.sim.read_u64(part(span, 102, 1).start()), Ok(0));
        lab.assert_empty();
    }
}

/// Numbers that were not pages yet were taken for pages by the path that cleans up. Here they are of
/// two types: `DevicePfn` is a number, `DevicePage` a page in use. So a failed populate, whatever it
/// wrote before, touches nobody's pages.
#[test]
fn lesson_10_raw_numbers_are_never_taken_for_pages() {
    let lab = Lab::new(&[0]);
    let (used, span) = (lab.block(1), lab.block(2));
    lab.device().migrate(used).unwrap();
    let victim = lab.device().pagemap().live().remove(0).0;
    let Home::Device(page) = lab.home(used.start()) else {
        panic!("it is on the device");
    };
    let rubbish = || {
        Some(
            (0..256)
                .map(|i| page.pfn.offset(PageCount::new(i)))
                .collect(),
        )
    };
    *lab.device().populates.lock().unwrap() = rubbish();
    lab.device().migrate(span).unwrap_err();
    *lab.device().populates.lock().unwrap() = rubbish();
    let evicted = evict_to_ram(&lab.device().pagemap(), &victim, Cause::Eviction);
    assert_eq!(evicted, Ok(()), "a second try follows a failed one");
    lab.check(used, 1);
    lab.check(span, 2);
    assert_eq!(lab.device().releases.load(Ordering::Acquire), 2);
    lab.assert_empty();
}

/// An unmap read an array that an earlier step of the undo had cleared.
#[test]
fn lesson_11_undo_is_the_reverse_of_do() {
    for fails in [true, false] {
        let lab = Lab::new(&[0, 0]);
        let span = lab.block(1);
        lab.devices[1].migrate(span).unwrap();
        lab.bus.take_log();
        if fails {
            lab.bus.injector.fail_step_nth(Step::CopyToPeer, 1);
        }
        assert_eq!(lab.device().migrate(span).is_err(), fails);
        lab.bus.injector.disarm();
        let log = lab.bus.take_log();
        let place = |which: &dyn Fn(&(Peer, Call)) -> bool| {
            let first = log.iter().position(which).expect("it happened");
            let last = log.iter().rposition(which).expect("it happened");
            (first, last)
        };
        let maps = place(&|(_, call)| matches!(call, Call::Map(..)));
        let copy = place(&|(_, call)| matches!(call, Call::ToRam(..)));
        let unmaps = place(&|(_, call)| matches!(call, Call::Unmap(..)));
        let releases = place(&|(_, call)| matches!(call, Call::Release(_)));
        assert!(maps.1 < copy.0 && copy.1 < unmaps.0 && unmaps.1 < releases.0);
        let whose = log[releases.0].0;
        assert_eq!(whose, if fails { Peer(0) } else { Peer(1) });
        let mapped = log.iter().filter_map(|(_, call)| match call {
            Call::Map(pfn, _) => Some(pfn.dev_addr().get()),
            _ => None,
        });
        let unmapped = log.iter().filter_map(|(_, call)| match call {
            Call::Unmap(PagemapAddr::Peer(at), _) => Some(at.get() & ((1 << 52) - 1)),
            _ => None,
        });
        let (mapped, unmapped): (Vec<_>, Vec<_>) = (mapped.collect(), unmapped.collect());
        assert_eq!(mapped, unmapped, "the same ones, each once");
        assert_eq!(lab.on_device(span), 512);
        lab.check(span, 1);
        lab.assert_empty();
    }
}

/// Counters went below zero when a large page was split: one place counted pages, another one
/// allocations. Here every count is of pages.
#[test]
fn lesson_26_counters_never_pass_zero() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    for step in [1, 7, 256, 512] {
        lab.device().migrate(span).unwrap();
        let mut left = 512;
        for first in (0..512).step_by(step) {
            let count = step.min(512 - first);
            let piece = part(span, first as u64, count as u64);
            match first % 2 {
                0 => lab.sim.madvise_dontneed(piece),
                _ => {
                    let mut homes = vec![Home::System; count];
                    lab.device().pagemap().set_cpu_fault_window(piece.len());
                    let came = gpusvm_mm::AddressSpace::range_fault(
                        &*lab.sim,
                        piece,
                        None,
                        gpusvm_mm::Intent::Read,
                        &mut homes,
                    );
                    assert_eq!(came, Ok::<(), MmError>(()));
                }
            }
            left = lab.on_device(span).min(left);
            assert_eq!(lab.device().pagemap().pages_in_use().as_usize(), left);
            lab.assert_sound();
        }
        assert_eq!(left, 0);
        lab.assert_empty();
        lab.device()
            .pagemap()
            .set_cpu_fault_window(gpusvm_types::BLOCK_SIZE);
        lab.fill(span, 1);
    }
}

/// Every page of a range was taken to exist.
#[test]
fn lesson_27_pages_that_do_not_exist_are_not_copied() {
    for shift in [0, 1] {
        let lab = Lab::new(&[0]);
        let span = lab.untouched(PageCount::new(64));
        // Existing, never touched, dropped, existing, ...
        let kind = |i: u64| (i + shift) % 3;
        for i in (0..64).filter(|i| kind(*i) != 1) {
            lab.fill(part(span, i, 1), 9);
        }
        for i in (0..64).filter(|i| kind(*i) == 2) {
            lab.sim.madvise_dontneed(part(span, i, 1));
        }
        lab.bus.take_log();
        lab.device().migrate(span).unwrap();
        let existing = (0..64).filter(|i| kind(*i) == 0).count() as u64;
        let (mut copied, mut cleared) = (0, 0);
        for (_, call) in lab.bus.take_log() {
            let Call::ToDevmem(pieces, _) = call else {
                continue;
            };
            for piece in pieces {
                match piece {
                    ToDevmem::Copy { len, .. } => copied += len.get() / 4096,
                    ToDevmem::Clear { len, .. } => cleared += len.get() / 4096,
                }
            }
        }
        assert_eq!((copied, cleared), (existing, 64 - existing));
        let gone = part(span, 28, 8);
        lab.sim.munmap(gone);
        for i in (0..64).filter(|i| !(28..36).contains(i)) {
            let page = part(span, i, 1);
            match kind(i) {
                0 => lab.check(page, 9),
                _ => assert_eq!(lab.sim.read_u64(page.start()), Ok(0)),
            }
        }
        for page in gone.pages() {
            assert_eq!(
                lab.sim.read_u64(page.start()),
                Err(gpusvm_mm_sim::Signal::Segv)
            );
        }
        lab.assert_empty();
    }
}
