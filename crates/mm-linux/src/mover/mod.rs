//! How pages are taken out and put back, by rung of the capability ladder.
//!
//! ```text
//!                take_out                    settle                 fill
//!   moving    UFFDIO_MOVE to the slot         -             UFFDIO_MOVE from the slot
//!   copying   write-protect, leave in place   DONTNEED      UFFDIO_COPY from the slot
//!   remapping mprotect, mremap to the slot    -             mremap from the slot
//! ```
//!
//! All work on *runs*: pages of one block, one after the other, with the block locked.

mod uffd; // rungs 1, 2 and 3
mod remap; // rung 4

pub(crate) use remap::Remapper;
pub(crate) use uffd::UffdMover;

use crate::region::BlockState;
use gpusvm_mm::Source;
use gpusvm_types::{Span, VirtAddr};
use rustix::io::Errno;

/// How pages are taken out and put back.
pub(crate) trait Mover: Send + Sync + core::fmt::Debug {
    /// Begins to catch touches of missing pages of `span`.
    fn arm(&self, span: Span) -> Result<(), Errno>;

    /// Ends it. Nothing of `span` is on a device.
    fn disarm(&self, span: Span);

    /// Whether pages that are taken out go to the slot.
    fn takes_to_slot(&self) -> bool;

    /// Takes the pages of `run` out: to `slot`, where its place in the slot is, or out of the reach
    /// of writers only. Says for each page what became of it.
    ///
    /// On an error nothing was taken.
    fn take_out(&self, run: Span, slot: VirtAddr, sources: &mut [Source]) -> Result<(), Errno>;

    /// Pages that were taken out live elsewhere now: what is left of them here goes.
    fn settle(&self, run: Span, sources: &[Source], block: &BlockState);

    /// Pages that were taken out come back.
    fn put_back(&self, run: Span, slot: VirtAddr, sources: &[Source]) -> Result<(), Errno>;

    /// The pages of `run`, which are missing, get what is at `slot`.
    fn fill(&self, run: Span, slot: VirtAddr) -> Result<Filled, Errno>;

    /// Fresh pages at `from` move to `to`, which is in a slot.
    fn warm_up(&self, from: Span, to: VirtAddr) -> Result<(), Errno>;

    /// The pages of `run` that are missing become zeroes.
    fn zero_fill(&self, run: Span);

    /// Who waits for a page of `span` tries again.
    fn wake(&self, span: Span);

    /// Who touches the page from now on gets a bus error.
    fn poison(&self, page: Span);
}

/// What became of the pages of the slot that were filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// They went.
    Moved,
    /// They are still there.
    Copied,
}

/// The pages of the slot at `at`, as long as `run`.
pub(crate) fn slot_run(run: Span, at: VirtAddr) -> Span {
    Span::from_len(at, run.len()).expect("a run in a slot")
}
