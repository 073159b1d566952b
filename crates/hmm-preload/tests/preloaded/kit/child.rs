//! Children of fork, and whether the engine runs.

use super::errno;

/// Forks. The child exits with what `run` says: whether all is right.
pub(crate) fn fork(run: impl FnOnce() -> bool) -> i32 {
    // SAFETY: the child runs a little, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let is_right = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!is_right.unwrap_or(false))) };
    }
    assert!(child > 0, "{}", errno());
    child
}

/// Waits for a child, and looks whether it succeeded.
pub(crate) fn assert_child(child: i32, what: &str) {
    let mut status = -1;
    // SAFETY: waits for the child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "{what}");
}

/// Whether there is an engine in this process: its threads have names.
pub(crate) fn engine_runs() -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let names = threads.filter_map(|thread| {
        // One that has ended meanwhile has none.
        std::fs::read_to_string(thread.ok()?.path().join("comm")).ok()
    });
    names.into_iter().any(|name| name.starts_with("gpusvm-"))
}
