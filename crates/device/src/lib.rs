//! The contract of a device: what a driver engineer implements to get shared virtual memory.
//!
//! ```text
//!   Device ---- caps()          what it can do
//!          ---- copy_engine()   CopyEngine: batches in, fences out
//!          ---- page_tables()   PageTables: bind, zap, flush, accessed bits
//!          ---- fault_queue()   FaultQueue: replayable faults, or none (declared residency)
//!          ---- aperture()      where peers of its fabric find its memory, if it has one
//! ```
//!
//! The device owns its hardware; the driver layer above owns every decision. It hands out the
//! device's memory with the [`Buddy`] allocator of this crate, so that a device only says how much
//! memory it has.
//!
//! # Locking
//!
//! The driver calls `bind` and `zap` under its notifier lock and copies under block locks. A device
//! takes only locks of its own inside, and calls nothing back.
//!
//! # Differences from the kernel
//!
//! There is no such contract in the kernel: each driver talks to its own hardware. This one is
//! what `xe` uses of its migration engine, its page tables and its fault queues.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod device;
pub mod copy;
pub mod page_table;
pub mod fault;
pub mod buddy;

pub use buddy::{BlockRun, Buddy, BuddyError};
pub use copy::{CopyEngine, CopyOp, Fence};
pub use device::{Caps, Device, DeviceError, Fabric, FaultMode, PageSizes};
pub use fault::{Access, DeviceFault, FaultError, FaultId, FaultQueue, Verdict};
pub use page_table::{Mapping, PageTables, Target, VmId};
