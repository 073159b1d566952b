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

use crate::driver::counters;
use crate::driver::fault::{self, Request};
use crate::driver::vm::Vm;
use gpusvm_device::{Access, FaultError};
use gpusvm_mm::{AddressSpace, Block, Home, MmError};
use gpusvm_pagemap::{Cause, Devmem};
use gpusvm_svm::{Permission, Range};
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

/// Keeps memory on the device until it is dropped.
#[derive(Debug, Default)]
#[must_use = "pages may leave as soon as it is dropped"]
pub struct Lease(Vec<Arc<Devmem>>);

impl Lease {
    /// How many allocations it keeps.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    fn take(&mut self, devmem: Arc<Devmem>) {
        // Neighbours are usually of one allocation.
        let known = self.0.iter().rev().any(|other| Arc::ptr_eq(other, &devmem));
        if !known {
            devmem.lease();
            self.0.push(devmem);
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.iter().for_each(|devmem| devmem.unlease());
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
        for Declared { span, access } in declared {
            let mut at = span.start();
            while at < span.end() {
                at = self.make_range_resident(at, *access, &mut lease)?;
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
        };
        for _ in 0..MAX_SLIPS {
            fault::make_accessible(self, &request)?;
            if let Some(range) = self.svm().range_find(at) {
                match self.lease(&range, fault::wanted(access)) {
                    Ok(Some(mut here)) => {
                        lease.0.append(&mut here.0);
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
    fn lease(&self, range: &Range<M>, wanted: Permission) -> Result<Option<Lease>, MmError> {
        let _serving = range.serve();
        let mut lease = Lease::default();
        let mm = self.svm().mm();
        // Pages that cannot migrate need no lease to stay where they are.
        let block = match range.can_migrate().then(|| mm.lock_block(range.span())) {
            Some(Ok(block)) => Some(block),
            Some(Err(MmError::Gone)) => return Err(MmError::Gone),
            Some(Err(_)) => return Ok(None),
            None => None,
        };
        for page in range.span().pages() {
            let home = block.as_ref().map(|block| block.home(page));
            if let Some(Home::Device(page)) = home {
                let pagemap = self.region.devices().pagemaps().page_to_pagemap(page);
                let devmem = pagemap.and_then(|pagemap| pagemap.devmem_of(page));
                devmem.into_iter().for_each(|devmem| lease.take(devmem));
            }
        }
        // Asked with the block locked: nothing was taken since the leases.
        let mapped = range.pages().allow(wanted) && !range.is_gone();
        drop(block);
        Ok(mapped.then_some(lease))
    }
}
