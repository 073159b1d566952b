//! Where pages are, for who only looks: no page is faulted in, none comes home, nobody waits.
//!
//! ```text
//!   mapping     [----------------------)   [---------)
//!   page table   F F Z . . .                . F          F frame, Z zero page, . nothing
//!   words        s s s s D D M s            (none)       s system, D device, M on the move
//!   seen         S S S A D D M A  A  U U U  A S          System, Absent, Device, Moving, Unmapped
//! ```
//!
//! What the words say of a page comes first; of a page that they leave to the system, and of memory
//! that nobody mirrors, the page table tells.
//!
//! # Differences from the kernel
//!
//! This is `hmm_range_fault` without a flag that asks for pages. There an entry is a number with flags,
//! and what an earlier call left in it means something to the next; here every entry is written.

use crate::{DevicePage, Home};

/// Where a page was when somebody looked. It may be elsewhere by the time that this is read: whoever
/// maps pages asks [`AddressSpace::range_fault`](crate::AddressSpace::range_fault) instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Nothing is mapped there.
    Unmapped,
    /// A mapping, but no page in it yet.
    Absent,
    /// A page of RAM. The shared page of zeros is one, and so is a page that was swapped out.
    System,
    /// A page of a device.
    Device(DevicePage),
    /// A page of a device whose memory the CPU uses in place.
    Coherent(DevicePage),
    /// A page that is on the move.
    Moving,
}

impl Seen {
    /// Whether there is a page, wherever it is.
    pub const fn is_populated(self) -> bool {
        match self {
            Self::System | Self::Device(_) | Self::Coherent(_) | Self::Moving => true,
            Self::Unmapped | Self::Absent => false,
        }
    }

    /// What a page's word tells. `None` when it leaves that to the page table.
    pub const fn by_word(home: Home) -> Option<Self> {
        match home {
            Home::System | Home::Protected => None,
            Home::Device(page) => Some(Self::Device(page)),
            Home::Coherent(page) => Some(Self::Coherent(page)),
            Home::Moving => Some(Self::Moving),
            Home::Unmapped => Some(Self::Unmapped),
        }
    }
}
