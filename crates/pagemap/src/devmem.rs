//! One allocation of device memory, filled by one migration: `drm_pagemap_devmem`.
//!
//! ```text
//!   new -----> filled by migrate_to_devmem -----> last page gone -----> detached, released
//!     \                                                                    ^
//!      `------ the migration failed, or nobody ever filled it -------------'
//! ```

use crate::pieces::{Cause, ToDevmem, ToRam};
use alloc::boxed::Box;
use core::time::Duration;
use gpusvm_mm::Time;
use gpusvm_sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use gpusvm_types::{DevicePfn, PageCount};

/// What the driver does for one allocation (`drm_pagemap_devmem_ops`).
///
/// All of them but `release` run with a block locked. None may touch mirrored memory, and
/// `copy_to_ram` and `release`, which serve CPU faults, may not allocate on the global heap.
pub trait DevmemOps: Send + Sync + core::fmt::Debug {
    /// Says which device pages the allocation consists of, in order. They are *raw* page frame
    /// numbers. A failure ends the migration; every page is put back.
    ///
    /// # Errors
    ///
    /// Whatever keeps the driver from it.
    fn populate_pfn(&self, pfns: &mut [DevicePfn]) -> Result<(), DevmemError>;

    /// Copies and clears, and returns when it is done. A failure ends the migration; every page is
    /// put back.
    ///
    /// # Errors
    ///
    /// What the device failed at.
    fn copy_to_devmem(
        &self,
        pieces: &mut dyn Iterator<Item = ToDevmem>,
        cause: Cause,
    ) -> Result<(), DevmemError>;

    /// Copies, and returns when it is done. A failure leaves the pages on the device.
    ///
    /// # Errors
    ///
    /// What the device failed at.
    fn copy_to_ram(
        &self,
        pieces: &mut dyn Iterator<Item = ToRam>,
        cause: Cause,
    ) -> Result<(), DevmemError>;

    /// Gives the memory back. Called once, from whichever thread freed the last page, possibly with
    /// a block locked: it must not wait.
    fn release(&self);
}

/// What the device's part of a migration failed at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DevmemError {
    /// A copy failed.
    #[error("the device could not copy: {reason}")]
    Copy {
        /// What it said.
        reason: &'static str,
    },
    /// The allocation has fewer pages than were asked for.
    #[error("the allocation has no such pages")]
    Pages,
}

impl DevmemError {
    /// What the kernel's twin returns.
    pub const fn errno(self) -> i32 {
        match self {
            Self::Copy { .. } => 5, // EIO
            Self::Pages => 22,      // EINVAL
        }
    }
}

/// One allocation of device memory.
#[derive(Debug)]
pub struct Devmem {
    ops: Box<dyn DevmemOps>,
    size: PageCount,
    /// The time until which the CPU cannot take pages back, in nanoseconds of the mm's clock.
    timeslice_expiration: AtomicU64,
    /// How many launches need it to stay.
    leases: AtomicU32,
    detached: AtomicBool,
}

impl Devmem {
    /// An allocation of `size` pages that nothing lives in yet.
    pub fn new(size: PageCount, ops: Box<dyn DevmemOps>) -> Self {
        Self {
            ops,
            size,
            timeslice_expiration: AtomicU64::new(0),
            leases: AtomicU32::new(0),
            detached: AtomicBool::new(false),
        }
    }

    /// How many pages it has.
    pub fn size(&self) -> PageCount {
        self.size
    }

    /// The driver's part.
    pub fn ops(&self) -> &dyn DevmemOps {
        &*self.ops
    }

    /// Whether its last page is gone and its memory was given back.
    pub fn is_detached(&self) -> bool {
        self.detached.load(Ordering::Acquire)
    }

    /// From `now` on, the CPU cannot take pages back for so long.
    pub fn start_timeslice(&self, now: Time, timeslice: Duration) {
        let until = now.after(timeslice).as_duration().as_nanos();
        let until = u64::try_from(until).unwrap_or(u64::MAX);
        self.timeslice_expiration.store(until, Ordering::Release);
    }

    /// The time before which pages may not leave, if it is not over: the end of the timeslice, if
    /// that counts, and the next look at a lease, which always counts.
    pub fn stays_until(&self, now: Time, timeslice: bool) -> Option<Time> {
        /// How soon to look again at a lease, which ends at no known time.
        const LEASE_POLL: Duration = Duration::from_millis(1);
        if self.is_leased() {
            return Some(now.after(LEASE_POLL));
        }
        let until = Duration::from_nanos(self.timeslice_expiration.load(Ordering::Acquire));
        let until = Time::since_start(until);
        (timeslice && now < until).then_some(until)
    }

    /// Keeps the pages on the device until as many `unlease`s.
    pub fn lease(&self) {
        self.leases.fetch_add(1, Ordering::AcqRel);
    }

    /// Ends a `lease`.
    ///
    /// # Panics
    ///
    /// When there was none.
    pub fn unlease(&self) {
        let before = self.leases.fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "a lease ended that was not taken");
    }

    /// Whether a launch needs it.
    pub fn is_leased(&self) -> bool {
        self.leases.load(Ordering::Acquire) > 0
    }

    /// Gives the memory back, the first time only.
    pub(crate) fn release(&self) {
        if !self.detached.swap(true, Ordering::AcqRel) {
            self.ops.release();
        }
    }
}

/// An allocation that nothing ever lived in goes back here.
impl Drop for Devmem {
    fn drop(&mut self) {
        self.release();
    }
}
