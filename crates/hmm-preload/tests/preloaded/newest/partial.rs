//! Memory on the device that is unmapped in part.

use crate::kit::{Area, Device, HUGE, READ_WRITE, assert_same, is_preloaded, pattern, seen};

/// Half of a huge page's worth goes, from three places on; the device keeps the rest, and the CPU reads it.
#[test]
fn migrate_partial_unmap_fault() {
    if !is_preloaded("newest::partial::migrate_partial_unmap_fault") {
        return;
    }
    for huge in [false, true] {
        for offset in [0, HUGE / 4, HUGE / 2] {
            unmapped_at(offset, huge);
        }
    }
}

fn unmapped_at(offset: usize, huge: bool) {
    let what = format!("from page {offset} on, huge {huge}");
    let device = Device::open();
    let area = Area::aligned(HUGE, huge, READ_WRITE);
    area.fill(1);
    assert_same(&device.take(area.all()), &pattern(1, 0, HUGE), &what);
    let (from, to) = (offset, offset + HUGE / 2);
    let part = |from: usize, to: usize| area.part(from, to - from);
    let gone = part(from, to);
    // SAFETY: memory of our own.
    let unmapped = unsafe { libc::munmap(gone.at.cast(), gone.len()) };
    assert_eq!(unmapped, 0, "{what}");
    // The rest is where it was, in pages of its own.
    let seen = device.look(area.all());
    for (n, seen) in seen.iter().enumerate() {
        let wanted = match (from..to).contains(&n) {
            true => seen::ERROR,
            false => seen::PRIVATE_LOCAL | seen::WRITE,
        };
        assert_eq!(*seen, wanted, "{what}: page {n}");
    }
    for (from, to) in [(0, from), (to, HUGE)] {
        let found = part(from, to).read();
        assert_same(&found, &pattern(1, from, to - from), &what);
    }
    device.close();
}
