//! The library in programs: this test itself, started again with the library preloaded, and programs of the system.
//!
//! A test that runs under the library starts with `is_preloaded`, which in the program that cargo started runs just
//! this test in another, with the library. A device that is closed has no memory in use and no page anywhere but in
//! RAM, or `close` fails.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod kit; // programs with the library, a device, memory, children
mod basics; // what the commands of a device are, and what is refused
mod newest; // what newer kernels test beside that
mod flags; // allocations that fail, pages that are kept back, and what is exclusive
mod apps; // programs that know nothing of the library
