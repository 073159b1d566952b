//! Each call against the real kernel: what it does, how it refuses, what it costs.

mod moves; // out and back
mod fills; // copy, protect, wake, poison
mod events; // what is heard of
mod facts; // what the design takes for granted
mod facts_huge; // the same of huge pages
mod facts_files; // the same of private mappings of files
mod facts_markers; // the same of markers on pages that are not there

use super::{Progress, RegisterModes};
use crate::sys::map::Request;
use gpusvm_types::{BLOCK_SIZE, ByteSize};
use rustix::io::Errno;
use std::time::{Duration, Instant};

const MISSING: RegisterModes = RegisterModes {
    missing: true,
    wp: false,
    minor: false,
};

/// Seven in every byte: something to copy from.
static BYTES: [u8; 4096] = [7; 4096];

/// All of it.
fn complete(done: ByteSize) -> Progress {
    Progress { done, errno: None }
}

/// So much of it, and then this.
fn stopped(done: ByteSize, errno: Errno) -> Progress {
    Progress {
        done,
        errno: Some(errno),
    }
}

/// Rounds of a measurement.
const ROUNDS: usize = 200;

/// One block; huge where the system has it.
fn block() -> Request {
    Request::new(BLOCK_SIZE).aligned().dont_fork()
}

/// The middle one.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Does `work` and keeps how long it took.
#[expect(clippy::disallowed_methods, reason = "costs are measured")]
fn timed<T>(times: &mut Vec<Duration>, work: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = work();
    times.push(start.elapsed());
    result
}
