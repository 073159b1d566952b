//! Declared residency: what a launch says it touches is there before it starts, and stays until it ends.
//!
//! ```text
//!   for each range of a declared span:
//!     make accessible (as a fault would) -> lease what it lives in -> still mapped? next
//!                ^                                                        |
//!                `------------------ no: let go, again -------------------'
//! ```
//!
//! A leased allocation is not evicted, and the CPU waits for it.

use crate::driver::Vm;
use crate::driver::fault::{self, Request};
use gpusvm_device::{Access, FaultError};
use gpusvm_mm::AddressSpace;
use gpusvm_pagemap::{Cause, Devmem};
use gpusvm_svm::Permission;
use gpusvm_sync::Arc;
use gpusvm_types::{Span, VirtAddr};

/// How often a range may slip away between being made accessible and being leased.
pub(crate) const MAX_SLIPS: u32 = 32;

/// Memory that a launch touches, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Declared {
    pub(crate) span: Span,
    pub(crate) access: Access,
}

/// Keeps memory on the device until it is dropped.
#[derive(Debug, Default)]
pub(crate) struct Lease(Vec<Arc<Devmem>>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.iter().for_each(|devmem| devmem.unlease());
    }
}

impl<M: AddressSpace> Vm<M> {
    /// Makes declared memory accessible, and keeps it so.
    pub(crate) fn make_resident(&self, declared: &[Declared]) -> Result<Lease, FaultError> {
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
        let wanted = if access.is_write() {
            Permission::Write
        } else {
            Permission::Read
        };
        let request = Request {
            at,
            access,
            stale: false,
            cause: Cause::Declared,
        };
        for _ in 0..MAX_SLIPS {
            fault::make_accessible(self, &request)?;
            let Some(range) = self.svm.range_find(at) else {
                continue;
            };
            let _serving = range.serve();
            let mut here = Lease::default();
            for resident in self.vram.residents_in(range.span()) {
                resident.devmem.lease();
                here.0.push(resident.devmem);
            }
            if range.pages().allow(wanted) && !range.is_gone() {
                lease.0.append(&mut here.0);
                return Ok(range.span().end());
            }
        }
        Err(FaultError::Gave {
            at,
            reason: "it was taken away again before the launch began",
        })
    }
}
