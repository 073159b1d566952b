//! Migration between RAM and device memory: what `drm_pagemap` is in the kernel.
//!
//! ```text
//!   driver: populate                    mm: a CPU touched a device page       driver: memory is full
//!        |                                        |                                  |
//!   migrate_to_devmem                       migrate_to_ram                      evict_to_ram
//!        |                                        |                                  |
//!        |   collect -> copy -> commit            |   collect_device -> copy -> commit
//!        v                                        v                                  v
//!   Devmem <--- Zdd, counted: one reference for each device page in use ---> release, once
//! ```
//!
//! A page that is only read need not move: a [`Duplicate`] is a copy of it that lives as long as the
//! mapping that reads it.
//!
//! A [`Pagemap`] is a device's memory as an address space sees it; [`Pagemaps`] are all of them. A
//! [`Devmem`] is one allocation of a memory, filled by one migration. Every device page in use counts as a reference to its allocation (the
//! [`zdd`]); when the last page is gone, whatever took it away, the allocation is released.
//!
//! # Locking
//!
//! A migration to a device keeps the device bound (a lock that unbinding takes to write), and then one
//! block of the address space locked. Nothing here holds another lock across a call out, except that
//! lookups of a page's allocation lock that allocation's slot for a moment.
//!
//! # Invariants
//!
//! Every `Devmem` is released exactly once. A migration that fails or is dropped leaves every byte,
//! every home and every reference as before.
//!
//! # Differences from the kernel
//!
//! Partial migration is the default: a page that cannot be collected stays in RAM. The kernel's rule,
//! all or nothing, is [`Mode::AllOrNothing`]. A CPU fault within the timeslice sleeps until it is over;
//! the kernel returns and lets the CPU fault again and again. A device that wants another device's page
//! respects the timeslice too.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

pub mod migrate;
pub(crate) mod peer_copy;
pub mod duplicate;
pub mod fault;
pub mod evict;
pub mod migrate_back;
pub mod exclusive;
pub mod pagemap;
pub mod registry;
pub mod owner;
pub mod addr;
pub mod devmem;
pub mod zdd;
pub mod pieces;
pub mod error;

pub use addr::PagemapAddr;
pub use devmem::{Devmem, DevmemError, DevmemOps, Holder, Holds, PreMigrateFence, Way};
pub use duplicate::Duplicate;
pub use error::{EvictError, MigrateError};
pub use migrate::{MigrateRequest, Migrated, Mode};
pub use owner::{Owner, OwnerList, Peer};
pub use pagemap::{Importer, Pagemap, PagemapOps, PagemapSpec, RebindError};
pub use pieces::{Cause, ToDevmem, ToRam};
pub use registry::Pagemaps;
