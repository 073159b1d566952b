//! 2 MiB at once: huge pages, and what becomes of parts of them.

use super::bench::value;
use super::{Bench, Kit, Model, Setup};
use crate::mirror::Snap;
use crate::world::{Feature, Kind, Prot, World};
use gpusvm_device::Target;
use gpusvm_sync::Arc;
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, Span};

const PAGES: u64 = BLOCK_SIZE.whole_pages().get();

fn huge<W: World>(bench: &Bench<W>) -> Span {
    bench.map(PAGES, Prot::ReadWrite, Kind::Huge)
}

/// `count` pages of a span.
fn part(span: Span, first: u64, count: u64) -> Span {
    Span::of_pages(
        span.first_page() + PageCount::new(first),
        PageCount::new(count),
    )
}

/// Read-only memory that was never touched goes to the device: zeroes there, zeroes here.
pub fn migrate_anon_huge_empty<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.map(PAGES, Prot::Read, Kind::Huge);
        bench.to_device(0, span);
        bench.device_expect_zero(0, span);
        bench.expect_zero(span);
    });
}

/// Memory that was only read, and is the zero page, goes to the device and comes back as zeroes.
pub fn migrate_anon_huge_zero<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = huge(bench);
        bench.expect_zero(span);
        bench.to_device(0, span);
        bench.expect_zero(span);
        bench.to_device(0, span);
        bench.device_expect_zero(0, span);
    });
}

/// The program gives up what is on the device: zeroes, and no device page is left.
pub fn migrate_anon_huge_free<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        if !bench.can(&[Feature::DropContents]) {
            return;
        }
        let span = huge(bench);
        bench.fill(span, 1);
        bench.to_device(0, span);
        bench.world().drop_contents(span);
        bench.check();
        assert_eq!(bench.mirror().region.used(), PageCount::ZERO);
        bench.device_expect_zero(0, span);
        bench.expect_zero(span);
    });
}

/// A huge page is one piece on the device, nowhere else meanwhile, and comes back when it is touched.
pub fn migrate_anon_huge_fault<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = huge(bench);
        bench.fill(span, 1);
        bench.to_device(0, span);
        let writable = true;
        let snaps = bench.mirror().snapshot(span);
        let mut snaps = snaps.iter();
        assert!(snaps.all(|snap| *snap == Snap::Local { writable }));
        bench.device_expect(0, span, 1);
        expect_one_piece(bench, span);
        assert_eq!(bench.world().read(span.start()), Ok(value(1, span.start())));
        assert_eq!(bench.mirror().on_device(span), PageCount::ZERO);
        bench.expect(span, 1);
    });
}

fn expect_one_piece<W: World>(bench: &Bench<W>, span: Span) {
    if bench.model() == Model::Soft {
        return;
    }
    let mappings = bench.mirror().gpu.mappings();
    let inside = mappings
        .iter()
        .filter(|(_, page, _)| span.contains(page.start()));
    let places: Vec<_> = inside
        .map(|(_, _, entry)| match entry.target {
            Target::Vram(at) => at,
            other => panic!("mapped to {other:?}"),
        })
        .collect();
    assert_eq!(places.len(), span.page_count().as_usize());
    assert!(places[0].is_aligned(BLOCK_SIZE), "{:?}", places[0]);
    let follows = |pair: &[_]| pair[0] + ByteSize::kib(4) == pair[1];
    assert!(places.windows(2).all(follows), "it is one piece");
}

/// Half of what is on the device is unmapped, at its start, a quarter in, or at its end: the rest is
/// still right.
pub fn migrate_partial_unmap_fault<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        if !bench.can(&[Feature::Unmap]) {
            return;
        }
        for kind in [Kind::Mirrored, Kind::Huge] {
            for quarter in 0..3 {
                let span = bench.map(PAGES, Prot::ReadWrite, kind);
                bench.fill(span, 1);
                bench.to_device(0, span);
                bench.device_expect(0, span, 1);
                let gone = part(span, quarter * PAGES / 4, PAGES / 2);
                bench.world().unmap(gone);
                for left in span.without(gone).into_iter().flatten() {
                    bench.expect(left, 1);
                    bench.device_expect(0, left, 1);
                }
                let read = bench.world().read(gone.start());
                assert!(read.is_err(), "{read:?}");
                bench.check();
            }
        }
    });
}

/// Half of a block is moved to another address, while it is on the device or before it goes there; the
/// old address is gone, or empty. All of it is right at its new place.
pub fn migrate_remap_fault<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        if !bench.can(&[Feature::Remap]) {
            return;
        }
        for kind in [Kind::Mirrored, Kind::Huge] {
            for quarter in 0..3 {
                for (before, dontunmap) in
                    [(false, false), (false, true), (true, false), (true, true)]
                {
                    if !dontunmap || bench.can(&[Feature::DontUnmap]) {
                        let span = bench.map(PAGES, Prot::ReadWrite, kind);
                        let moving = part(span, quarter * PAGES / 4, PAGES / 2);
                        moves(bench, span, moving, before, dontunmap);
                    }
                }
            }
        }
    });
}

fn moves<W: World>(bench: &Arc<Bench<W>>, span: Span, moving: Span, before: bool, dontunmap: bool) {
    let what = format!("{moving} of {span}, before: {before}, dontunmap: {dontunmap}");
    bench.fill(span, 1);
    if !before {
        bench.to_device(0, span);
        bench.device_expect(0, span, 1);
    }
    let to = bench.remap(moving, dontunmap);
    if before {
        // As much of it as is mirrored still, at its new address.
        let moved = bench.mirror().migrate_to_dev(to);
        assert!(moved.is_ok(), "{what}: {moved:?}");
    }
    bench.expect_moved(to, moving, 1);
    bench.device_expect_moved(0, to, moving, 1);
    for left in span.without(moving).into_iter().flatten() {
        bench.expect(left, 1);
        bench.device_expect(0, left, 1);
    }
    match dontunmap {
        true => bench.expect_zero(moving),
        false => assert!(bench.world().read(moving.start()).is_err(), "{what}"),
    }
    bench.check();
    bench.world().unmap(span);
    bench.world().unmap(to);
}

/// There is no 2 MiB piece of device memory: the pages go in smaller ones. Then a copy fails in each
/// direction: everything is where it was, and the next try succeeds.
pub fn migrate_anon_huge_err<W: World>(kit: &Kit) {
    migrates_with_errors::<W>(kit, false);
}

/// The same with pages that were never written.
pub fn migrate_anon_huge_zero_err<W: World>(kit: &Kit) {
    migrates_with_errors::<W>(kit, true);
}

fn migrates_with_errors<W: World>(kit: &Kit, zero: bool) {
    let setup = Setup {
        // A page less than two blocks: one piece of 2 MiB, and many smaller.
        vram: ByteSize::kib(4 * (2 * PAGES - 1)),
        ..Setup::default()
    };
    kit.once::<W>(&setup, |bench| {
        let single = in_pieces(bench);
        let span = huge(bench);
        if !zero {
            bench.fill(span, 1);
        }
        let expect = || match zero {
            true => bench.expect_zero(span),
            false => bench.expect(span, 1),
        };
        bench.to_device(0, span);
        expect();
        bench.check();
        if let Some(hook) = bench.mirror().gpu.hook() {
            hook.fail(0, 1);
            let moved = bench.mirror().migrate_to_dev(span);
            assert!(moved.is_err(), "{moved:?}");
            assert_eq!(hook.failed(), 1);
            assert_eq!(bench.mirror().on_device(span), PageCount::ZERO);
            bench.check();
            bench.to_device(0, span);
            hook.fail(0, 1);
            let home = bench.mirror().migrate_to_sys(span);
            assert!(home.is_err(), "{home:?}");
            assert_eq!(hook.failed(), 2);
            bench.check();
            assert_eq!(bench.mirror().migrate_to_sys(span), Ok(()));
            expect();
        }
        bench.expect(single, 1);
    });
}

/// Takes one page of the only 2 MiB piece of device memory: a page that stays there.
fn in_pieces<W: World>(bench: &Bench<W>) -> Span {
    let mirror = bench.mirror();
    let small = bench.memory(PAGES - 1);
    bench.to_device(0, small);
    let single = bench.memory(1);
    bench.fill(single, 1);
    bench.to_device(0, single);
    assert_eq!(mirror.migrate_to_sys(small), Ok(()));
    assert_eq!(mirror.region.used(), PageCount::ONE);
    single
}
