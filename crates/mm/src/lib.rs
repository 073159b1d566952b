//! The contract of a process address space, and the protocols that every world shares.
//!
//! ```text
//!   pagemap, svm                      who asks
//!        |
//!   AddressSpace  ---- vma, mirrored, arm, range_fault, snapshot, now
//!        |        ---- lock_block ----> Block
//!        |                               |-- collect -------> Outbound -- commit  RAM -> device
//!        |                               |-- write_protect -> copies to read, until somebody writes
//!        |                               `-- collect_device -> Inbound -- commit  device -> RAM
//!        |        ---- notifiers -----> Notifiers: subscribers learn what changes, before it does
//!        |
//!   DeviceMemoryOps                   whom the address space asks: a CPU touched a device page
//! ```
//!
//! A world implements [`AddressSpace`]: `mm-linux` with a live process. This crate holds the
//! contract, the words that say where each page lives ([`home`]), the back-references from device
//! pages to addresses ([`rmap`]), and the notifiers ([`notifier`]).
//!
//! # The order that makes races harmless
//!
//! Whoever takes a page away does three things in this order: it marks the page's word, then it
//! invalidates (subscribers bump their sequence, zap, flush), then it takes the page. Whoever maps a
//! page reads the sequence, then the word, and checks the sequence again under the subscriber's lock
//! before the mapping becomes visible. So a mapping made from an old word is never kept.
//!
//! # Locking
//!
//! Block locks come before subscribers' locks. A block lock may be held across a copy; nothing else
//! may. `docs/locking.md` has the whole order.
//!
//! # Differences from the kernel
//!
//! There is no `struct page`: a device page is a number, its owner finds the rest. Migration works on
//! at most one 2 MiB block at a time, under that block's lock, instead of page locks.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod space;
pub mod migrate;
pub mod home;
pub mod range_fault;
pub mod seen;
pub mod device_page;
pub mod rmap;
pub mod memories;
pub mod notifier;
pub mod device_memory;
pub mod error;

pub use device_memory::{CpuFault, DeviceMemoryOps, FaultOutcome, Wanted};
pub use error::MmError;
pub use home::{DeviceMemoryId, DevicePage, DeviceRun, Home, PageWord, Place, WordState};
pub use memories::{Freed, Memories, Memory};
pub use migrate::{Block, Inbound, KeptReason, Leaving, Outbound, Source};
pub use notifier::{IntervalNotifier, Invalidation, Notifiers, Reason, Sequence, Subscriber};
pub use range_fault::Snapshot;
pub use rmap::Rmap;
pub use seen::Seen;
pub use space::{AddressSpace, ArmToken, Intent, Mirror, Time, Vma, VmaKind};
