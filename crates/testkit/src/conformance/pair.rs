//! Two devices and one program.

use super::{Bench, Kit, Places, Setup};
use crate::mirror::{Snap, words_of};
use crate::world::{Feature, Kind, Prot, World};
use gpusvm_sync::Arc;
use gpusvm_types::{PageCount, Span};

const PAIR: Setup = Setup {
    devices: 2,
    fabric: false,
    vram: gpusvm_types::ByteSize::mib(8),
    places: Places::Device,
    atomics_on_ram: true,
    coherent: 0,
};

const PEERS: Setup = Setup {
    fabric: true,
    ..PAIR
};

fn page(span: Span, number: u64) -> Span {
    pages(span, number, 1)
}

fn pages(span: Span, first: u64, count: u64) -> Span {
    Span::of_pages(
        span.first_page() + PageCount::new(first),
        PageCount::new(count),
    )
}

/// What cannot be read, and holes, do not migrate; untouched, read-only and other pages do, side by
/// side. Pages of one device go to the other when they are wanted there.
pub fn migrate_mixed<W: World>(kit: &Kit) {
    kit.once::<W>(&PAIR, |bench| {
        let (world, span) = (bench.world(), bench.memory(6));
        world.protect(span, Prot::None);
        let moved = bench.mirror().migrate_to_dev(span);
        assert_eq!(moved.unwrap_or(PageCount::ZERO), PageCount::ZERO);
        world.protect(span, Prot::ReadWrite);
        if bench.can(&[Feature::Unmap]) {
            world.unmap(page(span, 1));
            let moved = bench.mirror().migrate_to_dev(pages(span, 1, 2));
            assert!(moved.is_err(), "a hole: {moved:?}");
        }
        // Page 2 was never touched, page 3 is read-only.
        bench.fill(pages(span, 3, 3), 1);
        world.protect(page(span, 3), Prot::Read);
        for (first, count) in [(2, 1), (3, 1), (4, 2)] {
            bench.to_device(0, pages(span, first, count));
        }
        bench.device_expect_zero(0, page(span, 2));
        bench.device_expect(0, pages(span, 3, 3), 1);
        bench.check();
        bench.to_device(1, pages(span, 4, 2));
        assert_eq!(bench.mirror().on_device(pages(span, 4, 2)), PageCount::ZERO);
        bench.device_expect(1, pages(span, 4, 2), 1);
        bench.device_expect(0, pages(span, 4, 2), 1);
        bench.expect(pages(span, 3, 3), 1);
        bench.expect_zero(page(span, 2));
    });
}

/// What each of seven pages is: not readable, a hole, untouched, read-only, writable, on this device,
/// on the other.
pub fn snapshot<W: World>(kit: &Kit) {
    kit.once::<W>(&PAIR, |bench| {
        let (world, span) = (bench.world(), bench.memory(7));
        bench.fill(pages(span, 3, 4), 1);
        bench.to_device(0, page(span, 5));
        bench.to_device(1, page(span, 6));
        world.protect(page(span, 0), Prot::None);
        world.protect(pages(span, 2, 2), Prot::Read);
        let can_unmap = bench.can(&[Feature::Unmap]);
        if can_unmap {
            world.unmap(page(span, 1));
            world.settle();
        }
        let wanted = [
            Snap::Error,
            Snap::Error,
            Snap::System { writable: false },
            Snap::System { writable: false },
            Snap::System { writable: true },
            Snap::Local { writable: true },
            Snap::Elsewhere,
        ];
        let snaps = bench.mirror().snapshot(span);
        for (number, (snap, wanted)) in snaps.iter().zip(&wanted).enumerate() {
            if number != 1 || can_unmap {
                assert_eq!(snap, wanted, "page {number}");
            }
        }
        assert_eq!(
            bench.mirror_at(1).snapshot(page(span, 5)),
            [Snap::Elsewhere]
        );
    });
}

/// Both devices read the same memory; when it goes to one, the other has lost it, and faults once.
pub fn double_map<W: World>(kit: &Kit) {
    for places in [Places::Device, Places::InPlace] {
        for setup in [PAIR, PEERS] {
            kit.once::<W>(&Setup { places, ..setup }, maps_twice);
        }
    }
}

fn maps_twice<W: World>(bench: &Arc<Bench<W>>) {
    let span = bench.memory(512);
    bench.fill(span, 1);
    bench.world().protect(span, Prot::Read);
    bench.device_expect(0, span, 1);
    bench.device_expect(1, span, 1);
    bench.check();
    bench.world().protect(span, Prot::ReadWrite);
    bench.to_device(1, span);
    bench.check();
    let first = bench.mirror();
    let (_, faults) = first.faults_of(|| bench.device_expect(0, span, 1));
    if bench.is_faulting() {
        assert!(faults > 0, "it had lost the mapping");
    }
    bench.check();
    bench.expect(span, 1);
}

/// Two devices and the CPU add to the words of one block, and take it from each other.
pub fn two_devices_race_for_one_block<W: World>(kit: &Kit) {
    kit.race::<W>(&PAIR, race_for_one_block);
}

/// The same with devices that reach each other's memory.
pub fn two_peers_race_for_one_block<W: World>(kit: &Kit) {
    kit.race::<W>(&PEERS, race_for_one_block);
}

fn race_for_one_block<W: World>(bench: &Arc<Bench<W>>) {
    const ROUNDS: u64 = 6;
    let span = bench.map(16, Prot::ReadWrite, Kind::Mirrored);
    let words = Arc::new(words_of(span));
    let adds = |device: usize| {
        let words = Arc::clone(&words);
        move |bench: &Arc<Bench<W>>| {
            for round in 0..ROUNDS {
                let added = bench.mirror_at(device).add(&words, 1);
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
    let moves = move |bench: &Arc<Bench<W>>| {
        for round in 0..2 * ROUNDS {
            // Whether it goes depends on the others.
            let _ = bench
                .mirror_at(usize::from(round % 2 == 0))
                .migrate_to_dev(span);
        }
    };
    bench.run(vec![
        Box::new(adds(0)),
        Box::new(adds(1)),
        Box::new(cpu),
        Box::new(moves),
    ]);
    for at in words.iter() {
        assert_eq!(bench.world().read(*at), Ok(3 * ROUNDS), "{at}");
    }
}
