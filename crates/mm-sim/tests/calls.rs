//! Each system call, with its pages in RAM, on the device, and under way.

mod common;

use common::{Device, check, expect, fill, on_device, seeded, thread, word, world};
use gpusvm_mm::{
    AddressSpace, Home, IntervalNotifier, Invalidation, Mirror, MmError, Reason, Subscriber,
};
use gpusvm_mm_sim::{Backing, Options, Prot, Signal, Sim};
use gpusvm_sync::Mutex;
use gpusvm_types::{PageCount, Span};
use std::sync::Arc;

/// Every call works alike with early and with late events.
fn both(test: impl Fn(Options)) {
    for late_events in [false, true] {
        test(Options {
            late_events,
            ..seeded(3)
        });
    }
}

fn first(span: Span, pages: u64) -> Span {
    Span::of_pages(span.first_page(), PageCount::new(pages))
}

#[test]
fn munmap_gives_device_pages_back() {
    both(|options| {
        let (sim, device, span) = world(options, 8);
        fill(&sim, span, 1);
        device.pull(&sim, span, None).unwrap();
        sim.munmap(first(span, 3));
        assert_eq!(sim.read_u64(span.start()), Err(Signal::Segv));
        check(&sim, &device);
        assert_eq!(device.held(), 5);
        assert_eq!(sim.read_u64(word(span, 4)), Ok(5));
        assert!(matches!(sim.mirrored(span.start()), Mirror::Gap(_)));
        assert_eq!(sim.home(span.first_page()), Home::Unmapped);
    });
}

#[test]
fn dontneed_makes_pages_zero_wherever_they_are() {
    both(|options| {
        let (sim, device, span) = world(options, 4);
        fill(&sim, span, 1);
        device.pull(&sim, first(span, 2), None).unwrap();
        sim.madvise_dontneed(span);
        for i in 0..4 {
            assert_eq!(sim.read_u64(word(span, i)), Ok(0));
        }
        fill(&sim, span, 9);
        device.pull(&sim, span, None).unwrap();
        expect(&sim, span, 9);
        check(&sim, &device);
    });
}

#[test]
fn mremap_onto_a_mapping_gives_its_device_pages_back() {
    both(|options| {
        for dontunmap in [false, true] {
            let (sim, device, span) = world(options.clone(), 6);
            let other = sim.mmap(PageCount::new(6), Prot::ReadWrite, Backing::Mirrored);
            fill(&sim, span, 1);
            fill(&sim, other, 50);
            device.pull(&sim, first(span, 3), None).unwrap();
            sim.arm(other).unwrap();
            device.pull(&sim, other, None).unwrap();
            let onto = first(other, 4);
            sim.mremap_fixed(first(span, 4), onto.start(), dontunmap);
            sim.settle_events();
            assert_eq!(device.held(), 3 + 2);
            check(&sim, &device);
            expect(&sim, onto, 1);
            assert_eq!(sim.read_u64(word(other, 4)), Ok(54));
            let old = sim.read_u64(span.start());
            assert_eq!(old, if dontunmap { Ok(0) } else { Err(Signal::Segv) });
            assert_eq!(sim.read_u64(word(span, 5)), Ok(6));
            check(&sim, &device);
        }
    });
}

#[test]
fn mremap_takes_device_pages_along() {
    both(|options| {
        for dontunmap in [false, true] {
            let (sim, device, span) = world(options.clone(), 6);
            fill(&sim, span, 1);
            device.pull(&sim, first(span, 3), None).unwrap();
            let there = sim.mremap(span, dontunmap);
            sim.settle_events();
            assert_eq!(on_device(&sim, there), 3);
            check(&sim, &device);
            expect(&sim, there, 1);
            let old = sim.read_u64(span.start());
            assert_eq!(old, if dontunmap { Ok(0) } else { Err(Signal::Segv) });
            check(&sim, &device);
        }
    });
}

#[test]
fn mprotect_is_obeyed_on_the_device_and_at_home() {
    both(|options| {
        let (sim, device, span) = world(options, 2);
        fill(&sim, span, 1);
        sim.mprotect(span, Prot::Read);
        assert_eq!(sim.write_u64(span.start(), 3), Err(Signal::Segv));
        device.pull(&sim, span, None).unwrap();
        assert_eq!(on_device(&sim, span), 2, "read-only pages migrate");
        assert_eq!(sim.write_u64(span.start(), 3), Err(Signal::Segv));
        expect(&sim, span, 1);
        sim.mprotect(span, Prot::None);
        assert_eq!(sim.read_u64(span.start()), Err(Signal::Segv));
        assert!(!sim.is_readable(span.start()));
        device.pull(&sim, span, None).unwrap();
        sim.mprotect(span, Prot::ReadWrite);
        expect(&sim, span, 1);
        check(&sim, &device);
    });
}

#[test]
fn mmap_fixed_replaces_what_was_there() {
    both(|options| {
        let (sim, device, span) = world(options, 4);
        fill(&sim, span, 1);
        device.pull(&sim, span, None).unwrap();
        sim.mmap_fixed(span, Prot::ReadWrite, Backing::Mirrored);
        assert_eq!(sim.read_u64(span.start()), Ok(0));
        check(&sim, &device);
        assert_eq!(device.held(), 0);
        sim.mmap_fixed(first(span, 1), Prot::Read, Backing::Shared);
        sim.settle_events();
        assert!(matches!(sim.mirrored(span.start()), Mirror::Gap(_)));
        let vma = sim.find_vma(span.start()).unwrap().unwrap();
        assert_eq!((vma.span, vma.writable), (first(span, 1), false));
        check(&sim, &device);
    });
}

#[test]
fn adopted_memory_migrates_until_it_is_given_back() {
    let sim = Sim::new(seeded(1));
    let device = Device::add(&sim, 1, 16);
    let span = sim.mmap(PageCount::new(4), Prot::ReadWrite, Backing::Private);
    fill(&sim, span, 1);
    let refused = sim.arm(span).unwrap_err();
    assert_eq!(refused, MmError::NotMirrored { span });
    sim.adopt(span).unwrap();
    assert_eq!(sim.adopt(span).unwrap_err().errno(), 17);
    sim.arm(span).unwrap();
    device.pull(&sim, span, None).unwrap();
    sim.unadopt(span).unwrap();
    assert_eq!(device.held(), 0);
    expect(&sim, span, 1);
    assert!(sim.mirrored_spans().is_empty());
    let shared = sim.mmap(PageCount::ONE, Prot::ReadWrite, Backing::Shared);
    assert_eq!(
        sim.adopt(shared),
        Err(MmError::NotMirrored { span: shared })
    );
    check(&sim, &device);
}

#[test]
fn a_child_sees_the_moment_of_the_fork_and_collecting_still_works() {
    both(|options| {
        let (sim, device, span) = world(options, 4);
        fill(&sim, span, 1);
        device.pull(&sim, span, None).unwrap();
        let mut child = sim.fork();
        assert_eq!(device.held(), 0);
        device.pull(&sim, span, None).unwrap();
        assert_eq!(sim.stats().unshared, 4);
        sim.write_u64(span.start(), 50).unwrap();
        child.write_u64(word(span, 1), 60).unwrap();
        for i in 0..4 {
            let want = if i == 1 { 60 } else { 1 + i };
            assert_eq!(child.read_u64(word(span, i)), Ok(want));
        }
        assert_eq!(sim.read_u64(word(span, 1)), Ok(2));
        check(&sim, &device);
    });
}

#[test]
fn fork_waits_for_whoever_moves_pages_to_a_device() {
    for seed in 0..50 {
        let (sim, device, span) = world(seeded(seed), 8);
        fill(&sim, span, 1);
        let (mover, parent) = (Arc::clone(&sim), Arc::clone(&sim));
        let moves = Arc::clone(&device);
        let body = move || {
            for _ in 0..3 {
                moves.pull(&mover, span, None).unwrap();
            }
        };
        let fork = move || {
            let child = parent.fork();
            for i in 0..8 {
                assert_eq!(child.read_u64(word(span, i)), Ok(1 + i));
            }
        };
        sim.run(vec![thread(body), thread(fork)]);
        check(&sim, &device);
    }
}

#[test]
fn after_exit_everything_is_gone() {
    both(|options| {
        let (sim, device, span) = world(options, 4);
        fill(&sim, span, 1);
        device.pull(&sim, span, None).unwrap();
        sim.exit();
        assert_eq!(device.held(), 0);
        assert_eq!(sim.read_u64(span.start()), Err(Signal::Segv));
        assert_eq!(sim.find_vma(span.start()), Err(MmError::Gone));
        assert_eq!(sim.arm(span), Err(MmError::Gone));
        assert_eq!(sim.lock_block(span).unwrap_err(), MmError::Gone);
        let mut homes = [Home::System; 4];
        assert_eq!(
            sim.range_fault(span, None, gpusvm_mm::Intent::Read, &mut homes),
            Err(MmError::Gone)
        );
        check(&sim, &device);
    });
}

/// Remembers what it is told.
#[derive(Debug, Default)]
struct Told(Mutex<Vec<Reason>>);

impl Subscriber for Told {
    fn invalidate(&self, notifier: &IntervalNotifier, event: &Invalidation) {
        notifier.bump();
        self.0.lock().push(event.reason);
    }
}

#[test]
fn subscribers_are_told_of_every_change() {
    both(|options| {
        let (sim, device, span) = world(options, 4);
        fill(&sim, span, 1);
        let told = Arc::new(Told::default());
        let window = Span::block_of(span.start());
        let notifier = sim.notifiers().subscribe(window, told.clone());
        let said = || {
            sim.settle_events();
            core::mem::take(&mut *told.0.lock())
        };
        let before = notifier.read_begin();
        device.pull(&sim, span, None).unwrap();
        assert!(matches!(said()[..], [Reason::Migrate(Some(_))]));
        assert!(!notifier.is_current(before));
        sim.read_u64(span.start()).unwrap();
        assert_eq!(said(), [Reason::Migrate(None)]);
        sim.madvise_dontneed(span);
        assert_eq!(said(), [Reason::Clear]);
        sim.mprotect(span, Prot::Read);
        assert_eq!(said(), [Reason::Protect]);
        sim.munmap(span);
        assert_eq!(said(), [Reason::Unmap]);
        sim.notifiers().unsubscribe(&notifier);
    });
}
