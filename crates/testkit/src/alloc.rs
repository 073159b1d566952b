//! Which thread allocates, and frees: the system's allocator, counting.
//!
//! ```
//! use gpusvm_testkit::CountingAllocator;
//!
//! #[global_allocator]
//! static ALLOCATOR: CountingAllocator = CountingAllocator::new();
//!
//! let mark = ALLOCATOR.mark(&[ALLOCATOR.this_thread()]);
//! let sum: u32 = (0..10).sum();
//! assert_eq!(mark.allocations(&ALLOCATOR), 0, "{sum} on the stack");
//! let boxed = Box::new(1);
//! assert_eq!(mark.allocations(&ALLOCATOR), *boxed);
//! drop(boxed);
//! assert_eq!(mark.frees(&ALLOCATOR), 1);
//! ```
//!
//! # Locking
//!
//! None: a fixed table of counters by thread id, since an allocator cannot allocate to count.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::Cell;
use core::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::alloc::System;

/// How many threads are told apart. Those beyond share the last counter.
const THREADS: usize = 1024;

/// The system's allocator, counting by thread.
#[derive(Debug)]
pub struct CountingAllocator {
    threads: [Counter; THREADS],
}

/// What one thread allocated and freed.
#[derive(Debug)]
struct Counter {
    /// Zero where free.
    tid: AtomicI32,
    allocations: AtomicU64,
    frees: AtomicU64,
}

/// How many there were.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    allocations: u64,
    frees: u64,
}

/// What some threads had allocated and freed at a moment.
#[derive(Clone, Debug)]
pub struct Mark {
    threads: Vec<(i32, Counts)>,
}

thread_local! {
    /// The place of this thread in the table, or `THREADS` as long as it has none.
    static PLACE: Cell<usize> = const { Cell::new(THREADS) };
}

impl CountingAllocator {
    /// Nothing counted yet.
    pub const fn new() -> Self {
        let threads = [const {
            Counter {
                tid: AtomicI32::new(0),
                allocations: AtomicU64::new(0),
                frees: AtomicU64::new(0),
            }
        }; THREADS];
        Self { threads }
    }

    /// The id of the calling thread, as the table has it.
    pub fn this_thread(&self) -> i32 {
        // SAFETY: it has no preconditions.
        unsafe { libc::gettid() }
    }

    /// What these threads have allocated and freed so far.
    pub fn mark(&self, threads: &[i32]) -> Mark {
        let threads = threads.iter().map(|tid| (*tid, self.count_of(*tid)));
        Mark {
            threads: threads.collect(),
        }
    }

    /// How many allocations of all threads are not freed.
    pub fn live(&self) -> u64 {
        let sum = |of: fn(&Counter) -> &AtomicU64| -> u64 {
            let counts = self.threads.iter().map(of);
            counts.map(|count| count.load(Ordering::Acquire)).sum()
        };
        let frees = sum(|counter| &counter.frees);
        sum(|counter| &counter.allocations).saturating_sub(frees)
    }

    fn count_of(&self, tid: i32) -> Counts {
        let mut counters = self.threads.iter();
        let counter = counters.find(|counter| counter.tid.load(Ordering::Acquire) == tid);
        counter.map_or(Counts::default(), |counter| Counts {
            allocations: counter.allocations.load(Ordering::Acquire),
            frees: counter.frees.load(Ordering::Acquire),
        })
    }

    fn count(&self, what: fn(&Counter) -> &AtomicU64) {
        // A thread that is about to end has lost its place: what it does then is counted nowhere.
        let place = PLACE.try_with(|place| {
            if place.get() == THREADS {
                place.set(self.place_for(self.this_thread()));
            }
            place.get()
        });
        if let Ok(place) = place {
            what(&self.threads[place]).fetch_add(1, Ordering::AcqRel);
        }
    }

    fn place_for(&self, tid: i32) -> usize {
        let taken = self.threads.iter().position(|counter| {
            let mine = counter
                .tid
                .compare_exchange(0, tid, Ordering::AcqRel, Ordering::Acquire);
            mine.is_ok() || mine == Err(tid)
        });
        taken.unwrap_or(THREADS - 1)
    }
}

impl Default for CountingAllocator {
    fn default() -> Self {
        Self::new()
    }
}

impl Mark {
    /// How many allocations the threads have made since.
    pub fn allocations(&self, allocator: &CountingAllocator) -> u64 {
        let since = |(tid, before): &(i32, Counts)| {
            allocator.count_of(*tid).allocations - before.allocations
        };
        self.threads.iter().map(since).sum()
    }

    /// How often the threads have freed since.
    pub fn frees(&self, allocator: &CountingAllocator) -> u64 {
        let since = |(tid, before): &(i32, Counts)| allocator.count_of(*tid).frees - before.frees;
        self.threads.iter().map(since).sum()
    }
}

// SAFETY: everything is the system's allocator, unchanged.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count(|counter| &counter.allocations);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        self.count(|counter| &counter.frees);
        // SAFETY: the caller's.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.count(|counter| &counter.allocations);
        // SAFETY: the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.count(|counter| &counter.frees);
        self.count(|counter| &counter.allocations);
        // SAFETY: the caller's.
        unsafe { System.realloc(ptr, layout, size) }
    }
}
