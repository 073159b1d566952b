//! Children of fork and exec, and what they inherit.

use crate::kit::{
    Area, SNAPSHOT, TO_DEV, again, assert_child, assert_success, close, engine_runs, fork,
    is_preloaded, open, role,
};

const INHERITED: &str = "children::what_is_inherited_is_a_plain_file";

/// In a child, a descriptor of its parent's device is a plain file: commands are refused, on the parent's memory
/// and on the child's. The child may close it, and open devices; the parent's is as it was.
#[test]
fn what_is_inherited_is_a_plain_file() {
    // Executed, with the numbers of two descriptors.
    if let Some((kept, closed)) = role().as_deref().and_then(|role| role.split_once(',')) {
        let (kept, closed) = (kept.parse().unwrap(), closed.parse().unwrap());
        let area = Area::new(1);
        assert_eq!(
            area.run(kept, SNAPSHOT, &mut [0]).unwrap_err(),
            libc::ENOTTY
        );
        assert_eq!(
            area.run(closed, SNAPSHOT, &mut [0]).unwrap_err(),
            libc::EBADF
        );
        assert_eq!(close(kept), Ok(()));
        return;
    }
    if !is_preloaded(INHERITED) {
        return;
    }
    let fd = open(0);
    let area = Area::new(8);
    area.fill(1);
    area.take(fd);
    let child = fork(|| {
        let refused = area.run(fd, TO_DEV, &mut [0; 8 * 4096]).unwrap_err() == libc::ENOTTY;
        let is_right = refused && area.is_filled(1) && !engine_runs();
        area.fill(2);
        let own = open(0);
        area.take(own);
        let is_right = is_right && area.is_local(own) && close(fd) == Ok(());
        is_right && area.is_local(own) && close(own) == Ok(()) && area.is_filled(2)
    });
    assert_child(child, "the child of fork");
    area.take(fd);
    assert!(area.is_local(fd));
    // What one has, and what exec closes.
    let hidden = open(libc::O_CLOEXEC);
    let role = format!("{fd},{hidden}");
    assert_success(&again(INHERITED, &role).output().unwrap());
    assert!(area.is_local(fd) && area.is_filled(1));
    close(hidden).unwrap();
    close(fd).unwrap();
    assert!(!engine_runs());
}

/// A device ends with its last descriptor in the process that opened it: what a child still has is no device.
#[test]
fn a_child_does_not_keep_its_parents_device() {
    if !is_preloaded("children::a_child_does_not_keep_its_parents_device") {
        return;
    }
    let fd = open(0);
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let [from, to] = ends;
    let child = fork(|| {
        close(to).unwrap();
        // Until the parent has closed its device.
        // SAFETY: reads nothing into nothing much.
        unsafe { libc::read(from, [0u8; 1].as_mut_ptr().cast(), 1) == 0 }
    });
    close(fd).unwrap();
    assert!(!engine_runs());
    close(to).unwrap();
    assert_child(child, "the child");
}
