//! Private anonymous memory: what a device reads and writes of it, and what it must not.

use super::bench::value;
use super::{Bench, Kit, Model, Places, Setup};
use crate::mirror::words_of;
use crate::world::{Kind, Prot, World};
use gpusvm_device::FaultError;
use gpusvm_sync::Arc;
use gpusvm_types::{BLOCK_SIZE, PageCount, Span};

/// The kernel's buffer: 4 MiB.
const PAGES: u64 = 1024;

/// Runs a case with pages that go to the device, and with pages that stay where they are.
fn each_place<W: World>(kit: &Kit, case: impl Fn(&Arc<Bench<W>>)) {
    for places in [Places::Device, Places::InPlace] {
        let setup = Setup {
            places,
            ..Setup::default()
        };
        kit.once(&setup, &case);
    }
}

/// A fault is served with as much around it as a range holds: a block of 2 MiB.
fn expect_one_fault_a_block<W: World>(bench: &Bench<W>, span: Span, faults: u64) {
    let blocks = span.blocks().count() as u64;
    // Units of the software GPU fault together; a device that declares does not fault.
    match (bench.is_faulting(), bench.model()) {
        (true, Model::Dmirror) => assert_eq!(faults, blocks, "faults for {span}"),
        (true, Model::Soft) => assert!(faults >= blocks, "{faults} faults for {span}"),
        (false, _) => assert_eq!(faults, 0, "a device that does not fault"),
    }
}

/// A device joins a program, leaves it, and another joins.
pub fn open_close<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(4);
        let second = bench.join();
        assert_eq!(second.write(&[(span.start(), 7)]), Ok(()));
        second.evict_all().expect("it leaves");
        drop(second);
        assert_eq!(bench.world().read(span.start()), Ok(7));
        let third = bench.join();
        assert_eq!(third.read(&[span.start()]), Ok(vec![7]));
        third.evict_all().expect("it leaves");
    });
}

/// A device reads read-only memory, pages that were never touched among it.
pub fn anon_read<W: World>(kit: &Kit) {
    each_place::<W>(kit, |bench| {
        let span = bench.memory(PAGES);
        let [_, touched] = span.without(Span::of_pages(span.first_page(), PageCount::new(2)));
        let touched = touched.expect("more than two pages");
        bench.fill(touched, 1);
        bench.world().protect(span, Prot::Read);
        let mirror = bench.mirror();
        let (read, faults) = mirror.faults_of(|| mirror.read(&words_of(span)));
        let wanted = words_of(span)
            .into_iter()
            .map(|at| match touched.contains(at) {
                true => value(1, at),
                false => 0,
            });
        assert_eq!(read, Ok(wanted.collect()));
        expect_one_fault_a_block(bench, span, faults);
        let (_, again) = mirror.faults_of(|| mirror.read(&words_of(span)));
        assert_eq!(again, 0, "it is mapped");
    });
}

/// Memory that permits nothing is not read, and stays as it was.
pub fn anon_read_prot<W: World>(kit: &Kit) {
    each_place::<W>(kit, |bench| {
        let span = bench.memory(PAGES);
        bench.fill(span, 1);
        bench.world().protect(span, Prot::None);
        let read = bench.mirror().read(&words_of(span));
        assert!(
            matches!(read, Err(FaultError::NotPermitted { .. })),
            "{read:?}"
        );
        bench.world().protect(span, Prot::ReadWrite);
        bench.expect(span, 1);
    });
}

/// A device writes memory that was never touched.
pub fn anon_write<W: World>(kit: &Kit) {
    each_place::<W>(kit, |bench| {
        let span = bench.memory(PAGES);
        write_all(bench, span, 1);
        bench.expect(span, 1);
    });
}

fn write_all<W: World>(bench: &Bench<W>, span: Span, tag: u64) {
    let mirror = bench.mirror();
    let (written, faults) = mirror.faults_of(|| bench.device_fill(0, span, tag));
    assert_eq!(written, Ok(()));
    expect_one_fault_a_block(bench, span, faults);
}

/// A device reads read-only memory, must not write it, and may once it is permitted.
pub fn anon_write_prot<W: World>(kit: &Kit) {
    each_place::<W>(kit, |bench| {
        let span = bench.map(PAGES, Prot::Read, Kind::Mirrored);
        let first = Span::page_of(span.start());
        bench.device_expect_zero(0, first);
        let written = bench.device_fill(0, span, 1);
        assert!(
            matches!(written, Err(FaultError::NotPermitted { .. })),
            "{written:?}"
        );
        bench.expect_zero(span);
        bench.world().protect(span, Prot::ReadWrite);
        write_all(bench, span, 2);
        bench.expect(span, 2);
    });
}

/// A device writes 2 MiB at once.
pub fn anon_write_huge<W: World>(kit: &Kit) {
    each_place::<W>(kit, |bench| {
        let pages = BLOCK_SIZE.whole_pages().get();
        let span = bench.map(pages, Prot::ReadWrite, Kind::Huge);
        write_all(bench, span, 1);
        bench.expect(span, 1);
    });
}

/// What a device has of a huge page is writable as a whole, and read-only as a whole.
pub fn compound<W: World>(kit: &Kit) {
    each_place::<W>(kit, |bench| {
        let pages = BLOCK_SIZE.whole_pages().get();
        let span = bench.map(pages, Prot::ReadWrite, Kind::Huge);
        write_all(bench, span, 1);
        expect_mapped(bench, span, true);
        bench.world().protect(span, Prot::Read);
        bench.device_expect(0, span, 1);
        expect_mapped(bench, span, false);
        let written = bench.device_fill(0, span, 2);
        assert!(
            matches!(written, Err(FaultError::NotPermitted { .. })),
            "{written:?}"
        );
        bench.world().protect(span, Prot::ReadWrite);
        bench.expect(span, 1);
    });
}

/// Every page of `span` is mapped, for this.
fn expect_mapped<W: World>(bench: &Bench<W>, span: Span, writable: bool) {
    if bench.model() == Model::Soft {
        return;
    }
    let mappings = bench.mirror().gpu.mappings();
    let inside = mappings
        .iter()
        .filter(|(_, page, _)| span.contains(page.start()));
    assert!(
        inside
            .clone()
            .all(|(_, _, entry)| entry.allows.is_write() == writable),
        "writable: {writable}"
    );
    assert_eq!(inside.count(), span.page_count().as_usize());
}

/// Memory is mapped, read by a device and unmapped, again and again at one address.
pub fn anon_read_multiple<W: World>(kit: &Kit) {
    each_place::<W>(kit, |bench| {
        let span = bench.memory(PAGES / 2);
        for round in 1..=10 {
            bench.fill(span, round);
            bench.device_expect(0, span, round);
            if bench.can(&[crate::world::Feature::Unmap]) {
                bench.world().unmap(span);
                bench
                    .world()
                    .map_again(span, Prot::ReadWrite, Kind::Mirrored);
            }
        }
    });
}

/// A device reads what is being unmapped: it gets an error, or the data.
pub fn anon_teardown<W: World>(kit: &Kit) {
    kit.race::<W>(&Setup::default(), |bench| {
        if !bench.can(&[crate::world::Feature::Unmap]) {
            return;
        }
        let span = bench.memory(32);
        let upper = Span::of_pages(span.first_page() + PageCount::new(16), PageCount::new(16));
        bench.fill(span, 1);
        let reads = move |bench: &Arc<Bench<W>>| match bench.mirror().read(&words_of(span)) {
            Ok(read) => {
                let wanted = words_of(span).into_iter().map(|at| value(1, at));
                assert_eq!(read, wanted.collect::<Vec<_>>());
            }
            Err(error) => assert!(is_of_unmapping(&error), "{error:?}"),
        };
        let unmaps = move |bench: &Arc<Bench<W>>| bench.world().unmap(upper);
        bench.run(vec![Box::new(reads), Box::new(unmaps)]);
    });
}

/// What a device may be told about memory that is being unmapped.
pub(super) fn is_of_unmapping(error: &FaultError) -> bool {
    matches!(
        error,
        FaultError::Unmapped { .. } | FaultError::NotDeclared { .. }
    )
}
