//! What the tests share: an engine, memory of the program's own, and a watchdog.
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test file uses its own part"
)]

use gpusvm::{ByteSize, FaultMode, SoftGpu, Svm};
use gpusvm_testkit::Watchdog;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// An engine with one device.
pub(crate) fn engine(vram: ByteSize) -> Svm {
    engine_with(vram, FaultMode::Replayable)
}

/// An engine with one device that faults, or does not.
pub(crate) fn engine_with(vram: ByteSize, faults: FaultMode) -> Svm {
    let gpu = SoftGpu::builder()
        .vram(vram)
        .units(3)
        .fault_mode(faults)
        .build()
        .unwrap();
    let svm = Svm::builder().device(gpu).build().unwrap();
    let required = std::env::var_os("GPUSVM_REQUIRE_UFFD").is_some_and(|value| value == "1");
    assert!(
        !required || svm.rung().number() < 4,
        "userfaultfd is required: {}",
        gpusvm::doctor()
    );
    if let Some(notice) = svm.rung_notice() {
        eprintln!("note: {notice}");
    }
    svm
}

/// Whether memory of the program's own can be adopted here; prints why not.
pub(crate) fn can_adopt(svm: &Svm) -> bool {
    let can = svm.rung().number() < 4;
    if !can {
        println!("skipped: without userfaultfd only memory of the library can be mirrored");
    }
    can
}

/// Runs `test`, and ends the process with a dump of where its threads are if it takes too long.
pub(crate) fn within(limit: Duration, test: impl FnOnce()) {
    let _watchdog = Watchdog::start(limit, String::new);
    test();
}

/// A private anonymous mapping of the program's own, 2 MiB aligned.
#[derive(Debug)]
pub(crate) struct Map {
    pub(crate) at: *mut u8,
    pub(crate) len: usize,
    whole: *mut u8,
    whole_len: usize,
}

// SAFETY: memory is not bound to a thread.
unsafe impl Send for Map {}
// SAFETY: the tests use it by atomics, or from one thread.
unsafe impl Sync for Map {}

const BLOCK: usize = 2 << 20;

impl Map {
    /// With huge pages, or never.
    pub(crate) fn new(len: usize, huge: bool) -> Self {
        let whole_len = len + BLOCK;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no address is asked for.
        let whole = unsafe { libc::mmap(std::ptr::null_mut(), whole_len, access, flags, -1, 0) };
        assert_ne!(whole, libc::MAP_FAILED);
        let whole = whole.cast::<u8>();
        let at = whole.wrapping_add(whole.align_offset(BLOCK));
        let advice = if huge {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        // SAFETY: advice on our own mapping.
        unsafe { libc::madvise(at.cast(), len, advice) };
        Self {
            at,
            len,
            whole,
            whole_len,
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(self.whole.cast(), self.whole_len) };
    }
}

/// Sets a flag when it is dropped, so that threads end when a test fails.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.set();
        }
    }
}
