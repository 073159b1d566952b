//! The buddy allocator: device memory in naturally aligned runs of a power of two of pages.
//!
//! ```text
//!   22 pages:   0               16      20  22
//!               [ order 4       | ord 2 | 1 )     what is free at the start
//!
//!   alloc(4):   takes order 2 at 16, whole
//!   alloc(2):   takes order 1 at 20, whole
//!   alloc(1):   splits order 4:   [0|1|2-3|4-7|8-15]    gives page 0, keeps the rest free
//!   free(0):    merges with 1, with 2-3, with 4-7, with 8-15: order 4 is whole again
//! ```
//!
//! The smallest free run that is large enough is used, and the lower half of a split is given out
//! first.
//!
//! # Invariants
//!
//! - A run of order `n` starts at a multiple of `2^n`.
//! - Two free runs that are buddies do not exist: freeing merges them at once.
//! - `free_pages + used_pages = total`.
//! - Nothing is allocated on the heap after construction: allocation and release run on the
//!   device fault path and under memory pressure.
//!
//! # Locking
//!
//! None inside: the owner holds a lock around it.
//!
//! # Differences from the kernel
//!
//! As `drm_buddy`, without its clear tracking, its ranges and its trees: a free list per order, and
//! one run per call. A caller that wants a count that is not a power of two, or more than the
//! largest run, asks several times.

use alloc::vec;
use alloc::vec::Vec;
use core::fmt;
use gpusvm_types::{DevicePfn, PageCount};

/// A naturally aligned, contiguous run of device pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockRun {
    /// The first page, a multiple of `count`.
    pub first: DevicePfn,
    /// How many pages, a power of two.
    pub count: PageCount,
}

/// Why device pages could not be allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuddyError {
    /// The count is zero or not a power of two.
    #[error("{} pages are not a power of two", count.get())]
    NotAPowerOfTwo {
        /// The count that was asked for.
        count: PageCount,
    },
    /// No run of this length fits the device, even when all of it is free.
    #[error("{} pages in one run: the largest is {}", count.get(), largest.get())]
    TooLarge {
        /// The count that was asked for.
        count: PageCount,
        /// The longest run that there can be.
        largest: PageCount,
    },
    /// No free run is long enough now.
    #[error("no free run of {} pages, {} are free", wanted.get(), free.get())]
    NoSpace {
        /// The count that was asked for.
        wanted: PageCount,
        /// How many pages are free, in shorter runs.
        free: PageCount,
    },
}

/// One order more than the largest run: 2^31 pages, 8 TiB.
const ORDERS: usize = 32;
/// The end of a free list.
const NONE: u32 = u32::MAX;

/// What the allocator knows of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Head {
    /// Not the first page of a run.
    Inside,
    /// The first page of a free run of this order.
    Free(u8),
    /// The first page of a run of this order that is in use.
    Used(u8),
}

/// The neighbours of a free run in the list of its order.
#[derive(Clone, Copy)]
struct Link {
    prev: u32,
    next: u32,
}

/// The buddy allocator of one device's memory.
pub struct Buddy {
    heads: Vec<Head>,
    // Only the links of pages that head a free run mean anything.
    links: Vec<Link>,
    lists: [u32; ORDERS],
    total: u32,
    free: u32,
}

impl Buddy {
    /// All of `total` pages, free.
    ///
    /// # Panics
    ///
    /// When `total` is 2^32 pages or more: 16 TiB, past what a [`DevicePfn`] can name.
    pub fn new(total: PageCount) -> Self {
        let pages = u32::try_from(total.get()).expect("less than 16 TiB of device memory");
        let mut buddy = Self {
            heads: vec![Head::Inside; total.as_usize()],
            links: vec![
                Link {
                    prev: NONE,
                    next: NONE
                };
                total.as_usize()
            ],
            lists: [NONE; ORDERS],
            total: pages,
            free: pages,
        };
        let mut at = 0;
        while at < pages {
            let order = at.trailing_zeros().min((pages - at).ilog2());
            buddy.push(at, order);
            at += 1 << order;
        }
        buddy
    }

    /// Takes a naturally aligned run of `count` pages, a power of two.
    ///
    /// # Errors
    ///
    /// `NotAPowerOfTwo`; `TooLarge` when no run of the device could ever hold it; `NoSpace` when
    /// none does now: free or evict something, or ask for less.
    pub fn alloc(&mut self, count: PageCount) -> Result<BlockRun, BuddyError> {
        if !count.get().is_power_of_two() {
            return Err(BuddyError::NotAPowerOfTwo { count });
        }
        let largest = self.largest_possible();
        if count > largest {
            return Err(BuddyError::TooLarge { count, largest });
        }
        let order = count.get().trailing_zeros();
        let Some(found) = (order..32).find(|&order| self.list(order) != NONE) else {
            return Err(BuddyError::NoSpace {
                wanted: count,
                free: self.free_pages(),
            });
        };
        let at = self.list(found);
        self.unlink(at, found);
        for half in (order..found).rev() {
            self.push(at + (1 << half), half);
        }
        self.heads[at as usize] = Head::Used(narrow(order));
        self.free -= 1 << order;
        Ok(BlockRun {
            first: DevicePfn::new(at),
            count,
        })
    }

    /// Gives a run back and merges it with its free buddies.
    ///
    /// # Panics
    ///
    /// When the run is not one that `alloc` returned and that is still in use: freed twice, or in
    /// another length. That is a mistake of the caller, and going on would corrupt memory.
    pub fn free(&mut self, run: BlockRun) {
        let mut at = run.first.get();
        let mut order = self.order_in_use(run);
        self.free += 1 << order;
        self.heads[at as usize] = Head::Inside;
        while let Some(buddy) = self.free_buddy(at, order) {
            self.unlink(buddy, order);
            at = at.min(buddy);
            order += 1;
        }
        self.push(at, order);
    }

    /// How many pages are free.
    pub fn free_pages(&self) -> PageCount {
        PageCount::new(self.free.into())
    }

    /// How many pages are in use.
    pub fn used_pages(&self) -> PageCount {
        self.total() - self.free_pages()
    }

    /// How many pages there are.
    pub fn total(&self) -> PageCount {
        PageCount::new(self.total.into())
    }

    /// The length of the longest run that is free now. Zero when nothing is.
    pub fn largest_free(&self) -> PageCount {
        let order = (0..32).rev().find(|&order| self.list(order) != NONE);
        order.map_or(PageCount::ZERO, |order| PageCount::new(1 << order))
    }

    /// The length of the longest run when everything is free. Zero for a device without memory.
    pub fn largest_possible(&self) -> PageCount {
        self.total
            .checked_ilog2()
            .map_or(PageCount::ZERO, |order| PageCount::new(1 << order))
    }

    /// The order of a run that the caller says is in use; panics when it is not.
    fn order_in_use(&self, run: BlockRun) -> u32 {
        let head = self.heads.get(run.first.index()).copied();
        let order = match head {
            None => panic!("free of {run:?}, which is outside of device memory"),
            Some(Head::Free(_)) => panic!("free of {run:?}, which is free already"),
            Some(Head::Inside) => panic!("free of {run:?}, which is not the start of a run in use"),
            Some(Head::Used(order)) => u32::from(order),
        };
        let count = PageCount::new(1 << order);
        assert!(
            run.count == count,
            "free of {run:?}, which was allocated as {count:?}"
        );
        order
    }

    /// The buddy of the run at `at`, when it is free as a whole.
    fn free_buddy(&self, at: u32, order: u32) -> Option<u32> {
        let buddy = at ^ 1u32.checked_shl(order)?;
        let head = self.heads.get(buddy as usize)?;
        (*head == Head::Free(narrow(order))).then_some(buddy)
    }

    fn list(&self, order: u32) -> u32 {
        self.lists[order as usize]
    }

    /// Puts a free run at the front of the list of its order.
    fn push(&mut self, at: u32, order: u32) {
        let next = self.list(order);
        self.heads[at as usize] = Head::Free(narrow(order));
        self.links[at as usize] = Link { prev: NONE, next };
        if next != NONE {
            self.links[next as usize].prev = at;
        }
        self.lists[order as usize] = at;
    }

    /// Takes a free run out of the list of its order.
    fn unlink(&mut self, at: u32, order: u32) {
        let Link { prev, next } = self.links[at as usize];
        match prev {
            NONE => self.lists[order as usize] = next,
            prev => self.links[prev as usize].next = next,
        }
        if next != NONE {
            self.links[next as usize].prev = prev;
        }
        self.heads[at as usize] = Head::Inside;
    }
}

/// An order as it is kept for each page.
fn narrow(order: u32) -> u8 {
    u8::try_from(order).expect("orders are below 32")
}

impl fmt::Debug for Buddy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buddy")
            .field("total", &self.total)
            .field("free", &self.free)
            .field("largest_free", &self.largest_free())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
