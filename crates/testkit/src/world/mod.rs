//! What a test needs of a world: a program whose memory is mapped, touched, forked and unmapped.
//!
//! ```text
//!   test case ---- World ---- the program's side: map, unmap, protect, read, write, fork, exit
//!                    |
//!                    |------- mm()   the address space, which the engine works on
//!                    `------- bus()  RAM as a device reaches it
//!
//!   sim     gpusvm_mm_sim::Sim          one seed, one history; threads take turns
//!   linux   gpusvm_mm_linux::Process    this very process; threads are threads
//! ```
//!
//! # Differences between worlds
//!
//! What a world cannot do, [`World::supports`] says with a reason, and the case that needs it is
//! skipped with that reason printed.

pub mod linux; // this process
pub mod sim; // a simulated one

use gpusvm_mm::AddressSpace;
use gpusvm_sync::Arc;
use gpusvm_types::{DmaAddr, PageCount, Span, VirtAddr};

pub use linux::Linux;
pub use sim::Simulated;

/// What a mapping permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prot {
    /// Nothing.
    None,
    /// Loads.
    Read,
    /// Loads and stores.
    ReadWrite,
}

/// What is behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Private and anonymous, in base pages, and mirrored: its pages can live on a device.
    Mirrored,
    /// The same in 2 MiB pages, where the world has them.
    Huge,
    /// Private and anonymous, and nobody mirrors it: devices reach it in place.
    Plain,
    /// Anonymous and shared.
    Shared,
    /// A file, shared: stores reach the file.
    FileShared,
    /// A file, private: stores stay in the process.
    FilePrivate,
}

/// What a world may be unable to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Memory of this kind.
    Kind(Kind),
    /// Files whose contents can be looked at: [`World::behind`].
    FileContents,
    /// Two mappings that one `mremap` made of one: `MREMAP_DONTUNMAP`.
    DontUnmap,
    /// `mremap` of memory that is mirrored.
    Remap,
    /// `munmap` of a part of memory that is mirrored, and all of it.
    Unmap,
    /// `madvise(MADV_DONTNEED)` of memory that is mirrored.
    DropContents,
    /// Shared memory that a child of fork shares too.
    SharedWithChild,
    /// An address space that is gone while devices are at work in it.
    ExitUnderWay,
}

/// An access that the world refused: `SIGSEGV` or `SIGBUS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// Where.
    pub at: VirtAddr,
}

/// RAM did not answer a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoAnswer;

/// What a device reaches by bus address.
pub trait Bus: Send + Sync + core::fmt::Debug {
    /// Reads. Aligned words of eight bytes are not torn.
    ///
    /// # Errors
    ///
    /// When nothing, or not all, is there.
    fn read(&self, at: DmaAddr, into: &mut [u8]) -> Result<(), NoAnswer>;

    /// Writes. Aligned words of eight bytes are not torn.
    ///
    /// # Errors
    ///
    /// As `read`; part of the bytes may be written.
    fn write(&self, at: DmaAddr, from: &[u8]) -> Result<(), NoAnswer>;

    /// Adds to an aligned word, atomically towards everybody, and says what was there.
    ///
    /// # Errors
    ///
    /// As `read`.
    fn fetch_add(&self, at: DmaAddr, by: u64) -> Result<u64, NoAnswer>;

    /// Runs what a device does. Its touches of RAM must never wait for whoever waits for the device.
    fn as_device(&self, work: &mut dyn FnMut());
}

/// What a CPU does to memory.
pub trait Cpu {
    /// Loads a word.
    ///
    /// # Errors
    ///
    /// What would have killed the program.
    fn read(&self, at: VirtAddr) -> Result<u64, Signal>;

    /// Stores a word.
    ///
    /// # Errors
    ///
    /// As `read`.
    fn write(&self, at: VirtAddr, value: u64) -> Result<(), Signal>;

    /// Adds to a word, atomically, and says what was there.
    ///
    /// # Errors
    ///
    /// As `read`.
    fn fetch_add(&self, at: VirtAddr, by: u64) -> Result<u64, Signal>;
}

/// A thread of the program, or of a device.
pub type Thread = Box<dyn FnOnce() + Send>;

/// One program in one address space.
pub trait World: Cpu + Send + Sync + core::fmt::Debug + Sized + 'static {
    /// The address space.
    type Mm: AddressSpace;

    /// For reports.
    const NAME: &'static str;

    /// A new world. What happens in it depends on `seed`, as far as the world can choose. `None` after
    /// saying why there is none.
    fn start(seed: u64) -> Option<Arc<Self>>;

    /// How many rounds a race gets, in a new world each.
    fn rounds() -> u64;

    /// In how many worlds a case without a race of its own is run: as many as there are kinds.
    fn rounds_of_plain_cases() -> u64;

    /// The address space.
    fn mm(&self) -> &Arc<Self::Mm>;

    /// RAM, as devices reach it.
    fn bus(&self) -> Arc<dyn Bus>;

    /// Whether the world can do something.
    ///
    /// # Errors
    ///
    /// Why it cannot.
    fn supports(&self, feature: Feature) -> Result<(), &'static str>;

    /// Maps memory, at a multiple of 2 MiB, apart from everything else.
    fn map(&self, pages: PageCount, prot: Prot, kind: Kind) -> Span;

    /// Maps memory again where it was unmapped.
    fn map_again(&self, span: Span, prot: Prot, kind: Kind);

    /// Unmaps (`munmap`).
    fn unmap(&self, span: Span);

    /// Changes what a mapping permits (`mprotect`), and lets the engine know.
    fn protect(&self, span: Span, prot: Prot);

    /// Gives the contents up (`MADV_DONTNEED`).
    fn drop_contents(&self, span: Span);

    /// Moves a mapping to a fresh address (`mremap`); `dontunmap` leaves an empty one behind.
    fn remap(&self, span: Span, dontunmap: bool) -> Span;

    /// Forks. `child` sees the memory as it was; whether it was content comes back.
    fn fork(&self, child: &mut dyn FnMut(&dyn Cpu) -> bool) -> bool;

    /// The program ends: the address space is gone.
    fn exit(&self);

    /// What the file behind an address holds there.
    fn behind(&self, at: VirtAddr) -> Option<u64>;

    /// Returns when the engine has heard of, and done, all that the program did before.
    fn settle(&self);

    /// Runs threads to their end, all at once.
    fn run(&self, threads: Vec<Thread>);

    /// Lets others go on for a while.
    fn pause(&self);

    /// What the world itself finds wrong, at a moment at which nothing moves.
    ///
    /// # Errors
    ///
    /// What it found.
    fn check(&self) -> Result<(), String>;

    /// What led here, for a report.
    fn story(&self) -> String;
}
