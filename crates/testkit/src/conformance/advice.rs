//! What the program says of its memory beforehand.

use super::{Bench, Kit, Setup};
use crate::mirror::words_of;
use crate::world::{Feature, Kind, Prot, World};
use gpusvm::driver::{Advice, AdviseError, Advised, Atomics, Attributes, Preferred, Priority};
use gpusvm_device::FaultError;
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_types::{ByteSize, PageCount, Span};

const IN_RAM: Advice = Advice::PreferredLocation(Preferred::Ram);
const ON_FIRST: Advice = Advice::PreferredLocation(Preferred::Device(0));
const ON_SECOND: Advice = Advice::PreferredLocation(Preferred::Device(1));
const MOSTLY_READ: Advice = Advice::ReadMostly(true);

fn pages(span: Span, first: u64, count: u64) -> Span {
    Span::of_pages(
        span.first_page() + PageCount::new(first),
        PageCount::new(count),
    )
}

fn advise<W: World>(bench: &Bench<W>, span: Span, advice: Advice) {
    let advised = bench.mirror().vm.advise(span, advice);
    assert_eq!(advised, Ok(()), "{advice:?} of {span}");
}

/// What is advised, where anything is.
fn advised<W: World>(bench: &Bench<W>, span: Span) -> Vec<(Span, Attributes)> {
    let all = bench.mirror().vm.advice(span);
    let mut from = span.start();
    for Advised {
        span,
        attributes,
        by,
    } in &all
    {
        assert_eq!(span.start(), from, "without holes");
        assert_eq!(by.is_some(), *attributes != Attributes::default());
        from = span.end();
    }
    assert_eq!(from, span.end());
    let some = all.into_iter().filter(|it| it.by.is_some());
    some.map(|it| (it.span, it.attributes)).collect()
}

fn reconsidered<W: World>(bench: &Bench<W>) -> u64 {
    bench.mirror().vm.stats().reconsidered
}

/// Pages go where they are advised to live, when they are touched next, and what was said already
/// changes nothing.
pub fn advised_places<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(512);
        let all = span.page_count();
        bench.fill(span, 1);
        let on_device = || bench.mirror().on_device(span);
        let by_first = |on| Advice::AccessedBy { device: 0, on };
        for (round, advice, wanted) in [
            (1, IN_RAM, PageCount::ZERO),
            (2, ON_FIRST, all),
            (3, IN_RAM, PageCount::ZERO),
            (4, Advice::PreferredLocation(Preferred::Anywhere), all),
            (5, by_first(true), all),
        ] {
            advise(bench, span, advice);
            assert_eq!(bench.device_fill(0, span, round), Ok(()));
            assert_eq!(on_device(), wanted, "round {round}");
            let before = (
                reconsidered(bench),
                bench.mirror().gpu.faults(bench.mirror().vm.id()),
            );
            advise(bench, span, advice);
            bench.device_expect(0, span, round);
            let after = (
                reconsidered(bench),
                bench.mirror().gpu.faults(bench.mirror().vm.id()),
            );
            assert_eq!(before, after, "it was advised before");
            bench.check();
        }
        // They were there already, and stay; what comes home stays in RAM.
        bench.expect(span, 5);
        bench.device_expect(0, span, 5);
        assert_eq!(on_device(), PageCount::ZERO, "it maps them where they are");
        advise(bench, span, by_first(false));
        bench.device_expect(0, span, 5);
        assert_eq!(on_device(), all);
        assert_eq!(advised(bench, span), []);
        assert_eq!(reconsidered(bench), 5);
    });
}

/// A range is not larger than is advised, and does not reach out of what is advised alike.
pub fn advice_cuts_ranges<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let (vm, span) = (&bench.mirror().vm, bench.memory(512));
        let (middle, small) = (pages(span, 128, 64), pages(span, 256, 256));
        bench.fill(span, 1);
        bench.device_expect(0, span, 1);
        assert_eq!(vm.svm().ranges_in(span).len(), 1);
        let there = bench.mirror().on_device(span);
        advise(bench, middle, IN_RAM);
        assert_eq!(
            vm.svm().ranges_in(span).len(),
            0,
            "it reached over the boundary"
        );
        assert_eq!(
            bench.mirror().on_device(span),
            there,
            "pages stay where they are"
        );
        advise(bench, small, Advice::Granularity(Some(ByteSize::kib(4))));
        // Else a device that cannot fault needs all of what they came in.
        bench.expect(span, 1);
        bench.device_expect(0, span, 1);
        let ranges = vm.svm().ranges_in(span);
        for range in &ranges {
            let range = range.span();
            assert!(middle.covers(range) || !middle.overlaps(range), "{range}");
            assert!(
                !small.overlaps(range) || range.len() == ByteSize::kib(4),
                "{range}"
            );
        }
        assert_eq!(bench.mirror().on_device(middle), PageCount::ZERO);
        bench.check();
        // Allocated in such pieces, it comes home in such pieces.
        bench.expect(small, 1);
        bench.device_expect(0, small, 1);
        bench.expect(pages(small, 7, 1), 1);
        let left = bench.mirror().on_device(small);
        assert_eq!(left, PageCount::new(255));
        advise(bench, span, Advice::Nothing);
        bench.expect(span, 1);
        bench.device_expect(0, span, 1);
        let is_large = |size: ByteSize| size >= ByteSize::kib(64);
        let mut ranges = vm.svm().ranges_in(small).into_iter();
        assert!(ranges.all(|range| is_large(range.span().len())));
        let refused = vm.advise(span, Advice::Granularity(Some(ByteSize::kib(12))));
        let size = ByteSize::kib(12);
        assert_eq!(refused, Err(AdviseError::Granularity { size }));
        let refused = vm.advise(
            span,
            Advice::AccessedBy {
                device: 1,
                on: true,
            },
        );
        assert_eq!(refused, Err(AdviseError::NoDevice { device: 1 }));
        let plain = bench.map(4, Prot::ReadWrite, Kind::Plain);
        let refused = vm.advise(plain, MOSTLY_READ);
        assert!(
            matches!(refused, Err(AdviseError::NotMirrored { .. })),
            "{refused:?}"
        );
    });
}

/// Advice ends with its mapping, at once, also if no device touched the memory: not with its contents,
/// and it does not move along.
pub fn advice_lasts_as_long_as_its_mapping<W: World>(kit: &Kit) {
    for touched in [false, true] {
        kit.once::<W>(&Setup::default(), |bench| {
            lasts_as_its_mapping(bench, touched)
        });
    }
}

fn lasts_as_its_mapping<W: World>(bench: &Arc<Bench<W>>, touched: bool) {
    let world = bench.world();
    let memory = || {
        let span = bench.memory(512);
        advise(bench, span, MOSTLY_READ);
        if touched {
            assert_eq!(bench.device_fill(0, span, 1), Ok(()));
        }
        span
    };
    let is_advised = |span| {
        advised(bench, span)
            .iter()
            .map(|(span, _)| *span)
            .collect::<Vec<_>>()
    };
    let span = memory();
    if bench.can(&[Feature::DropContents]) {
        world.drop_contents(span);
        world.settle();
        assert_eq!(is_advised(span), [span]);
        bench.expect_zero(span);
    }
    if bench.can(&[Feature::Unmap]) {
        let hole = pages(span, 100, 50);
        world.unmap(hole);
        let left: Vec<Span> = span.without(hole).into_iter().flatten().collect();
        assert_eq!(is_advised(span), left);
        world.map_again(hole, Prot::ReadWrite, Kind::Mirrored);
        assert_eq!(is_advised(span), left, "it is other memory");
        advise(bench, hole, IN_RAM);
        bench.fill(span, 2);
        bench.device_expect(0, span, 2);
        assert_eq!(bench.mirror().on_device(hole), PageCount::ZERO);
        world.settle();
        assert_eq!(is_advised(span).len(), 3);
    }
    for dontunmap in [false, true] {
        let needs = [Feature::Remap, Feature::DontUnmap];
        let needs = if dontunmap { &needs[..] } else { &needs[..1] };
        if bench.can(needs) {
            let from = memory();
            let to = bench.remap(from, dontunmap);
            assert_eq!(is_advised(to), []);
            world.settle();
            assert_eq!(is_advised(from), []);
            assert_eq!(is_advised(to), []);
            assert_eq!(bench.device_fill(0, to, 3), Ok(()));
            bench.expect(to, 3);
        }
    }
}

/// Atomics of the device are refused, or work in its memory only, or in RAM, as is advised.
pub fn advice_of_atomics<W: World>(kit: &Kit) {
    for atomics_on_ram in [true, false] {
        let setup = Setup {
            atomics_on_ram,
            ..Setup::default()
        };
        kit.once::<W>(&setup, |bench| {
            let span = bench.map(16, Prot::ReadWrite, Kind::Mirrored);
            let (mirror, words) = (bench.mirror(), words_of(span));
            let add = || mirror.add(&words, 1).map(drop);
            let set = |atomics| advise(bench, span, Advice::Atomics(atomics));
            set(Atomics::Cpu);
            let refused = add();
            assert!(
                matches!(refused, Err(FaultError::NotPermitted { .. })),
                "{refused:?}"
            );
            bench.fill(span, 1);
            bench.device_expect(0, span, 1);
            set(Atomics::Device);
            advise(bench, span, IN_RAM);
            bench.device_fill(0, span, 1).expect("stores work in RAM");
            bench.world().fetch_add(words[0], 1).expect("the CPU may");
            let on_device = mirror.on_device(span);
            assert_eq!(on_device, PageCount::ZERO, "mapped there, to store");
            assert_eq!(add(), Ok(()));
            assert_eq!(mirror.on_device(span), span.page_count(), "nowhere else");
            advise(bench, span, Advice::PreferredLocation(Preferred::Anywhere));
            set(Atomics::Global);
            assert_eq!(add(), Ok(()));
            let in_ram = mirror.on_device(span) == PageCount::ZERO;
            assert_eq!(in_ram, atomics_on_ram);
            set(Atomics::Undefined);
            assert_eq!(add(), Ok(()));
            let word = bench.world().read(words[0]);
            assert_eq!(word, Ok(super::bench::value(1, words[0]) + 4));
        });
    }
}

/// Device memory is full: who is advised to go first does, and what is pinned stays.
pub fn eviction_as_advised<W: World>(kit: &Kit) {
    let setup = Setup {
        vram: ByteSize::mib(4),
        ..Setup::default()
    };
    kit.once::<W>(&setup, |bench| {
        let [first, second, third, fourth] = [1, 2, 3, 4].map(|tag| {
            let span = bench.memory(512);
            bench.fill(span, tag);
            span
        });
        let priority = |span, priority| advise(bench, span, Advice::EvictionPriority(priority));
        let there = || {
            [first, second, third, fourth]
                .map(|span| bench.mirror().on_device(span) == span.page_count())
        };
        priority(second, Priority::Low);
        bench.device_expect(0, first, 1);
        bench.device_expect(0, second, 2);
        assert_eq!(there(), [true, true, false, false]);
        bench.device_expect(0, third, 3);
        assert_eq!(there(), [true, false, true, false], "not the oldest");
        priority(first, Priority::Pinned);
        priority(third, Priority::Pinned);
        assert_eq!(reconsidered(bench), 0, "nothing is mapped otherwise");
        bench.device_expect(0, fourth, 4);
        assert_eq!(there(), [true, false, true, false], "it is mapped in place");
        advise(bench, fourth, Advice::Atomics(Atomics::Device));
        let refused = bench.mirror().add(&words_of(fourth)[..1], 1);
        assert!(
            matches!(refused, Err(FaultError::Gave { .. })),
            "{refused:?}"
        );
        priority(first, Priority::High);
        priority(third, Priority::Normal);
        assert!(bench.mirror().add(&words_of(fourth)[..1], 1).is_ok());
        assert_eq!(there(), [true, false, false, true]);
        [first, second, third]
            .into_iter()
            .zip(1..)
            .for_each(|(span, tag)| bench.expect(span, tag));
    });
}

/// Two devices say where the same pages shall live, and not the same. The last advice counts for both,
/// and whoever does not reach the place takes the pages: nobody waits for ever, no addition is lost.
pub fn contradictory_advice_of_two_devices<W: World>(kit: &Kit) {
    for fabric in [true, false] {
        let setup = Setup {
            devices: 2,
            fabric,
            ..Setup::default()
        };
        kit.once::<W>(&setup, |bench| the_last_advice_counts(bench, fabric));
        kit.race::<W>(&setup, contradict);
    }
}

fn the_last_advice_counts<W: World>(bench: &Arc<Bench<W>>, fabric: bool) {
    let span = bench.memory(64);
    bench.fill(span, 1);
    for (through, advice, device) in [(0, ON_FIRST, 0), (1, ON_SECOND, 1), (0, ON_SECOND, 1)] {
        let vm = &bench.mirror_at(through).vm;
        assert_eq!(vm.advise(span, advice), Ok(()));
        let all = bench.mirror_at(1 - through).vm.advice(span);
        assert_eq!(all.len(), 1, "the same through both");
        assert_eq!(all[0].by.map(|by| by.device), Some(through));
        for faults in [1 - device, device] {
            bench.device_expect(faults, span, 1);
            let home = if fabric { device } else { faults };
            let there = bench.mirror_at(home).on_device(span);
            assert_eq!(
                there,
                span.page_count(),
                "{advice:?}, device {faults} faults"
            );
        }
        bench.check();
    }
    // Each may read it where it is.
    for device in [0, 1] {
        let vm = &bench.mirror_at(device).vm;
        assert_eq!(
            vm.advise(span, Advice::AccessedBy { device, on: true }),
            Ok(())
        );
        assert_eq!(vm.advise(span, IN_RAM), Ok(()));
    }
    bench.device_expect(0, span, 1);
    bench.device_expect(1, span, 1);
    let in_ram = [0, 1].map(|device| bench.mirror_at(device).on_device(span));
    assert_eq!(in_ram, [PageCount::ZERO; 2]);
}

fn contradict<W: World>(bench: &Arc<Bench<W>>) {
    const ROUNDS: u64 = 6;
    let span = bench.map(16, Prot::ReadWrite, Kind::Mirrored);
    let words = Arc::new(words_of(span));
    let adds = |device: usize| {
        let words = Arc::clone(&words);
        move |bench: &Arc<Bench<W>>| {
            for round in 0..ROUNDS {
                let mirror = bench.mirror_at(device);
                let advice = [ON_FIRST, ON_SECOND][device];
                assert_eq!(mirror.vm.advise(span, advice), Ok(()));
                let added = mirror.add(&words, 1);
                assert!(added.is_ok(), "device {device}, round {round}: {added:?}");
            }
        }
    };
    let of_cpu = Arc::clone(&words);
    let cpu = move |bench: &Arc<Bench<W>>| {
        for at in (0..ROUNDS).flat_map(|_| of_cpu.iter()) {
            assert!(bench.world().fetch_add(*at, 1).is_ok());
        }
    };
    bench.run(vec![Box::new(adds(0)), Box::new(adds(1)), Box::new(cpu)]);
    for at in words.iter() {
        assert_eq!(bench.world().read(*at), Ok(3 * ROUNDS), "{at}");
    }
}

/// Advice changes while a device adds, the CPU adds, the device loses its memory, and a part of the
/// mapping is replaced again and again.
pub fn advise_racing_all_else<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        if bench.can(&[Feature::Unmap]) {
            races_all_else(bench);
        }
    });
}

fn races_all_else<W: World>(bench: &Arc<Bench<W>>) {
    const ROUNDS: u64 = 6;
    let span = bench.memory(64);
    let (kept, replaced) = (pages(span, 0, 32), pages(span, 32, 32));
    let words = Arc::new(words_of(kept));
    let done = Arc::new(AtomicBool::new(false));
    let (of_cpu, over) = (Arc::clone(&words), Arc::clone(&done));
    let of_device = Arc::clone(&words);
    let adds = move |bench: &Arc<Bench<W>>| {
        for _ in 0..ROUNDS {
            let added = bench.mirror().add(&of_device, 1);
            assert!(added.is_ok(), "{added:?}");
        }
        done.store(true, Ordering::Release);
    };
    let cpu = move |bench: &Arc<Bench<W>>| {
        for at in (0..ROUNDS).flat_map(|_| of_cpu.iter()) {
            assert!(bench.world().fetch_add(*at, 1).is_ok());
        }
    };
    let advises = move |bench: &Arc<Bench<W>>| {
        let small = Advice::Granularity(Some(ByteSize::kib(16)));
        for advice in [IN_RAM, small, MOSTLY_READ, ON_FIRST, Advice::Nothing]
            .into_iter()
            .cycle()
        {
            let _ = bench.mirror().vm.advise(span, advice);
            advise(bench, pages(kept, 5, 9), advice);
            if over.load(Ordering::Acquire) {
                return;
            }
            bench.world().pause();
        }
    };
    let replaces = move |bench: &Arc<Bench<W>>| {
        for _ in 0..ROUNDS {
            bench.world().unmap(replaced);
            bench
                .world()
                .map_again(replaced, Prot::ReadWrite, Kind::Mirrored);
            let _ = bench.device_fill(0, pages(replaced, 3, 2), 2);
        }
    };
    let evicts = move |bench: &Arc<Bench<W>>| {
        for _ in 0..ROUNDS {
            let _ = bench.mirror().evict_all();
            bench.world().pause();
        }
    };
    bench.run(vec![
        Box::new(adds),
        Box::new(cpu),
        Box::new(advises),
        Box::new(replaces),
        Box::new(evicts),
    ]);
    for at in words.iter() {
        assert_eq!(bench.world().read(*at), Ok(2 * ROUNDS), "{at}");
    }
    bench.world().unmap(replaced);
    bench
        .world()
        .map_again(replaced, Prot::ReadWrite, Kind::Mirrored);
    assert_eq!(advised(bench, replaced), []);
}
