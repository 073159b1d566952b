//! What every cell of the storm's memory is to hold, and whose it is, in memory that nobody shares.
//!
//! ```text
//!   page id     0      1      2    ...      where it is (0: nowhere)
//!   cells      [0 1]  [2 3]  [4 5]          half a page each: whose, which version, which contents
//! ```
//!
//! Whoever writes a cell owns it; whoever reads it owns it together with other readers, or nobody, and
//! then finds out afterwards whether what it read may be judged. So a wrong byte is wrong for sure.

use std::sync::atomic::{AtomicU64, Ordering, fence};

pub(crate) const PAGE: usize = 4096;
pub(crate) const CELLS_PER_PAGE: usize = 2;
pub(crate) const WORDS: usize = PAGE / CELLS_PER_PAGE / 8;

/// The words of a cell.
pub(crate) type Words = [u64; WORDS];

const OWNED: u64 = 1;
const READER: u64 = 2;
const READERS: u64 = 0xfffe;
const ZERO: u64 = 1 << 16;
const GONE: u64 = 1 << 17;
const GENERATION: u64 = 0x3f_ffff << 18;
const VERSION: u64 = 1 << 40;

/// What is known of all pages.
#[derive(Debug)]
pub(crate) struct Table {
    places: Vec<AtomicU64>,
    cells: Vec<AtomicU64>,
}

/// What a cell holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Held {
    state: u64,
}

/// What becomes of a cell that somebody owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// As it was.
    Same,
    /// The next generation.
    Written,
    /// Zeroes.
    Zeroed,
    /// Its page is no more.
    Gone,
}

impl Table {
    /// So many pages, all of them nowhere.
    pub(crate) fn new(pages: usize) -> Self {
        let cell = |_| AtomicU64::new(GONE | ZERO);
        Self {
            places: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            cells: (0..pages * CELLS_PER_PAGE).map(cell).collect(),
        }
    }

    pub(crate) fn cells(&self) -> usize {
        self.cells.len()
    }

    /// Where a page is, or 0.
    pub(crate) fn place(&self, page: usize) -> u64 {
        self.places[page].load(Ordering::Acquire)
    }

    /// Says where a page is from now on. For who owns both of its cells.
    pub(crate) fn set_place(&self, page: usize, at: u64) {
        self.places[page].store(at, Ordering::Release);
    }

    /// Where a cell is.
    pub(crate) fn address(&self, cell: usize) -> u64 {
        let offset = cell % CELLS_PER_PAGE * (PAGE / CELLS_PER_PAGE);
        self.place(cell / CELLS_PER_PAGE) + offset as u64
    }

    /// Takes a cell that nobody has; one that is there, or one that is gone.
    pub(crate) fn try_own(&self, cell: usize, gone: bool) -> Option<Held> {
        let take = |now: u64| {
            let is_free = now & (OWNED | READERS) == 0 && (now & GONE != 0) == gone;
            is_free.then_some(now | OWNED)
        };
        let before = self.cells[cell].fetch_update(Ordering::AcqRel, Ordering::Relaxed, take);
        before.ok().map(|state| Held { state })
    }

    /// Gives a cell back.
    pub(crate) fn give_back(&self, cell: usize, held: Held, outcome: Outcome) {
        let next = (held.state & GENERATION).wrapping_add(1 << 18) & GENERATION;
        let version = (held.state & !(VERSION - 1)).wrapping_add(VERSION);
        let contents = match outcome {
            Outcome::Same => held.state & (GENERATION | ZERO | GONE),
            Outcome::Written => next,
            Outcome::Zeroed => (held.state & GENERATION) | ZERO,
            Outcome::Gone => (held.state & GENERATION) | ZERO | GONE,
        };
        self.cells[cell].store(version | contents, Ordering::Release);
    }

    /// Reads a cell together with others, so that nobody writes it.
    pub(crate) fn try_share(&self, cell: usize) -> Option<Held> {
        let take = |now: u64| (now & (OWNED | GONE) == 0).then_some(now + READER);
        let before = self.cells[cell].fetch_update(Ordering::AcqRel, Ordering::Relaxed, take);
        before.ok().map(|state| Held { state })
    }

    pub(crate) fn unshare(&self, cell: usize) {
        self.cells[cell].fetch_sub(READER, Ordering::AcqRel);
    }

    /// What a cell holds, for who reads it without asking anybody.
    pub(crate) fn look(&self, cell: usize) -> Option<Held> {
        let state = self.cells[cell].load(Ordering::Acquire);
        (state & (OWNED | GONE) == 0).then_some(Held { state })
    }

    /// Whether nobody owned the cell since that look: then what was read may be judged.
    pub(crate) fn is_unchanged(&self, cell: usize, seen: Held) -> bool {
        fence(Ordering::Acquire);
        let state = self.cells[cell].load(Ordering::Acquire);
        state & !READERS == seen.state & !READERS
    }
}

impl Held {
    /// The first word of `found` that is not what the cell holds.
    pub(crate) fn wrong(self, cell: usize, found: &Words) -> Option<usize> {
        let expected = self.words(cell);
        (0..WORDS).find(|i| found[*i] != expected[*i])
    }

    /// What the cell holds.
    pub(crate) fn words(self, cell: usize) -> Words {
        match self.state & ZERO {
            0 => pattern(cell, self.state & GENERATION),
            _ => [0; WORDS],
        }
    }

    /// What it holds after it was [written](Outcome::Written).
    pub(crate) fn next_words(self, cell: usize) -> Words {
        let next = (self.state & GENERATION).wrapping_add(1 << 18);
        pattern(cell, next & GENERATION)
    }
}

impl core::fmt::Display for Held {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (generation, version) = ((self.state & GENERATION) >> 18, self.state >> 40);
        let zero = if self.state & ZERO == 0 { "" } else { ", zero" };
        write!(f, "generation {generation}, version {version}{zero}")
    }
}

/// Each word says which cell, which generation and which word it is; never zero.
fn pattern(cell: usize, generation: u64) -> Words {
    let first = ((cell as u64) << 44) | (generation << 8) | 1;
    core::array::from_fn(|i| first + ((i as u64) << 1))
}
