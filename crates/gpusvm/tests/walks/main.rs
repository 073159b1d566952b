//! The four walks of ARCHITECTURE.md, as they are walked: each test makes one event happen, notes which
//! functions are entered, prints them, and compares them with the page.
#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests may unwrap and have a clock, and the lint does not see helpers in test files"
)]

#[path = "../common/mod.rs"]
mod common;
mod page; // what ARCHITECTURE.md says
mod trace; // what was walked

use common::built;
use gpusvm::{ByteSize, Grid, MigrateOnTouch, Resident, Rung, SoftGpu, Svm, SvmPtr, SvmSlice};
use gpusvm_sync::walk;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use trace::Trace;

/// Recordings take turns.
static TURN: Mutex<()> = Mutex::new(());

/// One block in words.
const BLOCK: usize = (2 << 20) / 8;

/// An engine with one device of so many blocks, whose pages may leave at once. `None`, after saying why,
/// where pages move in another way than the page says.
fn engine(blocks: u64) -> Option<(Svm, MutexGuard<'static, ()>)> {
    let turn = TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let gpu = SoftGpu::builder().vram(ByteSize::mib(2 * blocks)).units(1);
    let builder = Svm::builder().device(gpu.build().unwrap());
    let timeslice = Duration::ZERO;
    let svm = built(builder.policy(Arc::new(MigrateOnTouch { timeslice })));
    if svm.rung() == Rung::Move {
        return Some((svm, turn));
    }
    println!("skipped: the walks are those of the first rung");
    None
}

/// Blocks that the CPU has filled.
fn filled(svm: &Svm, blocks: usize) -> SvmSlice<u64> {
    let mut slice = svm.alloc_slice::<u64>(blocks * BLOCK).unwrap();
    slice.fill(1);
    slice
}

/// A block of memory of the program's own, which the CPU has filled.
fn filled_map() -> *mut u64 {
    let (access, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: no address is asked for. Twice as much as a block, so that there is an aligned one in it.
    let map = unsafe { libc::mmap(std::ptr::null_mut(), 16 * BLOCK, access, flags, -1, 0) };
    assert_ne!(map, libc::MAP_FAILED);
    let map: *mut u64 = map.cast();
    let block = map.wrapping_add(map.align_offset(8 * BLOCK));
    for i in 0..BLOCK {
        // SAFETY: in the mapping, and nobody else knows of it.
        unsafe { block.wrapping_add(i).write(1) };
    }
    block
}

/// A device stores one word.
fn store(svm: &Svm, at: SvmPtr<u64>) {
    // SAFETY: nobody else touches the memory meanwhile, and it outlives the launch.
    let launch = unsafe {
        svm.launch_resident(0, Grid::new(1), Resident::new(), move |lane| {
            lane.store(at, 2u64)
        })
    };
    launch.unwrap().wait().unwrap();
}

/// Waits for what comes soon.
fn until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < deadline, "it takes too long");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Compares what was walked with the page.
#[track_caller]
fn compare(heading: &str, trace: &Trace) {
    println!("### {heading}\n\n{trace}");
    assert_eq!(
        trace.lines(),
        page::walk(heading),
        "ARCHITECTURE.md, \"{heading}\", differs from what was walked:\n{trace}"
    );
}

#[test]
fn a_device_fault() {
    let Some((svm, _turn)) = engine(2) else {
        return;
    };
    let slice = filled(&svm, 1);
    let ((), steps) = walk::record(|| store(&svm, slice.device_ptr()));
    let roots = [
        ("softgpu/src/port.rs", "miss"),
        ("driver/worker.rs", "answer"),
    ];
    compare("A device fault", &Trace::of(&steps, &roots));
}

#[test]
fn a_cpu_fault() {
    let Some((svm, _turn)) = engine(2) else {
        return;
    };
    let slice = filled(&svm, 1);
    store(&svm, slice.device_ptr());
    let (word, steps) = walk::record(|| {
        let word = slice[0];
        // The thread goes on before the last page is given back.
        until(|| svm.stats().vram_used_bytes == 0);
        word
    });
    assert_eq!(word, 2);
    let roots = [("mm-linux/src/handler.rs", "take")];
    compare("A CPU fault", &Trace::of(&steps, &roots));
}

#[test]
fn eviction() {
    let Some((svm, _turn)) = engine(1) else {
        return;
    };
    let slice = filled(&svm, 2);
    store(&svm, slice.device_ptr());
    let ((), steps) = walk::record(|| store(&svm, slice.device_ptr().add(BLOCK)));
    assert_eq!(svm.stats().evictions, 1);
    compare(
        "Eviction",
        &Trace::of(&steps, &[("driver/evict.rs", "allocate")]),
    );
}

#[test]
fn unmap() {
    let Some((svm, _turn)) = engine(2) else {
        return;
    };
    let memory = filled_map();
    let adopted = svm.adopt(memory, ByteSize::from_usize(8 * BLOCK)).unwrap();
    store(&svm, SvmPtr::from(memory));
    let ((), steps) = walk::record(|| {
        let half = 4 * BLOCK;
        // SAFETY: nobody uses the second half any more.
        let done = unsafe { libc::munmap(memory.wrapping_add(BLOCK / 2).cast(), half) };
        assert_eq!(done, 0);
        until(|| svm.stats().ranges_live == 0 && svm.stats().vram_used_bytes == 0);
    });
    drop(adopted);
    let roots = [
        ("mm-linux/src/events.rs", "arrive"),
        ("events/thread.rs", "handle"),
        ("svm/src/garbage.rs", "collect_garbage"),
    ];
    compare("Unmap, remove, remap", &Trace::of(&steps, &roots));
}
