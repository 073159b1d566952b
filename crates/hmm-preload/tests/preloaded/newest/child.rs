//! A child of fork, with memory that was on the device, or not.

use crate::kit::{
    Area, Device, Do, HUGE, READ_WRITE, assert_child, assert_same, fork, is_preloaded, pattern,
};

/// The child sees its parent's values, and what it writes by a device of its own is its own.
#[test]
fn anon_write_child() {
    if !is_preloaded("newest::child::anon_write_child") {
        return;
    }
    for (pages, huge) in [(2 * HUGE, false), (HUGE, true)] {
        for migrated in [false, true] {
            forked(pages, huge, migrated);
        }
    }
}

fn forked(pages: usize, huge: bool, migrated: bool) {
    let what = format!("{pages} pages, huge {huge}, migrated {migrated}");
    let device = Device::open();
    let area = Area::aligned(pages, huge, READ_WRITE);
    area.fill(8);
    if migrated {
        device.take(area.all());
        assert!(device.has(area.all()), "{what}");
    }
    let child = fork(|| {
        in_child(&area, &what);
        true
    });
    assert_child(child, &format!("{what}: the child"));
    assert_same(&area.read(), &pattern(8, 0, pages), &what);
    // The parent's device is as good as before.
    assert_same(&device.take(area.all()), &pattern(8, 0, pages), &what);
    device.close();
}

fn in_child(area: &Area, what: &str) {
    assert_same(&area.read(), &pattern(8, 0, area.pages), what);
    let device = Device::open();
    let mut bytes = pattern(9, 0, area.pages);
    let done = device.run(Do::Write, area.all(), &mut bytes).unwrap();
    assert_eq!(done.cpages, area.pages as u64, "{what}");
    assert!(done.faults > 0, "{what}: a device of its own");
    assert_same(&area.read(), &bytes, what);
    assert_same(&device.take(area.all()), &bytes, what);
    let done = device.run(Do::MigrateToSys, area.all(), &mut []).unwrap();
    assert_eq!(done.cpages, area.pages as u64, "{what}");
    assert_same(&area.read(), &bytes, what);
    device.close();
}
