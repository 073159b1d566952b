//! The copy engine: bytes between RAM and device memory.

use crate::DeviceError;
use gpusvm_types::{ByteSize, DevAddr, DmaAddr};

/// One contiguous piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyOp {
    /// RAM to device memory.
    ToDevice {
        /// Where the bytes are.
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
        /// Where they go.
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
pub trait CopyEngine: Send + Sync {
    /// Queues a batch, which runs in order, and says what to wait for.
    ///
    /// Called by the driver on the migration path, with block locks held, also for CPU faults:
    /// it must not allocate on the global heap and must not touch memory that faults.
    ///
    /// # Errors
    ///
    /// `OutsideVram`, `RamUnreachable`, `Lost`. A batch that failed may have been done in part.
    fn submit(&self, batch: &[CopyOp]) -> Result<Fence, DeviceError>;

    /// Returns when everything up to `fence` is done.
    ///
    /// # Errors
    ///
    /// `Lost`, or the error of a copy that failed after `submit` had returned.
    fn wait(&self, fence: Fence) -> Result<(), DeviceError>;
}
