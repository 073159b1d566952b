//! A fault that is answered late must not fill memory that has become another's: userfaultfd fills
//! whatever is registered, by whomever.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and sleep"
)]

mod common;

use common::{Map, Stay, built, can_adopt, within};
use gpusvm::{ByteSize, Grid, SoftGpu, Svm, SvmPtr};
use std::sync::Arc;
use std::time::Duration;

const LEN: usize = 16 << 10;

fn engine() -> Svm {
    let gpu = SoftGpu::with_vram(ByteSize::mib(8)).unwrap();
    let policy = Arc::new(Stay(Duration::ZERO));
    built(Svm::builder().device(gpu).policy(policy))
}

/// Has the device write a word.
fn store(svm: &Svm, at: *mut u8, value: u64) {
    let at = SvmPtr::from(at.cast::<u64>());
    // SAFETY: nobody else uses the memory until the launch has ended.
    let launch = unsafe { svm.launch(Grid::new(1), move |lane| lane.store(at, value)) };
    launch.unwrap().wait().unwrap();
}

fn load(at: *mut u8) -> u64 {
    // SAFETY: a word of a mapping of the test, which no device uses now.
    unsafe { at.cast::<u64>().read_volatile() }
}

fn remap(from: *mut u8, to: *mut u8) {
    let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: a mapping of the test, to a place of the test that nobody uses.
    let found = unsafe { libc::mremap(from.cast(), LEN, LEN, how, to.cast::<libc::c_void>()) };
    assert_eq!(found, to.cast());
}

/// A thread touches a page that has just been moved, and sleeps a moment, until the move is known; it is
/// woken earlier and moves the page on, and another engine's page moves to the place, while it lives on
/// a device. When the moment is over, the first engine must not answer the fault again.
#[test]
fn a_fault_that_slept_fills_no_memory_of_others() {
    within(Duration::from_secs(120), || {
        let (first, second) = (engine(), engine());
        if !can_adopt(&first) {
            return;
        }
        let places = Map::new(64 * LEN, false);
        let place = |i: usize| places.at.wrapping_add(4 * i * LEN);
        let (ours, theirs, shared) = (place(0), place(1), place(2));
        let len = ByteSize::from_usize(LEN);
        let _adopted = [
            first.adopt(ours, len).unwrap(),
            second.adopt(theirs, len).unwrap(),
        ];
        for round in 1..=2000 {
            store(&first, ours, round);
            store(&second, theirs, 1000 + round);
            remap(ours, shared);
            assert_eq!(load(shared), round);
            remap(shared, ours);
            remap(theirs, shared);
            std::thread::sleep(Duration::from_micros(500));
            assert_eq!(load(shared), 1000 + round, "round {round}");
            remap(shared, theirs);
            assert_eq!(load(ours), round);
        }
    });
}
