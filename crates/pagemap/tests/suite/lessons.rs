//! Mistakes that others made in this layer: see the lessons in docs/kernel-map.md. Each test has the
//! number of its lesson, and fails when the mistake is made here.

use crate::device::{Call, Device, request};
use crate::lab::{BLOCK, Lab, part};
use gpusvm_mm::{AddressSpace, Block, Home, Invalidation, Reason};
use gpusvm_mm_sim::{Options, Sim, Step};
use gpusvm_pagemap::evict::evict_to_ram;
use gpusvm_pagemap::migrate::migrate_to_devmem;
use gpusvm_pagemap::{Cause, Devmem, DevmemError, Mode, PreMigrateFence, ToDevmem};
use gpusvm_types::{ByteSize, DevicePfn, PageCount, Span, VirtAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

fn huge_lab() -> Lab {
    let sim = Sim::new(Options {
        huge: true,
        ..Options::default()
    });
    Lab::on(sim, &[0, 0], PageCount::new(2048))
}

/// A huge page reached out of the range, and all of it was mapped. Here: a migration of a part of a
/// huge page must touch that part only, in both directions.
#[test]
fn lesson_01_order_is_clipped_to_both_ends() {
    for (first, count) in [(3, 6), (0, 5), (500, 12), (24, 16)] {
        let lab = huge_lab();
        let span = lab.block(1);
        assert!(lab.sim.is_huge(span.start()));
        let inner = part(span, first, count);
        let moved = lab.device().migrate(inner).unwrap();
        assert_eq!(moved.moved, PageCount::new(count));
        assert_eq!(lab.on_device(span) as u64, count);
        let len = |call: &Call| match call {
            Call::ToDevmem(pieces, _) => pieces.iter().map(to_devmem_len).sum(),
            Call::ToRam(pieces, _) => pieces.iter().map(|piece| piece.len.get()).sum(),
            _ => 0,
        };
        lab.peek(span, 1);
        lab.check(part(span, first + 2, 1), 1);
        let log = lab.bus.take_log();
        let copied: u64 = log.iter().map(|(_, call)| len(call)).sum();
        let home = count - lab.on_device(span) as u64;
        assert!(home > 0 && home <= count, "the window is clipped too");
        assert_eq!(copied, (count + home) * 4096, "and no byte more");
        lab.check(span, 1);
        lab.assert_empty();
    }
}

fn to_devmem_len(piece: &ToDevmem) -> u64 {
    match piece {
        ToDevmem::Copy { len, .. } | ToDevmem::Clear { len, .. } => len.get(),
    }
}

/// Failures left through an exit that unlocked too much or too little. Here: after each failure the
/// block can be locked, and an invalidation runs.
#[test]
fn lesson_05_every_error_gives_its_locks_back() {
    let steps = [
        Step::Staging,
        Step::TakeOut,
        Step::PopulatePfn,
        Step::CopyToDevmem,
        Step::CopyToRam,
        Step::CommitIn,
    ];
    for step in steps {
        let lab = Arc::new(Lab::new(&[0]));
        let span = lab.block(1);
        lab.device().migrate(part(span, 0, 8)).unwrap();
        let (devmem, _) = lab.device().pagemap().live().remove(0);
        lab.bus.injector.fail_every(step);
        let _ = lab.device().migrate(span);
        let _ = evict_to_ram(&lab.device().pagemap(), &devmem, Cause::Eviction);
        let mut homes = [Home::System; 512];
        let _ = lab
            .sim
            .range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes);
        lab.bus.injector.disarm();
        let after = Arc::clone(&lab);
        // A lock that was kept is a deadlock, which the simulation reports.
        lab.sim.run(vec![Box::new(move || {
            drop(after.sim.lock_block(span).unwrap());
            let reason = Reason::Protect;
            after
                .sim
                .notifiers()
                .invalidate(&Invalidation { span, reason });
            after.device().pagemap().unbind();
        })]);
        lab.check(span, 1);
        lab.assert_empty();
    }
}

/// An array went in with rubbish, and what was in it meant something. Here: homes are only written.
#[test]
fn lesson_06_the_array_of_homes_is_only_written() {
    let found = [Home::System, Home::Moving, Home::Unmapped].map(|rubbish| {
        let lab = Lab::new(&[0, 1]);
        let span = lab.untouched(BLOCK);
        lab.fill(part(span, 0, 100), 1);
        lab.device().migrate(part(span, 20, 20)).unwrap();
        lab.devices[1].migrate(part(span, 60, 20)).unwrap();
        let mut homes = [rubbish; 512];
        let owner = Some(lab.device().pagemap().owner());
        lab.sim
            .range_fault(span, owner, gpusvm_mm::Intent::Read, &mut homes)
            .unwrap();
        assert_eq!(
            lab.on_device(span),
            20,
            "the foreign ones came home, no others"
        );
        homes.map(|home| matches!(home, Home::Device(_)))
    });
    assert_eq!(found[0].iter().filter(|on_device| **on_device).count(), 20);
    assert!(found.iter().all(|other| *other == found[0]));
}

/// A return on a failed allocation kept a reference to the mm. Here: no failure does.
#[test]
fn lesson_07_a_failure_keeps_no_hold_on_the_process() {
    let lab = Lab::new(&[0]);
    let span = lab.block(1);
    lab.device().migrate(part(span, 0, 8)).unwrap();
    let (devmem, _) = lab.device().pagemap().live().remove(0);
    let before = Arc::strong_count(&lab.sim);
    for step in [Step::PopulatePfn, Step::TakeOut, Step::CopyToDevmem] {
        lab.bus.injector.fail_every(step);
        lab.device().migrate(span).unwrap_err();
        assert_eq!(Arc::strong_count(&lab.sim), before, "{step:?}");
    }
    for step in [Step::PopulatePfn, Step::CopyToRam, Step::CommitIn] {
        lab.bus.injector.fail_every(step);
        evict_to_ram(&lab.device().pagemap(), &devmem, Cause::Eviction).unwrap_err();
        assert_eq!(Arc::strong_count(&lab.sim), before, "{step:?}");
    }
    let (sim, pagemap) = (Arc::downgrade(&lab.sim), lab.device().pagemap());
    drop(lab);
    assert!(sim.upgrade().is_none(), "nobody holds it");
    let gone = evict_to_ram(&pagemap, &devmem, Cause::Eviction).unwrap_err();
    assert_eq!(gone.errno(), 14);
}

/// A huge source met base pages at the other end, and the order was read after it was gone.
#[test]
fn lesson_12_a_huge_page_may_land_in_base_pages() {
    let lab = huge_lab();
    let span = lab.block(1);
    lab.device().backwards.store(true, Ordering::Release);
    assert_eq!(lab.device().migrate(span).unwrap().moved, BLOCK);
    lab.peek(span, 1);
    lab.check(span, 1);
    // Dropped in the middle of the way, every second page.
    let mut block = lab.sim.lock_block(span).unwrap();
    let owner = lab.device().pagemap().owner();
    let collected = block.collect(span, owner, &mut |_, _| false).unwrap();
    drop(collected);
    drop(block);
    for i in (0..512).step_by(2) {
        lab.sim.madvise_dontneed(part(span, i, 1));
    }
    assert_eq!(lab.device().migrate(span).unwrap().moved, BLOCK);
    for i in 0..512 {
        let page = part(span, i, 1);
        match i % 2 {
            0 => assert_eq!(lab.sim.read_u64(page.start()), Ok(0)),
            _ => lab.check(page, 1),
        }
    }
    lab.assert_empty();
}

/// A huge page counted as one, and the test for all failed a good migration.
#[test]
fn lesson_13_collected_is_counted_in_pages() {
    let lab = huge_lab();
    let whole = lab.block(1);
    let partly = lab.untouched(BLOCK);
    lab.fill(part(partly, 100, 7), 2);
    for span in [whole, partly] {
        let moved = lab
            .device()
            .migrate_as(span, Mode::AllOrNothing, Duration::ZERO)
            .unwrap();
        assert_eq!((moved.moved, moved.kept), (BLOCK, PageCount::ZERO));
    }
    lab.check(whole, 1);
    lab.bus.injector.fail_step_nth(Step::PageBusy, 5);
    let error = lab
        .device()
        .migrate_as(whole, Mode::AllOrNothing, Duration::ZERO)
        .unwrap_err();
    lab.bus.injector.disarm();
    assert!(error.to_string().contains("511"), "{error}");
    lab.check(whole, 1);
    lab.check(part(partly, 100, 7), 2);
    lab.assert_empty();
}

/// Device pages came back into use with what they had been before.
#[test]
fn lesson_14_a_reused_device_page_has_no_past() {
    let lab = Lab::on(Sim::new(Options::default()), &[0], BLOCK);
    let span = lab.block(1);
    let hour = Duration::from_secs(3600);
    lab.device().migrate_as(span, Mode::Partial, hour).unwrap();
    lab.device().pagemap().evict_all(Cause::Eviction).unwrap();
    for size in [1, 64, 512] {
        let began = lab.sim.now();
        for first in (0..512).step_by(usize::try_from(size).unwrap()) {
            lab.device().migrate(part(span, first, size)).unwrap();
        }
        let allocations = lab.device().pagemap().live();
        assert_eq!(allocations.len() as u64, 512 / size);
        assert!(
            allocations
                .iter()
                .all(|(devmem, pages)| devmem.size() == *pages)
        );
        lab.check(part(span, 70, 1), 1);
        assert_eq!(lab.on_device(span) as u64, 512 - size, "its own allocation");
        assert!(
            lab.sim.now().since(began) < hour,
            "the old timeslice is over"
        );
        lab.check(span, 1);
        lab.assert_empty();
    }
}

/// Device memory that is idle some time after it was handed out.
#[derive(Debug)]
struct Clearing {
    device: Weak<Device>,
    pfns: Vec<DevicePfn>,
    done: AtomicBool,
    waits: AtomicU64,
}

impl PreMigrateFence for Clearing {
    fn wait(&self) -> Result<(), DevmemError> {
        self.waits.fetch_add(1, Ordering::AcqRel);
        if !self.done.swap(true, Ordering::AcqRel) {
            let device = self.device.upgrade().unwrap();
            for pfn in &self.pfns {
                device.write(pfn.dev_addr(), &[0xEE; 4096]);
            }
        }
        Ok(())
    }
}

/// A copy raced the clear of its memory, and lost.
#[test]
fn lesson_17_the_first_copy_waits_for_its_memory() {
    for fail in [None, Some(Step::PopulatePfn), Some(Step::CopyToDevmem)] {
        let lab = Lab::new(&[0]);
        let span = lab.block(1);
        let pfns = lab.device().take(BLOCK).unwrap();
        let fence = Arc::new(Clearing {
            device: Arc::downgrade(lab.device()),
            pfns: pfns.clone(),
            done: AtomicBool::new(false),
            waits: AtomicU64::new(0),
        });
        let held = Arc::clone(&fence) as Arc<dyn PreMigrateFence>;
        let devmem = Arc::new(Devmem::idle_after(BLOCK, lab.device().bo(pfns), held));
        if let Some(step) = fail {
            lab.bus.injector.fail_step_nth(step, 1);
        }
        let request = request(span, Mode::Partial, Duration::ZERO);
        let result = migrate_to_devmem(&lab.device().pagemap(), &devmem, &request);
        lab.bus.injector.disarm();
        assert_eq!(result.is_ok(), fail.is_none());
        lab.peek(span, 1);
        lab.check(span, 1);
        let waits = fence.waits.load(Ordering::Acquire);
        let expected = u64::from(fail != Some(Step::PopulatePfn));
        assert_eq!(waits, expected, "the first copy, and no later one");
        drop(devmem);
        assert_eq!(Arc::strong_count(&fence), 1, "nobody keeps it");
        lab.assert_empty();
    }
}

/// Pages outlived their pagemap.
#[test]
fn lesson_18_pages_keep_their_pagemap_alive() {
    let mut lab = Lab::new(&[0]);
    let span = lab.block(1);
    lab.device().migrate(span).unwrap();
    let pagemap = Arc::downgrade(&lab.device().pagemap());
    let (devmem, _) = lab.device().pagemap().live().remove(0);
    let devmem = {
        let weak = Arc::downgrade(&devmem);
        drop(devmem);
        weak
    };
    let sim = Arc::clone(&lab.sim);
    // Everything of the driver's goes but what the pages hold.
    lab.devices.clear();
    drop(lab);
    assert!(devmem.upgrade().is_some() && pagemap.upgrade().is_some());
    for page in span.pages() {
        let at = page.start();
        assert_eq!(sim.read_u64(at), Ok(crate::lab::word(at, 1)));
    }
    assert!(devmem.upgrade().is_none(), "released with its last page");
    drop(sim);
    assert!(pagemap.upgrade().is_none(), "goes with its process");
}

/// Device to device was taken out of the kernel for a while: it hung.
#[test]
fn lesson_19_device_to_device_does_not_hang() {
    for seed in 0..20 {
        let lab = Arc::new(Lab::seeded(seed, &[0, 0]));
        let spans = [1, 2].map(|seed| lab.block(seed));
        let mover = |to: usize| {
            let lab = Arc::clone(&lab);
            let run: Box<dyn FnOnce() + Send> = Box::new(move || {
                for round in 0..20 {
                    let _ = lab.devices[to].migrate(spans[round % 2]);
                }
            });
            run
        };
        let reader = {
            let lab = Arc::clone(&lab);
            Box::new(move || {
                for i in 0..20 {
                    lab.check(part(spans[0], i, 1), 1);
                    lab.check(part(spans[1], i, 1), 2);
                }
            })
        };
        lab.sim.run(vec![mover(0), mover(1), reader]);
        lab.assert_sound();
        let in_use = |device: &Arc<Device>| device.pagemap().pages_in_use();
        let in_use = lab
            .devices
            .iter()
            .map(in_use)
            .map(PageCount::as_usize)
            .sum();
        assert_eq!(lab.on_device(spans[0]) + lab.on_device(spans[1]), in_use);
        lab.check(spans[0], 1);
        lab.check(spans[1], 2);
        lab.assert_empty();
    }
}

/// A shift by a number that a user chose.
#[test]
fn lesson_25_sizes_at_the_edges_are_checked_first() {
    let windows = [0, 1, 4095, 4096, 4097, (2 << 20) + 1, 1 << 63, u64::MAX];
    for window in windows {
        let lab = Lab::new(&[0]);
        let span = lab.block(1);
        lab.device().migrate(span).unwrap();
        lab.device()
            .pagemap()
            .set_cpu_fault_window(ByteSize::new(window));
        lab.check(part(span, 511, 1), 1);
        let home = 512 - lab.on_device(span) as u64;
        let expected = if window < 8192 { 1 } else { 512 };
        assert_eq!(home, expected, "window {window}");
        lab.check(span, 1);
        lab.assert_empty();
    }
    let end = VirtAddr::new(!0xFFF);
    assert!(Span::from_len(end, ByteSize::new(8192)).is_err());
    assert!(Span::covering(end, ByteSize::new(u64::MAX)).is_err());
}
