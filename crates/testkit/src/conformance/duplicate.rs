//! Pages that are in RAM and on devices at once, to be read: until somebody writes them.

use super::bench::value;
use super::{Bench, Kit, Part, Places, Setup};
use crate::mirror::words_of;
use crate::world::{Feature, Kind, Prot, World};
use gpusvm_mm::AddressSpace;
use gpusvm_sync::atomic::{AtomicBool, AtomicU64, Ordering};
use gpusvm_sync::{Arc, yield_now};
use gpusvm_types::{ByteSize, PageCount, Span, VirtAddr};

const PAIR: Setup = Setup {
    devices: 2,
    fabric: false,
    vram: ByteSize::mib(8),
    places: Places::Duplicate,
    atomics_on_ram: true,
    coherent: 0,
};

/// Whether devices get copies here: else the cases hold all the same, with pages that move.
fn has_copies<W: World>(bench: &Bench<W>) -> bool {
    bench.is_faulting() && bench.world().mm().can_watch_writes()
}

/// How much went to devices, and came back.
fn moved<W: World>(bench: &Bench<W>) -> (u64, u64) {
    let each = (0..PAIR.devices).map(|number| bench.mirror_at(number).region.stats());
    each.fold((0, 0), |(out, home), stats| {
        let more = stats.to_device.bytes + stats.to_peer.bytes;
        (out + more, home + stats.to_ram.bytes)
    })
}

/// Everybody reads.
fn read_by_all<W: World>(bench: &Bench<W>, span: Span, tag: u64) {
    bench.expect(span, tag);
    (0..PAIR.devices).for_each(|number| bench.device_expect(number, span, tag));
}

/// The devices give back what a write put out of use; workers do that, where there are any.
fn tend<W: World>(bench: &Bench<W>) {
    bench.world().settle();
    (0..PAIR.devices).for_each(|number| bench.mirror_at(number).vm.tend());
}

/// The CPU and two devices read the same pages again and again, each from RAM or a copy of its own:
/// after the first time nobody faults, and nothing moves.
pub fn duplicate<W: World>(kit: &Kit) {
    for fabric in [false, true] {
        for kind in [Kind::Mirrored, Kind::Huge] {
            kit.once::<W>(&Setup { fabric, ..PAIR }, |bench| {
                let span = bench.map(600, Prot::ReadWrite, kind);
                bench.fill(span, 1);
                read_by_all(bench, span, 1);
                bench.check();
                if !has_copies(bench) {
                    return;
                }
                let before = moved(bench);
                let each = [0, 1].map(|number| {
                    let mirror = bench.mirror_at(number);
                    mirror
                        .faults_of(|| (0..4).for_each(|_| read_by_all(bench, span, 1)))
                        .1
                });
                assert_eq!(each, [0, 0], "faults");
                assert_eq!(moved(bench), before, "nothing bounces");
                assert_eq!(before, (2 * span.len().get(), 0), "one copy for each");
                for number in [0, 1] {
                    let mirror = bench.mirror_at(number);
                    assert_eq!(mirror.vm.duplicated(), span.page_count());
                    assert!(mirror.vm.stats().duplicated > 0);
                    assert_eq!(mirror.vm.stats().not_duplicated, 0);
                    assert_eq!(mirror.on_device(span), PageCount::ZERO, "they live in RAM");
                }
            });
        }
    }
}

/// What was never touched is zero in every copy, and the first write of it is seen.
pub fn duplicate_empty<W: World>(kit: &Kit) {
    kit.once::<W>(&PAIR, |bench| {
        let span = bench.memory(40);
        bench.device_expect_zero(0, span);
        bench.device_expect_zero(1, span);
        bench.check();
        bench.fill(span, 1);
        read_by_all(bench, span, 1);
        bench.expect(span, 1);
    });
}

/// Whoever writes, the CPU or a device: all others read it afterwards, and what was copied before is given
/// back.
pub fn duplicate_then_write<W: World>(kit: &Kit) {
    for fabric in [false, true] {
        kit.once::<W>(&Setup { fabric, ..PAIR }, |bench| {
            let span = bench.memory(48);
            bench.fill(span, 1);
            read_by_all(bench, span, 1);
            for tag in (2..8).step_by(3) {
                bench.fill(span, tag);
                tend(bench);
                if has_copies(bench) {
                    for number in [0, 1] {
                        let mirror = bench.mirror_at(number);
                        assert_eq!(mirror.region.used(), PageCount::ZERO, "device {number}");
                        assert!(mirror.vm.stats().duplicates_invalidated > 0);
                    }
                }
                read_by_all(bench, span, tag);
                bench.check();
                assert_eq!(bench.device_fill(0, span, tag + 1), Ok(()));
                read_by_all(bench, span, tag + 1);
                bench.check();
                assert_eq!(bench.device_fill(1, span, tag + 2), Ok(()));
                read_by_all(bench, span, tag + 2);
                bench.check();
            }
        });
    }
}

/// Copies go when there is no room for others, without a copy back.
pub fn duplicate_evicted<W: World>(kit: &Kit) {
    let setup = Setup {
        vram: ByteSize::mib(2),
        ..PAIR
    };
    kit.once::<W>(&setup, |bench| {
        let span = bench.memory(1100);
        bench.fill(span, 1);
        for _ in 0..3 {
            bench.device_expect(0, span, 1);
        }
        bench.check();
        bench.expect(span, 1);
        if has_copies(bench) {
            let stats = bench.mirror().vm.stats();
            assert!(stats.duplicates_dropped > 0, "{stats:?}");
            assert_eq!(moved(bench).1, 0, "nothing was copied back");
        }
        // Pages that live there want the room too.
        assert_eq!(bench.device_fill(0, span, 2), Ok(()));
        read_by_all(bench, span, 2);
    });
}

/// Contents that are given up are gone for all readers.
pub fn duplicate_then_dontneed<W: World>(kit: &Kit) {
    kit.once::<W>(&PAIR, |bench| {
        if !bench.can(&[Feature::DropContents]) {
            return;
        }
        let span = bench.memory(48);
        let (part, rest) = halves(span);
        bench.fill(span, 1);
        read_by_all(bench, span, 1);
        bench.world().drop_contents(part);
        bench.check();
        bench.device_expect_zero(0, part);
        bench.expect_zero(part);
        bench.device_expect_zero(1, part);
        read_by_all(bench, rest, 1);
        bench.fill(part, 2);
        read_by_all(bench, part, 2);
    });
}

/// A mapping with copies goes: nothing of it is in use any more, also where a part is left.
pub fn duplicate_then_unmap<W: World>(kit: &Kit) {
    kit.once::<W>(&PAIR, |bench| {
        if !bench.can(&[Feature::Unmap]) {
            return;
        }
        let span = bench.memory(48);
        let (part, rest) = halves(span);
        bench.fill(span, 1);
        read_by_all(bench, span, 1);
        bench.world().unmap(part);
        tend(bench);
        bench.check();
        assert!(bench.mirror().read(&words_of(part)).is_err(), "it is gone");
        read_by_all(bench, rest, 1);
        bench.fill(rest, 2);
        read_by_all(bench, rest, 2);
        bench.world().unmap(rest);
        tend(bench);
        bench.check();
        for number in [0, 1] {
            assert_eq!(bench.mirror_at(number).region.used(), PageCount::ZERO);
        }
    });
}

/// A mapping with copies moves: its pages are read, and written, where it is now.
pub fn duplicate_then_remap<W: World>(kit: &Kit) {
    for dontunmap in [false, true] {
        kit.once::<W>(&PAIR, |bench| {
            let feature = if dontunmap {
                Feature::DontUnmap
            } else {
                Feature::Remap
            };
            if !bench.can(&[feature]) {
                return;
            }
            let span = bench.memory(48);
            bench.fill(span, 1);
            read_by_all(bench, span, 1);
            let to = bench.remap(span, dontunmap);
            // At once: the engine may not have heard of it yet.
            let first = Span::page_of(to.start());
            bench.fill(first, 2);
            bench.check();
            read_by_all(bench, first, 2);
            bench.device_expect_moved(0, halves(to).1, halves(span).1, 1);
            bench.fill(to, 3);
            read_by_all(bench, to, 3);
            bench.check();
        });
    }
}

/// A child sees the memory as it was and writes its own; the parent's copies stay, and go when the parent
/// writes.
pub fn duplicate_then_fork<W: World>(kit: &Kit) {
    kit.once::<W>(&PAIR, |bench| {
        let span = bench.memory(48);
        bench.fill(span, 1);
        read_by_all(bench, span, 1);
        let words = words_of(span);
        let content = bench.world().fork(&mut |child| {
            let as_before = |at: &VirtAddr| child.read(*at) == Ok(value(1, *at));
            let mine = |at: &VirtAddr| child.write(*at, 7).is_ok() && child.read(*at) == Ok(7);
            words.iter().all(as_before) && words.iter().all(mine)
        });
        assert!(content, "the child");
        bench.check();
        read_by_all(bench, span, 1);
        bench.fill(span, 2);
        read_by_all(bench, span, 2);
        bench.check();
    });
}

fn halves(span: Span) -> (Span, Span) {
    let half = PageCount::new(span.page_count().get() / 2);
    let first = Span::of_pages(span.first_page(), half);
    let rest = Span::new(first.end(), span.end()).expect("two pages");
    (first, rest)
}

/// The words that a race is for: each writer counts up first one, then the other.
#[derive(Debug)]
struct Counted {
    words: Vec<(VirtAddr, VirtAddr)>,
    /// What was certainly written.
    written: AtomicU64,
    over: AtomicBool,
}

/// Readers end with the writer, also where it fails.
struct Over<'a>(&'a Counted);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
    }
}

/// The writer counts up, all words of each page, the first before the second, and says so afterwards.
fn writes<W: World>(counted: &Arc<Counted>, rounds: u64, by_device: bool) -> Part<W> {
    let counted = Arc::clone(counted);
    Box::new(move |bench| {
        let _over = Over(&counted);
        for round in 1..=rounds {
            // In turns with a device, in the other case.
            let device = by_device && round % 2 == 0;
            for (first, second) in &counted.words {
                if device {
                    let both = [(*first, round), (*second, round)];
                    assert_eq!(bench.mirror_at(1).write(&both), Ok(()));
                } else {
                    assert_eq!(bench.world().write(*first, round), Ok(()));
                    assert_eq!(bench.world().write(*second, round), Ok(()));
                }
            }
            counted.written.store(round, Ordering::Release);
            yield_now();
        }
    })
}

/// A reader reads the second before the first: never older than what was certainly written, and never the
/// second newer than the first.
fn reads<W: World>(counted: &Arc<Counted>, device: Option<usize>) -> Part<W> {
    let counted = Arc::clone(counted);
    Box::new(move |bench| {
        let mut is_over = false;
        while !is_over {
            is_over = counted.over.load(Ordering::Acquire);
            for (first, second) in &counted.words {
                let written = counted.written.load(Ordering::Acquire);
                let words = [*second, *first];
                let read = match device {
                    Some(number) => bench.mirror_at(number).read(&words).expect("mapped"),
                    None => words
                        .map(|at| bench.world().read(at).expect("mapped"))
                        .into(),
                };
                let seen = format!("{device:?} reads {read:?} at {first}, after {written}");
                assert!(written <= read[0] && read[0] <= read[1], "{seen}");
                yield_now();
            }
        }
    })
}

fn race<W: World>(kit: &Kit, by_device: bool) {
    /// Where nothing moves. In all live worlds together ten thousand.
    const MANY: u64 = 840;
    /// Where pages move, and stay for a while each time.
    const SOME: u64 = 12;
    kit.race::<W>(&PAIR, |bench| {
        let many = W::NAME == "linux" && has_copies(bench) && !by_device;
        let rounds = if many { MANY } else { SOME };
        let span = bench.memory(20);
        bench.fill(span, 0);
        let pairs = words_of(span);
        let words: Vec<_> = pairs.chunks(2).map(|pair| (pair[0], pair[1])).collect();
        let words: Vec<_> = words.into_iter().step_by(7).collect();
        for (first, second) in &words {
            assert_eq!(bench.world().write(*first, 0), Ok(()));
            assert_eq!(bench.world().write(*second, 0), Ok(()));
        }
        let counted = Arc::new(Counted {
            words,
            written: AtomicU64::new(0),
            over: AtomicBool::new(false),
        });
        bench.run(vec![
            writes(&counted, rounds, by_device),
            reads(&counted, Some(0)),
            reads(&counted, Some(1)),
            reads(&counted, None),
        ]);
    });
}

/// The CPU writes what it and two devices read: nobody reads what is older than the last write, or torn.
pub fn duplicate_racing_cpu_writes<W: World>(kit: &Kit) {
    race::<W>(kit, false);
}

/// As before, and every second time a device writes.
pub fn duplicate_racing_device_writes<W: World>(kit: &Kit) {
    race::<W>(kit, true);
}

/// Copies are made while the program unmaps, moves, drops and forks; and while all others write.
pub fn duplicate_racing_system_calls<W: World>(kit: &Kit) {
    const ROUNDS: u64 = 12;
    kit.race::<W>(&PAIR, |bench| {
        let span = bench.memory(16);
        let stays = bench.memory(16);
        bench.fill(span, 1);
        bench.fill(stays, 1);
        let reader = |number: usize| -> Part<W> {
            Box::new(move |bench| {
                for _ in 0..ROUNDS {
                    // It may be gone, or zero, or elsewhere.
                    let _ = bench.mirror_at(number).read(&words_of(span));
                    bench.device_expect(number, stays, 1);
                }
            })
        };
        let program: Part<W> = Box::new(move |bench| {
            let mut at = span;
            for round in 0..ROUNDS {
                match round % 4 {
                    0 if bench.can(&[Feature::DropContents]) => bench.world().drop_contents(at),
                    1 if bench.can(&[Feature::Remap]) => {
                        at = bench.remap(at, false);
                    }
                    2 => assert!(bench.world().fork(&mut |child| {
                        child.read(stays.start()) == Ok(value(1, stays.start()))
                    })),
                    _ => {}
                }
                bench.fill(at, round + 2);
                bench.expect(at, round + 2);
                yield_now();
            }
        });
        bench.run(vec![reader(0), reader(1), program]);
        bench.check();
        bench.expect(stays, 1);
    });
}
