//! A test that hangs says where, and ends.
//!
//! Tests of memory that moves do not fail, they hang: a thread waits for a page that nobody brings.
//! The watchdog prints what the test knows and what every thread waits for, and aborts.

use core::fmt::{self, Write as _};
use core::time::Duration;
use std::fs;
use std::io::Write as _;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};

/// Watches until it is dropped.
#[must_use]
pub struct Watchdog(#[expect(dead_code, reason = "its end is what is heard of")] Sender<()>);

impl fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Watchdog")
    }
}

impl Watchdog {
    /// Aborts the process if it is not dropped in `time`; `state` says what is known then.
    ///
    /// # Panics
    ///
    /// When no thread can be started.
    pub fn start(time: Duration, state: impl Fn() -> String + Send + 'static) -> Self {
        let (alive, ended) = mpsc::channel();
        let watch = move || {
            if ended.recv_timeout(time) == Err(RecvTimeoutError::Timeout) {
                die(&format!("hung for {time:?}:\n{}{}", threads(), state()));
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".to_owned());
        thread.spawn(watch).expect("a thread");
        Self(alive)
    }
}

/// Says why, and ends the process: nothing is to happen to the evidence. What a test prints is kept from us
/// until it has ended, which it never will: so this goes past that, to the error stream itself.
pub fn die(why: &str) -> ! {
    // If nobody can be told, it ends all the same.
    let _ = writeln!(std::io::stderr(), "{why}");
    std::process::abort();
}

/// What every thread of the process waits for, as far as the kernel tells.
fn threads() -> String {
    let mut all = String::new();
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return all;
    };
    for task in tasks.flatten().map(|task| task.path()) {
        let read = |file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
        let (name, waits, call) = (read("comm"), read("wchan"), read("syscall"));
        let (name, waits, call) = (name.trim(), waits.trim(), call.trim());
        let _ = writeln!(all, "  {name:20} {waits:30} {call}");
    }
    all
}
