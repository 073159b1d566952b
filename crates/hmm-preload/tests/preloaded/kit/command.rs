//! What a device is asked for, and what it says.

use super::{PAGE, Span};

/// The commands, by their numbers.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub(crate) enum Do {
    Read = 0,
    Write = 1,
    MigrateToDev = 2,
    MigrateToSys = 3,
    Snapshot = 4,
    Exclusive = 5,
    CheckExclusive = 6,
    Release = 7,
    Flags = 8,
    ReadUnlocked = 9,
}

impl Do {
    /// What `ioctl` knows it by.
    pub(crate) fn request(self) -> u64 {
        request(self as u64)
    }

    /// How many bytes it reads or writes where the data is, for so many pages.
    pub(crate) fn data_len(self, pages: usize) -> usize {
        match self {
            Self::Snapshot => pages,
            Self::MigrateToSys | Self::CheckExclusive | Self::Release | Self::Flags => 0,
            Self::Read
            | Self::Write
            | Self::MigrateToDev
            | Self::Exclusive
            | Self::ReadUnlocked => pages * PAGE,
        }
    }
}

/// Of any number, also one that no command has: `_IOWR('H', number, struct hmm_dmirror_cmd)`.
pub(crate) fn request(number: u64) -> u64 {
    3 << 30 | 40 << 16 | 0x48 << 8 | number
}

/// The five words of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Cmd {
    pub(crate) addr: u64,
    pub(crate) ptr: u64,
    pub(crate) npages: u64,
    pub(crate) cpages: u64,
    pub(crate) faults: u64,
}

impl Cmd {
    /// On these pages, with this data. What comes of it is not as it is before.
    pub(crate) fn new(pages: Span, data: &mut [u8]) -> Self {
        Self {
            addr: pages.at.addr() as u64,
            ptr: data.as_mut_ptr().addr() as u64,
            npages: pages.pages as u64,
            cpages: 99,
            faults: 99,
        }
    }
}

/// What a snapshot says of a page: a place, and what may be done there.
pub(crate) mod seen {
    /// Not mapped, or not readable.
    pub(crate) const ERROR: u8 = 0xff;
    /// Nothing that the device could read without a fault.
    pub(crate) const NONE: u8 = 0;
    pub(crate) const READ: u8 = 1;
    pub(crate) const WRITE: u8 = 2;
    /// Part of a huge page.
    pub(crate) const PMD: u8 = 4;
    /// The page of zeroes.
    pub(crate) const ZERO: u8 = 0x10;
    /// On this device, out of the CPU's reach.
    pub(crate) const PRIVATE_LOCAL: u8 = 0x20;
    /// On this device, where the CPU uses it.
    pub(crate) const COHERENT_LOCAL: u8 = 0x40;
    /// On another device, where the CPU uses it.
    pub(crate) const COHERENT_REMOTE: u8 = 0x50;
}

/// Whether a snapshot says that a page is on this device and may be written, as part of a huge page or not.
pub(crate) fn is_local(seen: u8) -> bool {
    seen & !seen::PMD == seen::PRIVATE_LOCAL | seen::WRITE
}
