//! Memory on the device that is unmapped in part.

use crate::kit::{Area, Device, HUGE, PAGE, assert_same, fill, is_preloaded, pattern, read, seen};

/// Half of a huge page's worth goes, from three places on; the device keeps the rest, and the CPU reads it.
#[test]
fn migrate_partial_unmap_fault() {
    if !is_preloaded("partial::migrate_partial_unmap_fault") {
        return;
    }
    for huge in [false, true] {
        for offset in [0, HUGE / 4, HUGE / 2] {
            unmapped_at(offset, huge);
        }
    }
}

fn unmapped_at(offset: usize, huge: bool) {
    let what = format!("{offset:#x} on, huge {huge}");
    let device = Device::open();
    let area = Area::new(HUGE, huge);
    fill(1, area.all());
    assert_same(&device.take(area.all()), &pattern(1, 0, HUGE), &what);
    let (from, to) = (offset, offset + HUGE / 2);
    let part = |from: usize, to: usize| (area.at.wrapping_add(from), to - from);
    // SAFETY: memory of our own.
    let unmapped = unsafe { libc::munmap(part(from, to).0.cast(), to - from) };
    assert_eq!(unmapped, 0, "{what}");
    // The rest is where it was, in pages of its own.
    let seen = device.look(area.all());
    for (n, seen) in seen.iter().enumerate() {
        let wanted = match (from..to).contains(&(n * PAGE)) {
            true => seen::ERROR,
            false => seen::LOCAL | seen::WRITE,
        };
        assert_eq!(*seen, wanted, "{what}: page {n}");
    }
    for (from, to) in [(0, from), (to, HUGE)] {
        let found = read(part(from, to));
        assert_same(&found, &pattern(1, from, to - from), &what);
    }
    device.close();
}
