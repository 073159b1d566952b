//! What the kernel's HMM self-tests gained after Linux 6.12, as tests of our own through the same interface: by
//! their names and with their meaning. None of their code is here.
//!
//! Each test starts this program again with the library preloaded, and in it goes through its table. A device
//! that is closed has no memory in use and no page anywhere but in RAM, or `close` fails.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod kit; // a device, memory, and a program with the library
mod partial; // memory that is unmapped in part
mod remap; // memory that moves
mod huge; // huge pages: untouched, zero, freed
mod child; // a child of fork
