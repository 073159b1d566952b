//! Per-VM ranges, notifiers and pages: what `drm_gpusvm` is in the kernel.
//!
//! ```text
//!   GpuSvm  one device address space that mirrors a process
//!     |-- Notifier   a window of the process; hears of every change in it, as long as it has a range
//!     |     `-- Range   a chunk that the device touched: 2 MiB, 64 KiB or 4 KiB
//!     |           `-- Pages   what of it is mapped now, for each device of the mirror
//!     `-- garbage    ranges whose memory was unmapped
//! ```
//!
//! # The life of a range
//!
//! Made by the device's first fault in it, mapped and unmapped many times as its pages move, flagged
//! when its memory is unmapped, and removed later by the garbage collector.
//!
//! # Bounds
//!
//! Nothing here tries again: a look that was out of date ends as a range that is gone, a pass that was ends
//! as a commit that says so, and the driver bounds its passes. Every loop goes over a finite thing once: the
//! pages of a range, the ranges of an event, the devices of a mirror, the blocks of a span.
//!
//! # Locking
//!
//! The notifier lock makes an invalidation (writer) exclude the commit of a mapping (readers). The
//! tree lock guards the ranges and is never held across a call out of this crate, except zap and flush. Order:
//! notifier lock, tree lock, what a range reaches.
//!
//! # Differences from the kernel
//!
//! The kernel's `drm_gpusvm_notifier_lock()` takes a *read* lock; here holding it is [`Quiesced`], a
//! proof that no invalidation runs. A range can hold pages of RAM and of a device at once. Ranges of
//! one VM are found and inserted concurrently: there is no outer driver lock. What a device reaches of
//! other devices is given back when it is dropped, whoever drops it.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod gpusvm;
pub(crate) mod tree;
pub mod find;
pub mod chunk;
pub mod range;
pub mod pages;
pub mod history;
pub mod copies;
pub mod get_pages;
pub(crate) mod reached;
pub mod invalidate;
pub mod unmap;
pub mod garbage;
pub mod scan;
pub mod error;

pub use copies::Copies;
pub use error::{FindError, GetPagesError};
pub use find::FaultCtx;
pub use get_pages::{PageRun, Prepared, Reach};
pub use gpusvm::{Config, GpuSvm, Quiesced, SvmOps};
pub use history::History;
pub use pages::{Pages, Permission};
pub use range::{DeviceIndex, Range, Serving};
pub use scan::Scan;
