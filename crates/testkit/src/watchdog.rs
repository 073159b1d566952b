//! A test that hangs says where, and ends.
//!
//! Tests of memory that moves do not fail, they hang: a thread waits for a page that nobody brings.
//! The watchdog prints what the test knows and what every thread waits for, and aborts.

use core::fmt;
use core::time::Duration;
use std::fs;
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
                eprintln!("hung for {time:?}:");
                threads();
                eprintln!("{}", state());
                std::process::abort();
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".to_owned());
        thread.spawn(watch).expect("a thread");
        Self(alive)
    }
}

/// What every thread of the process waits for, as far as the kernel tells.
fn threads() {
    let Ok(tasks) = fs::read_dir("/proc/self/task") else {
        return;
    };
    for task in tasks.flatten().map(|task| task.path()) {
        let read = |file: &str| fs::read_to_string(task.join(file)).unwrap_or_default();
        let (name, waits, call) = (read("comm"), read("wchan"), read("syscall"));
        eprintln!("  {:20} {:30} {}", name.trim(), waits.trim(), call.trim());
    }
}
