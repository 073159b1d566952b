//! Mistakes that others made in this layer: see the lessons in docs/kernel-map.md. Each test has the
//! number of its lesson, and fails when the mistake is made here. Here: what a device reaches.

use crate::gpu::Done;
use crate::lab::{GPU, Lab, RANGE, READ, WRITE, part};
use gpusvm_mm::{AddressSpace, Home, Reason};
use gpusvm_mm_sim::{Backing, Prot};
use gpusvm_pagemap::{PagemapAddr, Peer};
use gpusvm_svm::{FaultCtx, GetPagesError, Permission};
use gpusvm_types::{OwnerId, PAGE_SIZE, Span};

/// How often pages were mapped for a device, and unmapped.
fn counts(log: &[Done]) -> (usize, usize) {
    let count = |is: fn(&&Done) -> bool| log.iter().filter(is).count();
    let is_system = |done: &&Done| matches!(done, Done::Unmap(PagemapAddr::System(_), _));
    assert!(!log.iter().any(|done| is_system(&done)), "RAM is nobody's");
    let maps = count(|done| matches!(done, Done::Map(..)));
    (maps, count(|done| matches!(done, Done::Unmap(..))))
}

/// A page in the middle was refused, and those before it stayed mapped for ever. Here: what was
/// mapped before a failure is unmapped by it, once, and nothing else is.
#[test]
fn lesson_02_a_failed_get_pages_maps_nothing() {
    for k in [0, 1, 7, 15] {
        let lab = Lab::new(&[0]);
        let range = lab.range_on_device(lab.block());
        let at = part(range.span(), k, 1).start();
        lab.devices[0].refuse_map_after(k);
        let error = lab.get_pages(&range, &WRITE).unwrap_err();
        assert_eq!(error, GetPagesError::OutOfReach { at });
        let k = usize::try_from(k).unwrap();
        assert_eq!(counts(&lab.log.take()), (k, k));
        assert_eq!(lab.devices[0].reached(), 0);
        assert!(!range.is_mapped());

        assert!(lab.map(&range), "nothing is left of the failure");
        assert_eq!(counts(&lab.log.take()), (16, 0));
        lab.check_on_gpu(range.span());
        lab.assert_ends();
        lab.check(range.span());
    }
}

#[test]
fn lesson_02_also_when_a_page_is_in_ram() {
    for k in [0, 1, 7, 15] {
        let lab = Lab::new(&[0]);
        let range = lab.range_on_device(lab.block());
        let page = part(range.span(), k, 1);
        lab.sim.bring_home(range.span()).unwrap();
        let [below, above] = range.span().without(page);
        for rest in [below, above].into_iter().flatten() {
            lab.devices[0].migrate(rest).unwrap();
        }
        lab.log.take();
        let ctx = FaultCtx {
            devmem_only: true,
            ..WRITE
        };
        let error = lab.get_pages(&range, &ctx).unwrap_err();
        assert_eq!(error, GetPagesError::NotOnDevice { at: page.start() });
        let k = usize::try_from(k).unwrap();
        assert_eq!(counts(&lab.log.take()), (k, k));
        assert!(!range.is_mapped());
        lab.assert_ends();
    }
}

/// What was mapped for a device was only unmapped if it was also bound. Here: whoever drops it
/// unmaps it, whether or not it came to a commit.
#[test]
fn lesson_03_what_was_mapped_is_unmapped_without_commit() {
    let lab = Lab::new(&[0, 0]);
    let range = lab.range_on_device(lab.block());
    let span = range.span();
    // One page in RAM, to see that nobody unmaps that.
    lab.sim.bring_home(span).unwrap();
    lab.devices[1].migrate(part(span, 1, 15)).unwrap();
    lab.log.take();

    let prepared = lab.get_pages(&range, &WRITE).unwrap();
    lab.invalidate(span, Reason::Protect);
    assert!(!lab.commit(&range, prepared), "out of date");
    assert_eq!(counts(&lab.log.take()), (15, 15));

    drop(lab.get_pages(&range, &WRITE).unwrap());
    assert_eq!(counts(&lab.log.take()), (15, 15));

    assert!(lab.map(&range));
    assert_eq!(counts(&lab.log.take()), (15, 0));
    lab.invalidate(part(span, 3, 1), Reason::Protect);
    assert_eq!(counts(&lab.log.take()), (0, 15));

    // And what replaces a mapping that is still good gives that back, not itself.
    assert!(lab.map(&range) && lab.map(&range));
    assert_eq!(counts(&lab.log.take()), (30, 15));
    lab.assert_sound();
    assert!(lab.svm.range_remove(&range));
    assert_eq!(counts(&lab.log.take()), (0, 15));
    lab.assert_ends();
}

/// A page of RAM at the start made the first device page look like one of a second memory. Here: RAM
/// is no memory of a device, wherever in the range it is; two devices are too many, in any order.
#[test]
fn lesson_04_ram_first_is_not_a_second_pagemap() {
    let cases = [
        ("SAAA", None),
        ("ASAA", None),
        ("SSAS", None),
        ("AAAA", None),
        ("SSSS", None),
        ("BBBB", None),
        ("SBSB", None),
        ("ABAA", Some(1)),
        ("SAAB", Some(3)),
        ("BSAB", Some(2)),
        ("SBAS", Some(2)),
    ];
    for (homes, mixed) in cases {
        let lab = Lab::new(&[0, 0]);
        let range = lab.range(lab.block().start());
        let span = range.span();
        for (i, home) in (0..RANGE).zip(homes.chars().chain("SSSSSSSSSSSS".chars())) {
            match home {
                'A' => drop(lab.devices[0].migrate(part(span, i, 1)).unwrap()),
                'B' => drop(lab.devices[1].migrate(part(span, i, 1)).unwrap()),
                _ => {}
            }
        }
        lab.log.take();
        match (lab.get_pages(&range, &WRITE), mixed) {
            (Ok(prepared), None) => {
                let kinds = prepared.runs().iter().flat_map(|run| {
                    let kind = match run.address {
                        PagemapAddr::System(_) => 'S',
                        PagemapAddr::Vram(_) => 'A',
                        PagemapAddr::Peer(_) => 'B',
                    };
                    run.span.pages().map(move |_| kind)
                });
                let kinds: String = kinds.take(4).collect();
                assert_eq!(kinds, homes);
            }
            (Err(error), Some(i)) => {
                let at = part(span, i, 1).start();
                assert_eq!(error, GetPagesError::MixedPagemaps { at }, "{homes}");
                assert_eq!(error.errno(), 95);
            }
            (result, _) => panic!("{homes}: {result:?}"),
        }
        let (maps, unmaps) = counts(&lab.log.take());
        assert_eq!(maps, unmaps, "{homes}");
        lab.check(span);
        lab.assert_ends();
    }
}

/// To ask for no device was taken for "any device will do". Here: without an owner every page comes
/// home, and is mapped nowhere.
#[test]
fn lesson_22_no_owner_means_ram() {
    let lab = Lab::new(&[0]);
    let range = lab.mapped_range(lab.block());
    let span = range.span();
    lab.svm.range_evict(&range).unwrap();
    assert!(lab.is_home(span));
    assert!(!range.is_mapped());
    assert_eq!(
        lab.log.take_of_table(),
        [Done::Zap(span), Done::Flush(span)]
    );
    lab.check(span);

    lab.devices[0].migrate(span).unwrap();
    let mut homes = [Home::System; 16];
    lab.sim
        .range_fault(span, Some(OwnerId(0)), gpusvm_mm::Intent::Read, &mut homes)
        .unwrap();
    assert!(homes.iter().all(|home| matches!(home, Home::Device(_))));
    lab.sim
        .range_fault(span, Some(OwnerId(1)), gpusvm_mm::Intent::Read, &mut homes)
        .unwrap();
    assert_eq!(homes, [Home::System; 16]);
    lab.check(span);
    lab.assert_ends();
}

/// A device wrote to memory that the program may not write. Here: no way to a mapping that may be
/// written leads through read-only memory, also when it became so later.
#[test]
fn lesson_24_no_write_to_read_only_memory() {
    let lab = Lab::new(&[0]);
    let span = lab.some(Prot::ReadWrite, Backing::Mirrored);
    let range = lab.mapped_range(span);
    assert!(range.pages(GPU).allow(Permission::Write));

    let prepared = lab.get_pages(&range, &WRITE).unwrap();
    lab.sim.mprotect(span, Prot::Read);
    assert!(!range.is_mapped());
    assert!(!lab.commit(&range, prepared), "it was for writing");
    let error = lab
        .svm
        .range_find_or_insert(span.start(), Span::EVERYWHERE, &WRITE);
    assert_eq!(error.unwrap_err().errno(), 1);
    let error = lab.get_pages(&range, &WRITE).unwrap_err();
    assert_eq!(error, GetPagesError::ReadOnly { span });

    let range = lab
        .svm
        .range_find_or_insert(span.start(), Span::EVERYWHERE, &READ)
        .unwrap();
    let prepared = lab.get_pages(&range, &READ).unwrap();
    let is_read = |run: &gpusvm_svm::PageRun| run.permission == Permission::Read;
    assert!(prepared.runs().iter().all(is_read));
    assert!(lab.commit(&range, prepared));
    assert!(range.pages(GPU).allow(Permission::Read) && !range.pages(GPU).allow(Permission::Write));
    lab.check_on_gpu(span);
    lab.check(span);
    lab.assert_ends();
}

/// The svm half of lesson 1: what is prepared covers the range and no byte more, however large the
/// runs of the device pages are.
#[test]
fn runs_end_where_the_range_ends() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    let token = lab.sim.arm(block).unwrap();
    lab.devices[0].migrate(block).unwrap();
    for first in [0, RANGE, 512 - RANGE] {
        let range = lab.range(part(block, first + 5, 1).start());
        let prepared = lab.get_pages(&range, &WRITE).unwrap();
        let [run] = prepared.runs() else {
            panic!("one run: {:?}", prepared.runs());
        };
        assert_eq!(run.span, part(block, first, RANGE));
        let Home::Device(page) = lab.sim.home(run.span.first_page()) else {
            panic!("it is on the device");
        };
        assert_eq!(run.address, lab.devices[0].address(page.pfn, Peer(0)));
        assert_eq!(run.span.len().get(), RANGE * PAGE_SIZE.get());
    }
    lab.sim.disarm(block, token);
    lab.assert_ends();
}
