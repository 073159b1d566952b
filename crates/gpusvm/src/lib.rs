//! Shared virtual memory for devices, in user space: one pointer, valid on the CPU and on a device.
//!
//! ```text
//!   alloc_slice, adopt ----> ordinary memory of the process
//!        |                        ^      |
//!        |        CPU touches it: |      | the device touches it:
//!        |        pages come home |      v pages migrate, device memory full or not
//!   launch ------------------> a device: kernels that follow the same pointers
//! ```
//!
//! # Examples
//!
//! ```
//! use gpusvm::{ByteSize, Grid, SoftGpu, Svm};
//!
//! // A device with 4 MiB of memory, and 8 MiB of data.
//! let svm = Svm::builder().device(SoftGpu::with_vram(ByteSize::mib(4))?).build()?;
//! let mut xs = svm.alloc_slice::<f32>(2 << 20)?;
//! xs.fill(1.0);
//!
//! let p = xs.device_ptr();
//! let n = xs.len();
//! // Safe, because nobody else touches `xs` until the launch has ended, and it outlives the launch.
//! let launch = unsafe {
//!     svm.launch(Grid::new(n), move |lane| {
//!         let x = p.add(lane.id());
//!         let value = lane.load(x)?;
//!         lane.store(x, value + 1.0)
//!     })?
//! };
//! launch.wait()?;
//! assert!(xs.iter().all(|x| *x == 2.0));
//! drop(xs);
//! assert_eq!(svm.shutdown()?.vram_used_bytes, 0);
//! # Ok::<(), gpusvm::Error>(())
//! ```
//!
//! # What is shared
//!
//! Memory from [`Svm::alloc_slice`], and private memory that was [adopted](Svm::adopt), moves between RAM
//! and the device. Everything else (the stack, small boxes, shared files) is read and written in place by
//! devices that reach RAM.
//!
//! Pages that moved to a device come home when the CPU touches them. A device with coherent memory
//! (`SoftGpu::builder().coherent_memory(true)`) shares them with the CPU: they count as the device's
//! ([`PagePlace::Coherent`]), both use them where they are, and only a command, an eviction or another
//! device takes them away.
//!
//! # Errors
//!
//! [`Error`] is a superset of what the layers below refuse; each variant says which memory and why, and
//! [`Error::errno`] what the kernel's twin of the operation returns.
#![deny(unsafe_code)]

mod svm; // the engine, built and taken down
mod node; // a device of it
mod device_vm; // an address space of one
mod object; // memory of one
mod slice; // memory to share
mod share; // memory of the program's own
mod launch; // kernels on it
mod prefetch; // memory where it is wanted
mod residence; // where it is, page by page
mod exclusive; // what a device has for itself
mod transfer; // bytes through the eyes of a device
mod advice; // what the program says beforehand
mod inject; // what is to fail
mod stats; // what happened
mod error; // what was refused
pub mod driver; // device faults, end to end

pub use device_vm::DeviceVm;
pub use driver::{
    Advice, AdviseError, Advised, Atomics, Attributes, DeviceSet, Preferred, Priority,
};
pub use driver::{
    Destination, FaultInfo, FaultReport, MigrateOnTouch, Moved, Plan, Policy, PrefetchError,
    PrefetchReason, Prefetched, Served, SizeStats, Times, VmStats,
};
pub use error::Error;
pub use gpusvm_device::{Access, Fabric, FaultError, FaultMode};
pub use gpusvm_mm_linux::{AdoptError, Capabilities, Plain, Protection, RamPage, Rung};
pub use gpusvm_softgpu::{
    Grid, Lane, LaneError, LaunchError, LaunchReport, SoftGpu, SoftGpuError, SvmPtr, Word,
};
pub use gpusvm_types::{ByteSize, Span, VirtAddr};
pub use inject::{Injected, Injection};
pub use launch::{Launch, Resident};
pub use object::Object;
pub use prefetch::Prefetch;
pub use residence::{PagePlace, PageState};
pub use share::Adopted;
pub use slice::SvmSlice;
pub use stats::Stats;
pub use svm::{Builder, Svm};

/// A report of what this machine offers, and what would make it better, for people.
pub fn doctor() -> String {
    Capabilities::probe().to_string()
}
