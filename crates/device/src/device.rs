//! The device as a whole.

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
}

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
