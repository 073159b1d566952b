//! Out and home again: every byte, every home.

mod common;

use common::{Device, check, expect, fill, on_device, seeded, thread, word, world};
use gpusvm_mm::{AddressSpace, Block, Home, KeptReason, MmError, Source, Time};
use gpusvm_mm_sim::{Backing, BusError, Options, Prot, Signal, Sim, Step};
use gpusvm_types::{ByteSize, DmaAddr, OwnerId, PageCount, Span};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

#[test]
fn migrate_then_cpu_read() {
    let (sim, device, span) = world(seeded(1), 8);
    fill(&sim, span, 100);
    device.pull(&sim, span, None).unwrap();
    assert_eq!(on_device(&sim, span), 8);
    check(&sim, &device);
    expect(&sim, span, 100);
    assert_eq!(on_device(&sim, span), 0);
    assert_eq!(sim.stats().cpu_faults, 1, "one fault for the window");
    check(&sim, &device);
}

#[test]
fn holes_are_zero_and_migrate_as_holes() {
    let (sim, device, span) = world(seeded(1), 3);
    sim.write_u64(word(span, 1), 5).unwrap();
    assert_eq!(sim.read_u64(word(span, 2)), Ok(0));
    let sources = device.pull(&sim, span, None).unwrap();
    assert!(matches!(
        sources[..],
        [Source::Hole, Source::Page(_), Source::Hole]
    ));
    for (i, want) in [0, 5, 0].into_iter().enumerate() {
        assert_eq!(sim.read_u64(word(span, i as u64)), Ok(want));
    }
    check(&sim, &device);
}

#[test]
fn an_abort_puts_everything_back() {
    let (sim, device, span) = world(seeded(1), 6);
    fill(&sim, span, 7);
    let before = span.pages().map(|page| sim.home(page)).collect::<Vec<_>>();
    sim.injector().fail_step_nth(Step::CopyToDevmem, 4);
    device.pull(&sim, span, None).unwrap_err();
    assert_eq!(sim.stats().aborts, 1);
    check(&sim, &device);
    let after = span.pages().map(|page| sim.home(page)).collect::<Vec<_>>();
    assert_eq!(before, after);
    expect(&sim, span, 7);
}

#[test]
fn what_is_not_armed_does_not_leave() {
    let sim = Sim::new(seeded(1));
    let device = Device::add(&sim, 1, 8);
    let span = sim.mmap(PageCount::new(2), Prot::ReadWrite, Backing::Mirrored);
    let refused = device.pull(&sim, span, None);
    assert_eq!(refused, Err(MmError::NotArmed { span }));
    let token = sim.arm(span).unwrap();
    device.pull(&sim, span, None).unwrap();
    sim.disarm(span, token);
    assert_eq!(
        sim.read_u64(span.start()),
        Ok(0),
        "still watched: pages are away"
    );
    check(&sim, &device);
}

#[test]
fn peers_hand_pages_over_without_ram() {
    let (sim, first, span) = world(seeded(1), 4);
    let second = Device::add(&sim, 2, 16);
    fill(&sim, span, 3);
    first.pull(&sim, span, None).unwrap();
    let sources = second.pull(&sim, span, Some(&first)).unwrap();
    assert!(
        sources
            .iter()
            .all(|source| matches!(source, Source::Device(_)))
    );
    assert_eq!(first.held(), 0);
    check(&sim, &second);
    // Without a word about peers they stay.
    let sources = first.pull(&sim, span, None).unwrap();
    let kept = |source: &Source| matches!(source, Source::Kept(KeptReason::OnDevice(_)));
    assert!(sources.iter().all(kept));
    // And an abort leaves them with the peer.
    sim.injector().fail_step_nth(Step::CopyToDevmem, 2);
    first.pull(&sim, span, Some(&second)).unwrap_err();
    assert_eq!((first.held(), second.held()), (0, 4));
    expect(&sim, span, 3);
    check(&sim, &second);
}

#[test]
fn pinned_pages_stay() {
    let (sim, device, span) = world(seeded(1), 3);
    fill(&sim, span, 3);
    sim.pin(Span::page_of(word(span, 1)));
    let sources = device.pull(&sim, span, None).unwrap();
    assert_eq!(sources[1], Source::Kept(KeptReason::Busy));
    assert_eq!(on_device(&sim, span), 2);
    sim.unpin(span);
    device.pull(&sim, span, None).unwrap();
    assert_eq!(on_device(&sim, span), 3);
    expect(&sim, span, 3);
}

#[test]
fn a_huge_page_stays_whole_and_a_partial_move_splits_it() {
    let options = Options {
        huge: true,
        ..Options::default()
    };
    let (sim, device, span) = world(options, 512);
    let token = sim.arm(span).unwrap();
    sim.disarm(span, token);
    assert!(
        !sim.is_huge(span.start()),
        "watched blocks are filled page by page"
    );
    let span = sim.mmap(PageCount::new(512), Prot::ReadWrite, Backing::Mirrored);
    sim.write_u64(span.start(), 9).unwrap();
    assert!(sim.is_huge(span.start()));
    sim.arm(span).unwrap();
    device.pull(&sim, span, None).unwrap();
    assert!(!sim.is_huge(span.start()));
    assert_eq!(sim.read_u64(span.start()), Ok(9));
    assert!(
        sim.is_huge(span.start()),
        "all of it went, and all of it came back"
    );
    device
        .pull(&sim, Span::page_of(span.start()), None)
        .unwrap();
    assert_eq!(sim.read_u64(span.start()), Ok(9));
    assert!(!sim.is_huge(span.start()));
    check(&sim, &device);
}

#[test]
fn a_fault_in_a_timeslice_sleeps_and_does_not_spin() {
    let (sim, device, span) = world(seeded(4), 2);
    fill(&sim, span, 1);
    device.pull(&sim, span, None).unwrap();
    device.set_timeslice(sim.now(), Duration::from_millis(5));
    let reader = Arc::clone(&sim);
    sim.run(vec![thread(move || expect(&reader, span, 1))]);
    let times = sim.thread_times()[0];
    assert!(times.slept > Duration::from_millis(4), "{times:?}");
    assert!(times.busy < Duration::from_micros(200), "{times:?}");
    assert_eq!(sim.stats().delayed_faults, 1);
}

#[test]
fn a_page_that_cannot_come_home_is_a_bus_error() {
    let (sim, device, span) = world(seeded(1), 2);
    fill(&sim, span, 1);
    device.pull(&sim, span, None).unwrap();
    device.fails.store(true, Ordering::Release);
    assert_eq!(sim.read_u64(span.start()), Err(Signal::Bus));
    device.fails.store(false, Ordering::Release);
    assert_eq!(sim.read_u64(span.start()), Err(Signal::Bus), "from then on");
    assert!(!sim.is_readable(span.start()), "a device is told, too");
    assert_eq!(sim.stats().failed_faults, 1);
}

#[test]
fn range_fault_brings_foreign_pages_home_after_their_timeslice() {
    let (sim, device, span) = world(seeded(1), 4);
    fill(&sim, span, 1);
    device.pull(&sim, span, None).unwrap();
    let mut homes = [Home::Moving; 4];
    sim.range_fault(span, Some(OwnerId(1)), gpusvm_mm::Intent::Read, &mut homes)
        .unwrap();
    assert!(homes.iter().all(|home| matches!(home, Home::Device(_))));
    let due = sim.now().after(Duration::from_millis(3));
    device.set_timeslice(sim.now(), Duration::from_millis(3));
    sim.range_fault(span, Some(OwnerId(2)), gpusvm_mm::Intent::Read, &mut homes)
        .unwrap();
    assert_eq!(homes, [Home::System; 4]);
    assert!(sim.now() >= due);
}

#[test]
fn range_fault_waits_a_second_for_pages_on_the_move() {
    let (sim, _device, span) = world(seeded(1), 4);
    let (mover, looker) = (Arc::clone(&sim), Arc::clone(&sim));
    let hold = move || {
        let mut block = mover.lock_block(span).unwrap();
        let mut none = |_, _| false;
        let collected = block.collect(span, OwnerId(1), &mut none).unwrap();
        mover.sleep(Duration::from_secs(5));
        drop(collected);
    };
    let look = move || {
        looker.sleep(Duration::from_millis(1));
        let mut homes = [Home::System; 4];
        let found = looker.range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes);
        assert_eq!(found, Err(MmError::Unstable { span }));
        assert!(looker.now() < Time::START.after(Duration::from_secs(3)));
    };
    sim.run(vec![thread(hold), thread(look)]);
}

#[test]
fn the_bus_sees_ram_and_nothing_else() {
    let (sim, device, span) = world(seeded(1), 3);
    let at = |i| DmaAddr::new(word(span, i).get());
    sim.write_u64(word(span, 0), 0x0102).unwrap();
    let mut bytes = [0; 8];
    sim.bus_read(at(0), &mut bytes).unwrap();
    assert_eq!(bytes, 0x0102_u64.to_le_bytes());
    sim.bus_read(at(1), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 8], "untouched");
    // Across the end of a page.
    sim.bus_write(at(1) + ByteSize::new(4092), &[1; 8]).unwrap();
    assert_eq!(sim.read_u64(word(span, 2)), Ok(0x0101_0101));
    assert_eq!(sim.bus_fetch_add_u64(at(0), 1), Ok(0x0102));
    device
        .pull(&sim, Span::page_of(span.start()), None)
        .unwrap();
    assert_eq!(
        sim.bus_read(at(0), &mut bytes),
        Err(BusError::NotInRam(at(0)))
    );
    assert_eq!(sim.read_u64(span.start()), Ok(0x0103));
    sim.mprotect(span, Prot::Read);
    assert_eq!(sim.bus_write(at(0), &bytes), Err(BusError::Denied(at(0))));
    let nowhere = DmaAddr::new(1 << 56);
    assert_eq!(
        sim.bus_read(nowhere, &mut bytes),
        Err(BusError::Unmapped(nowhere))
    );
}

#[test]
fn eviction_needs_no_address() {
    let (sim, device, span) = world(seeded(1), 4);
    fill(&sim, span, 1);
    device.set_window(ByteSize::kib(4));
    device.pull(&sim, span, None).unwrap();
    device.evict(&sim, 2).unwrap();
    assert_eq!(on_device(&sim, span), 3);
    device.evict(&sim, 2).unwrap();
    assert_eq!(on_device(&sim, span), 3, "nothing is there any more");
    expect(&sim, span, 1);
    check(&sim, &device);
}
