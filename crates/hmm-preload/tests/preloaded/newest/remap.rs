//! Memory that the program moves, before it migrates and after.

use crate::kit::{
    Area, Device, HUGE, READ_WRITE, Span, assert_same, errno, is_local, is_preloaded, pattern, seen,
};

/// A way of moving memory.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// To the device, and then to another address, or the other way round.
    migrates_first: bool,
    /// The old place stays, empty.
    stays: bool,
    huge: bool,
    /// How many pages from a huge page's beginning the new place begins.
    offset: usize,
}

/// Device pages go where the program moves them, also to where no huge page could be.
#[test]
fn migrate_remap_fault() {
    if !is_preloaded("newest::remap::migrate_remap_fault") {
        return;
    }
    let both = [false, true];
    for offset in [0, HUGE / 4, HUGE / 2] {
        for (migrates_first, stays, huge) in both
            .into_iter()
            .flat_map(|a| both.map(|b| (a, b)))
            .flat_map(|(a, b)| both.map(|c| (a, b, c)))
        {
            let (what, seen) = moved(Case {
                migrates_first,
                stays,
                huge,
                offset,
            });
            assert!(seen.iter().all(|seen| is_local(*seen)), "{what}: {seen:x?}");
        }
    }
}

/// What the pages are at their new place, before the CPU reads them there.
fn moved(case: Case) -> (String, Vec<u8>) {
    let what = format!("{case:?}");
    let device = Device::open();
    let area = Area::aligned(2 * HUGE, case.huge, READ_WRITE);
    let old = area.part(0, HUGE);
    let new = area.part(2 * HUGE + case.offset, HUGE);
    old.fill(2);
    if case.migrates_first {
        assert_same(&device.take(old), &pattern(2, 0, HUGE), &what);
    }
    remap(old, new, case.stays);
    if !case.migrates_first {
        assert_same(&device.take(new), &pattern(2, 0, HUGE), &what);
    }
    let seen = device.look(new);
    let left = match case.stays {
        true => seen::NONE,
        false => seen::ERROR,
    };
    assert_eq!(device.look(old), [left; HUGE], "{what}: the old place");
    assert_same(&new.read(), &pattern(2, 0, HUGE), &what);
    if case.stays {
        // Nothing of what was there, and memory like any other.
        assert!(old.is_zero(), "{what}");
        old.fill(3);
        assert_same(&device.take(old), &pattern(3, 0, HUGE), &what);
        assert_same(&old.read(), &pattern(3, 0, HUGE), &what);
        assert_same(&new.read(), &pattern(2, 0, HUGE), &what);
    }
    device.close();
    (what, seen)
}

fn remap(old: Span, new: Span, stays: bool) {
    let stays = if stays { libc::MREMAP_DONTUNMAP } else { 0 };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | stays;
    // SAFETY: memory of our own, to address space of our own.
    let at = unsafe { libc::mremap(old.at.cast(), old.len(), new.len(), flags, new.at) };
    assert_eq!(at, new.at.cast(), "{}", errno());
}
