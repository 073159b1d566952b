//! Stacks for the engine's threads, on address space that was reserved when the library was loaded.
//!
//! ```text
//!   [ guard | stack | guard | stack | ...... ]     a slot is a guard and a stack
//! ```
//!
//! The C library would map each stack where the kernel likes, which is the highest hole that is large enough:
//! one that the program left for itself, and unmaps with all that is around it.
//!
//! # Locking
//!
//! None: a slot is taken and given back by an atomic.
//!
//! # Invariants
//!
//! A slot that is free has no thread on it. That of a thread is told by where the C library keeps what it knows of
//! the thread, which is on its stack.

use crate::next;
use core::ffi::c_void;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

/// More than the threads of an engine, by far. Who finds none has its stack from the C library.
const SLOTS: usize = 128;
/// What a slot takes up: the library asks for 2 MiB of it.
const SLOT: usize = 4 << 20;
const GUARD: usize = 64 << 10;

static START: AtomicPtr<c_void> = AtomicPtr::new(core::ptr::null_mut());
static TAKEN: [AtomicBool; SLOTS] = [const { AtomicBool::new(false) }; SLOTS];

/// Sets the address space aside.
pub(crate) fn reserve() {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK;
    let anywhere = core::ptr::null_mut();
    // SAFETY: no address is asked for, so that nothing that exists is replaced.
    let start = unsafe { next::mmap(anywhere, SLOTS * SLOT, libc::PROT_NONE, flags, -1, 0) };
    if start != libc::MAP_FAILED {
        START.store(start, Ordering::Release);
    }
}

/// No thread but the one that forked is in a child.
pub(crate) fn forget() {
    for taken in &TAKEN {
        taken.store(false, Ordering::Release);
    }
}

/// A stack, and how large it is. `None`: there is none, or not one so large.
pub(crate) fn take(least: usize) -> Option<(*mut c_void, usize)> {
    const LEN: usize = SLOT - GUARD;
    let start = START.load(Ordering::Acquire);
    if start.is_null() || least > LEN {
        return None;
    }
    let take = |taken: &AtomicBool| !taken.swap(true, Ordering::AcqRel);
    let slot = TAKEN.iter().position(take)?;
    let stack = start.wrapping_byte_add(slot * SLOT + GUARD);
    // SAFETY: in a slot that is nobody's but ours.
    match unsafe { next::mprotect(stack, LEN, libc::PROT_READ | libc::PROT_WRITE) } {
        0 => Some((stack, LEN)),
        _ => {
            TAKEN[slot].store(false, Ordering::Release);
            None
        }
    }
}

/// Gives the stack back that holds this address, if it is one of these.
///
/// # Safety
///
/// No thread is on it.
pub(crate) unsafe fn give_back(at: usize) {
    let start = START.load(Ordering::Acquire);
    let slot = at.checked_sub(start.addr()).map(|offset| offset / SLOT);
    let Some((slot, taken)) = slot.and_then(|slot| Some((slot, TAKEN.get(slot)?))) else {
        return;
    };
    if start.is_null() {
        return;
    }
    let stack = start.wrapping_byte_add(slot * SLOT + GUARD);
    // SAFETY: nobody uses what is on it, as the caller promises.
    unsafe { libc::madvise(stack, SLOT - GUARD, libc::MADV_DONTNEED) };
    taken.store(false, Ordering::Release);
}
