//! Memory of our own: a heap on address space that was reserved when the library was loaded.
//!
//! ```text
//!   [ dlmalloc: segments that grow upwards | top ..........................  never touched ]
//!     0                                                                            RESERVED
//! ```
//!
//! The program's heap is not ours: it may be written over its end, be mirrored, or be locked by the thread
//! that a fault of it stops. And no page of this one comes to lie in a hole that the program left for itself.
//!
//! # Locking
//!
//! One word, spun on: whoever has it makes no system call but one that gives pages back. Held across fork,
//! so that a child finds the heap whole.
//!
//! # Invariants
//!
//! What is below `top` is dlmalloc's, and all of it lies in what was reserved.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use dlmalloc::Dlmalloc;

/// How much address space: what is not used takes up none of the machine's memory.
const RESERVED: usize = 16 << 30;
const PAGE: usize = 4096;
/// So much keeps its pages when it is given back: commands, one after the other, need about as much each. What is
/// above comes in huge pages, where the system has them.
const KEPT: usize = 64 << 20;
/// Failure, and nothing.
const NULL: *mut u8 = core::ptr::null_mut();

#[global_allocator]
static HEAP: Heap = Heap {
    is_locked: AtomicBool::new(false),
    heap: UnsafeCell::new(Dlmalloc::new_with_allocator(Reserved {
        start: AtomicPtr::new(NULL),
        top: AtomicUsize::new(0),
    })),
};

/// What the loader calls when the library has been loaded, before the program begins.
#[used]
#[unsafe(link_section = ".init_array")]
static ON_LOAD: extern "C" fn() = on_load;

extern "C" fn on_load() {
    HEAP.with(|heap| heap.allocator().reserve());
    crate::stacks::reserve();
    crate::interpose::threads::prepare();
    // SAFETY: functions of this library, which is never unloaded: it has been preloaded.
    unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(in_child)) };
}

unsafe extern "C" fn before_fork() {
    HEAP.lock();
}

unsafe extern "C" fn after_fork() {
    HEAP.unlock();
}

unsafe extern "C" fn in_child() {
    HEAP.unlock();
    crate::files::forget();
    crate::stacks::forget();
}

struct Heap {
    is_locked: AtomicBool,
    heap: UnsafeCell<Dlmalloc<Reserved>>,
}

// SAFETY: the heap is used by who has the lock.
unsafe impl Sync for Heap {}

impl Heap {
    fn lock(&self) {
        let taken = || self.is_locked.swap(true, Ordering::Acquire);
        while taken() {
            // SAFETY: asks for nothing.
            unsafe { libc::sched_yield() };
        }
    }

    fn unlock(&self) {
        self.is_locked.store(false, Ordering::Release);
    }

    fn with<R>(&self, run: impl FnOnce(&mut Dlmalloc<Reserved>) -> R) -> R {
        self.lock();
        // SAFETY: we have the lock, and nothing in here panics or allocates.
        let result = run(unsafe { &mut *self.heap.get() });
        self.unlock();
        result
    }
}

// SAFETY: dlmalloc gives memory that fits the layout and is nobody else's; it is called by one thread at a
// time.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        self.with(|heap| unsafe { heap.malloc(layout.size(), layout.align()) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        self.with(|heap| unsafe { heap.calloc(layout.size(), layout.align()) })
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        self.with(|heap| unsafe { heap.free(at, layout.size(), layout.align()) });
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as the caller promises.
        self.with(|heap| unsafe { heap.realloc(at, layout.size(), layout.align(), size) })
    }
}

/// Where dlmalloc gets its segments: behind each other, from below.
struct Reserved {
    start: AtomicPtr<u8>,
    /// How much is given out.
    top: AtomicUsize,
}

impl Reserved {
    /// Where it begins. Reserved now if it is not yet; null when the system has no such space.
    fn reserve(&self) -> *mut u8 {
        let known = self.start.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let anywhere = core::ptr::null_mut();
        // SAFETY: no address is asked for, so that nothing that exists is replaced.
        let start = unsafe { crate::next::mmap(anywhere, RESERVED, access, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return NULL;
        }
        // SAFETY: advice on memory of our own. A dump of the program need not have it.
        unsafe { libc::madvise(start, RESERVED, libc::MADV_DONTDUMP) };
        let large = start.wrapping_byte_add(KEPT);
        // SAFETY: as above. A system that has none refuses.
        unsafe { libc::madvise(large, RESERVED - KEPT, libc::MADV_HUGEPAGE) };
        self.start.store(start.cast(), Ordering::Relaxed);
        start.cast()
    }

    /// Gives back what is above `new`, if `end` is the top, and there is much of it.
    fn lower(&self, at: *mut u8, end: usize, new: usize) -> bool {
        let offset = at.addr() - self.start.load(Ordering::Relaxed).addr();
        if self.top.load(Ordering::Relaxed) != offset + end || offset + end <= KEPT {
            return false;
        }
        let gone = at.wrapping_add(new).cast();
        // SAFETY: dlmalloc does not use it any more, and nobody else does.
        unsafe { libc::madvise(gone, end - new, libc::MADV_DONTNEED) };
        self.top.store(offset + new, Ordering::Relaxed);
        true
    }
}

// SAFETY: memory that is given out is nobody else's until it is given back; what is given out anew was never
// written, or dropped since. Used with the heap's lock held.
unsafe impl dlmalloc::Allocator for Reserved {
    fn alloc(&self, size: usize) -> (*mut u8, usize, u32) {
        let (start, top) = (self.reserve(), self.top.load(Ordering::Relaxed));
        let size = size.checked_next_multiple_of(PAGE);
        let end = size.and_then(|size| top.checked_add(size));
        match (start.is_null(), size, end) {
            (false, Some(size), Some(end)) if end <= RESERVED => {
                self.top.store(end, Ordering::Relaxed);
                (start.wrapping_add(top), size, 0)
            }
            _ => (NULL, 0, 0),
        }
    }

    fn remap(&self, _: *mut u8, _: usize, _: usize, _: bool) -> *mut u8 {
        NULL
    }

    fn free_part(&self, at: *mut u8, old: usize, new: usize) -> bool {
        self.lower(at, old, new)
    }

    fn free(&self, at: *mut u8, size: usize) -> bool {
        self.lower(at, size, 0)
    }

    fn can_release_part(&self, _: u32) -> bool {
        true
    }

    fn allocates_zeros(&self) -> bool {
        true
    }

    fn page_size(&self) -> usize {
        PAGE
    }
}
