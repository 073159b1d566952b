//! The calls of the program that are ours to answer, or to hear of. Everything else goes on untouched.
//!
//! `open` and its kin are variadic in C. They are three or four arguments in registers on every machine
//! that Linux runs on, where an argument that was not given is read as whatever is there, and handed on.

use crate::files;
use crate::next;
use core::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use libc::{mode_t, off_t, size_t};
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

/// The device that a path names.
///
/// # Safety
///
/// `path` is null or a C string.
unsafe fn device_at(path: *const c_char) -> Option<usize> {
    if path.is_null() {
        return None;
    }
    // SAFETY: as the caller promises.
    let path = unsafe { CStr::from_ptr(path) };
    let number = path.to_bytes().strip_prefix(b"/dev/hmm_dmirror")?;
    match number {
        [digit @ b'0'..=b'3'] => Some(usize::from(digit - b'0')),
        _ => None,
    }
}

/// # Safety
///
/// As `open`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: a path, as the caller promises.
    match unsafe { device_at(path) } {
        Some(device) => answered(ours("open", || files::open(device, flags))),
        // SAFETY: as the caller promises.
        None => unsafe { next::open(path, flags, mode) },
    }
}

/// # Safety
///
/// As `open64`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: `open` on a machine whose offsets have 64 bits anyway.
    unsafe { open(path, flags | libc::O_LARGEFILE, mode) }
}

/// # Safety
///
/// As `openat`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn openat(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: mode_t,
) -> c_int {
    // SAFETY: a path, as the caller promises. It is absolute, so the folder does not matter.
    match unsafe { device_at(path) } {
        Some(device) => answered(ours("openat", || files::open(device, flags))),
        // SAFETY: as the caller promises.
        None => unsafe { next::openat(dir, path, flags, mode) },
    }
}

/// # Safety
///
/// As `openat64`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn openat64(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
    mode: mode_t,
) -> c_int {
    // SAFETY: `openat` on a machine whose offsets have 64 bits anyway.
    unsafe { openat(dir, path, flags | libc::O_LARGEFILE, mode) }
}

/// # Safety
///
/// As `close`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close(fd: c_int) -> c_int {
    let file = files::find(fd);
    // SAFETY: as the caller promises.
    let closed = unsafe { next::close(fd) };
    match file {
        Some(file) if closed == 0 => answered(ours("close", || files::closed(file))),
        _ => closed,
    }
}

/// # Safety
///
/// As `ioctl`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int {
    match files::find(fd) {
        Some(file) => answered(ours("ioctl", || file.command(request, argument))),
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
