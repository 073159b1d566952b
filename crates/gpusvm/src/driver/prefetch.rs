//! Memory where it is wanted, and mapped, before the device touches it: `DRM_XE_VM_BIND_OP_PREFETCH`.
//!
//! ```text
//!   Vm::prefetch(spans) ---> Prefetch: wait, is_done, cancel       dropped: goes on by itself
//!            |                  |
//!            `---> queue ---> jobs ---> pass: one range, as a fault would have it
//!                   threads, shared by all prefetches of a device; none when there is no work
//! ```
//!
//! The unit is a piece of a block: as many are under way as there are threads, and those that wait. A
//! prefetch is a wish. Pages that cannot move are mapped where they are, and why is told; holes are
//! skipped; the rest goes on.
//!
//! # Differences from the kernel
//!
//! There a prefetch is an operation of a bind queue, in order with others, and waits for nobody's
//! processor; here it is a handle. A span in which nothing is mapped is counted, not refused.

mod job; // what is left of one
mod pass; // one range
mod queue; // who works on them

pub use queue::{MAX_PREFETCHES, PREFETCHERS};

use crate::driver::VramRegion;
use crate::driver::vm::Vm;
use gpusvm_device::FaultError;
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_pagemap::MigrateError;
use gpusvm_sync::Arc;
use gpusvm_types::Span;
use job::Job;
pub(crate) use queue::Queue;

/// Where memory is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In the memory of the device.
    Device,
    /// In RAM.
    Ram,
    /// Where a fault of the device would put it.
    Advised,
}

/// What came of a prefetch: ranges, by what was done about them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Prefetched {
    /// In device memory now, and mapped.
    pub moved: u64,
    /// Mapped where they are: they cannot migrate, could not now, or were not advised to.
    pub in_place: u64,
    /// In RAM now, and mapped if the device reaches them there.
    pub home: u64,
    /// There was nothing to do.
    pub valid: u64,
    /// Why they are not where they were wanted, the error of the first says.
    pub failed: u64,
    /// Spans in which nothing is mapped. Known when it is done.
    pub invalid: u64,
    /// Whether something did not begin, because it was cancelled or the device left.
    pub cancelled: bool,
}

/// Why memory is not where it was wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("prefetch of {span}: {reason}")]
pub struct PrefetchError {
    /// Which memory.
    pub span: Span,
    /// Why.
    pub reason: PrefetchReason,
}

/// What was in the way of a prefetch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrefetchReason {
    /// A fault would have failed there, too.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// It could not go to the device.
    #[error(transparent)]
    Migrate(#[from] MigrateError),
    /// It could not come home.
    #[error(transparent)]
    Mm(#[from] MmError),
}

/// A prefetch on its way. Dropping it leaves it on its way: it goes on in the background, if the device
/// has workers, and ends at the latest with its address space.
#[derive(Debug)]
#[must_use = "a prefetch ends some time; `wait` says when, and how"]
pub struct Prefetch<M: AddressSpace>(Arc<Job<M>>);

impl<M: AddressSpace> Vm<M> {
    /// Brings what is mapped in `spans` where it is wanted, and maps it, so that the device does not
    /// fault there; returns at once. More than [`MAX_PREFETCHES`] of a device do not queue up: then who
    /// asks does the work first.
    ///
    /// What could not be done, [`Prefetch::wait`] tells.
    pub fn prefetch(self: &Arc<Self>, spans: &[Span], to: Location) -> Prefetch<M> {
        let job = Arc::new(Job::new(Arc::downgrade(self), spans, to));
        self.region.prefetches().add(&job);
        Prefetch(job)
    }
}

impl<M: AddressSpace> VramRegion<M> {
    /// Does a piece of a prefetch, for worlds in which there are no threads in the background. Whether
    /// there was one to do.
    pub fn work_on_prefetches(&self) -> bool {
        self.prefetches().work()
    }

    /// Ends the prefetches of the device: none begins from now on, and none is under way when this
    /// returns. Those who wait for one are told `Closed`.
    pub fn close_prefetches(&self) {
        self.prefetches().close();
    }
}

impl<M: AddressSpace> Prefetch<M> {
    /// Waits until it is done, doing what of it has not begun.
    ///
    /// # Errors
    ///
    /// The first memory that is not where it was wanted, and why; everything else was tried.
    pub fn wait(&self) -> Result<Prefetched, PrefetchError> {
        while self.0.work() {}
        self.0.wait_done();
        match self.0.so_far() {
            (_, Some(error)) => Err(error),
            (prefetched, None) => Ok(prefetched),
        }
    }

    /// Whether nothing of it is left to do.
    pub fn is_done(&self) -> bool {
        self.0.is_done()
    }

    /// What came of it so far, errors or not.
    pub fn progress(&self) -> Prefetched {
        self.0.so_far().0
    }

    /// What has not begun does not begin. Returns when nothing of it is under way.
    pub fn cancel(&self) {
        self.0.stop(None);
        self.0.wait_done();
    }
}
