//! The behaviour of the device, through its public interface.
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]
#![expect(clippy::cast_possible_truncation, reason = "small numbers of tests")]

mod common; // a driver in miniature
mod access; // loads, stores, atomics, tiles, faults
mod page_tables; // bind, zap, split, accessed bits
mod flush; // nothing stale, under stress
mod launches; // order, errors, cancellation, teardown
mod copies; // the copy engine, and who allocates
mod peers; // the memory of other devices
