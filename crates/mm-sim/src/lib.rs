//! The simulated world: a process address space of which one seed replays one history.
//!
//! ```text
//!   pagemap, svm, a test           AddressSpace            Sim::run: simulated threads
//!        |                              |                        |
//!        v                              v                        v
//!   lock_block, collect, commit    range_fault, arm     mmap, munmap, fork, read_u64, write_u64
//!        `------------------------------+------------------------'
//!                                      Sim
//!              kernel: mappings, page table, real bytes        staging: frames on the move
//!              runtime: who runs next, the clock, the trace    injector: what fails
//!                                       |
//!                             bus_read, bus_write: what a device sees of RAM
//! ```
//!
//! It keeps the contract of [`gpusvm_mm`] with that crate's own page words, reverse maps and notifiers,
//! in the same three steps: mark, invalidate, take. Between any two steps another simulated thread may
//! run; the seed says which. Bytes are real, so a page that is lost, or copied too early, is found by
//! who reads it.
//!
//! # The life of a test
//!
//! Make a world with a seed, give it devices and threads, [`Sim::run`] them, [`Sim::check`] what is
//! left. A failure names its seed. [`Sim::trace`] tells what happened.
//!
//! # Differences from the real world
//!
//! Devices reach pages in place by their virtual addresses; a touch of a page that is not in RAM is
//! refused by the bus instead of waiting. Nothing is asynchronous but simulated threads and, if asked
//! for, the events of system calls ([`Options::late_events`]).
//!
//! # Examples
//!
//! ```
//! use gpusvm_mm_sim::{Backing, Options, Prot, Sim};
//! use gpusvm_types::PageCount;
//!
//! let sim = Sim::new(Options { seed: 7, ..Options::default() });
//! let span = sim.mmap(PageCount::new(4), Prot::ReadWrite, Backing::Mirrored);
//! let adds = (0..2).map(|_| {
//!     let sim = sim.clone();
//!     Box::new(move || {
//!         for _ in 0..10 {
//!             sim.fetch_add_u64(span.start(), 1).unwrap();
//!         }
//!     }) as Box<dyn FnOnce() + Send>
//! });
//! sim.run(adds.collect());
//! assert_eq!(sim.read_u64(span.start()), Ok(20));
//! sim.check().unwrap();
//! ```
#![forbid(unsafe_code)]

mod sim; // the world, and what may be asked of it
mod access; // the program's loads and stores
mod fault; // a load of a page that is elsewhere
mod bus; // what devices see of RAM
mod space; // the contract
mod block; // a locked block
mod outbound; // RAM to device
mod inbound; // device to RAM
mod protect; // pages that are read in copies
mod calls; // mmap, munmap and friends
mod events; // what the engine does about them
mod adopt; // what is mirrored
mod fork; // children, and the end
mod kernel; // mappings and page table
mod region; // words and locks of a mirrored mapping
mod frame; // real bytes
mod staging; // where pages are between homes
mod check; // what must be true
mod injector; // what fails
mod runtime; // who runs, and the clock
mod random; // the seed
mod stats; // what happened, counted

pub use access::Signal;
pub use block::BlockGuard;
pub use bus::BusError;
pub use fork::{Child, Pass};
pub use inbound::SimInbound;
pub use injector::{Injector, Step};
pub use kernel::{Backing, Prot};
pub use outbound::SimOutbound;
pub use runtime::{Body, ThreadTimes};
pub use sim::{Options, Sim};
pub use stats::SimStats;
