//! The hook: asked first, on any thread, for any instruction.
#![cfg(target_arch = "x86_64")]

use gpusvm_guarded::{self as guarded, FaultInfo, HookVerdict};
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const PAGE: usize = 4096;
const PAGES: usize = 64;

static BASE: AtomicUsize = AtomicUsize::new(0);
static WRITES: AtomicU64 = AtomicU64::new(0);
static READS: AtomicU64 = AtomicU64::new(0);
static IN_ACCESSOR: AtomicU64 = AtomicU64::new(0);

/// Opens pages of the map, one at a time; the first half of them only to readers at first.
fn open(fault: &FaultInfo) -> HookVerdict {
    let base = BASE.load(Ordering::Relaxed);
    let index = fault.addr.wrapping_sub(base) / PAGE;
    if index >= PAGES {
        return HookVerdict::NotMine;
    }
    // A hook may use accessors itself: a nested fault.
    // SAFETY: refused.
    assert!(unsafe { guarded::load32(ptr::null()) }.is_err());
    let counter = if fault.write { &WRITES } else { &READS };
    counter.fetch_add(1, Ordering::Relaxed);
    IN_ACCESSOR.fetch_add(u64::from(fault.in_accessor), Ordering::Relaxed);
    let write = if fault.write { libc::PROT_WRITE } else { 0 };
    let page = ptr::with_exposed_provenance_mut(base + index * PAGE);
    // SAFETY: a page of the map.
    let result = unsafe { libc::mprotect(page, PAGE, libc::PROT_READ | write) };
    assert_eq!(result, 0);
    HookVerdict::Retry
}

/// One test, because there is one hook.
#[test]
fn hook_opens_pages_and_the_access_is_run_again() {
    guarded::install().unwrap();
    guarded::install().unwrap();
    assert!(guarded::is_installed());
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses the place.
    let map = unsafe { libc::mmap(ptr::null_mut(), PAGES * PAGE, libc::PROT_NONE, flags, -1, 0) };
    let base = map.cast::<u8>();
    BASE.store(base.expose_provenance(), Ordering::Relaxed);
    guarded::set_fault_hook(open);

    // Plain instructions of the program.
    // SAFETY: the hook opens the page.
    assert_eq!(unsafe { base.read_volatile() }, 0);
    // SAFETY: the hook opens the page.
    unsafe { base.write_volatile(3) };
    assert_eq!(
        (
            READS.load(Ordering::Relaxed),
            WRITES.load(Ordering::Relaxed)
        ),
        (1, 1)
    );
    assert_eq!(IN_ACCESSOR.load(Ordering::Relaxed), 0);

    // Accessors.
    let word = base.wrapping_add(PAGE).cast::<u64>();
    // SAFETY: the hook opens the page.
    assert_eq!(unsafe { guarded::fetch_add64(word, 2) }, Ok(0));
    // SAFETY: open now.
    assert_eq!(unsafe { guarded::load64(word) }, Ok(2));
    assert_eq!(IN_ACCESSOR.load(Ordering::Relaxed), 1);

    // A copy over many pages, from four threads.
    let start = base.wrapping_add(2 * PAGE).expose_provenance();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(move || {
                let source = vec![9u8; (PAGES - 2) * PAGE];
                let to = ptr::with_exposed_provenance_mut(start);
                // SAFETY: all copy the same; the hook opens the pages.
                unsafe { guarded::copy_streaming(to, source.as_ptr(), source.len()) }.unwrap();
            });
        }
    });
    // SAFETY: open now.
    let last = unsafe { base.wrapping_add(PAGES * PAGE - 1).read_volatile() };
    assert_eq!(last, 9);

    // What is not the hook's is reported as before.
    // SAFETY: refused.
    assert!(unsafe { guarded::load64(ptr::null()) }.is_err());
}
