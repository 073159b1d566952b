//! Architectures without accessors of their own: copies by system call, everything else refused.
//!
//! `process_vm_readv` on the own process copies between two places of it and reports a bad one, on
//! either side, as `EFAULT`. That is slow, and right.

use crate::access::Outcome;
use core::ffi::c_void;

/// The granularity that the callers round to; anything will do.
pub(crate) const WIDE: usize = 256;
/// A cache line.
pub(crate) const LINE: usize = 64;

const REFUSED: Outcome = Outcome {
    value: 0,
    refused: 1,
};
const DONE: Outcome = Outcome {
    value: 0,
    refused: 0,
};

macro_rules! refuse {
    ($($name:ident($($arg:ty),*);)*) => {$(
        /// # Safety
        ///
        /// None needed: it does nothing.
        pub(crate) unsafe fn $name($(_: $arg),*) -> Outcome {
            REFUSED
        }
    )*};
}
refuse! {
    load8(*const u8); load16(*const u16); load32(*const u32); load64(*const u64);
    store8(*mut u8, u64); store16(*mut u16, u64); store32(*mut u32, u64); store64(*mut u64, u64);
    compare_exchange8(*mut u8, u64, u64); compare_exchange16(*mut u16, u64, u64);
    compare_exchange32(*mut u32, u64, u64); compare_exchange64(*mut u64, u64, u64);
    fetch_add32(*mut u32, u64); fetch_add64(*mut u64, u64);
}

/// Copies any number of bytes.
///
/// # Safety
///
/// What can be written may be written by the caller.
pub(crate) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> Outcome {
    let local = libc::iovec {
        iov_base: to.cast::<c_void>(),
        iov_len: len,
    };
    let remote = libc::iovec {
        iov_base: from.cast_mut().cast::<c_void>(),
        iov_len: len,
    };
    // SAFETY: it has no preconditions.
    let this = unsafe { libc::getpid() };
    // SAFETY: the kernel checks both sides; the caller vouches for the target.
    let copied =
        unsafe { libc::process_vm_readv(this, &raw const local, 1, &raw const remote, 1, 0) };
    match usize::try_from(copied) {
        Ok(copied) if copied == len => DONE,
        Ok(copied) => Outcome {
            value: from.wrapping_add(copied).addr() as u64,
            refused: 1,
        },
        Err(_) => Outcome {
            value: from.addr() as u64,
            refused: 1,
        },
    }
}

pub(crate) use copy as copy_wide;
pub(crate) use copy as stream;

/// Clears, a page at a time.
///
/// # Safety
///
/// As [`copy`].
pub(crate) unsafe fn clear(to: *mut u8, len: usize) -> Outcome {
    static ZEROES: [u8; 4096] = [0; 4096];
    let mut done = 0;
    while done < len {
        let step = ZEROES.len().min(len - done);
        // SAFETY: the caller's.
        let outcome = unsafe { copy(to.wrapping_add(done), ZEROES.as_ptr(), step) };
        if outcome.refused != 0 {
            return outcome;
        }
        done += step;
    }
    DONE
}

/// System calls leave nothing to order.
pub(crate) fn store_fence() {}

/// A signal frame that nobody reads.
#[derive(Debug)]
pub(crate) struct Frame;

impl Frame {
    /// # Safety
    ///
    /// None needed.
    pub(crate) unsafe fn new(_context: *mut c_void) -> Self {
        Self
    }

    pub(crate) fn instruction(&self) -> usize {
        0
    }

    pub(crate) fn is_write(&self) -> bool {
        false
    }

    pub(crate) fn in_accessor(&self) -> bool {
        false
    }

    pub(crate) fn is_about_to_touch(&self, _addr: usize) -> bool {
        false
    }

    pub(crate) fn refuse(&mut self, _addr: usize) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_call_copies_and_reports_either_side() {
        let (from, mut to) = ([7u8; 300], [0u8; 300]);
        // SAFETY: both are 300 bytes.
        let got = unsafe { copy(to.as_mut_ptr(), from.as_ptr(), 300) }.refused;
        assert_eq!(got, 0);
        assert_eq!(from, to);
        // SAFETY: nothing is mapped at null.
        let got = unsafe { copy(core::ptr::null_mut(), from.as_ptr(), 300) }.refused;
        assert_eq!(got, 1);
        // SAFETY: as above.
        let got = unsafe { copy(to.as_mut_ptr(), core::ptr::null(), 300) }.refused;
        assert_eq!(got, 1);
        // SAFETY: 300 bytes.
        assert_eq!(unsafe { clear(to.as_mut_ptr(), 300) }.refused, 0);
        assert_eq!(to, [0; 300]);
    }
}
