//! Copies and clears of which either side may fault.
//!
//! ```text
//!   copy             short, or whatever the widest registers can load and store
//!   copy_streaming   |head|============ body, 256-byte steps, past the cache ============|tail|
//!                    up to a cache line                                          store fence
//! ```

use crate::access::{Outcome, Refused};
use crate::arch;

/// Copies `len` bytes from `from` to `to`, which do not overlap, through the cache.
///
/// Aligned words of 8 bytes are not torn on x86_64. Nothing else is promised towards threads that
/// write to `from`, or read `to`, meanwhile.
///
/// # Errors
///
/// When the kernel refuses an access, on either side. Part of the bytes may be copied then.
///
/// # Safety
///
/// What is mapped writable of `len` bytes at `to` may be written by the caller now.
#[inline]
pub unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> Result<(), Refused> {
    let wide = if len < arch::WIDE {
        0
    } else {
        len - len % arch::WIDE
    };
    if wide != 0 {
        // SAFETY: the length is a multiple of the step; the rest is the caller's.
        let outcome = unsafe { arch::copy_wide(to, from, wide) };
        check(outcome, to, from, wide)?;
    }
    if wide == len {
        return Ok(());
    }
    let (to, from) = (to.wrapping_add(wide), from.wrapping_add(wide));
    // SAFETY: the caller's.
    let outcome = unsafe { arch::copy(to, from, len - wide) };
    check(outcome, to, from, len - wide)
}

/// Copies as [`copy`] does, but with stores that go past the cache.
///
/// For large pieces that whoever copies will not read soon: what is in the cache stays there, and
/// the lines of `to` are not fetched first. The bytes are visible to others before whatever the
/// caller stores later.
///
/// # Errors
///
/// As [`copy`].
///
/// # Safety
///
/// As [`copy`].
pub unsafe fn copy_streaming(to: *mut u8, from: *const u8, len: usize) -> Result<(), Refused> {
    let head = to.align_offset(arch::LINE).min(len);
    let body = (len - head) - (len - head) % arch::WIDE;
    let tail = len - head - body;
    // SAFETY: the caller's.
    unsafe { copy(to, from, head)? };
    let (to, from) = (to.wrapping_add(head), from.wrapping_add(head));
    if body != 0 {
        // SAFETY: the head made `to` aligned, `body` is a multiple of the step.
        let outcome = unsafe { arch::stream(to, from, body) };
        arch::store_fence();
        check(outcome, to, from, body)?;
    }
    // SAFETY: the caller's.
    unsafe { copy(to.wrapping_add(body), from.wrapping_add(body), tail) }
}

/// Zeroes `len` bytes, of whole cache lines with stores that go past the cache.
///
/// # Errors
///
/// When the kernel refuses an access. Part of the bytes may be zero then.
///
/// # Safety
///
/// As [`copy`].
pub unsafe fn clear_streaming(to: *mut u8, len: usize) -> Result<(), Refused> {
    static ZEROES: [u8; arch::LINE] = [0; arch::LINE];
    let head = to.align_offset(arch::LINE).min(len);
    let body = (len - head) - (len - head) % arch::LINE;
    let tail = len - head - body;
    // SAFETY: less than a line; the rest is the caller's.
    unsafe { copy(to, ZEROES.as_ptr(), head)? };
    let to = to.wrapping_add(head);
    if body != 0 {
        // SAFETY: the head made `to` aligned, `body` is whole lines.
        let outcome = unsafe { arch::clear(to, body) };
        arch::store_fence();
        check(outcome, to, to, body)?;
    }
    // SAFETY: less than a line; the rest is the caller's.
    unsafe { copy(to.wrapping_add(body), ZEROES.as_ptr(), tail) }
}

/// What an outcome says of a copy.
#[inline]
fn check(outcome: Outcome, to: *mut u8, from: *const u8, len: usize) -> Result<(), Refused> {
    if outcome.refused == 0 {
        Ok(())
    } else {
        Err(refusal(outcome, to, from, len))
    }
}

/// Which address was refused. For an address that is not canonical the processor tells none: then
/// it is the side that is above the lower half of the address space.
#[cold]
fn refusal(outcome: Outcome, to: *mut u8, from: *const u8, len: usize) -> Refused {
    let (to, from) = (to.addr(), from.addr());
    match usize::try_from(outcome.value) {
        Ok(at) if at.wrapping_sub(to) < len || at.wrapping_sub(from) < len => Refused { addr: at },
        _ => Refused {
            addr: if from > to { from } else { to },
        },
    }
}
