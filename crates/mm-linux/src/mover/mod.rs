//! How pages are taken out and put back, by rung of the capability ladder.
//!
//! ```text
//!                take_out                    settle                 fill
//!   moving    UFFDIO_MOVE to the slot         -             UFFDIO_MOVE or COPY from the slot
//!   copying   write-protect, leave in place   DONTNEED      UFFDIO_COPY from the slot
//!   remapping mprotect, mremap to the slot    -             mremap from the slot
//! ```
//!
//! All work on *runs*: pages of one block, one after the other, with the block locked. A call that
//! fills says how far it came; what to do about the rest is the caller's to decide, who knows what
//! became of the pages meanwhile.

mod uffd; // rungs 1, 2 and 3
mod remap; // rung 4

pub(crate) use remap::Remapper;
pub(crate) use uffd::UffdMover;

use crate::region::{Behind, BlockState};
use gpusvm_mm::Source;
use gpusvm_types::{ByteSize, Span, VirtAddr};
use rustix::io::Errno;

/// How pages are taken out and put back.
pub(crate) trait Mover: Send + Sync + core::fmt::Debug {
    /// Begins to catch touches of missing pages of `span`; where a file is behind, also of pages that are
    /// in the file only.
    fn arm(&self, span: Span, behind: Behind) -> Result<(), Errno>;

    /// Whether touches of pages that are in a file only can be caught, and writes of pages that are not.
    fn can_watch_files(&self) -> bool;

    /// Ends it. Nothing of `span` is on a device.
    fn disarm(&self, span: Span);

    /// Begins to hear of unmaps and remaps of `span`, and of nothing else. `NOSYS` where that is not to
    /// be had without more.
    fn watch(&self, span: Span) -> Result<(), Errno>;

    /// Ends it, unless it was armed since.
    fn unwatch(&self, span: Span);

    /// Whether pages that are taken out go to the slot.
    fn takes_to_slot(&self) -> bool;

    /// Whether the page is part of a huge page, as far as can be told: a hint.
    fn is_huge(&self, page: Span) -> bool;

    /// Takes the pages of `run` out: to `slot`, where its place in the slot is, or out of the reach
    /// of writers only. Says for each page what became of it.
    ///
    /// On an error nothing was taken.
    fn take_out(
        &self,
        run: Span,
        slot: VirtAddr,
        sources: &mut [Source],
        block: &BlockState,
    ) -> Result<Taken, Errno>;

    /// Pages that were taken in place live elsewhere now: what is left of them here goes. `false` when some
    /// of it may be there still, because the program unmapped some of it meanwhile. See
    /// [`Process::discard`](crate::process::Process::discard).
    fn discard(&self, run: Span) -> bool;

    /// Whether writes of pages that stay where they are can be caught.
    fn can_protect(&self) -> bool;

    /// The zero page comes where nothing of `run` is.
    fn fill_gaps(&self, run: Span) -> Result<(), Errno>;

    /// Catches writes of the pages of `run`, which stay where they are, and says where each can be read.
    /// Devices that could write them were flushed.
    ///
    /// On an error some may be protected: `release` them.
    fn protect(&self, run: Span, sources: &mut [Source]) -> Result<(), Errno>;

    /// Pages that were taken in place, or protected, are writers' again; who waits for one of them
    /// tries again.
    fn release(&self, run: Span);

    /// As `release`, one page, and without waiting: if mappings are changing right now, who waits for it
    /// tries again, and finds it as it was. For handlers that must answer at once.
    fn release_at_once(&self, page: Span);

    /// Pages that were taken to the slot come back; holes among them stay holes.
    fn put_back(&self, run: Span, slot: VirtAddr) -> Filled;

    /// The pages of `run`, which are missing, get what is at `slot`, where all of it is.
    fn fill(&self, run: Span, slot: VirtAddr) -> Filled;

    /// As `fill`, by a copy where there is a choice.
    fn fill_copy(&self, run: Span, slot: VirtAddr) -> Filled;

    /// Whether `fill` takes the pages of a slot away for a run of this length.
    fn moves_in(&self, len: ByteSize) -> bool;

    /// Fresh pages at `from` move to `to`, which is in a slot.
    fn warm_up(&self, from: Span, to: VirtAddr) -> Result<(), Errno>;

    /// The pages of `run` that are missing become zeroes. Whether any was missing.
    fn zero_fill(&self, run: Span) -> bool;

    /// As `zero_fill`, a page whose writes are caught.
    fn zero_fill_protected(&self, page: Span);

    /// The page of the file behind a private mapping comes where none is; its writes are caught, or not.
    /// Whether it was missing, or it is too early to tell. `None` when the file has none there.
    fn fill_from_file(&self, page: Span, protected: bool) -> Option<bool>;

    /// Whether pages that live elsewhere are marked where they were.
    fn leaves_markers(&self) -> bool {
        false
    }

    /// Marks the pages of `run`, of which none is here, or takes the marks off. `AGAIN`: events must be read
    /// first.
    fn mark(&self, _run: Span, _on: bool) -> Result<(), Errno> {
        Ok(())
    }

    /// Who waits for a page of `span` tries again.
    fn wake(&self, span: Span);

    /// Who touches the page from now on gets a bus error.
    fn poison(&self, page: Span);

    /// Whatever is armed or watched is so no more, for good. For who hears of nothing any more, so that
    /// nobody waits for that.
    fn end(&self);
}

/// How pages were taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// They are in the slot; as one huge page, or one by one.
    Moved {
        /// As one.
        huge: bool,
    },
    /// They are where they were, and nobody can write them.
    InPlace,
}

/// How far a fill came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Filled {
    /// What was filled, from the start on.
    pub(crate) done: ByteSize,
    /// Whether the pages of the slot went, as opposed to being copied.
    pub(crate) moved: bool,
    /// Why no more was filled. `AGAIN`: events must be read first.
    pub(crate) errno: Option<Errno>,
}

/// The pages of the slot at `at`, as long as `run`.
pub(crate) fn slot_run(run: Span, at: VirtAddr) -> Span {
    Span::from_len(at, run.len()).expect("a run in a slot")
}
