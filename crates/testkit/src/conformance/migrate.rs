//! To the device and back.

use super::{Bench, Kit, Places, Setup};
use crate::mirror::{Snap, words_of};
use crate::world::{Feature, Kind, Prot, World};
use gpusvm_device::FaultError;
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{PageCount, Span};

/// The kernel's buffer: 4 MiB.
const PAGES: u64 = 1024;

fn expect_local<W: World>(bench: &Bench<W>, span: Span) {
    let writable = true;
    let snaps = bench.mirror().snapshot(span);
    let mut snaps = snaps.iter();
    assert!(
        snaps.all(|snap| *snap == Snap::Local { writable }),
        "{span}"
    );
}

/// The lower half of a span.
fn half(span: Span) -> Span {
    Span::of_pages(
        span.first_page(),
        PageCount::new(span.page_count().get() / 2),
    )
}

/// Memory that the CPU wrote goes to the device, all of it; both read it there and back.
pub fn migrate<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(PAGES);
        bench.fill(span, 1);
        bench.to_device(0, span);
        expect_local(bench, span);
        bench.check();
        bench.device_expect(0, span, 1);
        expect_local(bench, span);
        assert_eq!(bench.device_fill(0, span, 2), Ok(()));
        assert_eq!(bench.mirror().migrate_to_sys(span), Ok(()));
        assert_eq!(bench.mirror().on_device(span), PageCount::ZERO);
        bench.expect(span, 2);
    });
}

/// The CPU takes half of it back; all of it goes again.
pub fn migrate_fault<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(PAGES);
        bench.fill(span, 1);
        bench.to_device(0, span);
        bench.expect(half(span), 1);
        assert_eq!(bench.mirror().on_device(half(span)), PageCount::ZERO);
        bench.to_device(0, span);
        bench.device_expect(0, span, 1);
        bench.expect(span, 1);
    });
}

/// A device gives up its memory: everything is home.
pub fn migrate_release<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(PAGES);
        bench.fill(span, 1);
        bench.to_device(0, span);
        let mirror = bench.mirror();
        assert!(mirror.evict_all().is_ok());
        assert_eq!(mirror.region.used(), PageCount::ZERO);
        assert_eq!(mirror.on_device(span), PageCount::ZERO);
        bench.expect(span, 1);
    });
}

/// Memory is mapped, migrated and unmapped, again and again at one address.
pub fn migrate_multiple<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        if !bench.can(&[Feature::Unmap]) {
            return;
        }
        let span = bench.memory(PAGES / 2);
        for round in 1..=10 {
            bench.expect_zero(span);
            bench.fill(span, round);
            bench.to_device(0, span);
            if round % 2 == 0 {
                bench.device_expect(0, span, round);
                bench.expect(span, round);
            }
            bench.world().unmap(span);
            bench
                .world()
                .map_again(span, Prot::ReadWrite, Kind::Mirrored);
        }
    });
}

/// A device without atomics on RAM works on words alone, also of pages that it read in place before:
/// they live with it as long as it does, and the CPU takes them back by touching them.
pub fn exclusive<W: World>(kit: &Kit) {
    for places in [Places::Device, Places::InPlace] {
        let setup = Setup {
            atomics_on_ram: false,
            places,
            ..Setup::default()
        };
        kit.once::<W>(&setup, works_alone);
    }
}

fn works_alone<W: World>(bench: &Arc<Bench<W>>) {
    let span = bench.memory(256);
    let words = words_of(span);
    bench.device_expect_zero(0, span);
    assert_eq!(bench.mirror().add(&words, 3), Ok(vec![0; words.len()]));
    expect_local(bench, span);
    for at in &words {
        assert_eq!(bench.world().fetch_add(*at, 1), Ok(3));
    }
    assert_eq!(bench.mirror().on_device(span), PageCount::ZERO);
    assert_eq!(bench.mirror().add(&words, 3), Ok(vec![4; words.len()]));
}

/// What a device works on alone becomes read-only: it must not write it any more.
pub fn exclusive_mprotect<W: World>(kit: &Kit) {
    let setup = Setup {
        atomics_on_ram: false,
        ..Setup::default()
    };
    kit.once::<W>(&setup, |bench| {
        let span = bench.memory(256);
        let words = words_of(span);
        assert!(bench.mirror().add(&words, 3).is_ok());
        bench.world().protect(span, Prot::Read);
        let added = bench.mirror().add(&words, 3);
        assert!(
            matches!(added, Err(FaultError::NotPermitted { .. })),
            "{added:?}"
        );
        for at in &words {
            assert_eq!(bench.world().read(*at), Ok(3));
        }
    });
}

/// What is left of a range of the device that was cut by unmapping comes home, since ranges are not
/// split.
pub fn what_is_left_of_a_cut_range_comes_home<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        if !bench.can(&[Feature::Unmap]) {
            return;
        }
        for upper in [false, true] {
            let span = bench.memory(512);
            bench.fill(span, 1);
            bench.device_expect(0, span, 1);
            let [_, upper_half] = span.without(half(span));
            let upper_half = upper_half.expect("the upper half");
            let (gone, left) = match upper {
                true => (upper_half, half(span)),
                false => (half(span), upper_half),
            };
            bench.world().unmap(gone);
            bench.check();
            assert_eq!(bench.mirror().on_device(left), PageCount::ZERO, "{left}");
            assert_eq!(bench.mirror().region.used(), PageCount::ZERO);
            bench.expect(left, 1);
        }
    });
}

/// When a program is over, and all that it had of a device is dropped, nothing keeps the device.
pub fn a_device_ends_with_its_program<W: World>(kit: &Kit) {
    let devices = Mutex::new(Vec::new());
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(64);
        bench.fill(span, 1);
        bench.device_expect(0, span, 1);
        let device = bench.mirror().gpu.device();
        devices.lock().push(Arc::downgrade(&device));
    });
    for device in devices.into_inner() {
        assert_eq!(device.strong_count(), 0, "who keeps the device?");
    }
}

/// Whatever the program does to memory that is on the device, no device page stays behind.
pub fn device_pages_do_not_leak<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let world = bench.world();
        let pages = PageCount::new(512);
        let fresh = || {
            let span = bench.memory(pages.get());
            bench.fill(span, 1);
            bench.to_device(0, span);
            bench.device_expect(0, span, 1);
            assert_eq!(bench.mirror().region.used(), pages);
            span
        };
        let expect_used = |left: u64, what: &str| {
            bench.check();
            assert_eq!(bench.mirror().region.used().get(), left, "after {what}");
        };
        if bench.can(&[Feature::Unmap]) {
            world.unmap(fresh());
            expect_used(0, "unmapping all");
            let span = fresh();
            world.unmap(half(span));
            let [_, left] = span.without(half(span));
            bench.expect(left.expect("the upper half"), 1);
            expect_used(0, "unmapping half and touching the rest");
        }
        if bench.can(&[Feature::DropContents]) {
            let span = fresh();
            world.drop_contents(span);
            expect_used(0, "dropping the contents");
            bench.expect_zero(span);
        }
        let span = fresh();
        bench.expect(span, 1);
        expect_used(0, "touching all");
        fresh();
        world.exit();
        assert_eq!(bench.mirror().region.used(), PageCount::ZERO, "at the exit");
    });
}
