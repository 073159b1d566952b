//! Reads of our own memory that fail instead of waiting.
//!
//! `/proc/self/mem` does not wait for a userfaultfd: a missing page of a registered span is
//! `EIO`. So a thread that must not wait can look at memory that may be elsewhere.

use gpusvm_types::VirtAddr;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// The memory of this process, as a file.
///
/// It keeps showing the process that opened it: a forked child opens its own.
#[derive(Debug)]
pub(crate) struct ProcMem {
    fd: OwnedFd,
}

impl ProcMem {
    /// Opens the memory of this process.
    ///
    /// # Errors
    ///
    /// `/proc` is not there, or may not be read.
    pub(crate) fn open() -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/proc/self/mem", flags, Mode::empty())?;
        Ok(Self { fd })
    }

    /// Reads from `at` on; how many bytes came: fewer than fit where something is missing.
    ///
    /// The bytes may be torn by whoever writes them meanwhile.
    ///
    /// # Errors
    ///
    /// `EIO`: the first page is not mapped, or missing in a registered span, or poisoned.
    pub(crate) fn read(&self, at: VirtAddr, out: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::pread(&self.fd, out, at.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::Request;
    use crate::sys::testing::{self, finishes};
    use crate::sys::uffd::{Features, RegisterModes};
    use gpusvm_types::ByteSize;

    #[test]
    fn reads_what_is_there_and_stops_before_what_is_not_mapped() {
        let mapping = Request::new(ByteSize::kib(8)).map().unwrap();
        mapping.store(ByteSize::kib(4), 9);
        let memory = ProcMem::open().unwrap();
        let mut out = [0; 1];
        let at = mapping.span().start() + ByteSize::kib(4);
        assert_eq!(memory.read(at, &mut out), Ok(1));
        assert_eq!(out, [9]);
        assert_eq!(memory.read(VirtAddr::new(4096), &mut out), Err(Errno::IO));
    }

    #[test]
    fn a_missing_page_is_an_error_and_not_a_wait() {
        let Some(uffd) = testing::uffd(Features::NONE) else {
            return;
        };
        let mapping = Request::new(ByteSize::kib(8)).dont_fork().map().unwrap();
        mapping.store(ByteSize::ZERO, 1);
        let (start, second) = (
            mapping.span().start(),
            mapping.span().start() + ByteSize::kib(4),
        );
        let missing = RegisterModes {
            missing: true,
            wp: false,
            minor: false,
        };
        // SAFETY: nothing touches the missing page but through the file.
        unsafe { uffd.register(mapping.span(), missing) }.unwrap();
        let read = move |at| {
            finishes(move || {
                let mut out = [0; 4096];
                ProcMem::open().unwrap().read(at, &mut out)
            })
        };
        assert_eq!(read(second), Some(Err(Errno::IO)), "an error, not a wait");
        assert_eq!(read(start), Some(Ok(4096)));
        let across = finishes(move || {
            let mut out = [0; 8192];
            ProcMem::open().unwrap().read(start, &mut out)
        });
        assert_eq!(across, Some(Ok(4096)), "what is there, then stop");
    }
}
