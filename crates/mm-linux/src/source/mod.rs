//! Where faults arrive: the seam between the rungs of the ladder and the handlers.
//!
//! A source hands out faults one at a time, to any of the handlers. Events go through it in the order
//! in which the kernel sent them, before any fault that came after them.

pub(crate) mod uffd; // rungs 1, 2 and 3: messages of userfaultfd
pub(crate) mod signals; // rung 4: SIGSEGV

use crate::patience::Patience;
use crate::sys::uffd::Event;
use core::time::Duration;
use gpusvm_sync::RwLockReadGuard;
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
    /// How many events had been read, at least, when it was read.
    pub(crate) told: u64,
}

/// Where faults arrive.
pub(crate) trait FaultSource: Send + Sync + core::fmt::Debug {
    /// The next fault, waiting for it up to `timeout`. What else is there goes to `sink`. `None`
    /// when nothing came, or on `rouse` and `interrupt`.
    fn next(&self, timeout: Option<Duration>, sink: &mut dyn FaultSink) -> Option<Arrival>;

    /// Keeps events from being read. Every event that was read is applied, and whoever made another
    /// one waits in the kernel: before it drops a page, after it unmapped or moved one. For as long
    /// as it takes to look at page words and fill pages accordingly.
    fn hold(&self) -> Held<'_>;

    /// Returns when every event that was read is applied.
    fn fence(&self) {
        drop(self.hold());
    }

    /// As `fence`, and of what other threads did before and have yet to tell, unless mappings change all the
    /// time.
    fn settle(&self) {
        let mut patience = Patience::new();
        while !self.if_all_is_told(&mut || ()) && patience.wait() {}
        self.fence();
    }

    /// Whether every event of what happened to mappings before was read, and is applied; if so, calls
    /// `act`, and none is read meanwhile. Never waits: `false` when that is not known.
    fn if_all_is_told(&self, act: &mut dyn FnMut()) -> bool;

    /// As `if_all_is_told`, but waits, and what happened to mappings while `act` ran counts too: then it
    /// runs `undo` as well, before any event is read, and the answer is `false`.
    fn unless_more_is_told(&self, act: &mut dyn FnMut(), undo: &mut dyn FnMut()) -> bool;

    /// Ends the wait of one that waits in `next`, or the next wait.
    fn rouse(&self);

    /// From now on, nobody waits in `next`.
    fn interrupt(&self);
}

/// Evidence that no event is read.
#[derive(Debug)]
pub(crate) struct Held<'a>(
    #[expect(dead_code, reason = "held, not read")] Option<RwLockReadGuard<'a, ()>>,
);

/// Where what is read goes, but for the first fault.
pub(crate) trait FaultSink {
    /// An event. They come in order, and no other thread is here meanwhile. Must not wait for a
    /// block.
    fn event(&mut self, event: Event);

    /// Whether a look at pages is to come before each message.
    fn reads_one_by_one(&self) -> bool;

    /// That look. A message is there, which nobody has read.
    fn look(&mut self);

    /// A fault behind the first.
    fn more(&mut self, arrival: Arrival);
}
