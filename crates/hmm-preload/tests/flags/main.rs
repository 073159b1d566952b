//! What newer kernels have beside the tests of 6.12: allocations that fail, reads that wait for the program, and
//! which pages are exclusive. Each test is started again with the library preloaded.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod device; // a test under the library, and the device in it
mod large; // FLAGS: allocations that fail
mod back; // TO_SYS: what was named
mod exclusive; // EXCLUSIVE, and CHECK_EXCLUSIVE
mod unlocked; // READ_UNLOCKED: pages that the program keeps back
