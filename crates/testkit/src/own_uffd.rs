//! A userfaultfd of the program's own: pages that somebody else than the engine keeps back.
//!
//! The fewest calls that a test needs, written out, so that nothing of the engine is in it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const API: u64 = 0xc018_aa3f;
const REGISTER: u64 = 0xc020_aa00;
const UNREGISTER: u64 = 0x8010_aa01;
const COPY: u64 = 0xc028_aa03;
const WRITE_PROTECT: u64 = 0xc018_aa06;
/// Write protection, also of pages that are not there: `UFFD_FEATURE_PAGEFAULT_FLAG_WP`, `_WP_UNPOPULATED`.
const PROTECTS: u64 = 1 | 1 << 13;
/// Touches of programs only: `UFFD_USER_MODE_ONLY`.
const USER_MODE_ONLY: libc::c_int = 1;
/// A page is missing.
const PAGE_FAULT: u8 = 0x12;
const PAGE: u64 = 4096;

/// A userfaultfd, which keeps pages back that are missing.
#[derive(Debug)]
pub struct OwnUffd(OwnedFd);

impl OwnUffd {
    /// Opens one, for touches of programs, and of system calls if that is allowed; `None` where it is refused.
    pub fn open() -> Option<Self> {
        Self::open_with(0).ok()?
    }

    /// As [`OwnUffd::open`], one that can protect pages that are missing. An error where the kernel cannot.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn open_protecting() -> io::Result<Option<Self>> {
        Self::open_with(PROTECTS)
    }

    fn open_with(features: u64) -> io::Result<Option<Self>> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let open = |flags: libc::c_int| {
            // SAFETY: a system call that takes flags.
            let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
            libc::c_int::try_from(fd).ok().filter(|fd| *fd >= 0)
        };
        let Some(fd) = open(flags).or_else(|| open(flags | USER_MODE_ONLY)) else {
            return Ok(None);
        };
        // SAFETY: a descriptor that nobody else has.
        let this = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        this.call(API, &mut [0xaa, features, 0])?;
        Ok(Some(this))
    }

    /// Keeps missing pages back from now on.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn register(&self, at: *mut u8, pages: usize) -> io::Result<()> {
        self.call(REGISTER, &mut [addr(at), bytes(pages), 1, 0])
    }

    /// Keeps missing pages back, and leaves a mark where each is missing.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn register_and_protect(&self, at: *mut u8, pages: usize) -> io::Result<()> {
        self.call(REGISTER, &mut [addr(at), bytes(pages), 3, 0])?;
        self.call(WRITE_PROTECT, &mut [addr(at), bytes(pages), 1])
    }

    /// Lets go of them. Who waits for one looks again.
    ///
    /// # Errors
    ///
    /// What the kernel refuses.
    pub fn unregister(&self, at: *mut u8, pages: usize) -> io::Result<()> {
        self.call(UNREGISTER, &mut [addr(at), bytes(pages)])
    }

    /// The page that somebody waits for next, within that time.
    pub fn next_fault(&self, within_ms: i32) -> Option<*mut u8> {
        let mut ready = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one entry, of our own.
        if unsafe { libc::poll(&raw mut ready, 1, within_ms) } != 1 {
            return None;
        }
        let mut message = [0u64; 4];
        let (room, len) = ((&raw mut message).cast(), size_of_val(&message));
        // SAFETY: room for one message.
        let read = unsafe { libc::read(self.0.as_raw_fd(), room, len) };
        let is_fault = message[0].to_ne_bytes()[0] == PAGE_FAULT;
        let at = usize::try_from(message[2] & !(PAGE - 1)).ok()?;
        (read > 0 && is_fault).then(|| core::ptr::with_exposed_provenance_mut(at))
    }

    /// Makes the page at `at`, of that byte, and wakes who waits for it.
    ///
    /// # Errors
    ///
    /// What the kernel refuses: `EEXIST` when it is there.
    pub fn fill(&self, at: *mut u8, byte: u8) -> io::Result<()> {
        let page = vec![byte; bytes(1).try_into().unwrap_or(0)];
        self.call(COPY, &mut [addr(at), addr(page.as_ptr()), PAGE, 0, 0])
    }

    fn call(&self, request: u64, argument: &mut [u64]) -> io::Result<()> {
        // SAFETY: as long as the request says.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument.as_mut_ptr()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn addr(at: *const u8) -> u64 {
    at.expose_provenance() as u64
}

const fn bytes(pages: usize) -> u64 {
    pages as u64 * PAGE
}
