//! What a kernel's userfaultfd offers.

use core::fmt;
use core::ops::BitOr;
use linux_raw_sys::general as raw;

/// A set of userfaultfd features.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// None.
    pub const NONE: Self = Self(0);
    /// Write protection, and messages that say so.
    pub const WP: Self = Self(raw::UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64);
    /// The parent hears of a fork; takes `CAP_SYS_PTRACE`.
    pub const EVENT_FORK: Self = Self(raw::UFFD_FEATURE_EVENT_FORK as u64);
    /// `mremap` is heard of.
    pub const EVENT_REMAP: Self = Self(raw::UFFD_FEATURE_EVENT_REMAP as u64);
    /// `madvise` that drops pages is heard of.
    pub const EVENT_REMOVE: Self = Self(raw::UFFD_FEATURE_EVENT_REMOVE as u64);
    /// `munmap` is heard of.
    pub const EVENT_UNMAP: Self = Self(raw::UFFD_FEATURE_EVENT_UNMAP as u64);
    /// A touch of a missing page is a SIGBUS, not a message.
    pub const SIGBUS: Self = Self(raw::UFFD_FEATURE_SIGBUS as u64);
    /// Messages name the thread.
    pub const THREAD_ID: Self = Self(raw::UFFD_FEATURE_THREAD_ID as u64);
    /// Messages name the byte, not only the page.
    pub const EXACT_ADDRESS: Self = Self(raw::UFFD_FEATURE_EXACT_ADDRESS as u64);
    /// Write protection also of pages that are not there.
    pub const WP_UNPOPULATED: Self = Self(raw::UFFD_FEATURE_WP_UNPOPULATED as u64);
    /// Touches of pages of shared memory that are in the file, but not in the mapping, are heard of; also
    /// in private mappings.
    pub const MINOR_SHMEM: Self = Self(raw::UFFD_FEATURE_MINOR_SHMEM as u64);
    /// Pages can be marked as broken.
    pub const POISON: Self = Self(raw::UFFD_FEATURE_POISON as u64);
    /// The kernel unprotects by itself and keeps count in the page tables.
    pub const WP_ASYNC: Self = Self(raw::UFFD_FEATURE_WP_ASYNC as u64);
    /// Pages can be moved.
    pub const MOVE: Self = Self(raw::UFFD_FEATURE_MOVE as u64);

    const NAMES: [(Self, &str); 13] = [
        (Self::MOVE, "MOVE"),
        (Self::POISON, "POISON"),
        (Self::WP, "WP"),
        (Self::WP_ASYNC, "WP_ASYNC"),
        (Self::WP_UNPOPULATED, "WP_UNPOPULATED"),
        (Self::EXACT_ADDRESS, "EXACT_ADDRESS"),
        (Self::THREAD_ID, "THREAD_ID"),
        (Self::EVENT_FORK, "EVENT_FORK"),
        (Self::EVENT_REMAP, "EVENT_REMAP"),
        (Self::EVENT_REMOVE, "EVENT_REMOVE"),
        (Self::EVENT_UNMAP, "EVENT_UNMAP"),
        (Self::MINOR_SHMEM, "MINOR_SHMEM"),
        (Self::SIGBUS, "SIGBUS"),
    ];

    /// The set with these bits of the kernel's.
    pub(crate) const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// The bits of the kernel's.
    pub(crate) const fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `others` are in the set.
    pub const fn contains(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }

    /// Those that are in both.
    #[must_use]
    pub const fn intersection(self, others: Self) -> Self {
        Self(self.0 & others.0)
    }

    /// Those that are not in `others`.
    #[must_use]
    pub const fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }
}

impl BitOr for Features {
    type Output = Self;
    fn bitor(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }
}

/// The names of those that matter here, in order of weight; `none` when there is none.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut gap = "";
        for (_, name) in Self::NAMES
            .iter()
            .filter(|(feature, _)| self.contains(*feature))
        {
            write!(f, "{gap}{name}")?;
            gap = " ";
        }
        if gap.is_empty() {
            f.write_str("none")
        } else {
            Ok(())
        }
    }
}

impl fmt::Debug for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_read_as_names() {
        let both = Features::WP | Features::MOVE;
        assert_eq!(both.to_string(), "MOVE WP");
        assert_eq!(Features::NONE.to_string(), "none");
        assert!(both.contains(Features::WP) && !both.contains(Features::POISON));
        assert_eq!(both.without(Features::WP), Features::MOVE);
    }
}
