//! The steps of a migration, as types.
//!
//! ```text
//!   lock_block --> Block --collect--------> Outbound --commit(pages)--> homes: Device
//!                    |                          `--drop--> every page back where it was
//!                    |
//!                    `-----collect_device--> Inbound  --commit--------> homes: System
//!                                               `--drop--> every page stays on the device
//! ```
//!
//! A page that is only read is not moved but copied: `write_protect` lets it stay where it is, and
//! whoever writes it first waits for the block, and takes every copy out of reach of its device.
//!
//! A page for a device whose memory the CPU uses in place moves neither: `collect_coherent` takes it
//! from no CPU, and from commit on it takes up a device page and is used where it is, by all. `collect_device`
//! ends that.
//!
//! Between collect and commit nobody can reach the pages: CPU threads that touch them wait, devices
//! were zapped and flushed. So a copy in between copies everything, once.
//!
//! # Differences from the kernel
//!
//! `migrate_vma_setup` and `migrate_device_pfns` become `collect`s that return an object; the undo
//! that `migrate_vma_finalize` does for entries without a destination is its `Drop`, so no error path
//! can forget it.

use crate::{DevicePage, Home, MmError};
use gpusvm_types::{DmaAddr, OwnerId, PageCount, PageIndex, Span};

/// What became of a page that was to be collected from RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The page was taken out; its bytes are here until the migration ends.
    Page(DmaAddr),
    /// There was no page, or the zero page: the device clears, nothing is copied.
    Hole,
    /// The page lives on another device, which does not map it any more: devices that reach each
    /// other copy it directly.
    Device(DevicePage),
    /// The page is the device's where it is: nothing is copied.
    InPlace,
    /// The page stays where it is.
    Kept(KeptReason),
}

impl Source {
    /// Whether the page can move.
    pub const fn is_collected(self) -> bool {
        !matches!(self, Self::Kept(_))
    }
}

/// Why a page stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptReason {
    /// It lives on a device already.
    OnDevice(DevicePage),
    /// Pinned by somebody's DMA, or otherwise not to be moved now.
    Busy,
    /// The program has just dropped it, and the kernel is not done with that.
    Dropped,
    /// It is no longer mapped.
    Unmapped,
    /// It is a page of the file behind a private mapping: the program has not written it.
    OfFile,
}

/// A page on its way from a device to RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// Where its bytes are.
    pub from: DevicePage,
    /// Where they go.
    pub to: DmaAddr,
}

/// A locked 2 MiB block: nobody else moves its pages.
pub trait Block {
    /// Pages that were taken out.
    type Outbound<'b>: Outbound
    where
        Self: 'b;
    /// Pages of devices that are about to come home.
    type Inbound<'b>: Inbound
    where
        Self: 'b;

    /// The part of the block that is one mirrored mapping.
    fn span(&self) -> Span;

    /// Where a page lives.
    fn home(&self, page: PageIndex) -> Home;

    /// Takes the pages of `span` that are in RAM, and the device pages that `peers` names, out of the
    /// reach of the CPU and of all devices; `owner` is for whom.
    ///
    /// # Errors
    ///
    /// `Gone`, `NotArmed`, `NoStaging`, or what the world's mechanism refused; then every page is
    /// where it was.
    fn collect(
        &mut self,
        span: Span,
        owner: OwnerId,
        peers: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self::Outbound<'_>, MmError>;

    /// Prepares the pages of `span` that are in RAM to be coherent: from commit on they take up device pages,
    /// and CPU and devices use them where they are. What was never touched becomes a page of zeroes, pages
    /// that were protected are so no more, and no device maps any of them when this returns; `owner` is
    /// for whom. CPUs go on using them all the time. Collected pages are [`Source::InPlace`].
    ///
    /// # Errors
    ///
    /// `Gone`, `NotArmed`, or what the world's mechanism refused; then every page is where it was.
    fn collect_coherent(
        &mut self,
        span: Span,
        owner: OwnerId,
    ) -> Result<Self::Outbound<'_>, MmError>;

    /// Takes the device pages of `span` that `select` names out of the reach of all devices, and
    /// finds RAM for them. Coherent ones are in their place already, and stay in reach of the CPU.
    ///
    /// # Errors
    ///
    /// `Gone`, `NoStaging`; then every page is where it was.
    fn collect_device(
        &mut self,
        span: Span,
        select: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self::Inbound<'_>, MmError>;

    /// Keeps everybody from writing the pages of `span` that are in RAM, and says in `sources` where
    /// each can be read for as long as the block is locked: copies of them are the same bytes from then
    /// on, until subscribers hear of [`Reason::Write`](crate::Reason::Write), or another reason. What
    /// was never touched becomes the zero page, so that its first write is caught. Device mappings of
    /// before, which may be writable, are gone; those of pages that were protected already stay.
    ///
    /// Pages that somebody's DMA has pinned before are not seen to be written by it.
    ///
    /// # Errors
    ///
    /// `UnwatchedWrites` when the world does not see them all, `NotArmed`, `Gone`, or what its mechanism
    /// refused; then nothing is protected that was not before.
    ///
    /// # Panics
    ///
    /// When `sources` is not as long as `span`, or `span` is not in the block.
    fn write_protect(&mut self, span: Span, sources: &mut [Source]) -> Result<(), MmError>;
}

/// Pages that were taken out. Dropping it puts them back.
pub trait Outbound {
    /// What was asked for.
    fn span(&self) -> Span;

    /// What became of each page of the span.
    fn sources(&self) -> &[Source];

    /// Lets the collected pages live on the device from now on: `home` says where the i-th page of
    /// the span is. Asked for collected pages only. Device pages that they leave go back to their
    /// memory.
    fn commit(self, home: &mut dyn FnMut(usize) -> DevicePage);
}

/// Device pages with RAM to copy them to. Dropping it leaves them on the device.
pub trait Inbound {
    /// What was asked for.
    fn span(&self) -> Span;

    /// The pages that come home by a copy, by their place in the span; `None` for the others.
    fn leaving(&self) -> &[Option<Leaving>];

    /// How many pages come home without one: coherent ones.
    fn in_place(&self) -> PageCount;

    /// Lets the pages live in RAM from now on, and gives the device pages back to their memory.
    ///
    /// # Errors
    ///
    /// What the world's mechanism refused; then the pages that could not come home stay on the
    /// device.
    fn commit(self) -> Result<(), MmError>;
}
