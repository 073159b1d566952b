//! What the tests of all layers share.
//!
//! ```text
//!   require    skip with a reason, or fail where there must be no skipping
//!   launch     a command without userfaultfd, or as nobody
//!   alloc      which thread allocates
//!   watchdog   a test that hangs says where, and ends
//!
//!   world        a program with its memory, simulated or this very process
//!   dmirror, gpu devices to test with
//!   mirror       a device that mirrors a program, with the words of the kernel's test mirror
//!   check        what must hold across all layers when nothing moves
//!   conformance  the cases: see `docs/conformance.md`
//! ```
//!
//! Tests never need more privileges than they find: what is missing is skipped and said, and what
//! is there is taken away to see what happens without it.

pub mod require; // skip or fail
pub mod launch; // privileges taken away
pub mod alloc; // allocations by thread
pub mod watchdog; // no test hangs
pub mod own_uffd; // pages that somebody else keeps back
pub mod world; // a program with its memory
pub mod dmirror; // the test device
pub mod gpu; // devices that run programs
pub mod mirror; // a device that mirrors a program
pub mod check; // what must hold
pub mod conformance; // the cases

pub use alloc::CountingAllocator;
pub use require::{require_uffd, unavailable};
pub use watchdog::{Watchdog, die};
