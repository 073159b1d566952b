//! What a test needs of a device that runs programs: loads, stores and atomics at addresses of the
//! process.
//!
//! ```text
//!   case ---- Gpu ---- Dmirror   on the calling thread, page by page
//!              `------ Soft      a launch of one lane, faults served by threads
//! ```

mod soft; // the software GPU

pub use soft::Soft;

use crate::dmirror::{CopyHook, Dmirror, Entry, Handler};
use gpusvm_device::{Device, FaultError, VmId};
use gpusvm_sync::Arc;
use gpusvm_types::{PageIndex, VirtAddr};

/// A device that runs programs.
pub trait Gpu: Send + Sync + core::fmt::Debug {
    /// The device, as the engine knows it.
    fn device(&self) -> Arc<dyn Device>;

    /// From now on, or no longer, `handler` serves the faults of `vm`.
    fn attach(&self, vm: VmId, handler: Option<Handler>);

    /// Loads words, one after the other.
    ///
    /// # Errors
    ///
    /// Why the first of them could not be loaded that could not.
    fn load(&self, vm: VmId, at: &[VirtAddr]) -> Result<Vec<u64>, FaultError>;

    /// Stores words, one after the other: those before an error stay stored.
    ///
    /// # Errors
    ///
    /// As `load`.
    fn store(&self, vm: VmId, words: &[(VirtAddr, u64)]) -> Result<(), FaultError>;

    /// Adds to words atomically, one after the other, and says what was there.
    ///
    /// # Errors
    ///
    /// As `load`.
    fn fetch_add(&self, vm: VmId, at: &[VirtAddr], by: u64) -> Result<Vec<u64>, FaultError>;

    /// How many faults it had.
    fn faults(&self, vm: VmId) -> u64;

    /// Every mapping of every address space, for checkers; none of a device that does not tell.
    fn mappings(&self) -> Vec<(VmId, PageIndex, Entry)>;

    /// What decides about its copies, if something does.
    fn hook(&self) -> Option<&CopyHook>;
}

impl Gpu for Arc<Dmirror> {
    fn device(&self) -> Arc<dyn Device> {
        Arc::clone(self) as _
    }

    fn attach(&self, vm: VmId, handler: Option<Handler>) {
        self.set_handler(vm, handler);
    }

    fn load(&self, vm: VmId, at: &[VirtAddr]) -> Result<Vec<u64>, FaultError> {
        Dmirror::load(self, vm, at)
    }

    fn store(&self, vm: VmId, words: &[(VirtAddr, u64)]) -> Result<(), FaultError> {
        Dmirror::store(self, vm, words)
    }

    fn fetch_add(&self, vm: VmId, at: &[VirtAddr], by: u64) -> Result<Vec<u64>, FaultError> {
        Dmirror::fetch_add(self, vm, at, by)
    }

    fn faults(&self, vm: VmId) -> u64 {
        Dmirror::faults(self, vm)
    }

    fn mappings(&self) -> Vec<(VmId, PageIndex, Entry)> {
        Dmirror::mappings(self)
    }

    fn hook(&self) -> Option<&CopyHook> {
        Some(Dmirror::hook(self))
    }
}
