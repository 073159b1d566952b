//! What was prepared is mapped if it is still true, and not at all otherwise.

use crate::gpu::{Done, NoRoom};
use crate::lab::{GPU, Lab, READ, WRITE, part};
use gpusvm_mm::Reason;
use gpusvm_mm_sim::{Backing, Prot};
use gpusvm_pagemap::{Cause, PagemapAddr};
use gpusvm_svm::{FaultCtx, Permission};
use gpusvm_types::{DmaAddr, Span};

#[test]
fn a_commit_binds_what_was_prepared() {
    let lab = Lab::new(&[0]);
    let range = lab.range_on_device(lab.block());
    let span = range.span();
    assert!(!lab.svm.has_mapping(span));
    let prepared = lab.get_pages(&range, &WRITE).unwrap();
    assert!(prepared.is_in_vram() && !prepared.is_partly_in_ram());
    assert_eq!(lab.gpu.entries(), [], "nothing is mapped yet");
    assert!(lab.commit(&range, prepared));
    assert!(range.pages(GPU).allow(Permission::Write));
    assert!(lab.svm.has_mapping(span));
    lab.check_on_gpu(span);
    lab.assert_ends();
}

#[test]
fn pages_of_ram_and_of_a_device_are_mapped_together() {
    let lab = Lab::new(&[0]);
    let range = lab.range(lab.block().start());
    let span = range.span();
    lab.devices[0].migrate(part(span, 4, 8)).unwrap();
    let prepared = lab.get_pages(&range, &WRITE).unwrap();
    assert!(!prepared.is_in_vram() && prepared.is_partly_in_ram());
    let spans: Vec<Span> = prepared.runs().iter().map(|run| run.span).collect();
    assert_eq!(
        spans,
        [part(span, 0, 4), part(span, 4, 8), part(span, 12, 4)]
    );
    assert!(lab.commit(&range, prepared));
    lab.check_on_gpu(span);
    lab.assert_ends();
}

/// Each page allows atomic operations as they may work where it is; the range, what all of it allows.
#[test]
fn atomics_are_allowed_where_they_may_work() {
    let (read, write, atomic) = (Permission::Read, Permission::Write, Permission::Atomic);
    for (on_ram, on_devmem, read_only, expected) in [
        (true, true, false, [atomic, atomic]),
        (false, true, false, [write, atomic]),
        (true, false, false, [atomic, write]),
        (false, false, false, [write, write]),
        (true, true, true, [read, read]),
    ] {
        let lab = Lab::new(&[0]);
        let prot = if read_only {
            Prot::Read
        } else {
            Prot::ReadWrite
        };
        let span = lab.some(prot, Backing::Mirrored);
        let ctx = FaultCtx {
            atomics_on_ram: on_ram,
            atomics_on_devmem: on_devmem,
            ..READ
        };
        let range = lab
            .svm
            .range_find_or_insert(span.start(), span, &ctx)
            .unwrap();
        assert_eq!(lab.svm.range_arm(&range, &range.serve()), Ok(true));
        let half = range.span().page_count().get() / 2;
        lab.devices[0]
            .migrate(part(range.span(), half, half))
            .unwrap();
        let prepared = lab.get_pages(&range, &ctx).unwrap();
        let permissions = prepared.runs().iter().map(|run| run.permission);
        assert_eq!(permissions.collect::<Vec<_>>(), expected);
        assert!(lab.commit(&range, prepared));
        let least = expected[0].min(expected[1]);
        for wanted in [read, write, atomic] {
            assert_eq!(
                range.pages(GPU).allow(wanted),
                wanted <= least,
                "{wanted:?}"
            );
        }
        lab.assert_ends();
    }
}

/// Whatever happens to the pages between get_pages and commit: they are not mapped.
#[test]
fn a_commit_of_what_was_invalidated_is_refused() {
    type Change = fn(&Lab, Span);
    let changes: [(&str, Change); 6] = [
        ("protect", |lab, span| {
            lab.invalidate(part(span, 3, 1), Reason::Protect);
        }),
        ("clear", |lab, span| {
            lab.sim.madvise_dontneed(part(span, 3, 1));
        }),
        ("unmap", |lab, span| lab.sim.munmap(part(span, 3, 1))),
        ("touch", |lab, span| {
            lab.sim.read_u64(span.start()).unwrap();
        }),
        ("home", |lab, span| lab.sim.bring_home(span).unwrap()),
        ("evict", |lab, _| {
            lab.devices[0].pagemap().evict_all(Cause::Eviction).unwrap();
        }),
    ];
    for (name, change) in changes {
        let lab = Lab::new(&[0]);
        let range = lab.range_on_device(lab.block());
        let prepared = lab.get_pages(&range, &WRITE).unwrap();
        change(&lab, range.span());
        lab.log.take();
        assert!(!lab.commit(&range, prepared), "{name}");
        assert_eq!(lab.log.take_of_table(), [], "{name}");
        assert!(!range.is_mapped(), "{name}");
        lab.assert_ends();
    }
}

#[test]
fn a_commit_to_a_removed_range_is_refused() {
    let lab = Lab::new(&[0]);
    let block = lab.block();
    let range = lab.range_on_device(block);
    let prepared = lab.get_pages(&range, &WRITE).unwrap();
    assert!(lab.svm.range_remove(&range));
    // Another has its place meanwhile.
    let other = lab.range(block.start());
    assert!(!lab.commit(&range, prepared));
    assert!(!other.is_mapped());
    assert_eq!(lab.gpu.entries(), []);
    assert!(lab.map(&other));
    assert!(!lab.svm.range_remove(&range), "only once");
    lab.check_on_gpu(other.span());
    lab.assert_ends();
}

/// A page table that runs full in the middle: what it has entered is taken out again.
#[test]
fn a_bind_that_fails_leaves_nothing_mapped() {
    let lab = Lab::new(&[0]);
    for was_mapped in [false, true] {
        let range = lab.range(lab.block().start());
        let span = range.span();
        lab.devices[0].migrate(part(span, 4, 8)).unwrap();
        if was_mapped {
            assert!(lab.map(&range));
        }
        let prepared = lab.get_pages(&range, &WRITE).unwrap();
        lab.log.take();
        let bind = |runs: &[_]| lab.gpu.bind_and_fail(runs);
        assert_eq!(lab.commit_with(&range, prepared, bind), Err(NoRoom));
        let told = [
            Done::Bind(part(span, 0, 4)),
            Done::Zap(span),
            Done::Flush(span),
        ];
        assert_eq!(lab.log.take_of_table(), told);
        assert!(!range.is_mapped());
        lab.assert_sound();
        assert!(lab.map(&range), "there is room now");
        lab.check_on_gpu(span);
    }
    lab.assert_ends();
}

#[test]
fn what_cannot_migrate_is_mapped_in_place() {
    for backing in [Backing::Private, Backing::Shared] {
        let lab = Lab::new(&[0]);
        let span = lab.some(Prot::ReadWrite, backing);
        let range = lab.range(span.start());
        assert!(!range.can_migrate());
        let prepared = lab.get_pages(&range, &WRITE).unwrap();
        let [run] = prepared.runs() else {
            panic!("one run")
        };
        let in_place = PagemapAddr::System(DmaAddr::new(span.start().get()));
        assert_eq!((run.span, run.address), (span, in_place));
        assert!(lab.commit(&range, prepared));
        lab.check_on_gpu(span);
        // Nobody watches it, but its system calls are heard.
        lab.sim.munmap(part(span, 0, 1));
        assert!(!range.is_mapped() && range.is_partially_unmapped());
        assert_eq!(lab.svm.collect_garbage(), 1);
        lab.assert_ends();
    }
    let lab = Lab::new(&[0]);
    let ctx = FaultCtx {
        devmem_possible: false,
        ..WRITE
    };
    let span = lab.some(Prot::ReadWrite, Backing::Mirrored);
    let range = lab
        .svm
        .range_find_or_insert(span.start(), Span::EVERYWHERE, &ctx)
        .unwrap();
    assert!(!range.can_migrate(), "nobody asked for it");
    lab.assert_ends();
}

/// A mapping for reading is replaced by one for writing, and not the other way round by itself.
#[test]
fn a_mapping_allows_what_its_memory_allows() {
    let lab = Lab::new(&[0]);
    let span = lab.some(Prot::Read, Backing::Mirrored);
    let range = lab
        .svm
        .range_find_or_insert(span.start(), Span::EVERYWHERE, &READ)
        .unwrap();
    let prepared = lab.get_pages(&range, &READ).unwrap();
    assert!(lab.commit(&range, prepared));
    assert!(!range.pages(GPU).allow(Permission::Write));
    lab.sim.mprotect(span, Prot::ReadWrite);
    assert!(!range.is_mapped());
    // Of memory that can be written, a reader gets a mapping for writing: it need not fault twice.
    let prepared = lab.get_pages(&range, &READ).unwrap();
    assert!(lab.commit(&range, prepared));
    assert!(range.pages(GPU).allow(Permission::Write));
    lab.assert_ends();
}

/// Nothing is zapped for an invalidation that comes while a commit looks: it waits, and then is.
#[test]
fn an_invalidation_waits_for_a_commit() {
    let lab = Lab::new(&[0]);
    let range = lab.range_on_device(lab.block());
    let span = range.span();
    let (one, other, of_one) = (lab.clone(), lab.clone(), range.clone());
    let commits = move || {
        let prepared = one.get_pages(&of_one, &WRITE).unwrap();
        let bind = |runs: &[_]| {
            one.gpu.bind(runs);
            (0..20).for_each(|_| one.sim.yield_now());
            assert_eq!(one.gpu.entries().len(), 16, "zapped while it was bound");
            Ok(())
        };
        let _ = one.commit_with(&of_one, prepared, bind).unwrap();
    };
    let invalidates = move || {
        (0..3).for_each(|_| other.invalidate(span, Reason::Protect));
    };
    lab.sim.run(vec![Box::new(commits), Box::new(invalidates)]);
    lab.assert_ends();
}
