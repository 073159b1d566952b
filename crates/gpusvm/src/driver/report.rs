//! What became of the last fault of a device address space, for who looks at a program that stopped.
//!
//! # Locking
//!
//! A leaf, held to copy a few words, by workers and by who asks.
//!
//! # Differences from the kernel
//!
//! `xe` keeps those faults that failed, as a list that a program can read once one of them ended its
//! context. Here the last of all is kept: a lane says itself what it failed at.

use core::time::Duration;
use gpusvm_device::{Access, FaultError};
use gpusvm_mm::Time;
use gpusvm_sync::Mutex;
use gpusvm_types::VirtAddr;

/// How a fault was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// All pages of its range are in the device's memory, and mapped.
    InDeviceMemory,
    /// Pages of its range are mapped where they are: in RAM, on a peer.
    InPlace,
    /// Another fault had its range mapped by then.
    Coalesced,
}

/// One fault of a device, and what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultReport {
    /// The first byte that was touched.
    pub at: VirtAddr,
    /// What was wanted.
    pub access: Access,
    /// How it was served, or why not.
    pub outcome: Result<Served, FaultError>,
    /// How many passes it took; none when it was answered with another's.
    pub passes: u32,
    /// How long it took to serve.
    pub took: Duration,
    /// When it was done, by the clock of the address space.
    pub when: Time,
}

/// The last fault.
#[derive(Debug, Default)]
pub(crate) struct LastFault(Mutex<Option<FaultReport>>);

impl LastFault {
    pub(crate) fn set(&self, report: FaultReport) {
        *self.0.lock() = Some(report);
    }

    pub(crate) fn get(&self) -> Option<FaultReport> {
        *self.0.lock()
    }
}
