//! The driver layer: what `xe_svm` is in the kernel.
//!
//! ```text
//!   device fault queue
//!        |
//!   worker --> fault: the story of one device fault
//!                |-- policy     migrate? for how long?
//!                |-- populate   device memory, filled by pagemap
//!                |      |-- vram     what is free, what lives there
//!                |      `-- evict    what goes when nothing is free
//!                |-- (svm)      where are the pages now?
//!                `-- vm         bind, zap, flush
//!
//!   revisit    what is mapped in place gets a second look
//!   resident   launches that declare what they touch
//!   devmem     copies, counted by cause
//! ```
//!
//! Everything is generic over the address space: nothing here knows which world it is in.

pub(crate) mod worker; // threads that take faults
pub(crate) mod fault; // the story
pub(crate) mod policy; // what to do, never how
pub(crate) mod populate; // pages into device memory
pub(crate) mod evict; // and out of it, for others
pub(crate) mod revisit; // what is mapped in place gets a second look
pub(crate) mod resident; // declared residency
pub(crate) mod vm; // one device address space
pub(crate) mod vram; // device memory
pub(crate) mod devmem; // one allocation of it
pub(crate) mod counters; // what happened

pub use counters::{Moved, Times};
pub use policy::Policy;
pub(crate) use vm::Vm;
