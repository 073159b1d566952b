//! The translations that a unit remembers.
//!
//! Two tables, of 2 MiB entries and of 4 KiB entries, each of two ways. A 64 KiB entry fills 16
//! places of the latter. An entry counts only with the stamp that its block has now: see `flush`.

use crate::arena::ENTRIES;
use crate::edit::GROUP_PAGES;
use crate::entry::Entry;
use crate::port::Board;
use crate::table::{Leaf, Reach};
use gpusvm_types::{BLOCK_SHIFT, BLOCK_SIZE, PAGE_SHIFT, PAGE_SIZE};

/// Sets for 2 MiB entries: 128 entries, 256 MiB.
const HUGE_SETS: usize = 64;
/// Sets for 4 KiB entries: 512 entries, 2 MiB.
const SMALL_SETS: usize = 256;

/// One remembered translation.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
struct Line {
    // Block or page number.
    tag: u64,
    stamp: u64,
    // The address in the process of the block or page, with the flags of its entry.
    entry: Entry,
}

const EMPTY: Line = Line {
    tag: u64::MAX,
    stamp: 0,
    entry: Entry::ABSENT,
};

/// Where an access goes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Hit {
    /// The address in the process, with the flags of the entry in the low bits.
    entry: Entry,
    /// The offset in the block or page.
    offset: u64,
    /// Whether it is a block.
    huge: bool,
}

impl Hit {
    /// A place in a 2 MiB entry.
    #[inline(always)]
    fn in_block(entry: Entry, at: u64) -> Self {
        Self {
            entry,
            offset: at & (BLOCK_SIZE.get() - 1),
            huge: true,
        }
    }

    /// A place in a 4 KiB entry.
    #[inline(always)]
    fn in_page(entry: Entry, at: u64) -> Self {
        Self {
            entry,
            offset: at & (PAGE_SIZE.get() - 1),
            huge: false,
        }
    }

    /// The byte that was asked for.
    #[inline(always)]
    pub(crate) fn pointer(self) -> *mut u8 {
        // Lossless on x86_64, and an address on any machine.
        #[expect(
            clippy::cast_possible_truncation,
            reason = "an address of this process"
        )]
        let at = (self.entry.address() + self.offset) as usize;
        std::ptr::with_exposed_provenance_mut(at)
    }

    /// How many bytes follow in the same entry, at least.
    pub(crate) fn rest(self) -> u64 {
        let size = if self.huge { BLOCK_SIZE } else { PAGE_SIZE };
        size.get() - self.offset
    }

    /// Whether it is in RAM, or in the memory of a peer, and may refuse.
    #[inline(always)]
    pub(crate) fn is_system(self) -> bool {
        self.entry.has(Entry::SYSTEM)
    }

    /// What it means when the access is refused.
    pub(crate) fn refusal(self) -> Refusal {
        if self.entry.has(Entry::PEER) {
            Refusal::Peer
        } else {
            Refusal::Ram
        }
    }

    /// Whether the entry has `flags`.
    #[inline(always)]
    pub(crate) fn has(self, flags: u64) -> bool {
        self.entry.has(flags)
    }
}

/// Who refused an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// RAM: the translation is out of date.
    Ram,
    /// A peer: it is gone.
    Peer,
}

/// The translations of one unit.
#[derive(Debug)]
pub(crate) struct Tlb {
    huge: [[Line; 2]; HUGE_SETS],
    small: [[Line; 2]; SMALL_SETS],
    // Which way is replaced next.
    turn: usize,
}

impl Tlb {
    /// An empty one.
    pub(crate) fn new() -> Box<Self> {
        Box::new(Self {
            huge: [[EMPTY; 2]; HUGE_SETS],
            small: [[EMPTY; 2]; SMALL_SETS],
            turn: 0,
        })
    }

    /// Looks `at` up. `stamp` is the present one of its block.
    #[inline(always)]
    pub(crate) fn find(&self, at: u64, stamp: u64) -> Option<Hit> {
        let block = at >> BLOCK_SHIFT;
        for line in &self.huge[huge_set(block)] {
            if line.tag == block && line.stamp == stamp {
                return Some(Hit::in_block(line.entry, at));
            }
        }
        let page = at >> PAGE_SHIFT;
        for line in &self.small[small_set(page)] {
            if line.tag == page && line.stamp == stamp {
                return Some(Hit::in_page(line.entry, at));
            }
        }
        None
    }

    /// Remembers what a walk for `at` found, and says where the access goes.
    pub(crate) fn fill(&mut self, at: u64, stamp: u64, leaf: Leaf, board: &Board) -> Hit {
        let entry = match leaf.entry {
            entry if entry.has(Entry::SYSTEM) => entry,
            entry => Entry(entry.0 + board.vram),
        };
        let page = at >> PAGE_SHIFT;
        match leaf.reach {
            Reach::Block => {
                let tag = at >> BLOCK_SHIFT;
                self.turn ^= 1;
                place(
                    &mut self.huge[huge_set(tag)],
                    self.turn,
                    Line { tag, stamp, entry },
                );
                return Hit::in_block(entry, at);
            }
            Reach::Page => self.fill_page(Line {
                tag: page,
                stamp,
                entry,
            }),
            Reach::Group => {
                let within = page % GROUP_PAGES as u64;
                let head = Entry(entry.0 - within * PAGE_SIZE.get());
                for index in 0..GROUP_PAGES as u64 {
                    let tag = page - within + index;
                    self.fill_page(Line {
                        tag,
                        stamp,
                        entry: head.page(index),
                    });
                }
            }
        }
        Hit::in_page(entry, at)
    }

    fn fill_page(&mut self, line: Line) {
        self.turn ^= 1;
        place(&mut self.small[small_set(line.tag)], self.turn, line);
    }
}

/// Puts a line where its predecessor is, else in the way whose turn it is.
fn place(set: &mut [Line; 2], turn: usize, line: Line) {
    let way = set
        .iter()
        .position(|old| old.tag == line.tag)
        .unwrap_or(turn & 1);
    set[way] = line;
}

/// Mixes higher bits in: arrays of a program lie at multiples of large powers of two.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "six bits are left")]
fn huge_set(block: u64) -> usize {
    ((block ^ block >> 6 ^ block >> 12) & (HUGE_SETS as u64 - 1)) as usize
}

/// As `huge_set`; 512 neighbours lie in different lines of both ways together.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "eight bits are left")]
fn small_set(page: u64) -> usize {
    ((page ^ page >> 8) & (SMALL_SETS as u64 - 1)) as usize
}

const _: () = assert!(
    ENTRIES == 2 * SMALL_SETS,
    "the small entries cover one table"
);
