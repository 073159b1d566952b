//! The page table of an address space: a radix tree of four levels over 48-bit addresses.
//!
//! ```text
//!   47        39        30        21        12        0
//!   [ level 3 | level 2 | level 1 | level 0 |  offset ]      9 bits, 512 entries each
//!                            |         |
//!                            |         +-- 4 KiB entry, or one of 16 flagged as a 64 KiB entry
//!                            +-- 2 MiB entry, or table
//! ```
//!
//! Units walk it while it is changed: an entry is one atomic word, a table is published when it is
//! filled, and its memory is not reused before the address space is gone.
//!
//! # Locking
//!
//! Walking takes none. Changes (`edit`) run under the edit lock of the table. The bits that a walk
//! sets, accessed and dirty, go in by compare and exchange: an entry that was replaced meanwhile is
//! not touched, and the walk begins again.

use crate::arena::{Arena, Node, NodeKind};
use crate::entry::Entry;
use gpusvm_device::Access;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{PageIndex, Span, VirtAddr};

/// The first page that is out of reach: addresses have 48 bits.
pub(crate) const PAGES: u64 = 1 << 36;

/// How much a leaf maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reach {
    /// 4 KiB.
    Page,
    /// 64 KiB.
    Group,
    /// 2 MiB.
    Block,
}

/// What a walk found: the entry, of the page itself or of its 2 MiB block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leaf {
    pub(crate) entry: Entry,
    pub(crate) reach: Reach,
}

/// Why a walk found nothing to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Miss {
    /// There is no entry.
    Unmapped,
    /// There is one, and it forbids that.
    NotPermitted,
}

/// The page table of one address space.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) root: Node,
    pub(crate) arena: Arc<Arena>,
    // guards: every change of an entry but for its accessed and dirty bits
    pub(crate) edit: Mutex<()>,
}

impl Table {
    /// An empty table. `None` when the arena is used up.
    pub(crate) fn new(arena: Arc<Arena>) -> Option<Self> {
        let root = arena.take(NodeKind::Plain)?;
        Some(Self {
            root,
            arena,
            edit: Mutex::new(()),
        })
    }

    /// Finds the entry for an access, and marks it accessed, and dirty if that writes.
    pub(crate) fn walk(&self, page: PageIndex, access: Access) -> Result<Leaf, Miss> {
        loop {
            let (slot, leaf) = self.find(page).ok_or(Miss::Unmapped)?;
            if !leaf.entry.has(Entry::permits(access)) {
                return Err(Miss::NotPermitted);
            }
            let dirty = if access.is_write() { Entry::DIRTY } else { 0 };
            let marked = leaf.entry.with(Entry::ACCESSED | dirty);
            if marked == leaf.entry || exchange(slot, leaf.entry, marked) {
                return Ok(Leaf {
                    entry: marked,
                    ..leaf
                });
            }
        }
    }

    /// The leaf of a page and where it is.
    fn find(&self, page: PageIndex) -> Option<(&AtomicU64, Leaf)> {
        let block = self.block_node(page)?;
        let slot = block.slot(index(page, 1));
        let entry = Entry(slot.load(Ordering::Acquire));
        if entry.has(Entry::PRESENT) {
            return Some((
                slot,
                Leaf {
                    entry,
                    reach: Reach::Block,
                },
            ));
        }
        if !entry.has(Entry::TABLE) {
            return None;
        }
        let slot = Node::of(entry).slot(index(page, 0));
        let entry = Entry(slot.load(Ordering::Acquire));
        let reach = if entry.has(Entry::GROUP) {
            Reach::Group
        } else {
            Reach::Page
        };
        entry
            .has(Entry::PRESENT)
            .then_some((slot, Leaf { entry, reach }))
    }

    /// The node of level 1 that holds the entries of the page's 1 GiB, if there is one.
    pub(crate) fn block_node(&self, page: PageIndex) -> Option<Node> {
        if page.get() >= PAGES {
            return None;
        }
        let upper = Entry(self.root.slot(index(page, 3)).load(Ordering::Acquire));
        if !upper.has(Entry::TABLE) {
            return None;
        }
        let middle = Entry(Node::of(upper).slot(index(page, 2)).load(Ordering::Acquire));
        middle.has(Entry::TABLE).then(|| Node::of(middle))
    }

    /// The part of a span that the table can map.
    pub(crate) fn within_reach(span: Span) -> Option<Span> {
        let end = PageIndex::new(PAGES).start();
        Span::new(VirtAddr::new(0), end).ok()?.intersection(span)
    }
}

/// The index of the entry for a page in a node of `level`.
pub(crate) fn index(page: PageIndex, level: u32) -> usize {
    let index = (page.get() >> (9 * level)) & 0x1ff;
    usize::try_from(index).expect("nine bits")
}

/// Replaces an entry if it is still `old`.
pub(crate) fn exchange(slot: &AtomicU64, old: Entry, new: Entry) -> bool {
    slot.compare_exchange(old.0, new.0, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
}

impl Drop for Table {
    fn drop(&mut self) {
        self.give_back(self.root, 3);
    }
}

impl Table {
    /// Gives a node, and all below it, back to the arena.
    fn give_back(&self, node: Node, level: u32) {
        let load = |slot: &AtomicU64| Entry(slot.load(Ordering::Relaxed));
        for index in 0..crate::arena::ENTRIES {
            let entry = load(node.slot(index));
            if level > 0 && entry.has(Entry::TABLE) {
                self.give_back(Node::of(entry), level - 1);
            }
            if level == 1 && load(node.spare(index)).has(Entry::TABLE) {
                self.arena
                    .give(Node::of(load(node.spare(index))), NodeKind::Plain);
            }
        }
        let kind = if level == 1 {
            NodeKind::WithSpares
        } else {
            NodeKind::Plain
        };
        self.arena.give(node, kind);
    }
}
