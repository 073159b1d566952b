//! Faults of the device: reported, served, replayed.

use crate::VmId;
use core::time::Duration;
use gpusvm_types::VirtAddr;

/// What the device wanted to do: what needs less before what needs more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Access {
    /// A load.
    Read,
    /// A store.
    Write,
    /// A read-modify-write.
    Atomic,
}

impl Access {
    /// Whether it needs a writable mapping.
    pub const fn is_write(self) -> bool {
        !matches!(self, Self::Read)
    }
}

/// Names one outstanding fault to the device that reported it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FaultId(pub u64);

/// An access that found no translation, or not the permission it needs. Whoever made it waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceFault {
    /// Which one.
    pub id: FaultId,
    /// In which address space.
    pub vm: VmId,
    /// The first byte that was touched.
    pub at: VirtAddr,
    /// What was wanted.
    pub access: Access,
    /// There was a translation to RAM, and RAM refused the access: the mapping is out of date.
    pub stale: bool,
}

/// What becomes of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Try the access again.
    Replay,
    /// The access cannot be served: stop who made it.
    Fail(FaultError),
}

/// Why an access cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// Nothing is mapped there.
    #[error("{at} is not mapped")]
    Unmapped {
        /// The address that was touched.
        at: VirtAddr,
    },
    /// Nothing is bound there in the device address space: it neither mirrors the process nor leads to
    /// memory of the device.
    #[error("nothing is bound at {at} in the device address space")]
    NotBound {
        /// The address that was touched.
        at: VirtAddr,
    },
    /// The mapping forbids it.
    #[error("{access:?} of {at} is not permitted by its mapping")]
    NotPermitted {
        /// The address that was touched.
        at: VirtAddr,
        /// What was wanted.
        access: Access,
    },
    /// There is no page, and to make one would be to wait: a userfaultfd of the program keeps it back; or it is
    /// not in its file.
    #[error(
        "the page of {at} is kept back, by a userfaultfd of the program, or is not in its file"
    )]
    KeptBack {
        /// The address that was wanted.
        at: VirtAddr,
    },
    /// The device reaches only what was declared to it or shared with it, and this was not.
    #[error("{at} is not resident on a device that cannot fault, and was not declared")]
    NotDeclared {
        /// The address that was touched.
        at: VirtAddr,
    },
    /// The device cannot reach RAM in place, and the page cannot be moved.
    #[error("{at} is in RAM, cannot move, and the device cannot reach it")]
    OutOfReach {
        /// The address that was touched.
        at: VirtAddr,
    },
    /// A mapping leads into the memory of a peer, and the peer does not answer.
    #[error("{at} is in the memory of a peer that is gone")]
    PeerLost {
        /// The address that was touched.
        at: VirtAddr,
    },
    /// The driver gave up: out of a resource, or not stable for too long.
    #[error("the fault at {at} could not be served: {reason}")]
    Gave {
        /// The address that was touched.
        at: VirtAddr,
        /// What it lacked.
        reason: &'static str,
    },
    /// The address space is being torn down.
    #[error("the address space was closed while {at} was being served")]
    Closed {
        /// The address that was touched.
        at: VirtAddr,
    },
}

/// Where a device's replayable faults arrive.
pub trait FaultQueue: Send + Sync {
    /// Waits up to `timeout` for faults and takes as many as fit `out`. Zero when none came in
    /// time or the queue is closed. Each fault is handed out once; several threads may take.
    fn take(&self, out: &mut [DeviceFault], timeout: Duration) -> usize;

    /// Whether the queue was closed: no fault will come any more.
    fn is_closed(&self) -> bool;

    /// Says what becomes of a fault that was taken. Every taken fault must be resolved once.
    fn resolve(&self, fault: &DeviceFault, verdict: Verdict);

    /// Wakes everyone in `take` and fails what is outstanding or comes later.
    fn close(&self);
}
