//! What a descriptor leads to, by system calls alone.
//!
//! The C library would take memory from the program's heap to list a folder, and the program may have written
//! over that.

use core::ffi::c_int;
use rustix::fs::{Mode, OFlags, RawDir};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// What tells one file from all others.
pub(crate) type Inode = (libc::dev_t, libc::ino_t);

/// A file of no bytes that nobody else has.
pub(crate) fn memfd(flags: c_int) -> Result<OwnedFd, c_int> {
    let flags = match flags {
        0 => 0,
        _ => libc::MFD_CLOEXEC,
    };
    // SAFETY: a C string.
    let fd = unsafe { libc::memfd_create(c"hmm_dmirror".as_ptr(), flags) };
    match fd {
        // SAFETY: a descriptor that nobody else has.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(libc::EMFILE),
    }
}

/// Where a descriptor leads. `None` if nothing is open there.
pub(crate) fn inode_of(fd: c_int) -> Option<Inode> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: room for what is told of any descriptor.
    if unsafe { libc::fstat(fd, stat.as_mut_ptr()) } != 0 {
        return None;
    }
    // SAFETY: it was told.
    let stat = unsafe { stat.assume_init() };
    Some((stat.st_dev, stat.st_ino))
}

/// Calls `with` for each descriptor of the process.
pub(crate) fn each(mut with: impl FnMut(c_int)) -> Result<(), c_int> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open("/proc/self/fd", flags, Mode::empty());
    let folder = folder.map_err(rustix::io::Errno::raw_os_error)?;
    let mut room = [MaybeUninit::<u8>::uninit(); 4096];
    let mut list = RawDir::new(&folder, &mut room);
    while let Some(entry) = list.next() {
        let entry = entry.map_err(rustix::io::Errno::raw_os_error)?;
        let number = entry.file_name().to_str().ok();
        let number = number.and_then(|name| name.parse().ok());
        if let Some(fd) = number.filter(|fd| *fd != folder.as_raw_fd()) {
            with(fd);
        }
    }
    Ok(())
}

/// All descriptors of the process that exec closes.
pub(crate) fn closed_by_exec() -> Result<Vec<c_int>, c_int> {
    let mut all = Vec::new();
    each(|fd| {
        // SAFETY: asks about a number, whatever is there.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        if flags != -1 && flags & libc::FD_CLOEXEC != 0 {
            all.push(fd);
        }
    })?;
    all.sort_unstable();
    Ok(all)
}
