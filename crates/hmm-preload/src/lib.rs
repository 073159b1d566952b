//! `libgpusvm_hmm.so`: preloaded into a program, it serves `/dev/hmm_dmirror0` to `3`, the devices of the
//! kernel's HMM self-tests, from the engine in that very process. 0 and 1 have private memory, 2 and 3 have
//! coherent memory: the CPU uses it in place, and only commands move pages.
//!
//! ```text
//!   open("/dev/hmm_dmirror0") --> interpose --> files: a memfd, and a device address space of its own
//!   ioctl(fd, ..., &command)  --> interpose --> files --> dmirror: what the command means --> gpusvm
//!   mprotect, munmap, mremap  --> interpose --> the kernel, then devices are told
//!   madvise, fork             --> nobody: the engine hears of them by itself
//! ```
//!
//! A program that never opens a device pays for one test in each interposed call, and has neither an engine
//! nor a thread of one. The engine starts with the first device that is opened and ends with the last
//! that is closed.
//!
//! Nothing here knows how memory migrates: all of it is the interface of `gpusvm` that every program has.
//!
//! # Memory
//!
//! What this library allocates is not on the program's heap (`heap.rs`): a program may write over the end of
//! its own allocations, and one of the kernel's tests does; and its heap may be mirrored.
//!
//! # Differences from the kernel
//!
//! - A child of fork that inherits a descriptor has a plain file in it, not the parent's device. It opens
//!   devices of its own.
//! - What lives on the device is exclusive to it: `CHECK_EXCLUSIVE` does not tell what came by
//!   `MIGRATE_TO_DEV` from what came by `EXCLUSIVE`.
//! - A touch of the CPU takes back what came to the device together, not one page.
//! - `dup2` onto a device's last descriptor closes it unseen: the engine notices with the next close.

mod interpose; // calls of the program
mod next; // who was to be called
mod files; // what is open
mod engine; // the engine, while anything is
mod command; // one ioctl, as the program has it in memory
mod dmirror; // what it means
mod snapshot; // pages, as the device's program sees them
mod heap; // memory of our own
