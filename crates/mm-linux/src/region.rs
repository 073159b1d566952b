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

use crate::as_one::AsOne;
use crate::sys::futex::{self, Woken};
use crate::sys::map::{Mapping, Request};
use crate::sys::room::Room;
use core::time::Duration;
use gpusvm_mm::{ArmToken, PageWord};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use gpusvm_types::{BLOCK_SHIFT, ByteSize, PageIndex, Span, VirtAddr};
use rustix::io::Errno;

/// What a page is that nobody has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behind {
    /// Zeroes.
    Zeroes,
    /// The page of a file, which a private mapping shows until the page is written.
    File,
}

/// One mirrored mapping, as it was when it was made. Parts may be gone: see the region table.
#[derive(Debug)]
pub(crate) struct Region {
    span: Span,
    behind: Behind,
    /// Tells it from others that were at its address before.
    token: ArmToken,
    /// Whether its blocks are registered together.
    pub(crate) as_one: AsOne,
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
    /// Whether touches of missing pages are caught: at least as long as it is armed, or a page is on
    /// a device. Changed with the block locked; set without, where blocks are registered together
    /// (`crate::as_one`).
    pub(crate) registered: AtomicBool,
    /// Whether somebody wants to hear of the end of the mapping, armed or not. Changed with the block
    /// locked.
    pub(crate) watched: AtomicBool,
    /// It left for a device as one huge page. Changed with the block locked.
    pub(crate) left_huge: AtomicBool,
    /// Pages of it are marked as collected, and devices that work on them in place are being stopped.
    pub(crate) clearing: Clearing,
    /// The thread that breaks the sharing of pages, or copies them in place, with the block locked: it
    /// cannot wait for them.
    breaker: AtomicI32,
    /// Whether it breaks sharing: by writes, of pages that are not being copied.
    breaks_sharing: AtomicBool,
}

/// The time between the mark of a page and the end of the accesses that devices began before.
///
/// A device in software can meet a hole in such an access, and whoever has the block locked waits for it
/// to end: so the hole is filled at once. Not a moment later, when pages are being taken: what is missing
/// then is not a hole.
#[derive(Debug, Default)]
pub(crate) struct Clearing {
    is_on: AtomicBool,
    filling: AtomicU32,
}

impl Clearing {
    /// Begins. With the block locked, before pages are marked.
    pub(crate) fn begin(&self) {
        self.is_on.store(true, Ordering::SeqCst);
    }

    /// Ends: no hole is being filled when this returns.
    pub(crate) fn end(&self) {
        self.is_on.store(false, Ordering::SeqCst);
        while self.filling.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }

    /// Runs `fill` if it is that time. Whether it was.
    pub(crate) fn fill(&self, fill: impl FnOnce()) -> bool {
        self.filling.fetch_add(1, Ordering::SeqCst);
        let is_on = self.is_on.load(Ordering::SeqCst);
        if is_on {
            fill();
        }
        self.filling.fetch_sub(1, Ordering::SeqCst);
        is_on
    }
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
    pub(crate) fn new(span: Span, behind: Behind, room: &Arc<Room>) -> Result<Self, Errno> {
        let words = ByteSize::from_usize(span.page_count().as_usize() * size_of::<PageWord>());
        let blocks = span.blocks().count() * size_of::<BlockState>();
        let request = |size| Request::new(size).never_huge().dont_fork().locked();
        let map = |size| request(size).map_in(room);
        Ok(Self {
            span,
            behind,
            token: next_token(),
            as_one: AsOne::default(),
            words: map(words)?,
            blocks: map(ByteSize::from_usize(blocks))?,
        })
    }

    /// Tells it from others that were at its address before.
    pub(crate) fn token(&self) -> ArmToken {
        self.token
    }

    /// What a page is that nobody has written.
    pub(crate) fn behind(&self) -> Behind {
        self.behind
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

    /// The words of the pages of a span inside.
    pub(crate) fn words_in(&self, span: Span) -> &[PageWord] {
        let first = self.span.index_of(span.first_page());
        &self.words()[first..first + span.page_count().as_usize()]
    }

    /// The word of a page, if it is inside.
    pub(crate) fn find_word(&self, page: PageIndex) -> Option<&PageWord> {
        let is_inside = self.span.contains(page.start());
        is_inside.then(|| self.word(page))
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

    /// Whether the end of what is in `piece` of a block is to be read yet: messages tell of it, and none
    /// has.
    pub(crate) fn will_end(&self, piece: Span) -> bool {
        let state = self.block(piece.start());
        let is_told = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        (is_told(&state.registered) || is_told(&state.watched))
            && self.words_in(piece).iter().any(|word| !word.get().unmapped)
    }

    fn blocks(&self) -> &[BlockState] {
        let first = self.blocks.as_ptr().cast::<BlockState>();
        let count = self.blocks.span().len().as_usize() / size_of::<BlockState>();
        // SAFETY: by the invariant; all-zero bytes are a state, and states are atomics.
        unsafe { core::slice::from_raw_parts(first, count) }
    }
}

fn next_token() -> ArmToken {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    ArmToken(NEXT.fetch_add(1, Ordering::Relaxed))
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
        let locked = self.lock_within(None);
        debug_assert!(locked, "only a time limit ends the wait");
    }

    /// As `lock`, but gives up once it has slept for `limit` without a wake-up. Whether it is locked.
    pub(crate) fn lock_within(&self, limit: Option<Duration>) -> bool {
        let mut to = LOCKED;
        loop {
            let now = self.lock.load(Ordering::Relaxed);
            if now & LOCKED == 0 {
                let locked = now | to;
                let taken =
                    self.lock
                        .compare_exchange(now, locked, Ordering::Acquire, Ordering::Relaxed);
                if taken.is_ok() {
                    return true;
                }
                continue;
            }
            let marked = now | SLEEPERS;
            let mark =
                self.lock
                    .compare_exchange(now, marked, Ordering::Relaxed, Ordering::Relaxed);
            if mark.is_ok() {
                if futex::wait(&self.lock, marked, limit) == Woken::TimedOut {
                    return false;
                }
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

    /// Breaks the sharing of pages by `act`, which touches them on this thread. Pages that are
    /// dropped meanwhile are filled at once, because nobody else will.
    pub(crate) fn breaking_sharing<T>(&self, act: impl FnOnce() -> T) -> T {
        self.breaker.store(futex::gettid(), Ordering::Release);
        self.breaks_sharing.store(true, Ordering::Release);
        let result = act();
        self.breaks_sharing.store(false, Ordering::Release);
        self.breaker.store(0, Ordering::Release);
        result
    }

    /// This thread copies pages of the block where they are, from now on, or no more. What of them is
    /// missing all of a sudden is filled at once, because the block is its own.
    pub(crate) fn copies_in_place(&self, copies: bool) {
        let tid = if copies { futex::gettid() } else { 0 };
        self.breaker.store(tid, Ordering::Release);
    }

    /// Whether it is this thread that breaks the sharing of pages, or copies them in place.
    pub(crate) fn is_breaker(&self, tid: i32) -> bool {
        tid != 0 && self.breaker.load(Ordering::Acquire) == tid
    }

    /// Whether it is this thread that breaks the sharing of pages.
    pub(crate) fn breaks_sharing(&self, tid: i32) -> bool {
        self.is_breaker(tid) && self.breaks_sharing.load(Ordering::Acquire)
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
    fn an_unaligned_region_has_a_state_for_each_block_it_touches() {
        let span = Span::new(VirtAddr::new(0x3ff000), VirtAddr::new(0x801000)).unwrap();
        let region = Region::new(span, Behind::Zeroes, &Room::reserve().unwrap()).unwrap();
        assert_eq!(region.words().len(), 1 + 512 + 512 + 1);
        let states = [0x3ff000, 0x400000, 0x600000, 0x800000]
            .map(|at| core::ptr::from_ref(region.block(VirtAddr::new(at))));
        for pair in states.windows(2) {
            assert_ne!(pair[0], pair[1]);
        }
    }
}
