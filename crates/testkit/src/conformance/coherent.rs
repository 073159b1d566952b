//! Devices whose memory the CPU uses in place: pages are the device's, and no touch of the CPU moves them.

use super::pair::two_devices_race_for_one_block;
use super::races;
use super::{Bench, Kit, Places, Setup};
use crate::mirror::{Snap, words_of};
use crate::world::{Cpu, Feature, Prot, World};
use gpusvm_sync::Arc;
use gpusvm_types::{PageCount, Span};

const ONE: Setup = Setup {
    devices: 1,
    fabric: false,
    vram: gpusvm_types::ByteSize::mib(8),
    places: Places::Device,
    atomics_on_ram: true,
    coherent: 1,
};

const PAIR: Setup = Setup {
    devices: 2,
    coherent: 2,
    ..ONE
};

/// The kernel's buffer: 4 MiB.
const PAGES: u64 = 1024;

fn pages(span: Span, first: u64, count: u64) -> Span {
    let first = span.first_page() + PageCount::new(first);
    Span::of_pages(first, PageCount::new(count))
}

/// All of it is the first device's, and where it was.
fn expect_coherent<W: World>(bench: &Bench<W>, span: Span) {
    let writable = true;
    let snaps = bench.mirror().snapshot(span);
    for (page, snap) in span.pages().zip(snaps) {
        assert_eq!(snap, Snap::Coherent { writable }, "{page:?}");
    }
}

/// What both read and write, and neither takes from the other.
fn both_use<W: World>(bench: &Arc<Bench<W>>, span: Span, tag: u64) {
    bench.fill(span, tag);
    bench.device_expect(0, span, tag);
    assert_eq!(bench.device_fill(0, span, tag + 1), Ok(()));
    bench.expect(span, tag + 1);
    let words = words_of(span);
    let before = bench.mirror().add(&words, 1).expect("the device adds");
    for (at, before) in words.iter().zip(before) {
        let added = bench.world().fetch_add(*at, 1);
        assert_eq!(added, Ok(before.wrapping_add(1)), "{at}");
    }
}

/// The CPU and the device work on pages of the device: they stay there, and there are no faults.
pub fn coherent<W: World>(kit: &Kit) {
    kit.once::<W>(&ONE, |bench| {
        let (span, mirror) = (bench.memory(PAGES), bench.mirror());
        bench.fill(span, 1);
        bench.to_device(0, span);
        expect_coherent(bench, span);
        assert_eq!(mirror.region.used(), span.page_count());
        bench.expect(span, 1);
        both_use(bench, span, 2);
        let ((), faults) = mirror.faults_of(|| both_use(bench, span, 4));
        assert_eq!(faults, 0, "nobody took anything away");
        expect_coherent(bench, span);
        bench.check();
        let ram = pages(span, 0, PAGES / 2);
        assert_eq!(mirror.migrate_to_sys(ram), Ok(()));
        assert_eq!(mirror.on_device(ram), PageCount::ZERO);
        assert_eq!(
            mirror.region.used(),
            pages(span, PAGES / 2, PAGES / 2).page_count()
        );
        bench.check();
        both_use(bench, span, 6);
        assert!(mirror.evict_all().is_ok());
        assert_eq!(mirror.region.used(), PageCount::ZERO);
        bench.fill(span, 8);
        bench.device_expect(0, span, 8);
    });
}

/// Pages that nobody touched are zeroes on the device, and read-only ones go there too.
pub fn coherent_empty<W: World>(kit: &Kit) {
    kit.once::<W>(&ONE, |bench| {
        let span = bench.memory(512);
        bench.fill(pages(span, 256, 256), 1);
        bench.world().protect(pages(span, 128, 256), Prot::Read);
        for piece in [
            pages(span, 0, 128),
            pages(span, 128, 256),
            pages(span, 384, 128),
        ] {
            bench.to_device(0, piece);
        }
        bench.check();
        bench.expect_zero(pages(span, 0, 256));
        bench.device_expect_zero(0, pages(span, 0, 256));
        bench.device_expect(0, pages(span, 256, 256), 1);
        let read_only = bench.mirror().snapshot(pages(span, 128, 256));
        let writable = false;
        assert!(
            read_only
                .iter()
                .all(|snap| *snap == Snap::Coherent { writable })
        );
        let refused = bench.device_fill(0, pages(span, 128, 1), 2);
        assert!(refused.is_err(), "{refused:?}");
        bench.world().protect(span, Prot::ReadWrite);
        both_use(bench, span, 3);
        expect_coherent(bench, span);
    });
}

/// More than the device's memory holds: others go home, which copies nothing, and all is right.
pub fn coherent_evicted<W: World>(kit: &Kit) {
    kit.once::<W>(&ONE, |bench| {
        let spans: Vec<Span> = (0..6).map(|_| bench.memory(512)).collect();
        for (tag, span) in (1..).zip(&spans) {
            bench.fill(*span, tag);
            bench.device_expect(0, *span, tag);
        }
        let mirror = bench.mirror();
        let there = spans.iter().map(|span| mirror.on_device(*span).get());
        let there: u64 = there.sum();
        assert!((1..=2048).contains(&there), "{there} pages are there");
        assert_eq!(mirror.region.used().get(), there);
        for (tag, span) in (1..).zip(&spans) {
            bench.expect(*span, tag);
            bench.device_expect(0, *span, tag);
        }
    });
}

/// What is to be the device's alone is taken from the CPU all the same, and a touch takes it back.
pub fn coherent_exclusive<W: World>(kit: &Kit) {
    let setup = Setup {
        atomics_on_ram: false,
        ..ONE
    };
    kit.once::<W>(&setup, |bench| {
        let span = bench.memory(256);
        let (words, mirror) = (words_of(span), bench.mirror());
        bench.to_device(0, span);
        expect_coherent(bench, span);
        assert_eq!(mirror.add(&words, 3), Ok(vec![0; words.len()]));
        let writable = true;
        let alone = mirror.snapshot(span);
        assert!(
            alone.iter().all(|snap| *snap == Snap::Local { writable }),
            "{alone:?}"
        );
        for at in &words {
            assert_eq!(bench.world().fetch_add(*at, 1), Ok(3));
        }
        assert_eq!(mirror.on_device(span), PageCount::ZERO);
        bench.to_device(0, span);
        expect_coherent(bench, span);
        assert_eq!(mirror.add(&words, 3), Ok(vec![4; words.len()]));
    });
}

/// Pages of one device are reached by the other where they are, and go there when they are wanted there.
pub fn coherent_of_two_devices<W: World>(kit: &Kit) {
    for fabric in [false, true] {
        kit.once::<W>(&Setup { fabric, ..PAIR }, |bench| {
            let span = bench.memory(512);
            bench.fill(span, 1);
            bench.to_device(0, span);
            let writable = true;
            let seen = bench.mirror_at(1).snapshot(span);
            let elsewhere = Snap::CoherentElsewhere { writable };
            assert!(seen.iter().all(|snap| *snap == elsewhere), "{seen:?}");
            bench.to_device(1, span);
            assert_eq!(bench.mirror().region.used(), PageCount::ZERO);
            assert_eq!(bench.mirror_at(1).region.used(), span.page_count());
            bench.expect(span, 1);
            bench.device_expect(1, span, 1);
            bench.check();
        });
        let places = Places::InPlace;
        kit.once::<W>(
            &Setup {
                fabric,
                places,
                ..PAIR
            },
            |bench| {
                let span = bench.memory(512);
                bench.fill(span, 1);
                bench.to_device(0, span);
                bench.device_expect(1, span, 1);
                assert_eq!(bench.device_fill(1, span, 2), Ok(()));
                bench.device_expect(0, span, 2);
                bench.expect(span, 2);
                expect_coherent(bench, span);
                bench.check();
            },
        );
    }
}

/// A device with coherent memory and one with private memory take pages from each other.
pub fn coherent_and_private<W: World>(kit: &Kit) {
    kit.once::<W>(
        &Setup {
            coherent: 1,
            ..PAIR
        },
        |bench| {
            let span = bench.memory(512);
            bench.fill(span, 1);
            for tag in 1..4 {
                bench.to_device(0, span);
                expect_coherent(bench, span);
                bench.expect(span, tag);
                bench.to_device(1, span);
                let seen = bench.mirror().snapshot(span);
                assert!(seen.iter().all(|snap| *snap == Snap::Elsewhere), "{seen:?}");
                bench.device_expect(1, span, tag);
                assert_eq!(bench.device_fill(1, span, tag + 1), Ok(()));
                bench.check();
            }
            bench.device_expect(0, span, 4);
            bench.expect(span, 4);
        },
    );
}

/// The contents are given up: zeroes for both, and no device page is left.
pub fn coherent_then_dontneed<W: World>(kit: &Kit) {
    kit.once::<W>(&ONE, |bench| {
        if !bench.can(&[Feature::DropContents]) {
            return;
        }
        let span = bench.memory(512);
        bench.fill(span, 1);
        bench.device_expect(0, span, 1);
        bench.world().drop_contents(pages(span, 100, 300));
        bench.check();
        assert_eq!(bench.mirror().on_device(span).get(), 212);
        bench.device_expect_zero(0, pages(span, 100, 300));
        bench.expect_zero(pages(span, 100, 300));
        bench.expect(pages(span, 0, 100), 1);
        bench.expect(pages(span, 400, 112), 1);
        both_use(bench, span, 2);
    });
}

/// Unmapped in part, then all: what is left is right, and nothing is in use any more.
pub fn coherent_then_unmap<W: World>(kit: &Kit) {
    kit.once::<W>(&ONE, |bench| {
        if !bench.can(&[Feature::Unmap]) {
            return;
        }
        let span = bench.memory(512);
        bench.fill(span, 1);
        bench.device_expect(0, span, 1);
        bench.world().unmap(pages(span, 200, 100));
        bench.check();
        for left in [pages(span, 0, 200), pages(span, 300, 212)] {
            bench.expect(left, 1);
            bench.device_expect(0, left, 1);
            both_use(bench, left, 2);
        }
        for left in [pages(span, 0, 200), pages(span, 300, 212)] {
            bench.world().unmap(left);
        }
        bench.check();
        assert_eq!(bench.mirror().region.used(), PageCount::ZERO);
    });
}

/// Moved to another address: it is the device's there, and where it was is new.
pub fn coherent_then_remap<W: World>(kit: &Kit) {
    kit.once::<W>(&ONE, |bench| {
        if !bench.can(&[Feature::Remap]) {
            return;
        }
        for dontunmap in [false, true] {
            if dontunmap && !bench.can(&[Feature::DontUnmap]) {
                return;
            }
            let span = bench.memory(512);
            bench.fill(span, 1);
            bench.to_device(0, span);
            let to = bench.remap(span, dontunmap);
            bench.expect_moved(to, span, 1);
            bench.world().settle();
            expect_coherent(bench, to);
            bench.device_expect_moved(0, to, span, 1);
            if dontunmap {
                bench.expect_zero(span);
                bench.device_expect_zero(0, span);
            }
            both_use(bench, to, 2);
            bench.check();
            assert!(bench.mirror().evict_all().is_ok());
        }
    });
}

/// A child of fork has what its parent had, and its own from then on.
pub fn coherent_then_fork<W: World>(kit: &Kit) {
    kit.once::<W>(&ONE, |bench| {
        let span = bench.memory(512);
        bench.fill(span, 1);
        bench.to_device(0, span);
        let words = words_of(span);
        let passed = bench.world().fork(&mut |child: &dyn Cpu| {
            let before: Vec<_> = words.iter().map(|at| child.read(*at)).collect();
            let mut all = words.iter().zip(before);
            all.all(|(at, before)| {
                child.write(*at, 7).is_ok() && before != Ok(7) && child.read(*at) == Ok(7)
            })
        });
        assert!(passed, "the child");
        bench.expect(span, 1);
        bench.device_expect(0, span, 1);
        both_use(bench, span, 2);
    });
}

/// Both add to words that go to the device and home: no addition is lost.
pub fn coherent_racing_moves<W: World>(kit: &Kit) {
    let kit = &kit.coherent();
    races::lost_cpu_writes_in_the_copy_window::<W>(kit);
    races::cpu_and_device_fault_one_block::<W>(kit);
    races::evict_racing_cpu_fault::<W>(kit);
}

/// The same with two devices that take them from each other.
pub fn coherent_racing_peers<W: World>(kit: &Kit) {
    two_devices_race_for_one_block::<W>(&kit.coherent());
}

/// Unmapped, and mapped again, while it comes and goes: what is there then is new.
pub fn coherent_racing_unmap<W: World>(kit: &Kit) {
    races::migrate_racing_unmap::<W>(&kit.coherent());
}

/// Given up while it comes and goes: it never comes back.
pub fn coherent_racing_dontneed<W: World>(kit: &Kit) {
    races::migrate_racing_dontneed::<W>(&kit.coherent());
}

/// Moved from address to address while it comes and goes: all of it arrives.
pub fn coherent_racing_remap<W: World>(kit: &Kit) {
    races::migrate_racing_remap::<W>(&kit.coherent());
}

/// Forked while it comes and goes: parent and child have all of it.
pub fn coherent_racing_fork<W: World>(kit: &Kit) {
    races::migrate_racing_fork::<W>(&kit.coherent());
}

/// The program ends while it comes and goes: no device page stays.
pub fn coherent_racing_exit<W: World>(kit: &Kit) {
    races::migrate_racing_exit::<W>(&kit.coherent());
}
