//! Device memory: what of it is free.
//!
//! # Locking
//!
//! The lock is held for one operation and taken also by CPU faults, whose last page frees an
//! allocation. It is not held across a call out.

use core::time::Duration;
use gpusvm_device::{BlockRun, Buddy, Fence};
use gpusvm_sync::{Condvar, Mutex, OneShot};
use gpusvm_types::PageCount;

/// The memory of one device.
#[derive(Debug)]
pub(crate) struct Vram {
    free: Mutex<Free>,
    freed: Condvar,
    /// No run longer than a page is found for the next allocation of more.
    pub(crate) no_run: OneShot,
}

/// What is free.
#[derive(Debug)]
struct Free {
    buddy: Buddy,
    /// What is free was given to the engine to be cleared, all of it before this. One fence for all:
    /// engines complete in order, so waiting for the latest is waiting long enough.
    idle_after: Option<Fence>,
    /// What could not be cleared is never used again.
    lost: PageCount,
}

/// Device pages that somebody got.
#[derive(Debug)]
pub(crate) struct Allocated {
    /// One run if there was one, else as few as there were.
    pub(crate) runs: Box<[BlockRun]>,
    /// They are not idle before that.
    pub(crate) idle_after: Option<Fence>,
}

impl Vram {
    pub(crate) fn new(pages: PageCount) -> Self {
        Self {
            free: Mutex::new(Free {
                buddy: Buddy::new(pages),
                idle_after: None,
                lost: PageCount::ZERO,
            }),
            freed: Condvar::new(),
            no_run: OneShot::default(),
        }
    }

    pub(crate) fn used(&self) -> PageCount {
        self.free.lock().buddy.used_pages()
    }

    pub(crate) fn total(&self) -> PageCount {
        self.free.lock().buddy.total()
    }

    /// How much of what is used was lost.
    pub(crate) fn lost(&self) -> PageCount {
        self.free.lock().lost
    }

    /// Device pages for `count` pages. `None` when not so many are free.
    pub(crate) fn allocate(&self, count: PageCount) -> Option<Allocated> {
        let mut free = self.free.lock();
        let idle_after = free.idle_after;
        if free.buddy.free_pages() < count {
            return None;
        }
        let runs = match count > PageCount::ONE && self.no_run.fires() {
            true => take_pages(&mut free.buddy, count)?,
            false => take(&mut free.buddy, count, count)?,
        };
        let runs = runs.into_boxed_slice();
        Some(Allocated { runs, idle_after })
    }

    /// Gives device pages back, which are idle after `cleared`. Allocates nothing.
    pub(crate) fn free(&self, runs: &[BlockRun], cleared: Option<Fence>) {
        let mut free = self.free.lock();
        free.idle_after = free.idle_after.max(cleared);
        runs.iter().for_each(|run| free.buddy.free(*run));
        drop(free);
        self.freed.notify_all();
    }

    /// What could not be cleared is not given back.
    pub(crate) fn lose(&self, runs: &[BlockRun]) {
        let mut free = self.free.lock();
        runs.iter().for_each(|run| free.lost += run.count);
    }

    /// What is free is not idle before that.
    pub(crate) fn idle_after(&self) -> Option<Fence> {
        self.free.lock().idle_after
    }

    /// Everything up to `fence` is cleared.
    pub(crate) fn is_idle(&self, fence: Fence) {
        let mut free = self.free.lock();
        free.idle_after = free.idle_after.filter(|latest| *latest > fence);
    }

    /// Waits for something to be freed, up to `timeout`.
    pub(crate) fn wait_freed(&self, timeout: Duration) {
        gpusvm_sync::walk!("wait_freed");
        let free = self.free.lock();
        drop(self.freed.wait_timeout(free, timeout));
    }
}

/// Page by page, no two of them neighbours in their order.
fn take_pages(buddy: &mut Buddy, count: PageCount) -> Option<Vec<BlockRun>> {
    let mut runs = take(buddy, count, PageCount::ONE)?;
    runs.sort_unstable_by_key(|run| core::cmp::Reverse(run.first));
    Some(runs)
}

/// One run if there is one, else as few as there are, none longer than `longest`.
fn take(buddy: &mut Buddy, count: PageCount, longest: PageCount) -> Option<Vec<BlockRun>> {
    let mut runs = Vec::new();
    let mut left = count.get();
    while left > 0 {
        let largest = buddy.largest_free().min(longest).get();
        let piece = PageCount::new((1 << left.ilog2()).min(largest));
        match buddy.alloc(piece) {
            Ok(run) => {
                left -= run.count.get();
                runs.push(run);
            }
            Err(_) => {
                runs.into_iter().for_each(|run| buddy.free(run));
                return None;
            }
        }
    }
    Some(runs)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As many pages, each alone; the next allocation is one run again, and all of it can be given back.
    #[test]
    fn an_allocation_that_finds_no_run_is_made_of_pages() {
        let vram = Vram::new(PageCount::new(64));
        let lengths = |allocated: &Allocated| -> Vec<u64> {
            allocated.runs.iter().map(|run| run.count.get()).collect()
        };
        vram.no_run.arm();
        let page = vram.allocate(PageCount::ONE).unwrap();
        assert!(vram.no_run.is_armed(), "a page is no run");
        let pages = vram.allocate(PageCount::new(16)).unwrap();
        assert_eq!(lengths(&pages), [1; 16]);
        let follows = |pair: &[BlockRun]| pair[0].first.offset(PageCount::ONE) == pair[1].first;
        assert!(!pages.runs.windows(2).any(follows));
        assert!(!vram.no_run.is_armed());
        let run = vram.allocate(PageCount::new(16)).unwrap();
        assert_eq!(lengths(&run), [16]);
        vram.no_run.arm();
        assert!(vram.allocate(PageCount::new(64)).is_none());
        assert!(vram.no_run.is_armed(), "there was no room at all");
        for allocated in [page, pages, run] {
            vram.free(&allocated.runs, None);
        }
        assert_eq!(vram.used(), PageCount::ZERO);
    }
}
