//! Memory that somebody's DMA uses: pinned, as by `pin_user_pages(FOLL_LONGTERM)`.
//!
//! The registered buffers of an `io_uring` are pinned so for as long as they are registered.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Bytes that are pinned until this is dropped.
#[derive(Debug)]
pub(crate) struct Pinned(OwnedFd);

const REGISTER_BUFFERS: libc::c_uint = 0;
const UNREGISTER_BUFFERS: libc::c_uint = 1;

impl Pinned {
    /// `None` where the system has no `io_uring` for us; prints why.
    pub(crate) fn new(at: *mut u8, len: usize) -> Option<Self> {
        // `struct io_uring_params`: 120 bytes, all zero for the defaults.
        let mut params = [0u64; 15];
        // SAFETY: the structure has this size, and lives for the call.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) };
        let Ok(fd) = i32::try_from(fd).and_then(u32::try_from) else {
            let error = std::io::Error::last_os_error();
            println!("skipped: nothing pins pages here: io_uring: {error}");
            return None;
        };
        // SAFETY: the call has just made it.
        let ring = unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) };
        let buffer = libc::iovec {
            iov_base: at.cast(),
            iov_len: len,
        };
        let buffers = &raw const buffer;
        // SAFETY: one buffer of the caller's, which it keeps mapped.
        let rc = unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring.as_raw_fd(),
                REGISTER_BUFFERS,
                buffers,
                1,
            )
        };
        assert_eq!(rc, 0, "{}", std::io::Error::last_os_error());
        Some(Self(ring))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let (ring, none) = (self.0.as_raw_fd(), std::ptr::null::<libc::iovec>());
        // SAFETY: undoes what `new` did.
        unsafe {
            libc::syscall(
                libc::SYS_io_uring_register,
                ring,
                UNREGISTER_BUFFERS,
                none,
                0,
            )
        };
    }
}
