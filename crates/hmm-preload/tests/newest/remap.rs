//! Memory that the program moves, before it migrates and after.

use crate::kit::{Area, Device, HUGE, assert_same, fill, is_preloaded, pattern, read, seen};

/// A way of moving memory.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// To the device, and then to another address, or the other way round.
    migrates_first: bool,
    /// The old place stays, empty.
    stays: bool,
    huge: bool,
    /// How far from a huge page's beginning the new place begins.
    offset: usize,
}

/// Device pages go where the program moves them, also to where no huge page could be.
#[test]
fn migrate_remap_fault() {
    if !is_preloaded("remap::migrate_remap_fault") {
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
            let is_local = |seen: &u8| seen & !seen::PMD == seen::LOCAL | seen::WRITE;
            assert!(seen.iter().all(is_local), "{what}: {seen:x?}");
        }
    }
}

/// What the pages are at their new place, before the CPU reads them there.
fn moved(case: Case) -> (String, Vec<u8>) {
    let what = format!("{case:?}");
    let device = Device::open();
    let area = Area::new(2 * HUGE, case.huge);
    let old = (area.at, HUGE);
    let new = (area.behind().wrapping_add(case.offset), HUGE);
    fill(2, old);
    if case.migrates_first {
        assert_same(&device.take(old), &pattern(2, 0, HUGE), &what);
    }
    remap(old.0, new.0, case.stays);
    if !case.migrates_first {
        assert_same(&device.take(new), &pattern(2, 0, HUGE), &what);
    }
    let seen = device.look(new);
    let left = match case.stays {
        true => seen::NONE,
        false => seen::ERROR,
    };
    assert_eq!(
        device.look(old),
        [left; HUGE / 4096],
        "{what}: the old place"
    );
    assert_same(&read(new), &pattern(2, 0, HUGE), &what);
    if case.stays {
        // Nothing of what was there, and memory like any other.
        assert_same(&read(old), &[0; HUGE], &what);
        fill(3, old);
        assert_same(&device.take(old), &pattern(3, 0, HUGE), &what);
        assert_same(&read(old), &pattern(3, 0, HUGE), &what);
        assert_same(&read(new), &pattern(2, 0, HUGE), &what);
    }
    device.close();
    (what, seen)
}

fn remap(old: *mut u8, new: *mut u8, stays: bool) {
    let stays = if stays { libc::MREMAP_DONTUNMAP } else { 0 };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | stays;
    // SAFETY: memory of our own, to address space of our own.
    let at = unsafe { libc::mremap(old.cast(), HUGE, HUGE, flags, new) };
    assert_eq!(at, new.cast(), "{}", std::io::Error::last_os_error());
}
