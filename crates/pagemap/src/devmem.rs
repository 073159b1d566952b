//! One allocation of device memory, filled by one migration: `drm_pagemap_devmem`.
//!
//! ```text
//!   new -----> filled by migrate_to_devmem -----> last page gone -----> detached, released
//!     \                                                                    ^
//!      `------ the migration failed, or nobody ever filled it -------------'
//! ```

use crate::pieces::{Cause, ToDevmem, ToRam};
use alloc::{boxed::Box, sync::Arc};
use core::time::Duration;
use gpusvm_mm::Time;
use gpusvm_sync::Mutex;
use gpusvm_sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use gpusvm_types::{DevicePfn, PageCount};

/// Something that still happens to device memory that was just allocated: it is being cleared, or who
/// had it before is still being copied out (`pre_migrate_fence`).
pub trait PreMigrateFence: Send + Sync + core::fmt::Debug {
    /// Returns when the memory is idle.
    ///
    /// # Errors
    ///
    /// What the device failed at: then the memory is not used.
    fn wait(&self) -> Result<(), DevmemError>;
}

/// What the driver does for one allocation (`drm_pagemap_devmem_ops`).
///
/// The copies run with a block locked. None may touch mirrored memory, and `copy_to_ram` and
/// `release`, which serve CPU faults, may not allocate on the global heap.
pub trait DevmemOps: Send + Sync + core::fmt::Debug {
    /// Says which device pages the allocation consists of, in order. They are *raw* page frame
    /// numbers. A failure ends the migration before anything is taken. Called without locks.
    ///
    /// # Errors
    ///
    /// Whatever keeps the driver from it.
    fn populate_pfn(&self, pfns: &mut [DevicePfn]) -> Result<(), DevmemError>;

    /// Copies and clears, not before `after`, and returns when it is done. A failure ends the
    /// migration; every page is put back.
    ///
    /// # Errors
    ///
    /// What the device failed at.
    fn copy_to_devmem(
        &self,
        pieces: &mut dyn Iterator<Item = ToDevmem>,
        after: Option<&dyn PreMigrateFence>,
        cause: Cause,
    ) -> Result<(), DevmemError>;

    /// Copies to RAM, or to the memory of a peer, not before `after`, and returns when it is done. A
    /// failure leaves the pages where they are.
    ///
    /// # Errors
    ///
    /// What the device failed at. `Unsupported` when its engine cannot write to that peer.
    fn copy_to_ram(
        &self,
        pieces: &mut dyn Iterator<Item = ToRam>,
        after: Option<&dyn PreMigrateFence>,
        cause: Cause,
    ) -> Result<(), DevmemError>;

    /// So many pages became coherent in the allocation, or ceased to be: nothing was copied. To count them;
    /// called with a block locked, also by a fault handler: it must not allocate and not wait.
    fn moved_in_place(&self, _way: Way, _pages: PageCount, _cause: Cause) {}

    /// Gives the memory back. Called once, from whichever thread freed the last page, possibly with
    /// a block locked: it must not wait.
    fn release(&self);
}

/// Which way pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the device.
    ToDevice,
    /// Home.
    ToRam,
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
    /// The device's engine does not do this.
    #[error("the device cannot do this: {what}")]
    Unsupported {
        /// What was asked of it.
        what: &'static str,
    },
}

impl DevmemError {
    /// What the kernel's twin returns.
    pub const fn errno(self) -> i32 {
        match self {
            Self::Copy { .. } => 5,         // EIO
            Self::Pages => 22,              // EINVAL
            Self::Unsupported { .. } => 95, // EOPNOTSUPP
        }
    }
}

/// What the device of a launch does when a page is taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// It faults, and gets it back. A fork need not wait for the launch; and must not, since its other
    /// faults wait for the fork.
    Faults,
    /// The launch fails.
    CannotFault,
}

/// What keeps pages on a device, depending on who wants them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Leases, and the timeslice.
    All,
    /// Leases.
    Leases,
    /// Leases of launches that fail without their pages.
    FirmLeases,
}

/// One allocation of device memory.
#[derive(Debug)]
pub struct Devmem {
    ops: Box<dyn DevmemOps>,
    size: PageCount,
    /// The time until which nobody can take pages, but who evicts, in nanoseconds of the mm's clock.
    timeslice_expiration: AtomicU64,
    /// How many launches need it to stay.
    leases: [AtomicU32; 2],
    detached: AtomicBool,
    /// What the first copy waits for.
    pre_migrate_fence: Mutex<Option<Arc<dyn PreMigrateFence>>>,
}

impl Devmem {
    /// An allocation of `size` pages that nothing lives in yet.
    pub fn new(size: PageCount, ops: Box<dyn DevmemOps>) -> Self {
        Self {
            ops,
            size,
            timeslice_expiration: AtomicU64::new(0),
            leases: Default::default(),
            detached: AtomicBool::new(false),
            pre_migrate_fence: Mutex::new(None),
        }
    }

    /// As [`Devmem::new`], of memory that is not idle before `fence`.
    pub fn idle_after(
        size: PageCount,
        ops: Box<dyn DevmemOps>,
        fence: Arc<dyn PreMigrateFence>,
    ) -> Self {
        let this = Self::new(size, ops);
        *this.pre_migrate_fence.lock() = Some(fence);
        this
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
    /// that holds, and the next look at a lease, if that holds.
    pub fn stays_until(&self, now: Time, holds: Holds) -> Option<Time> {
        gpusvm_sync::walk!("stays_until");
        /// How soon to look again at a lease, which ends at no known time.
        const LEASE_POLL: Duration = Duration::from_millis(1);
        let is_held = match holds {
            Holds::All | Holds::Leases => self.is_leased(),
            Holds::FirmLeases => self.leases_of(Holder::CannotFault).load(Ordering::Acquire) > 0,
        };
        if is_held {
            return Some(now.after(LEASE_POLL));
        }
        let until = Duration::from_nanos(self.timeslice_expiration.load(Ordering::Acquire));
        let until = Time::since_start(until);
        (holds == Holds::All && now < until).then_some(until)
    }

    /// Keeps the pages on the device until as many `unlease`s of this kind. Pages may be on their way
    /// home unless their block is locked: whoever moves them asks with the block locked.
    pub fn lease(&self, holder: Holder) {
        self.leases_of(holder).fetch_add(1, Ordering::AcqRel);
    }

    /// Ends a `lease`.
    ///
    /// # Panics
    ///
    /// When there was none.
    pub fn unlease(&self, holder: Holder) {
        let before = self.leases_of(holder).fetch_sub(1, Ordering::AcqRel);
        assert!(before > 0, "a lease ended that was not taken");
    }

    /// Whether a launch needs it.
    pub fn is_leased(&self) -> bool {
        let is_held = |holder| self.leases_of(holder).load(Ordering::Acquire) > 0;
        is_held(Holder::Faults) || is_held(Holder::CannotFault)
    }

    fn leases_of(&self, holder: Holder) -> &AtomicU32 {
        match holder {
            Holder::Faults => &self.leases[0],
            Holder::CannotFault => &self.leases[1],
        }
    }

    /// Coherent pages of it are RAM's again.
    pub(crate) fn came_home_in_place(&self, pages: PageCount, cause: Cause) {
        if pages > PageCount::ZERO {
            self.ops.moved_in_place(Way::ToRam, pages, cause);
        }
    }

    /// What the memory is not idle before, if that is still to be waited for.
    pub(crate) fn pre_migrate_fence(&self) -> Option<Arc<dyn PreMigrateFence>> {
        self.pre_migrate_fence.lock().clone()
    }

    /// The first copy is done: the memory is idle.
    pub(crate) fn fence_passed(&self) {
        let fence = self.pre_migrate_fence.lock().take();
        drop(fence);
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
