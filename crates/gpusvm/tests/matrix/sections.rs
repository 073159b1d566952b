//! The sections of the matrix: what is done around each exec, as names and flags.

use core::ops::BitOr;

/// What a section does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags(u32);

impl Flags {
    /// A mapping, not memory of the allocator.
    pub(crate) const MMAP: Self = Self(1);
    /// A new buffer for each exec; old ones are kept to the end.
    pub(crate) const NEW: Self = Self(1 << 1);
    /// Old buffers are freed at once.
    pub(crate) const FREE: Self = Self(1 << 2);
    /// The fence is a word of the record that the device writes.
    pub(crate) const RACE: Self = Self(1 << 3);
    /// The buffer is not written before the device touches it, but for the commands.
    pub(crate) const NO_MEMSET: Self = Self(1 << 4);
    /// A private mapping of a file.
    pub(crate) const FILE: Self = Self(1 << 5);
    /// Locked into RAM before, unlocked after the first exec.
    pub(crate) const LOCK: Self = Self(1 << 6);
    /// A shared mapping: it never migrates.
    pub(crate) const SHARED: Self = Self(1 << 7);
    /// Huge pages of hugetlbfs.
    pub(crate) const HUGE: Self = Self(1 << 8);
    /// A child of fork reads the result.
    pub(crate) const FORK: Self = Self(1 << 9);
    /// The parent reads it after the child has ended, not meanwhile.
    pub(crate) const FORK_AFTER: Self = Self(1 << 10);
    /// The buffer moves to another address after each exec.
    pub(crate) const REMAP: Self = Self(1 << 11);
    /// It leaves an empty mapping behind, which is unmapped afterwards.
    pub(crate) const DONTUNMAP: Self = Self(1 << 12);
    /// It moves while it is read-only.
    pub(crate) const READ_ONLY: Self = Self(1 << 13);
    /// Two results are checked after two moves, between which no CPU touches the buffer.
    pub(crate) const EVERY_OTHER: Self = Self(1 << 14);
    /// One list of commands writes to four places.
    pub(crate) const MULTI_FAULT: Self = Self(1 << 15);
    /// The buffer is fetched before each exec.
    pub(crate) const PREFETCH: Self = Self(1 << 16);
    /// The preferred location alternates between RAM and the device.
    pub(crate) const MADVISE: Self = Self(1 << 17);
    /// The mirror cannot be unbound while ranges of it are in use.
    pub(crate) const BUSY: Self = Self(1 << 18);
    /// A device object is bound over the buffer and unbound again, before the execs.
    pub(crate) const BO_UNMAP: Self = Self(1 << 19);
    /// Every second buffer is a device object.
    pub(crate) const BO_MAP: Self = Self(1 << 20);

    /// Whether all of `flags` are set.
    pub(crate) const fn has(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }

    /// Whether one of `flags` is set.
    pub(crate) const fn any(self, flags: Self) -> bool {
        self.0 & flags.0 != 0
    }

    const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        self.and(other)
    }
}

/// A column of the matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section {
    /// Behind the family in the name of a test.
    pub(crate) name: &'static str,
    /// What it does.
    pub(crate) flags: Flags,
}

macro_rules! sections {
    ($($name:literal: $($flag:ident)*;)*) => {
        /// All of them, in the order of the suite.
        pub(crate) const SECTIONS: &[Section] = &[$(Section {
            name: $name,
            flags: Flags(0)$(.and(Flags::$flag))*,
        }),*];
    };
}

sections! {
    "malloc": ;
    "malloc-madvise": MADVISE;
    "malloc-prefetch": PREFETCH;
    "malloc-prefetch-madvise": PREFETCH MADVISE;
    "malloc-multi-fault": MULTI_FAULT;
    "malloc-fork-read": FORK;
    "malloc-fork-read-after": FORK FORK_AFTER;
    "malloc-mlock": LOCK;
    "malloc-race": RACE;
    "malloc-prefetch-race": PREFETCH RACE;
    "malloc-busy": BUSY;
    "malloc-bo-unmap": BO_UNMAP;
    "mmap": MMAP;
    "mmap-prefetch": MMAP PREFETCH;
    "mmap-remap": MMAP REMAP;
    "mmap-remap-madvise": MMAP REMAP MADVISE;
    "mmap-remap-dontunmap": MMAP REMAP DONTUNMAP;
    "mmap-remap-ro": MMAP REMAP READ_ONLY;
    "mmap-remap-ro-dontunmap": MMAP REMAP READ_ONLY DONTUNMAP;
    "mmap-remap-eocheck": MMAP REMAP EVERY_OTHER;
    "mmap-remap-dontunmap-eocheck": MMAP REMAP DONTUNMAP EVERY_OTHER;
    "mmap-remap-ro-eocheck": MMAP REMAP READ_ONLY EVERY_OTHER;
    "mmap-remap-ro-dontunmap-eocheck": MMAP REMAP READ_ONLY DONTUNMAP EVERY_OTHER;
    "mmap-huge": MMAP HUGE;
    "mmap-shared": MMAP SHARED LOCK;
    "mmap-prefetch-shared": MMAP SHARED LOCK PREFETCH;
    "mmap-shared-remap": MMAP SHARED LOCK REMAP;
    "mmap-shared-remap-dontunmap": MMAP SHARED LOCK REMAP DONTUNMAP;
    "mmap-shared-remap-eocheck": MMAP SHARED LOCK REMAP EVERY_OTHER;
    "mmap-shared-remap-dontunmap-eocheck": MMAP SHARED LOCK REMAP DONTUNMAP EVERY_OTHER;
    "mmap-mlock": MMAP LOCK;
    "mmap-file": MMAP FILE;
    "mmap-file-mlock": MMAP FILE LOCK;
    "mmap-race": MMAP RACE;
    "free": NEW FREE;
    "free-madvise": NEW FREE MADVISE;
    "free-race": NEW FREE RACE;
    "new": NEW;
    "new-madvise": NEW MADVISE;
    "new-prefetch": NEW PREFETCH;
    "new-race": NEW RACE;
    "new-bo-map": NEW BO_MAP;
    "new-busy": NEW BUSY;
    "mmap-free": MMAP NEW FREE;
    "mmap-free-madvise": MMAP NEW FREE MADVISE;
    "mmap-free-huge": MMAP NEW FREE HUGE;
    "mmap-free-race": MMAP NEW FREE RACE;
    "mmap-new": MMAP NEW;
    "mmap-new-madvise": MMAP NEW MADVISE;
    "mmap-new-huge": MMAP NEW HUGE;
    "mmap-new-race": MMAP NEW RACE;
    "malloc-nomemset": NO_MEMSET;
    "malloc-mlock-nomemset": NO_MEMSET LOCK;
    "malloc-race-nomemset": NO_MEMSET RACE;
    "malloc-busy-nomemset": NO_MEMSET BUSY;
    "malloc-bo-unmap-nomemset": NO_MEMSET BO_UNMAP;
    "mmap-nomemset": NO_MEMSET MMAP;
    "mmap-huge-nomemset": NO_MEMSET MMAP HUGE;
    "mmap-shared-nomemset": NO_MEMSET MMAP SHARED;
    "mmap-mlock-nomemset": NO_MEMSET MMAP LOCK;
    "mmap-file-nomemset": NO_MEMSET MMAP FILE;
    "mmap-file-mlock-nomemset": NO_MEMSET MMAP FILE LOCK;
    "mmap-race-nomemset": NO_MEMSET MMAP RACE;
    "free-nomemset": NO_MEMSET NEW FREE;
    "free-race-nomemset": NO_MEMSET NEW FREE RACE;
    "new-nomemset": NO_MEMSET NEW;
    "new-race-nomemset": NO_MEMSET NEW RACE;
    "new-bo-map-nomemset": NO_MEMSET NEW BO_MAP;
    "new-busy-nomemset": NO_MEMSET NEW BUSY;
    "mmap-free-nomemset": NO_MEMSET MMAP NEW FREE;
    "mmap-free-huge-nomemset": NO_MEMSET MMAP NEW FREE HUGE;
    "mmap-free-race-nomemset": NO_MEMSET MMAP NEW FREE RACE;
    "mmap-new-nomemset": NO_MEMSET MMAP NEW;
    "mmap-new-huge-nomemset": NO_MEMSET MMAP NEW HUGE;
    "mmap-new-race-nomemset": NO_MEMSET MMAP NEW RACE;
}
