//! The address space: what a process looks like from below.

use crate::{Block, DeviceMemoryId, DeviceMemoryOps, DevicePage, Home, MmError, Notifiers, Seen};
use alloc::sync::Arc;
use core::time::Duration;
use gpusvm_types::{OwnerId, PageCount, PageIndex, Span, VirtAddr};

/// A point in time of an address space's clock, which never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(Duration);

impl Time {
    /// The beginning: before any other time.
    pub const START: Self = Self(Duration::ZERO);

    /// This long after the beginning.
    pub const fn since_start(since: Duration) -> Self {
        Self(since)
    }

    /// `by` later; saturates at the end of time.
    #[must_use]
    pub const fn after(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by))
    }

    /// How long after `earlier`; zero when it is not earlier.
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// The time since the beginning.
    pub const fn as_duration(self) -> Duration {
        self.0
    }
}

/// A mapping of the process (`vm_area_struct`), as it was when asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vma {
    /// What it covers.
    pub span: Span,
    /// Whether it can be read.
    pub readable: bool,
    /// Whether it can be written.
    pub writable: bool,
    /// What is behind it.
    pub kind: VmaKind,
}

/// What is behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmaKind {
    /// Private and anonymous: can migrate once it is mirrored.
    PrivateAnonymous,
    /// Private, of a file, and mirrored: pages that the program has written are its own, and can migrate;
    /// the others are the file's, and stay.
    PrivateFile,
    /// A file, shared memory, huge pages of hugetlbfs, a device: mapped in place, never migrated.
    Other,
}

impl VmaKind {
    /// Whether pages of it can migrate once it is mirrored.
    pub const fn can_migrate(self) -> bool {
        matches!(self, Self::PrivateAnonymous | Self::PrivateFile)
    }
}

/// Which mirrored mapping was armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmToken(pub u64);

/// What is mirrored around an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mirror {
    /// The address is in this mirrored mapping.
    Mapping(Span),
    /// The address is not mirrored, and nothing in this span is.
    Gap(Span),
}

impl Mirror {
    /// How far it is so.
    pub const fn span(self) -> Span {
        match self {
            Self::Mapping(span) | Self::Gap(span) => span,
        }
    }
}

/// What somebody is about to do with pages that it looks up (`HMM_PFN_REQ_WRITE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Load. Pages that are protected stay so.
    Read,
    /// Store, or map for others to store at any time: pages are not protected any more, and copies of
    /// them are out of reach.
    Write,
}

/// One process address space, real or simulated.
pub trait AddressSpace: Send + Sync + core::fmt::Debug + Sized + 'static {
    /// A locked block. Dropping it unlocks and wakes who waits for its pages.
    type Block<'a>: Block
    where
        Self: 'a;

    /// Evidence that the process does not fork.
    type NoFork<'a>: core::fmt::Debug
    where
        Self: 'a;

    /// The clock.
    fn now(&self) -> Time;

    /// The mapping that holds `at`, or the next one above it (`find_vma`).
    ///
    /// # Errors
    ///
    /// `Gone` when the address space is being torn down.
    fn find_vma(&self, at: VirtAddr) -> Result<Option<Vma>, MmError>;

    /// Whether a read of `at` would succeed now. Asked when a mapping says so and an access was
    /// refused: past the end of a file, a guard page. Does not wait for pages that are elsewhere.
    fn is_readable(&self, at: VirtAddr) -> bool;

    /// Whether `at` is in mirrored memory, whose pages can migrate, and how far that is so.
    fn mirrored(&self, at: VirtAddr) -> Mirror;

    /// Who learns of changes.
    fn notifiers(&self) -> &Notifiers;

    /// Adds a device's memory, so that pages can live there (`devm_memremap_pages`).
    ///
    /// # Errors
    ///
    /// `TooManyDevices` when there is no room for another.
    fn add_device_memory(
        &self,
        pages: PageCount,
        owner: OwnerId,
        ops: Arc<dyn DeviceMemoryOps<Self>>,
    ) -> Result<DeviceMemoryId, MmError>;

    /// Begins to watch the mirrored blocks of `span`: pages may now leave them, and changes to them
    /// are reported to subscribers. Counted: each `arm` needs its `disarm`, with the token.
    ///
    /// # Errors
    ///
    /// `NotMirrored`, `Gone`, or what the world's mechanism refused.
    fn arm(&self, span: Span) -> Result<ArmToken, MmError>;

    /// Ends what `arm` began. Nothing happens when the mapping that was armed is gone, and another
    /// may be at its address by now: that is what the token tells apart.
    fn disarm(&self, span: Span, token: ArmToken);

    /// Hears of it from now on when any of `span`, which is in one mirrored mapping, is unmapped or moved
    /// to another address: subscribers are told with [`Reason::Unmap`](crate::Reason). For memory that
    /// nobody armed: touches of it cost what they did before, and no page may leave it. Watching it
    /// again changes nothing. Takes blocks.
    ///
    /// # Errors
    ///
    /// `NotMirrored`, `Gone`, or what the world's mechanism refused; then part of it may be watched.
    fn watch(&self, span: Span) -> Result<ArmToken, MmError>;

    /// Ends what `watch` began, for every block that `span` touches. Nothing happens when the mapping
    /// that was watched is gone.
    fn unwatch(&self, span: Span, token: ArmToken);

    /// How much from `at` on, and in its block, is still the mapping that was watched. An unmapping that
    /// returned before is seen, also before subscribers were told. `None`: it is gone, or another one.
    /// Takes no block.
    fn watched(&self, at: VirtAddr, token: ArmToken) -> Option<Span>;

    /// Waits for a fork that is under way, and keeps the process from forking again as long as the
    /// result lives. Whoever takes several steps that a fork must not come between has it before the
    /// first: a fork waits for leases, and who holds one must not wait for a fork. `None` when the
    /// address space is gone.
    fn no_fork(&self) -> Option<Self::NoFork<'_>>;

    /// Locks the block that `span` lies in, waiting for it.
    ///
    /// # Errors
    ///
    /// `NotMirrored` when no mirrored mapping covers `span`, `CrossesBlock` when it is in more than
    /// one block, `Gone`.
    fn lock_block(&self, span: Span) -> Result<Self::Block<'_>, MmError>;

    /// Locks the block that `page` lives in and says where in it. `None` when the page is not in
    /// use, or moved each time it was to be locked, [`MAX_CHASES`](crate::device_page::MAX_CHASES)
    /// times. No address is needed: the way of eviction.
    fn lock_device_page(&self, page: DevicePage) -> Option<(Self::Block<'_>, PageIndex)>;

    /// Whether every write of the program to a protected page is caught, those of system calls too,
    /// and none of them fails: else pages are never read in copies.
    fn can_watch_writes(&self) -> bool;

    /// Where the pages of `span` live, none of them on the move: `hmm_range_fault`. Device pages of
    /// other owners than `owner` come home first, coherent ones only where no owner is named: everybody
    /// reaches them as RAM. Protected pages, if they are to be written, are unprotected first, and then no
    /// page is [`Home::Protected`].
    ///
    /// # Errors
    ///
    /// `Unstable` when pages kept moving for longer than a second, `Gone`, or why a foreign page
    /// could not come home.
    fn range_fault(
        &self,
        span: Span,
        owner: Option<OwnerId>,
        intent: Intent,
        homes: &mut [Home],
    ) -> Result<(), MmError>;

    /// Where the pages of `span` are now, whatever is mapped there, mirrored or not: `hmm_range_fault`
    /// that asks for no page. It faults nothing in, brings nothing home and waits for no page, and is
    /// out of date when it returns: for decisions that may be wrong, such as whether moving is worth
    /// while. Every entry of `seen` is written when it succeeds. Bounded by the pages of the span, and
    /// asks the system once for each mapping in it, not for each page.
    ///
    /// # Errors
    ///
    /// `Gone`, and what the system refused.
    ///
    /// # Panics
    ///
    /// When `seen` has not one entry for each page.
    fn snapshot(&self, span: Span, seen: &mut [Seen]) -> Result<(), MmError>;
}
