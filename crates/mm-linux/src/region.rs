//! One mirrored mapping: a word for each page, a lock for each block.
//!
//! ```text
//!   blocks      |   block 0    |   block 1    |   block 2    |     2 MiB aligned
//!   region           [.........................)                   page aligned
//!   words            w w w w w w w w w w w w w w                   one per page
//! ```
//!
//! # Locking
//!
//! A block's lock is one word: locked, somebody sleeps for it, and a fault was seen meanwhile. Who
//! unlocks a block with a fault seen wakes all who wait for its pages; they fault again if they must.
//! So a handler never waits for a block.

use crate::sys::futex;
use crate::sys::map::{Mapping, Request};
use gpusvm_mm::PageWord;
use gpusvm_sync::atomic::{AtomicU32, AtomicU64, Ordering};
use gpusvm_types::{BLOCK_SHIFT, ByteSize, PageIndex, Span, VirtAddr};
use rustix::io::Errno;

/// One mirrored mapping, as it was when it was made. Parts may be gone: see the region table.
#[derive(Debug)]
pub(crate) struct Region {
    span: Span,
    // INVARIANT: zeroed at first, as long as the region has pages, and only ever used as words.
    words: Mapping,
    // INVARIANT: zeroed at first, as long as the region has blocks, and only ever used as states.
    blocks: Mapping,
}

/// The state of one block.
#[derive(Debug, Default)]
#[repr(C)]
pub(crate) struct BlockState {
    lock: AtomicU32,
    /// How many ranges are in it. Changed with the block locked.
    pub(crate) armed: AtomicU32,
    reserved: [AtomicU32; 2],
    /// The span of a MADV_DONTNEED of our own that is under way: its event is not the program's.
    own_remove: [AtomicU64; 2],
}

const LOCKED: u32 = 1;
const SLEEPERS: u32 = 2;
const FAULT_SEEN: u32 = 4;

impl Region {
    /// For a span, every page in RAM, no block armed.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(span: Span) -> Result<Self, Errno> {
        let words = ByteSize::from_usize(span.page_count().as_usize() * size_of::<PageWord>());
        let blocks = span.blocks().count() * size_of::<BlockState>();
        let map = |size| Request::new(size).never_huge().dont_fork().map();
        Ok(Self {
            span,
            words: map(words)?,
            blocks: map(ByteSize::from_usize(blocks))?,
        })
    }

    /// What it covers.
    pub(crate) fn span(&self) -> Span {
        self.span
    }

    /// The words of all pages.
    pub(crate) fn words(&self) -> &[PageWord] {
        let first = self.words.as_ptr().cast::<PageWord>();
        // SAFETY: by the invariant; all-zero bytes are a word, and words are atomic.
        unsafe { core::slice::from_raw_parts(first, self.span.page_count().as_usize()) }
    }

    /// The word of a page inside.
    pub(crate) fn word(&self, page: PageIndex) -> &PageWord {
        &self.words()[self.span.index_of(page)]
    }

    /// The state of the block that holds `at`.
    pub(crate) fn block(&self, at: VirtAddr) -> &BlockState {
        assert!(self.span.contains(at), "{at} is not in {}", self.span);
        let first = self.span.start().get() >> BLOCK_SHIFT;
        let index = ByteSize::new((at.get() >> BLOCK_SHIFT) - first).as_usize();
        &self.blocks()[index]
    }

    fn blocks(&self) -> &[BlockState] {
        let first = self.blocks.as_ptr().cast::<BlockState>();
        let count = self.blocks.span().len().as_usize() / size_of::<BlockState>();
        // SAFETY: by the invariant; all-zero bytes are a state, and states are atomics.
        unsafe { core::slice::from_raw_parts(first, count) }
    }
}

impl BlockState {
    /// Locks the block if it is free.
    pub(crate) fn try_lock(&self) -> bool {
        let locked = self
            .lock
            .compare_exchange(0, LOCKED, Ordering::Acquire, Ordering::Relaxed);
        locked.is_ok()
    }

    /// Waits for the block and locks it.
    pub(crate) fn lock(&self) {
        let mut to = LOCKED;
        loop {
            let now = self.lock.load(Ordering::Relaxed);
            if now & LOCKED == 0 {
                let locked = now | to;
                let taken =
                    self.lock
                        .compare_exchange(now, locked, Ordering::Acquire, Ordering::Relaxed);
                if taken.is_ok() {
                    return;
                }
                continue;
            }
            let marked = now | SLEEPERS;
            let mark =
                self.lock
                    .compare_exchange(now, marked, Ordering::Relaxed, Ordering::Relaxed);
            if mark.is_ok() {
                futex::wait(&self.lock, marked, None);
                // Others may sleep as well: whoever was woken keeps the mark.
                to = LOCKED | SLEEPERS;
            }
        }
    }

    /// Leaves word that a fault was seen, for who holds the lock. `false` if nobody does.
    pub(crate) fn note_fault(&self) -> bool {
        let note = |now| (now & LOCKED != 0).then_some(now | FAULT_SEEN);
        self.lock
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, note)
            .is_ok()
    }

    /// The event of a removal of `span` is on its way, and it is our own. With the block locked.
    pub(crate) fn expect_remove(&self, span: Span) {
        self.own_remove[1].store(span.end().get(), Ordering::Relaxed);
        self.own_remove[0].store(span.start().get(), Ordering::Release);
    }

    /// Whether an event is the expected one, which is then no longer expected. Should the program
    /// remove the same span at the same time, the two events are as good as each other.
    pub(crate) fn is_own_remove(&self, span: Span) -> bool {
        let (start, end) = (span.start().get(), span.end().get());
        self.own_remove[1].load(Ordering::Relaxed) == end
            && self.own_remove[0]
                .compare_exchange(start, 0, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
    }

    /// Unlocks the block. Whether a fault was seen meanwhile.
    pub(crate) fn unlock(&self) -> bool {
        let before = self.lock.swap(0, Ordering::AcqRel);
        debug_assert!(before & LOCKED != 0, "unlocked a block that was not locked");
        if before & SLEEPERS != 0 {
            futex::wake(&self.lock, 1);
        }
        before & FAULT_SEEN != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_excludes_and_wakes() {
        let (block, inside, sum) = (BlockState::default(), AtomicU32::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..20_000 {
                        block.lock();
                        assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                        sum.fetch_add(1, Ordering::Relaxed);
                        inside.fetch_sub(1, Ordering::Relaxed);
                        block.unlock();
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 80_000);
    }

    #[test]
    fn a_fault_seen_is_told_to_who_unlocks() {
        let block = BlockState::default();
        assert!(!block.note_fault(), "nobody to tell");
        assert!(block.try_lock());
        assert!(!block.try_lock());
        assert!(block.note_fault());
        assert!(block.unlock());
        assert!(block.try_lock());
        assert!(!block.unlock());
    }

    #[test]
    fn an_own_removal_is_recognised_once() {
        let block = BlockState::default();
        let span = Span::page_of(VirtAddr::new(0x7000));
        assert!(!block.is_own_remove(span));
        block.expect_remove(span);
        assert!(!block.is_own_remove(Span::page_of(VirtAddr::new(0x8000))));
        assert!(block.is_own_remove(span));
        assert!(!block.is_own_remove(span));
    }

    #[test]
    fn an_unaligned_region_has_a_state_for_each_block_it_touches() {
        let span = Span::new(VirtAddr::new(0x3ff000), VirtAddr::new(0x801000)).unwrap();
        let region = Region::new(span).unwrap();
        assert_eq!(region.words().len(), 1 + 512 + 512 + 1);
        let states = [0x3ff000, 0x400000, 0x600000, 0x800000]
            .map(|at| core::ptr::from_ref(region.block(VirtAddr::new(at))));
        for pair in states.windows(2) {
            assert_ne!(pair[0], pair[1]);
        }
    }
}
