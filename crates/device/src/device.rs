//! The device as a whole, and the devices it can reach.
//!
//! ```text
//!   bus addresses:  0 ....... RAM ....... [ aperture of A ] ....... [ aperture of B ] ...
//!                                          |               |
//!                           device memory: 0               Caps::vram
//! ```
//!
//! Devices that share an interconnect reach each other's memory by bus address, as PCIe peers do
//! through their BARs: byte `n` of a device's memory is at [`Device::aperture`] `+ n`. Such an
//! address may stand wherever one of RAM may: in a copy ([`CopyOp`](crate::CopyOp)) and in a mapping
//! ([`Target`](crate::Target)).
//!
//! # Life cycle
//!
//! A device's memory is reached by its peers as long as the device lives, and nobody but the driver
//! knows who those are. The driver zaps and flushes every mapping that leads into a device, on all
//! of its peers, and waits for their copies, before it gives up the device, and before it gives the
//! memory behind such a mapping to somebody else. A device is not asked to check this. Where it can
//! tell, an access to a peer that is gone is [`FaultError::PeerLost`](crate::FaultError::PeerLost).

use crate::{CopyEngine, FaultQueue, PageTables};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, Span};

/// What a device tells about itself once, and what it can do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caps {
    /// A name for reports: `softgpu`.
    pub name: &'static str,
    /// How much memory the device has, in whole pages.
    pub vram: ByteSize,
    /// The sizes its page table entries can have.
    pub page_sizes: PageSizes,
    /// What happens when it touches a page it has no translation for.
    pub faults: FaultMode,
    /// Whether it can reach RAM in place, coherently with the CPU's caches.
    pub coherent: bool,
    /// Whether its atomic operations on RAM are atomic towards the CPU.
    pub atomics_on_ram: bool,
    /// Whether the CPU uses its memory in place, coherently. Pages that come to it then stay where the program
    /// has them, and the device reaches them at their address, as it reaches RAM: so it needs `coherent` as
    /// well. Its memory proper holds only what is to be exclusive to it.
    pub coherent_memory: bool,
    /// Which devices it shares its memory with. `None`: no peer reaches it, and it reaches none.
    pub fabric: Option<Fabric>,
}

/// An interconnect: devices of one fabric reach each other's memory, in copies and in place, with
/// atomic operations that are atomic towards all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fabric(pub u32);

/// The sizes a page table entry can have: a set of powers of two, always with 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSizes {
    /// Descending, the last one 4 KiB.
    pub sizes: &'static [ByteSize],
}

impl PageSizes {
    /// 2 MiB, 64 KiB and 4 KiB.
    pub const COMMON: Self = Self {
        sizes: &[ByteSize::mib(2), ByteSize::kib(64), ByteSize::kib(4)],
    };
}

/// What a device does on a touch of an unmapped page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultMode {
    /// It reports a fault, waits, and replays the access when told.
    Replayable,
    /// The launch that did it is lost. A launch declares what it touches beforehand.
    Declared,
}

/// A device that can share virtual memory with a process.
pub trait Device: Send + Sync + core::fmt::Debug {
    /// What it can do. The same for its whole life.
    fn caps(&self) -> &Caps;

    /// What moves bytes between RAM and device memory.
    fn copy_engine(&self) -> &dyn CopyEngine;

    /// What translates the device's accesses.
    fn page_tables(&self) -> &dyn PageTables;

    /// Where its faults arrive. `None` for [`FaultMode::Declared`].
    fn fault_queue(&self) -> Option<&dyn FaultQueue>;

    /// The bus address at which its memory begins for peers of its fabric, aligned to the largest
    /// of its page sizes. All of it is in reach from there on. The same for its whole life; `None`
    /// without a fabric.
    fn aperture(&self) -> Option<DmaAddr> {
        None
    }
}

/// What a device refuses or fails at.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A copy that leaves the device's memory.
    #[error("{len} at {at} of device memory: the device has {vram}")]
    OutsideVram {
        /// Where it starts.
        at: DevAddr,
        /// How long it is.
        len: ByteSize,
        /// How much there is.
        vram: ByteSize,
    },
    /// RAM that the device could not reach.
    #[error("the device cannot reach {len} of RAM at {at}")]
    RamUnreachable {
        /// Where it starts.
        at: DmaAddr,
        /// How long it is.
        len: ByteSize,
    },
    /// A mapping that the page table cannot hold.
    #[error("cannot bind {span}: {reason}")]
    BadMapping {
        /// What was to be mapped.
        span: Span,
        /// Why it cannot be.
        reason: &'static str,
    },
    /// What this device cannot do, and others can.
    #[error("the device has no support for {what}")]
    Unsupported {
        /// What was asked for.
        what: &'static str,
    },
    /// No further VM, or one that does not exist.
    #[error("no such device address space, or no room for another")]
    NoVm,
    /// The device is gone or failed.
    #[error("the device is lost: {reason}")]
    Lost {
        /// What happened.
        reason: &'static str,
    },
}
