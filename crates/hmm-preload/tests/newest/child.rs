//! A child of fork, with memory that was on the device, or not.

use crate::kit::{Area, Device, HUGE, Run, assert_same, fill, is_preloaded, pattern, read, seen};

/// The child sees its parent's values, and what it writes by a device of its own is its own.
#[test]
fn anon_write_child() {
    if !is_preloaded("child::anon_write_child") {
        return;
    }
    for (len, huge) in [(2 * HUGE, false), (HUGE, true)] {
        for migrated in [false, true] {
            forked(len, huge, migrated);
        }
    }
}

fn forked(len: usize, huge: bool, migrated: bool) {
    let what = format!("{len:#x} bytes, huge {huge}, migrated {migrated}");
    let device = Device::open();
    let area = Area::new(len, huge);
    fill(8, area.all());
    if migrated {
        device.take(area.all());
        let seen = device.look(area.all());
        assert!(seen.iter().all(|seen| seen & seen::LOCAL != 0), "{what}");
    }
    // SAFETY: the child looks at its memory, has a device write it, and exits.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "{what}");
    if child == 0 {
        let is_right = std::panic::catch_unwind(|| in_child(&area, &what)).is_ok();
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!is_right)) };
    }
    let mut status = -1;
    // SAFETY: waits for the child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "{what}: the child");
    assert_same(&read(area.all()), &pattern(8, 0, len), &what);
    // The parent's device is as good as before.
    assert_same(&device.take(area.all()), &pattern(8, 0, len), &what);
    device.close();
}

fn in_child(area: &Area, what: &str) {
    assert_same(&read(area.all()), &pattern(8, 0, area.len), what);
    let device = Device::open();
    let mut bytes = pattern(9, 0, area.len);
    let done = device.run(Run::Write, area.all(), &mut bytes).unwrap();
    assert_eq!(done.cpages * 4096, area.len as u64, "{what}");
    assert!(done.faults > 0, "{what}: a device of its own");
    assert_same(&read(area.all()), &bytes, what);
    assert_same(&device.take(area.all()), &bytes, what);
    let done = device.run(Run::ToSys, area.all(), &mut []).unwrap();
    assert_eq!(done.cpages * 4096, area.len as u64, "{what}");
    assert_same(&read(area.all()), &bytes, what);
    device.close();
}
