//! The kernel's interfaces that the crate stands on, each in one thin file.
//!
//! ```text
//!   uffd      faults and events in, pages out, in, copied, poisoned
//!   pagemap   which pages of a span are there, and of what kind
//!   procmap   which mapping an address lies in
//!   procmem   reads of our own memory that fail instead of waiting
//!   map       owned mappings, and advice on memory
//!   futex     sleep on a word, wake who sleeps
//!   thp       the system's huge page setting
//!   probe     what of all this is offered here, and which rung that makes
//! ```
//!
//! Nothing here loops, decides or retries, and nothing allocates after it was opened: the fault
//! path calls all of it.
//!
//! # What is unsafe here, and why
//!
//! - *Registering* a span: from then on, whoever holds the descriptor decides what a first touch
//!   of it finds. Filling, waking, protecting and poisoning only do what registering allowed.
//! - *Moving* pages out, *discarding*, *protecting* and *remapping*: the bytes of a span go away
//!   under whoever holds a reference to them.
//! - *Copying* from an address: the source is read whatever it is.
//!
//! Asking is safe: it reads what the kernel knows, never what the memory holds.

pub(crate) mod uffd; // the heart: userfaultfd
pub(crate) mod pagemap; // holes, zero pages, huge pages
pub(crate) mod procmap; // find_vma
pub(crate) mod procmem; // reads that never wait
pub(crate) mod map; // owned mappings
pub(crate) mod room; // address space of our own
mod place; // and where in all of it
pub(crate) mod futex; // sleeping and waking
pub(crate) mod thp; // huge page setting
pub(crate) mod probe; // what the machine offers
mod ioctl; // one typed call

#[cfg(test)]
pub(crate) mod testing; // skip or fail, serial sections, forked children

use core::ffi::c_void;
use gpusvm_types::{ByteSize, VirtAddr};

/// An address as the system calls take it.
///
/// Its provenance is exposed: only the kernel follows it.
fn pointer(at: VirtAddr) -> *mut c_void {
    core::ptr::with_exposed_provenance_mut(ByteSize::new(at.get()).as_usize())
}
