//! The ranges of a device on the simulated world, from the contract outward.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod device; // memory with bytes, and who reaches it
mod gpu; // a page table, and all that was done to it
mod lab; // a process, its devices, and a mirror
mod sound; // what must be true of them
mod errors; // why there is no range
mod errors_pages; // why pages cannot be mapped
mod commit; // what was prepared, and may be out of date
mod invalidate; // zap, zap, zap, flush
mod unmap; // what of a range is still there, and what is not
mod windows; // notifiers, and chunks
mod scan; // where pages are, for who only looks
mod shared; // several devices, one mirror
mod lessons; // mistakes of others, made impossible: what a device reaches
mod lessons_end; // and what comes after the end
mod random; // any order of anything, one seed at a time
mod threads; // and all at once
