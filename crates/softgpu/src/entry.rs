//! One entry of a page table, and of a TLB: an address and its flags.
//!
//! ```text
//!   63                            12    8      7     6     5     4     3      2      1      0
//!   [ address, a multiple of 4 KiB  | atomic peer group table dirty acc. system write present ]
//! ```

use gpusvm_device::{Access, Target};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, PAGE_SIZE};

/// An entry as it lies in a table. Zero is absent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry(pub(crate) u64);

impl Entry {
    /// Nothing.
    pub(crate) const ABSENT: Self = Self(0);
    /// It maps something.
    pub(crate) const PRESENT: u64 = 1 << 0;
    /// Stores are allowed.
    pub(crate) const WRITABLE: u64 = 1 << 1;
    /// The address is one of the bus, not of VRAM.
    pub(crate) const SYSTEM: u64 = 1 << 2;
    /// A unit has filled its TLB from it.
    pub(crate) const ACCESSED: u64 = 1 << 3;
    /// A unit has written through it.
    pub(crate) const DIRTY: u64 = 1 << 4;
    /// The address is that of the next table.
    pub(crate) const TABLE: u64 = 1 << 5;
    /// One of 16 neighbours that are one 64 KiB entry.
    pub(crate) const GROUP: u64 = 1 << 6;
    /// With `SYSTEM`: what is there is the memory of a peer.
    pub(crate) const PEER: u64 = 1 << 7;
    /// Atomic operations are allowed.
    pub(crate) const ATOMIC: u64 = 1 << 8;
    /// Everything that is not flags.
    pub(crate) const ADDRESS: u64 = !0xfff;

    /// The entry of a page of a mapping.
    pub(crate) fn leaf(target: Target, allows: Access) -> Self {
        let flags = Self::PRESENT | Self::permits(allows);
        match target {
            Target::Vram(at) => Self(at.get() | flags),
            Target::System(at) => Self(at.get() | flags | Self::SYSTEM),
            Target::Peer(at) => Self(at.get() | flags | Self::SYSTEM | Self::PEER),
        }
    }

    /// What an entry of a table must say to permit an access.
    pub(crate) const fn permits(access: Access) -> u64 {
        match access {
            Access::Read => 0,
            Access::Write => Self::WRITABLE,
            Access::Atomic => Self::WRITABLE | Self::ATOMIC,
        }
    }

    /// What one of a TLB must say before an access may go through it.
    pub(crate) const fn needs(access: Access) -> u64 {
        let dirty = if access.is_write() { Self::DIRTY } else { 0 };
        Self::permits(access) | dirty
    }

    /// The entry of a table at `address`.
    pub(crate) fn table(address: u64) -> Self {
        Self(address | Self::TABLE)
    }

    /// The address, without flags.
    pub(crate) fn address(self) -> u64 {
        self.0 & Self::ADDRESS
    }

    /// Whether all of `flags` are set.
    pub(crate) fn has(self, flags: u64) -> bool {
        self.0 & flags == flags
    }

    /// The entry with `flags` too.
    pub(crate) fn with(self, flags: u64) -> Self {
        Self(self.0 | flags)
    }

    /// The entry of the page `index` pages further on in the same mapping.
    pub(crate) fn page(self, index: u64) -> Self {
        Self(self.0 + index * PAGE_SIZE.get())
    }
}

/// `by` bytes further on in the same memory.
pub(crate) fn advance(target: Target, by: ByteSize) -> Target {
    match target {
        Target::Vram(at) => Target::Vram(at + by),
        Target::System(at) => Target::System(at + by),
        Target::Peer(at) => Target::Peer(at + by),
    }
}

/// Where a target is in its memory.
pub(crate) fn position(target: Target) -> u64 {
    match target {
        Target::Vram(at) => DevAddr::get(at),
        Target::System(at) | Target::Peer(at) => DmaAddr::get(at),
    }
}
