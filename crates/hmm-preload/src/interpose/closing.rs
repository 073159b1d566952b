//! What closes descriptors, or puts others in their place: the last one of a device ends it.
//!
//! Not seen is what closes in the C library or below it: `freopen`, `fcloseall`, a system call of the program's
//! own. Such a device ends when a descriptor of any is closed, or opened.
//!
//! The engine has descriptors in the process too, which a program that closes all that it does not know must not
//! close. For whoever is not the engine, they are not there.

use super::{answered, ours};
use crate::{files, next};
use core::ffi::{c_int, c_uint};
use libc::FILE;

/// # Safety
///
/// As `close`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close(fd: c_int) -> c_int {
    if is_of_the_engine(fd) {
        return answered(Err(libc::EBADF));
    }
    // SAFETY: as the caller promises.
    closing(fd, || unsafe { next::close(fd) })
}

/// # Safety
///
/// As `fclose`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn fclose(stream: *mut FILE) -> c_int {
    let fd = match files::is_any_open() {
        // SAFETY: a stream, as the caller promises.
        true => unsafe { libc::fileno(stream) },
        false => -1,
    };
    // SAFETY: as the caller promises.
    closing(fd, || unsafe { next::fclose(stream) })
}

/// # Safety
///
/// As `dup2`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup2(from: c_int, to: c_int) -> c_int {
    if is_of_the_engine(to) {
        return answered(Err(libc::EBUSY));
    }
    // SAFETY: as the caller promises.
    replacing(to, || unsafe { next::dup2(from, to) })
}

/// # Safety
///
/// As `dup3`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int {
    if is_of_the_engine(to) {
        return answered(Err(libc::EBUSY));
    }
    // SAFETY: as the caller promises.
    replacing(to, || unsafe { next::dup3(from, to, flags) })
}

/// # Safety
///
/// As `close_range`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    if !files::is_any_open() || first > last {
        // SAFETY: as the caller promises.
        return unsafe { next::close_range(first, last, flags) };
    }
    let kept = files::of_the_engine();
    closing_any(|| {
        // SAFETY: as the caller promises.
        let close = |first, last| unsafe { next::close_range(first, last, flags) };
        between(first, last, &kept, close)
    })
}

/// # Safety
///
/// As `closefrom`.
#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn closefrom(first: c_int) {
    match files::is_any_open() {
        // SAFETY: as the caller promises.
        false => unsafe { next::closefrom(first) },
        true => {
            let first = c_uint::try_from(first).unwrap_or(0);
            // SAFETY: as the caller promises.
            unsafe { close_range(first, c_uint::MAX, 0) };
        }
    }
}

/// What there is from `first` to `last` without those that are kept, piece by piece. Ends where it fails.
fn between(
    mut first: c_uint,
    last: c_uint,
    kept: &[c_int],
    mut close: impl FnMut(c_uint, c_uint) -> c_int,
) -> c_int {
    let all = first..=last;
    let kept = kept.iter().filter_map(|fd| c_uint::try_from(*fd).ok());
    for fd in kept.filter(|fd| all.contains(fd)) {
        if fd > first && close(first, fd - 1) != 0 {
            return -1;
        }
        first = fd + 1;
    }
    if first <= last { close(first, last) } else { 0 }
}

fn is_of_the_engine(fd: c_int) -> bool {
    files::is_any_open() && files::of_the_engine().binary_search(&fd).is_ok()
}

/// Runs what closes a descriptor, and says if its device could not end well.
fn closing(fd: c_int, close: impl FnOnce() -> c_int) -> c_int {
    if files::find(fd).is_none() {
        return close();
    }
    let mut closed = -1;
    let ended = ours("close", || {
        let (result, ended) = files::closing(close);
        closed = result;
        ended.map(|()| 0)
    });
    match ended {
        Err(errno) if closed == 0 => answered(Err(errno)),
        _ => closed,
    }
}

/// Runs what puts another in the place of a descriptor. Whose call it is hears nothing of a device that ends.
fn replacing(fd: c_int, replace: impl FnOnce() -> c_int) -> c_int {
    match files::find(fd) {
        None => replace(),
        Some(_) => closing_any(replace),
    }
}

/// Runs what closes descriptors of any device.
fn closing_any(close: impl FnOnce() -> c_int) -> c_int {
    let mut closed = -1;
    let _ = ours("closing", || {
        closed = files::closing(close).0;
        Ok(0)
    });
    closed
}
