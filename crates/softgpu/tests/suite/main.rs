//! The behaviour of the device, through its public interface.

mod common; // a driver in miniature
mod access; // loads, stores, atomics, tiles, faults
mod page_tables; // bind, zap, split, accessed bits
mod flush; // nothing stale, under stress
mod launches; // order, errors, cancellation, teardown
mod copies; // the copy engine, and who allocates
