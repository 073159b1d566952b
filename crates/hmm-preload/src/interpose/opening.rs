//! What opens files: the device's paths are ours.
//!
//! `open` and its kin are variadic in C. They are three or four arguments in registers on every machine
//! that Linux runs on, where an argument that was not given is read as whatever is there, and handed on.
//!
//! A system call that is made without the C library is not seen, nor is a path that leads to the device by
//! another name.

use super::{answered, ours};
use crate::{files, next};
use core::ffi::{CStr, c_char, c_int};
use libc::{FILE, mode_t};

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

/// Opens the device that `path` names, if it does.
///
/// # Safety
///
/// `path` is null or a C string.
unsafe fn open_device(path: *const c_char, flags: c_int) -> Option<c_int> {
    // SAFETY: as the caller promises.
    let device = unsafe { device_at(path) }?;
    Some(answered(ours("open", || files::open(device, flags))))
}

/// # Safety
///
/// As `open`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
    // SAFETY: a path, as the caller promises.
    let device = unsafe { open_device(path, flags) };
    // SAFETY: as the caller promises.
    device.unwrap_or_else(|| unsafe { next::open(path, flags, mode) })
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
    let device = unsafe { open_device(path, flags) };
    // SAFETY: as the caller promises.
    device.unwrap_or_else(|| unsafe { next::openat(dir, path, flags, mode) })
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

/// What `open` is in programs that are built with checks.
///
/// # Safety
///
/// As `open`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: a path, as the caller promises.
    let device = unsafe { open_device(path, flags) };
    // SAFETY: as the caller promises.
    device.unwrap_or_else(|| unsafe { next::__open_2(path, flags) })
}

/// # Safety
///
/// As `open64`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: as the caller promises.
    unsafe { __open_2(path, flags | libc::O_LARGEFILE) }
}

/// # Safety
///
/// As `openat`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: a path, as the caller promises.
    let device = unsafe { open_device(path, flags) };
    // SAFETY: as the caller promises.
    device.unwrap_or_else(|| unsafe { next::__openat_2(dir, path, flags) })
}

/// # Safety
///
/// As `openat64`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn __openat64_2(
    dir: c_int,
    path: *const c_char,
    flags: c_int,
) -> c_int {
    // SAFETY: as the caller promises.
    unsafe { __openat_2(dir, path, flags | libc::O_LARGEFILE) }
}

/// # Safety
///
/// As `fopen`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fopen(path: *const c_char, mode: *const c_char) -> *mut FILE {
    // SAFETY: a path, as the caller promises.
    match unsafe { device_at(path) } {
        // SAFETY: as the caller promises.
        Some(device) => unsafe { open_stream(device, mode) },
        // SAFETY: as the caller promises.
        None => unsafe { next::fopen(path, mode) },
    }
}

/// # Safety
///
/// As `fopen64`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE {
    // SAFETY: `fopen` on a machine whose offsets have 64 bits anyway.
    unsafe { fopen(path, mode) }
}

/// # Safety
///
/// As `fopen`.
unsafe fn open_stream(device: usize, mode: *const c_char) -> *mut FILE {
    // SAFETY: a C string, as the caller promises.
    let is_closed_by_exec = unsafe { CStr::from_ptr(mode) }.to_bytes().contains(&b'e');
    let flags = if is_closed_by_exec {
        libc::O_CLOEXEC
    } else {
        0
    };
    let fd = answered(ours("fopen", || files::open(device, flags)));
    if fd < 0 {
        return core::ptr::null_mut();
    }
    // SAFETY: a descriptor that nobody else has, and a mode, as the caller promises.
    let stream = unsafe { libc::fdopen(fd, mode) };
    if stream.is_null() {
        // SAFETY: as above. It is not used any more.
        unsafe { super::closing::close(fd) };
    }
    stream
}
