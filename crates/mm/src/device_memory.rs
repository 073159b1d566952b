//! What an address space asks of the owner of device pages: `dev_pagemap_ops`.

use crate::{AddressSpace, DevicePage, DeviceRun, Time};
use gpusvm_types::VirtAddr;

/// A page that lives on a device is wanted in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuFault {
    /// The address that was touched, as exactly as the world knows it.
    pub at: VirtAddr,
    /// Where the page lives.
    pub page: DevicePage,
    /// Who wants it.
    pub wanted: Wanted,
}

/// Who wants a device page in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A CPU thread touched it, and waits. The timeslice holds.
    Touched,
    /// A device wants it that cannot reach it where it is. The timeslice holds.
    Device,
    /// Somebody asked: the timeslice does not hold.
    Asked,
    /// The process forks: the timeslice does not hold.
    Fork,
    /// Part of its mapping was unmapped: the timeslice does not hold.
    Unmap,
}

/// What became of a CPU fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// The page is home, or on its way: whoever touched it tries again.
    Served,
    /// The page may not leave before this time. Whoever touched it sleeps until then.
    NotBefore(Time),
    /// The page cannot come home: whoever touched it gets a bus error.
    Failed,
}

/// The owner of a device memory.
pub trait DeviceMemoryOps<M: AddressSpace>: Send + Sync + core::fmt::Debug {
    /// Brings the page, and what belongs to it, home (`dev_pagemap_ops.migrate_to_ram`).
    ///
    /// Called by a fault handler, with the block of the page locked and nothing else. It must not
    /// allocate on the global heap and must not touch mirrored memory.
    fn migrate_to_ram(&self, mm: &M, block: &mut M::Block<'_>, fault: &CpuFault) -> FaultOutcome;

    /// These pages stand in for nothing any more (`dev_pagemap_ops.page_free`).
    ///
    /// Called with the block locked that they were in, after every device was flushed. It must not
    /// allocate and not wait.
    fn free_pages(&self, run: DeviceRun);
}
