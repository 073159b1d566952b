//! Memory for page tables, apart from the heap: `zap` and `bind` run on fault paths.
//!
//! ```text
//!   [ node | node | node + spares | node | ...............  never touched yet ]
//!      |______________^                       ^ next
//!      free lists, one per size, through the first word of each free node
//! ```
//!
//! A node is a page of 512 entries. The nodes that hold 2 MiB entries have a second page behind
//! them: one spare table per entry, see `edit`.
//!
//! Children of fork inherit the tables, unlike VRAM: what a driver changes or drops there, it changes
//! in its copy.

use crate::entry::Entry;
use crate::region::Region;
use gpusvm_sync::Mutex;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{ByteSize, PAGE_SIZE};
use std::io;

/// Entries of a node.
pub(crate) const ENTRIES: usize = 512;

/// How much address space is set aside: tables for 2 TiB in 4 KiB entries. Takes up no memory.
const RESERVED: ByteSize = ByteSize::gib(4);

/// One table of 512 entries, somewhere in an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Node(*const AtomicU64);

// SAFETY: entries are atomics, and nodes live as long as the arena, which every table keeps.
unsafe impl Send for Node {}
// SAFETY: as above.
unsafe impl Sync for Node {}

impl Node {
    /// The node that a table entry leads to.
    pub(crate) fn of(entry: Entry) -> Self {
        debug_assert!(entry.has(Entry::TABLE));
        let address = usize::try_from(entry.address()).expect("a 64-bit machine");
        Self(std::ptr::with_exposed_provenance(address))
    }

    /// The table entry that leads to the node.
    pub(crate) fn entry(self) -> Entry {
        Entry::table(self.0.expose_provenance() as u64)
    }

    /// The slot at `index`, which is below 512.
    #[inline]
    pub(crate) fn slot<'a>(self, index: usize) -> &'a AtomicU64 {
        assert!(index < ENTRIES);
        // SAFETY: below 512 as checked; a node is a page of initialised entries in the arena,
        // which outlives every table that can name it.
        unsafe { &*self.0.wrapping_add(index) }
    }

    /// The slot for the spare table of entry `index`, of a node that was made with spares.
    pub(crate) fn spare<'a>(self, index: usize) -> &'a AtomicU64 {
        Self(self.0.wrapping_add(ENTRIES)).slot(index)
    }
}

/// Which nodes an arena gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NodeKind {
    /// A page.
    Plain,
    /// A page, and a page of spares.
    WithSpares,
}

impl NodeKind {
    fn pages(self) -> usize {
        match self {
            Self::Plain => 1,
            Self::WithSpares => 2,
        }
    }
}

/// Where nodes come from.
#[derive(Debug)]
pub(crate) struct Arena {
    region: Region,
    free: Mutex<Free>,
}

/// What is free of an arena: byte offsets, zero is none.
#[derive(Debug, Default)]
struct Free {
    next: usize,
    lists: [usize; 2],
}

impl Arena {
    /// An arena without nodes.
    pub(crate) fn new() -> io::Result<Self> {
        // The first page is left out, so that offset zero is none.
        let free = Free {
            next: PAGE_SIZE.as_usize(),
            lists: [0; 2],
        };
        Ok(Self {
            region: Region::reserve(RESERVED)?,
            free: Mutex::new(free),
        })
    }

    /// A node of absent entries. `None` when the arena is used up.
    pub(crate) fn take(&self, kind: NodeKind) -> Option<Node> {
        let mut free = self.free.lock();
        let list = &mut free.lists[kind.pages() - 1];
        if *list != 0 {
            let node = self.node(*list);
            *list = usize::try_from(node.slot(0).load(Ordering::Relaxed)).ok()?;
            for index in 0..kind.pages() * ENTRIES {
                Node(node.0.wrapping_add(index))
                    .slot(0)
                    .store(0, Ordering::Relaxed);
            }
            return Some(node);
        }
        let at = free.next;
        let next = at + kind.pages() * PAGE_SIZE.as_usize();
        if next > self.region.len().as_usize() {
            return None;
        }
        free.next = next;
        Some(self.node(at))
    }

    /// Takes back a node that no unit can walk any more.
    pub(crate) fn give(&self, node: Node, kind: NodeKind) {
        let mut free = self.free.lock();
        let list = &mut free.lists[kind.pages() - 1];
        node.slot(0).store(*list as u64, Ordering::Relaxed);
        *list = node.0.addr() - self.region.base().addr();
    }

    fn node(&self, offset: usize) -> Node {
        Node(
            self.region
                .base()
                .wrapping_add(offset)
                .cast::<AtomicU64>()
                .cast_const(),
        )
    }
}
