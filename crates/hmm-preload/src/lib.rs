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
//! A program that never opens a device pays for one test in each interposed call, and two look-ups where a thread
//! is started, and has neither an engine nor a thread of one. To start takes about 0.4 ms longer, which is the loader's
//! work on this library and those it needs (`cargo xtask preload-cost`). The engine starts with the first device that is opened and ends with the last
//! that is closed.
//!
//! Nothing here knows how memory migrates: all of it is the interface of `gpusvm` that every program has.
//!
//! # Memory
//!
//! What this library allocates is not on the program's heap (`heap.rs`): a program may write over the end of
//! its own allocations, and one of the kernel's tests does; and its heap may be mirrored. Nor are the engine's
//! stacks (`stacks.rs`), or anything else that it maps, in a hole that the program left in its address space:
//! it may unmap that with what is around it.
//!
//! # Differences from the kernel
//!
//! - A child of fork, or a program that is executed, has a plain file in the descriptors that it inherits, not the
//!   parent's device: commands are refused with `ENOTTY`. The kernel runs them, on the memory of the parent.
//!   A child opens devices of its own.
//! - A device ends with the last descriptor in the process that opened it, also when children still have some.
//! - What is exclusive is the device's, not the open file's: `CHECK_EXCLUSIVE` of another file of the device
//!   says so too.
//! - A touch of the CPU takes back what came to the device together, not one page.
//! - What opens or closes without the C library, or inside it (`freopen`), is not seen: a path is not a device
//!   then, and a device that was closed ends when any is opened or closed.
//! - While a device is open, `close` and `dup2` take a lock: a signal handler that calls them can wait for ever for the
//!   thread that it interrupted in one of them.
//! - What this library keeps for a thread ends after what the program's C++ keeps for it, and for the main thread not
//!   at all.
//! - The engine has descriptors in the process. To the program's `close` they are not there, and `dup2` to the
//!   number of one is refused with `EBUSY`.
//! - What a device reads back at the end of `MIGRATE_TO_DEV` and `EXCLUSIVE` is given to the program as it is read:
//!   when memory is unmapped meanwhile, the command fails, and some of it was given.
//! - Where the environment has `GPUSVM_HMM_PAGEMAP=0`, pages on devices do not show as swapped out in
//!   `/proc/self/pagemap`, which costs less.

mod interpose; // calls of the program
mod next; // who was to be called
mod files; // what is open
mod descriptor; // and what a descriptor leads to
mod report; // what is left in use when it is closed
mod engine; // the engine, while anything is
mod command; // one ioctl, as the program has it in memory
mod dmirror; // what it means
mod flags; // what they meet
mod snapshot; // pages, as the device's program sees them
mod heap; // memory of our own
mod stacks; // and stacks
