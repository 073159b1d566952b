//! The calls of the program that are ours to answer, or to hear of. Everything else goes on untouched.

mod opening; // of files
mod closing; // and of descriptors
pub(crate) mod threads; // of the engine

use crate::files;
use crate::next;
use core::ffi::{c_int, c_ulong, c_void};
use libc::{off_t, size_t};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What an answer is in C: a value, or -1 and an error number.
fn answered(result: Result<c_int, c_int>) -> c_int {
    result.unwrap_or_else(|errno| {
        set_errno(errno);
        -1
    })
}

fn set_errno(errno: c_int) {
    // SAFETY: the C library gives each thread a place for it.
    let place = unsafe { libc::__errno_location() };
    // SAFETY: as above.
    unsafe { place.write(errno) };
}

/// Runs what is ours. A panic ends here, with a report: the program's stack is not ours to unwind.
fn ours(what: &str, run: impl FnOnce() -> Result<c_int, c_int>) -> Result<c_int, c_int> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        eprintln!("gpusvm-hmm: {what}: a bug of this library, see above");
        Err(libc::EIO)
    })
}

/// # Safety
///
/// As `ioctl`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    match files::find(fd) {
        // A request is 32 bits: a program that has it in an `int` hands on more.
        Some(file) => answered(ours("ioctl", move || {
            file.command(request & c_ulong::from(u32::MAX), argument)
        })),
        // SAFETY: as the caller promises.
        None => unsafe { next::ioctl(fd, request, argument) },
    }
}

/// # Safety
///
/// As `mmap`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap(
    at: *mut c_void,
    len: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let file = if flags & libc::MAP_ANONYMOUS == 0 {
        files::find(fd)
    } else {
        None
    };
    let mapped = match file {
        // SAFETY: as the caller promises.
        Some(_) => unsafe { files::map_fresh_pages(at, len, protection, flags) },
        // SAFETY: as the caller promises.
        None => unsafe { next::mmap(at, len, protection, flags, fd, offset) },
    };
    if flags & libc::MAP_FIXED != 0 && mapped != libc::MAP_FAILED {
        was_unmapped(at, len);
    }
    mapped
}

/// # Safety
///
/// As `mmap64`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap64(
    at: *mut c_void,
    len: size_t,
    protection: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: `mmap` on a machine whose offsets have 64 bits anyway.
    unsafe { mmap(at, len, protection, flags, fd, offset) }
}

/// # Safety
///
/// As `munmap`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn munmap(at: *mut c_void, len: size_t) -> c_int {
    // SAFETY: as the caller promises.
    let unmapped = unsafe { next::munmap(at, len) };
    if unmapped == 0 {
        was_unmapped(at, len);
    }
    unmapped
}

/// # Safety
///
/// As `mremap`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mremap(
    at: *mut c_void,
    len: size_t,
    new_len: size_t,
    flags: c_int,
    to: *mut c_void,
) -> *mut c_void {
    // SAFETY: as the caller promises.
    let moved = unsafe { next::mremap(at, len, new_len, flags, to) };
    if moved != libc::MAP_FAILED {
        if moved != at {
            was_unmapped(at, len);
        }
        if flags & libc::MREMAP_FIXED != 0 {
            was_unmapped(to, new_len);
        }
    }
    moved
}

/// Tells devices. The program's call has succeeded, whatever comes of that.
fn was_unmapped(at: *mut c_void, len: size_t) {
    let _ = ours("munmap", || {
        files::was_unmapped(at.cast_const().cast::<u8>(), len);
        Ok(0)
    });
}

/// # Safety
///
/// As `mprotect`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mprotect(at: *mut c_void, len: size_t, protection: c_int) -> c_int {
    // SAFETY: as the caller promises.
    let changed = unsafe { next::mprotect(at, len, protection) };
    // Also when it failed: part of it may be changed.
    let told = ours("mprotect", || {
        files::was_protected(at.cast_const().cast::<u8>(), len);
        Ok(changed)
    });
    match told {
        Ok(changed) => changed,
        Err(errno) => answered(Err(errno)),
    }
}
