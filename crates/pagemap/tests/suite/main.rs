//! The migration layer on the simulated world, from the contract outward.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod device; // memory, a log, and something that fails on demand
mod lab; // a process with devices
mod errors; // each error, by function
mod injection; // the n-th step fails
mod residency; // what moves, what stays, windows, timeslices
mod exclusive; // what a device has for itself
mod migrate_back; // pages that are asked back
mod duplicate; // copies for reading
mod peers; // device to device
mod life; // unbind, rebind, drop order
mod lessons; // each mistake of others, made impossible
mod lessons_undo; // those of them about what a failure leaves behind
