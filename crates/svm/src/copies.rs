//! Copies of the pages of a range, for one device to read.
//!
//! ```text
//!   duplicate: protect, read_begin, copy ---> Copies ---get_pages---> Prepared ---commit---> Pages
//!                                                |                       |                     |
//!                                                `------- dropped -------'     invalidated: not mapped,
//!                                                            |                 and still there
//!                                                            v                         |
//!                                                  memory is given back <---reclaim----'
//! ```
//!
//! A copy is valid exactly as long as the mapping that reads it. An invalidation, which can run in a
//! fault handler, frees nothing: it leaves the memory to `Pages::reclaim`, or to the next mapping.
//!
//! # Differences from the kernel
//!
//! `drm_gpusvm` has none. NVIDIA's UVM driver keeps a set of processors for each page that have a copy;
//! here the mapping of each device is that set.

use crate::{GpuSvm, Range};
use gpusvm_mm::{AddressSpace, Sequence};
use gpusvm_pagemap::{Cause, Devmem, Duplicate, MigrateError, Pagemap, duplicate};

/// Copies of the pages of a range, and since when they are the same bytes. For
/// [`GpuSvm::get_pages`]. Dropping it gives the memory back.
#[derive(Debug)]
pub struct Copies {
    pub(crate) sequence: Sequence,
    pub(crate) duplicate: Duplicate,
}

impl<M: AddressSpace> GpuSvm<M> {
    /// Copies the pages of the range that are in RAM to `devmem`; they stay where they are, and nobody
    /// can write them before the copies are out of use. Called by who serves the range, which is armed.
    ///
    /// # Errors
    ///
    /// As [`duplicate::duplicate`].
    pub fn duplicate(
        &self,
        range: &Range<M>,
        pagemap: &Pagemap<M>,
        devmem: Devmem,
        cause: Cause,
    ) -> Result<Copies, MigrateError> {
        // Protecting pages invalidates them: the sequence is read after that, and before the copy.
        let mut sequence = range.notifier().read_begin();
        let read_begin = || sequence = range.notifier().read_begin();
        let duplicate = duplicate::duplicate(pagemap, devmem, range.span(), cause, read_begin)?;
        Ok(Copies {
            sequence,
            duplicate,
        })
    }
}
