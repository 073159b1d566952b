//! The copy engine: bytes between RAM and device memory, and from device to device.
//!
//! Device to device is [`CopyOp::ToRam`] by the engine of the source, or [`CopyOp::ToDevice`] by that
//! of the target, with a bus address in the aperture of the other: see [`Device`](crate::Device).

use crate::DeviceError;
use gpusvm_types::{ByteSize, DevAddr, DmaAddr};

/// One contiguous piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyOp {
    /// RAM to device memory.
    ToDevice {
        /// Where the bytes are: in RAM, or in the aperture of a peer of the same fabric.
        from: DmaAddr,
        /// Where they go.
        to: DevAddr,
        /// How many.
        len: ByteSize,
    },
    /// Device memory to RAM.
    ToRam {
        /// Where the bytes are.
        from: DevAddr,
        /// Where they go: to RAM, or into the aperture of a peer of the same fabric.
        to: DmaAddr,
        /// How many.
        len: ByteSize,
    },
    /// Zeroes into device memory: what a hole in RAM becomes.
    Clear {
        /// Where they go.
        to: DevAddr,
        /// How many.
        len: ByteSize,
    },
}

/// A point in the order of a copy engine: everything submitted up to it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fence(pub u64);

/// What moves bytes between RAM and device memory.
///
/// An engine whose device has a fabric reads the memory of peers, and writes it where the hardware
/// can: some only read, and then the engine of the other device does the copy.
pub trait CopyEngine: Send + Sync {
    /// Queues a batch, which runs in order, and says what to wait for.
    ///
    /// Called by the driver on the migration path, with block locks held, also for CPU faults:
    /// it must not allocate on the global heap and must not touch memory that faults.
    ///
    /// # Errors
    ///
    /// `OutsideVram`, `RamUnreachable`, `Lost`; `Unsupported` for a peer that this engine cannot read
    /// or write, which is worth another way, through RAM if there is none. `RamUnreachable` is also
    /// what reaches past the end of a peer's memory. A batch that failed may have been done in part.
    fn submit(&self, batch: &[CopyOp]) -> Result<Fence, DeviceError>;

    /// Returns when everything up to `fence` is done.
    ///
    /// # Errors
    ///
    /// `Lost`, or the error of a copy that failed after `submit` had returned.
    fn wait(&self, fence: Fence) -> Result<(), DeviceError>;
}
