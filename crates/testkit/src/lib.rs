//! What the tests of all layers share.
//!
//! ```text
//!   require    skip with a reason, or fail where there must be no skipping
//!   launch     a command without userfaultfd, or as nobody
//!   alloc      which thread allocates
//!   watchdog   a test that hangs says where, and ends
//! ```
//!
//! Tests never need more privileges than they find: what is missing is skipped and said, and what
//! is there is taken away to see what happens without it.

pub mod require; // skip or fail
pub mod launch; // privileges taken away
pub mod alloc; // allocations by thread
pub mod watchdog; // no test hangs

pub use alloc::CountingAllocator;
pub use require::{require_uffd, unavailable};
pub use watchdog::Watchdog;
