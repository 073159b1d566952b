//! Where faults arrive: the seam between the rungs of the ladder and the handlers.
//!
//! A source hands out faults one at a time, to any of the handlers. Events go through it in the order
//! in which the kernel sent them, before any fault that came after them.

pub(crate) mod uffd; // rungs 1, 2 and 3: messages of userfaultfd
pub(crate) mod signals; // rung 4: SIGSEGV

use crate::sys::uffd::Event;
use core::time::Duration;
use gpusvm_types::VirtAddr;

/// A thread waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// The address it touched.
    pub(crate) at: VirtAddr,
    /// It touched a page that is there, but is write-protected.
    pub(crate) protected: bool,
    /// Which thread, if known.
    pub(crate) tid: Option<i32>,
}

/// Where faults arrive.
pub(crate) trait FaultSource: Send + Sync + core::fmt::Debug {
    /// The next fault, waiting for it up to `timeout`. Events that came before it go to `apply`, in
    /// order; no other thread is in `apply` meanwhile. `None` when nothing came, or on `interrupt`.
    fn next(&self, timeout: Option<Duration>, apply: &mut dyn FnMut(Event)) -> Option<Arrival>;

    /// From now on, nobody waits in `next`.
    fn interrupt(&self);
}
