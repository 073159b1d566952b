//! Children of fork and exec, and what they inherit.

use crate::kit::{
    Area, DEVICES, Descriptor, Device, Do, PAGE, again, assert_child, assert_passes, engine_runs,
    fork, is_preloaded, role,
};

const INHERITED: &str = "apps::children::what_is_inherited_is_a_plain_file";

/// In a child, a descriptor of its parent's device is a plain file: commands are refused, on the parent's memory
/// and on the child's. The child may close it, and open devices; the parent's is as it was.
#[test]
fn what_is_inherited_is_a_plain_file() {
    // Executed, with the numbers of two descriptors.
    if let Some((kept, closed)) = role().as_deref().and_then(|role| role.split_once(',')) {
        let (kept, closed) = (kept.parse().unwrap(), closed.parse().unwrap());
        let (kept, closed) = (Descriptor(kept), Descriptor(closed));
        let area = Area::new(1);
        let look = |at: Descriptor| at.run(Do::Snapshot, area.all(), &mut [0]).unwrap_err();
        assert_eq!(look(kept), libc::ENOTTY);
        assert_eq!(look(closed), libc::EBADF);
        assert_eq!(kept.close(), Ok(()));
        return;
    }
    if !is_preloaded(INHERITED) {
        return;
    }
    let device = Device::open();
    let area = Area::new(8);
    area.fill(1);
    device.take(area.all());
    let child = fork(|| {
        let refused = device.run(Do::MigrateToDev, area.all(), &mut [0; 8 * PAGE]);
        let refused = refused.unwrap_err() == libc::ENOTTY;
        let is_right = refused && area.is_filled(1) && !engine_runs();
        area.fill(2);
        let own = Device::open();
        own.take(area.all());
        let inherited: Descriptor = *device;
        let is_right = is_right && own.has(area.all()) && inherited.close() == Ok(());
        let is_right = is_right && own.has(area.all());
        own.close();
        is_right && area.is_filled(2)
    });
    assert_child(child, "the child of fork");
    device.take(area.all());
    assert!(device.has(area.all()));
    // What one has, and what exec closes.
    let hidden = Descriptor::open(DEVICES[0], libc::O_CLOEXEC).unwrap();
    let role = format!("{},{}", device.0, hidden.0);
    assert_passes(&mut again(INHERITED, &role));
    assert!(device.has(area.all()) && area.is_filled(1));
    hidden.close().unwrap();
    device.close();
    assert!(!engine_runs());
}

/// A device ends with its last descriptor in the process that opened it: what a child still has is no device.
#[test]
fn a_child_does_not_keep_its_parents_device() {
    if !is_preloaded("apps::children::a_child_does_not_keep_its_parents_device") {
        return;
    }
    let device = Device::open();
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let [from, to] = ends.map(Descriptor);
    let child = fork(|| {
        to.close().unwrap();
        // Until the parent has closed its device.
        // SAFETY: reads nothing into nothing much.
        unsafe { libc::read(from.0, [0u8; 1].as_mut_ptr().cast(), 1) == 0 }
    });
    device.close();
    assert!(!engine_runs());
    to.close().unwrap();
    assert_child(child, "the child");
}
