//! The real world: a live Linux process, whose pages move under its feet.
//!
//! ```text
//!   CPU thread touches a page that is elsewhere
//!        |
//!   kernel: userfaultfd message, or SIGSEGV on the last rung
//!        |
//!   source ---> handler ---> fault: whose page? ---> DeviceMemoryOps::migrate_to_ram   (pagemap)
//!                  |                                        |
//!                  `--> events: unmap, remove, remap        `--> block: collect_device, commit
//!                                                                   |
//!   driver ---> lock_block ---> block: collect, commit              |
//!                                  |                                |
//!                                  `----- staging, mover -----------'  UFFDIO_MOVE, COPY, mremap
//! ```
//!
//! [`Process`] is the address space of this process. Memory is *mirrored* when it was allocated here
//! or adopted; mirrored memory costs nothing until a device touches it, because a block is registered
//! with userfaultfd only when it is armed, or others that are one with it are.
//!
//! # What is unsafe here, and why
//!
//! Moving a page away and back is invisible to the program as long as every byte comes back before
//! anybody reads it. So no single call is dangerous for the memory that is registered; the danger is
//! to lose a page, and the types of the migration (`outbound`, `inbound`) are the argument that none
//! is lost. What is unsafe besides: the arrays of page words live in mappings of our own (`region`),
//! and the system calls (`sys`) take addresses.
//!
//! # The rules of the handler threads
//!
//! They allocate nothing on the global heap, touch no mirrored memory, and take no lock that a thread
//! holds which can fault. One of them is always free to read: a handler that might wait hands its
//! fault on when it is the last one that does not wait.
//!
//! # Locking
//!
//! region table (read) -> block -> staging pool. `docs/locking.md` has the whole order.
//!
//! # Differences from the kernel
//!
//! An unmap is heard of after it happened, not before; so an access in place by a device in software
//! can meet a hole, and is made with guarded instructions.

pub mod process; // the address space
mod allocation; // memory that a program gets from here
mod source; // where faults arrive: userfaultfd, or signals
mod handler; // the threads that serve them
mod fault; // the story of one CPU fault
mod delay; // faults that sleep until a page may leave
mod events; // unmap, remove, remap
mod fork; // what fork does to all this
mod region; // page words and block locks of one mirrored mapping
mod regions; // the table of mirrored mappings
mod block; // a locked block
mod as_one; // blocks that are registered together
mod let_go; // ending a registration, of one mapping and no other
mod outbound; // RAM to device, step by step
mod discard; // dropping what lives elsewhere, and whose removals are told
mod inbound; // device to RAM, step by step
mod protect; // pages that are read in copies
mod markers; // of pages that are elsewhere, for who reads the page table
mod patience; // how long to wait for events
mod staging; // where pages are between homes
mod mover; // how pages are taken out and put back, by rung
mod stats; // what happened, counted
mod sys; // the kernel's interfaces

pub use allocation::{Allocation, Plain};
pub use block::BlockGuard;
pub use fork::Pass;
pub use process::{
    AdoptError, FaultInError, Options, PageLook, Process, Protection, RamPage, StartError, Wait,
};
pub use stats::MmStats;
pub use sys::probe::{Capabilities, Offers, Presence, Rung};
pub use sys::thp::Thp;
pub use sys::uffd::{Attempt, Features, Flavour, OpenError, Way};
