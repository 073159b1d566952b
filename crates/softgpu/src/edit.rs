//! Changes of a page table: bind, zap, split, and the accessed bits.
//!
//! ```text
//!   bind [ 60 KiB ......................................... 2 MiB + 128 KiB )
//!        4K | 64K | 64K | ... | 64K |        2 MiB         | 64K | 64K
//!
//!   zap the middle of a 2 MiB entry:
//!        [            2 MiB            ]  ->  [64K|64K| ... |64K|    |64K| ... |64K]
//! ```
//!
//! A 2 MiB entry that takes the place of a table keeps that table as the spare of its slot: units
//! may still be walking it, and the next split wants one. What they find there are entries of the
//! same block, and whoever found an old one is waited for by the flush, as for any other entry.
//!
//! # Locking
//!
//! Everything here runs under the edit lock.

use crate::arena::{ENTRIES, Node, NodeKind};
use crate::entry::{Entry, advance, position};
use crate::table::{Table, exchange, index};
use gpusvm_device::Mapping;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PAGE_SIZE, PAGES_PER_BLOCK, PageCount, PageIndex, Span};

/// Pages of a 64 KiB entry.
pub(crate) const GROUP_PAGES: usize = 16;
const GROUP_SIZE: ByteSize = ByteSize::kib(64);

/// The arena has no memory for another table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OutOfTables;

impl Table {
    /// Enters a mapping that is within reach. What fails is taken back as a whole.
    pub(crate) fn bind(&self, mapping: &Mapping) -> Result<(), OutOfTables> {
        let _edit = self.edit.lock();
        for piece in mapping.span.blocks() {
            let by = piece.start().offset_from(mapping.span.start());
            let part = Mapping {
                span: piece,
                target: advance(mapping.target, by),
                ..*mapping
            };
            if let Err(error) = self.bind_in_block(&part) {
                self.clear(mapping.span);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Clears every entry in `span` and says how many pages were mapped.
    pub(crate) fn zap(&self, span: Span) -> PageCount {
        let _edit = self.edit.lock();
        self.clear(span)
    }

    /// Counts the pages of `span` whose entries were accessed, and clears their bits.
    pub(crate) fn test_and_clear_accessed(&self, span: Span) -> PageCount {
        let _edit = self.edit.lock();
        let mut count = PageCount::ZERO;
        self.each_block(span, |node, piece| {
            let slot = node.slot(index(piece.first_page(), 1));
            let entry = load(slot);
            if entry.has(Entry::TABLE) {
                count += test_pages(Node::of(entry), piece);
            } else if slot.fetch_and(!Entry::ACCESSED, Ordering::AcqRel) & Entry::ACCESSED != 0 {
                count += piece.page_count();
            }
        });
        count
    }

    fn clear(&self, span: Span) -> PageCount {
        let mut count = PageCount::ZERO;
        self.each_block(span, |node, piece| {
            count += self.clear_in_block(node, piece)
        });
        count
    }

    /// Calls `visit` for the piece of `span` in each 2 MiB block whose level 1 node exists.
    fn each_block(&self, span: Span, mut visit: impl FnMut(Node, Span)) {
        for far in chunks(span, ByteSize::gib(512)) {
            if !load(self.root.slot(index(far.first_page(), 3))).has(Entry::TABLE) {
                continue;
            }
            for near in chunks(far, ByteSize::gib(1)) {
                if let Some(node) = self.block_node(near.first_page()) {
                    near.blocks().for_each(|piece| visit(node, piece));
                }
            }
        }
    }

    fn bind_in_block(&self, part: &Mapping) -> Result<(), OutOfTables> {
        let node = self.make_block_node(part.span.first_page())?;
        let at = index(part.span.first_page(), 1);
        let leaf = Entry::leaf(part.target, part.allows);
        if part.span.len() == BLOCK_SIZE && leaf.address().is_multiple_of(BLOCK_SIZE.get()) {
            let old = Entry(node.slot(at).swap(leaf.0, Ordering::AcqRel));
            if old.has(Entry::TABLE) {
                node.spare(at).store(old.0, Ordering::Relaxed);
            }
            return Ok(());
        }
        let pages = self.make_pages(node, at)?;
        let congruent =
            position(part.target) % GROUP_SIZE.get() == part.span.start().get() % GROUP_SIZE.get();
        let (first, last) = page_range(part.span);
        split_groups_at(pages, first, last);
        for (page, slot) in (first..last).enumerate() {
            let head = slot - slot % GROUP_PAGES;
            let whole = first <= head && head + GROUP_PAGES <= last;
            let flags = if congruent && whole { Entry::GROUP } else { 0 };
            let entry = leaf.page(page as u64).with(flags);
            pages.slot(slot).store(entry.0, Ordering::Release);
        }
        Ok(())
    }

    fn clear_in_block(&self, node: Node, piece: Span) -> PageCount {
        let at = index(piece.first_page(), 1);
        let entry = load(node.slot(at));
        if !entry.has(Entry::PRESENT) && !entry.has(Entry::TABLE) {
            return PageCount::ZERO;
        }
        if entry.has(Entry::PRESENT) {
            // Without a table to split into, all of the entry goes: the rest faults back in.
            if piece.len() == BLOCK_SIZE || self.make_pages(node, at).is_err() {
                node.slot(at).store(Entry::ABSENT.0, Ordering::Release);
                return piece.page_count();
            }
        }
        let pages = Node::of(load(node.slot(at)));
        let (first, last) = page_range(piece);
        split_groups_at(pages, first, last);
        let clear = |slot| Entry(pages.slot(slot).swap(Entry::ABSENT.0, Ordering::AcqRel));
        let mapped = (first..last)
            .filter(|&slot| clear(slot).has(Entry::PRESENT))
            .count();
        PageCount::from_usize(mapped)
    }

    /// The node of level 1 for a page, made if there is none.
    fn make_block_node(&self, page: PageIndex) -> Result<Node, OutOfTables> {
        let upper = self.make_node(self.root.slot(index(page, 3)), NodeKind::Plain)?;
        self.make_node(upper.slot(index(page, 2)), NodeKind::WithSpares)
    }

    fn make_node(&self, slot: &AtomicU64, kind: NodeKind) -> Result<Node, OutOfTables> {
        let entry = load(slot);
        if entry.has(Entry::TABLE) {
            return Ok(Node::of(entry));
        }
        let node = self.arena.take(kind).ok_or(OutOfTables)?;
        slot.store(node.entry().0, Ordering::Release);
        Ok(node)
    }

    /// The node of level 0 behind entry `at` of a level 1 node: there, or split off, or new.
    fn make_pages(&self, node: Node, at: usize) -> Result<Node, OutOfTables> {
        let slot = node.slot(at);
        if load(slot).has(Entry::TABLE) {
            return Ok(Node::of(load(slot)));
        }
        let spare = Entry(node.spare(at).swap(0, Ordering::Relaxed));
        let pages = match spare {
            Entry::ABSENT => self.arena.take(NodeKind::Plain).ok_or(OutOfTables)?,
            spare => Node::of(spare),
        };
        loop {
            let old = load(slot);
            for page in 0..PAGES_PER_BLOCK {
                let entry = match old {
                    Entry::ABSENT => old,
                    old => old.page(page as u64).with(Entry::GROUP),
                };
                pages.slot(page).store(entry.0, Ordering::Relaxed);
            }
            // A unit may be setting the accessed bit of the old entry: then it is read again.
            if exchange(slot, old, pages.entry()) {
                return Ok(pages);
            }
        }
    }
}

/// Makes sure that no 64 KiB entry reaches across either end of `first..last`.
fn split_groups_at(pages: Node, first: usize, last: usize) {
    for edge in [first, last] {
        if edge % GROUP_PAGES != 0 && load(pages.slot(edge)).has(Entry::GROUP) {
            split_group(pages, edge - edge % GROUP_PAGES);
        }
    }
}

/// Makes 16 entries out of a 64 KiB entry. Each inherits that the whole was accessed or written.
fn split_group(pages: Node, head: usize) {
    let group = head..head + GROUP_PAGES;
    let seen = group
        .clone()
        .fold(0, |seen, page| seen | load(pages.slot(page)).0);
    for page in group {
        let slot = pages.slot(page);
        slot.fetch_or(seen & (Entry::ACCESSED | Entry::DIRTY), Ordering::AcqRel);
        slot.fetch_and(!Entry::GROUP, Ordering::AcqRel);
    }
}

/// Counts and clears accessed bits of single pages and of 64 KiB entries, in one block.
fn test_pages(pages: Node, piece: Span) -> PageCount {
    let (first, last) = page_range(piece);
    let mut count = 0;
    let mut slot = first;
    while slot < last {
        let group = load(pages.slot(slot)).has(Entry::GROUP);
        let head = slot - slot % GROUP_PAGES;
        let members = if group {
            head..head + GROUP_PAGES
        } else {
            slot..slot + 1
        };
        let next = members.end.min(last);
        let clear = |page| {
            pages
                .slot(page)
                .fetch_and(!Entry::ACCESSED, Ordering::AcqRel)
        };
        let accessed = members.fold(0, |seen, page| seen | clear(page)) & Entry::ACCESSED != 0;
        count += if accessed { next - slot } else { 0 };
        slot = next;
    }
    PageCount::from_usize(count)
}

/// The slots of a piece of a block in its level 0 node.
fn page_range(piece: Span) -> (usize, usize) {
    let first = index(piece.first_page(), 0);
    let count = piece.page_count().as_usize();
    debug_assert!(first + count <= ENTRIES && piece.start().is_aligned(PAGE_SIZE));
    (first, first + count)
}

/// The pieces of a span in each aligned chunk of `size`, ascending.
fn chunks(span: Span, size: ByteSize) -> impl Iterator<Item = Span> {
    let mut next = Some(span);
    core::iter::from_fn(move || {
        let rest = next?;
        let piece = rest.intersection(Span::chunk_of(rest.start(), size))?;
        next = Span::new(piece.end(), rest.end()).ok();
        Some(piece)
    })
}

fn load(slot: &AtomicU64) -> Entry {
    Entry(slot.load(Ordering::Acquire))
}
