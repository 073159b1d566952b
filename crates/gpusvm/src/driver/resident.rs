//! Declared residency: what a launch says it touches is there before it starts, and stays until it ends.
//!
//! ```text
//!   for each range of a declared span:
//!     make accessible (as a fault would) -> lock its block -> lease what its pages live in -> still mapped?
//!                ^                                                                                |
//!                `----------------------- no: let go, again --------------------------------------'
//! ```
//!
//! A leased allocation is not evicted, no other device takes it, and the CPU waits for it. Whoever moves
//! pages looks at the lease with their block locked: so either the lease is seen, or the pages were
//! taken before the block was locked here, and then the range is not mapped any more.
//!
//! Pages of the range that are in RAM stay there too, where the device could not fault if they went: see
//! [`stays`](crate::driver::stays). They do so from before the range is seen as mapped.

use crate::driver::counters;
use crate::driver::fault::{self, Request};
use crate::driver::stays::Stay;
use crate::driver::vm::Vm;
use gpusvm_device::{Access, FaultError, FaultMode};
use gpusvm_mm::{AddressSpace, Block, Home, MmError};
use gpusvm_pagemap::{Cause, Devmem, Holder};
use gpusvm_svm::Range;
use gpusvm_sync::Arc;
use gpusvm_types::{Span, VirtAddr};

/// How often a range may slip away between being made accessible and being leased.
pub const MAX_SLIPS: u32 = 32;

/// Memory that a launch touches, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Declared {
    /// Which pages.
    pub span: Span,
    /// How.
    pub access: Access,
}

/// Keeps memory on the device until it is dropped, and what of it the device reaches in RAM there.
#[derive(Debug, Default)]
#[must_use = "pages may leave as soon as it is dropped"]
pub struct Lease {
    allocations: Vec<(Arc<Devmem>, Holder)>,
    stays: Vec<Stay>,
}

impl Lease {
    /// How many allocations it keeps.
    pub fn count(&self) -> usize {
        self.allocations.len()
    }

    fn take(&mut self, devmem: Arc<Devmem>, holder: Holder) {
        // Neighbours are usually of one allocation.
        let mut known = self.allocations.iter().rev();
        if !known.any(|(other, _)| Arc::ptr_eq(other, &devmem)) {
            devmem.lease(holder);
            self.allocations.push((devmem, holder));
        }
    }

    fn append(&mut self, mut other: Self) {
        self.allocations.append(&mut other.allocations);
        self.stays.append(&mut other.stays);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let taken = self.allocations.iter();
        taken.for_each(|(devmem, holder)| devmem.unlease(*holder));
    }
}

impl<M: AddressSpace> Vm<M> {
    /// Makes declared memory accessible, and keeps it so as long as the lease lives.
    ///
    /// # Errors
    ///
    /// What a lane that touches it would stop with; `Gave` when it is taken away again each time.
    pub fn make_resident(&self, declared: &[Declared]) -> Result<Lease, FaultError> {
        let mut lease = Lease::default();
        let Some(first) = declared.first() else {
            return Ok(lease);
        };
        let closed = FaultError::Closed {
            at: first.span.start(),
        };
        // A fork waits for leases. Who has some must not wait for a fork, to get more.
        let _no_fork = self.svm().mm().no_fork().ok_or(closed)?;
        // What needs device memory first: its pages must not have to stay in RAM for the others.
        for wanted in [Access::Atomic, Access::Write, Access::Read] {
            for Declared { span, .. } in declared.iter().filter(|it| it.access == wanted) {
                let mut at = span.start();
                while at < span.end() {
                    at = self.make_range_resident(at, wanted, &mut lease)?;
                }
            }
        }
        Ok(lease)
    }

    /// Says where the range of `at` ends.
    fn make_range_resident(
        &self,
        at: VirtAddr,
        access: Access,
        lease: &mut Lease,
    ) -> Result<VirtAddr, FaultError> {
        let request = Request {
            at,
            access,
            stale: false,
            cause: Cause::Declared,
            in_place: false,
        };
        for _ in 0..MAX_SLIPS {
            fault::make_accessible(self, &request)?;
            // Memory of the device stays there without a lease.
            if let Some(end) = self.object_end(at) {
                return Ok(end);
            }
            if let Some(range) = self.svm().range_find(at) {
                match self.lease(&range, access) {
                    Ok(Some(here)) => {
                        lease.append(here);
                        return Ok(range.span().end());
                    }
                    Ok(None) => {}
                    Err(_) => return Err(FaultError::Closed { at }),
                }
            }
            counters::count(&self.counters.slips);
        }
        Err(FaultError::Gave {
            at,
            reason: "it was taken away again before the launch began",
        })
    }

    /// Leases what the pages of a range live in. `None` when it is not mapped any more.
    fn lease(&self, range: &Range<M>, access: Access) -> Result<Option<Lease>, MmError> {
        let _serving = range.serve();
        let mut lease = Lease::default();
        let mm = self.svm().mm();
        let holder = match self.caps().faults {
            FaultMode::Replayable => Holder::Faults,
            FaultMode::Declared => Holder::CannotFault,
        };
        if range.can_migrate() && holder == Holder::CannotFault {
            let stays = self.region.devices().stays();
            lease.stays.push(stays.stay(range.span()));
        }
        // Pages that cannot migrate need no lease to stay where they are.
        let block = match range.can_migrate().then(|| mm.lock_block(range.span())) {
            Some(Ok(block)) => Some(block),
            Some(Err(MmError::Gone)) => return Err(MmError::Gone),
            Some(Err(_)) => return Ok(None),
            None => None,
        };
        for page in range.span().pages() {
            let home = block.as_ref().map(|block| block.home(page));
            if let Some(page) = home.and_then(Home::device_page) {
                let pagemap = self.region.devices().pagemaps().page_to_pagemap(page);
                let devmem = pagemap.and_then(|pagemap| pagemap.devmem_of(page));
                devmem
                    .into_iter()
                    .for_each(|devmem| lease.take(devmem, holder));
            }
        }
        // Asked with the block locked: nothing was taken since the leases.
        let mapped = fault::is_served(range, access) && !range.is_gone();
        drop(block);
        Ok(mapped.then_some(lease))
    }
}
