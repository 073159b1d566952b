//! What happens to a program in the real world, while devices work on its memory: mappings that go,
//! move, change their permissions; processes that fork and end.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and has threads and clocks"
)]

#[path = "../common/mod.rs"]
mod common;
mod ends; // of the process, with work in flight
mod load; // devices and threads that go on meanwhile
mod moves; // mremap
mod protects; // mprotect, and Svm::protect
mod kinds; // memory that can only be read, private mappings of files
mod threads; // that end, with their stack and what they allocated on a device
mod heap; // allocations that grow, and memory that is adopted and given up all the time
mod replaced; // memory that came where other memory went, and nobody heard

use gpusvm::{Builder, ByteSize, Rung, SoftGpu, Svm};
use std::time::Duration;

const BLOCK: usize = 2 << 20;
const PAGE: usize = 4096;
/// Longer than any test takes on a slow machine.
const HANGS: Duration = Duration::from_secs(90);

/// An engine with one device on each rung that there is, one after the other.
fn on_rungs(adopts: bool, test: impl Fn(&Svm)) {
    let rungs = [
        Rung::Move,
        Rung::Copy,
        Rung::UserMode { moves: true },
        Rung::UserMode { moves: false },
        Rung::Signals,
    ];
    for rung in rungs {
        if adopts && rung == Rung::Signals {
            continue;
        }
        let gpu = SoftGpu::builder().vram(ByteSize::mib(16)).units(2);
        let builder: Builder = Svm::builder().device(gpu.build().unwrap()).rung(Some(rung));
        match builder.build() {
            Ok(svm) => {
                common::within(HANGS, || test(&svm));
                let stats = svm.shutdown().unwrap();
                assert_eq!((stats.vram_used_bytes, stats.ranges_live), (0, 0), "{rung}");
            }
            Err(error) => gpusvm_testkit::unavailable(&error.to_string()),
        }
    }
}
