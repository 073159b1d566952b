//! A device, by the descriptors of its file.

use super::{Cmd, Do, PAGE, Span, errno, is_local};
use std::ffi::{CStr, c_int};
use std::ops::Deref;

/// The device files: two that the CPU does not see into, and two that it does.
pub(crate) const DEVICES: [&CStr; 4] = [
    c"/dev/hmm_dmirror0",
    c"/dev/hmm_dmirror1",
    c"/dev/hmm_dmirror2",
    c"/dev/hmm_dmirror3",
];

/// The number of a descriptor, whatever is there, and whoever closes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor(pub(crate) c_int);

impl Descriptor {
    /// A descriptor of the file at `path`, or the error number.
    pub(crate) fn open(path: &CStr, flags: c_int) -> Result<Self, i32> {
        // SAFETY: a C string.
        match unsafe { libc::open(path.as_ptr(), libc::O_RDWR | flags) } {
            -1 => Err(errno()),
            fd => Ok(Self(fd)),
        }
    }

    /// Another one of the same file.
    pub(crate) fn dup(self) -> Self {
        // SAFETY: copies a descriptor, if it is one.
        let twin = unsafe { libc::dup(self.0) };
        assert!(twin >= 0, "{}", errno());
        Self(twin)
    }

    /// Whether it was closed, or the error number.
    pub(crate) fn close(self) -> Result<(), i32> {
        // SAFETY: a number, whatever is there: tests have nothing open that they did not open themselves.
        match unsafe { libc::close(self.0) } {
            0 => Ok(()),
            _ => Err(errno()),
        }
    }

    /// Runs a command. What is refused is left as it was.
    pub(crate) fn send(self, request: u64, cmd: &mut Cmd) -> Result<(), i32> {
        let before = *cmd;
        // SAFETY: a command of this device. The device looks where it is said to be data, and does not trust it.
        match unsafe { libc::ioctl(self.0, request, &raw mut *cmd) } {
            0 => Ok(()),
            _ => {
                let errno = errno();
                assert_eq!(*cmd, before, "error {errno}");
                Err(errno)
            }
        }
    }

    /// Runs a command on pages, and says what came of it, or the error number.
    pub(crate) fn run(self, what: Do, pages: Span, data: &mut [u8]) -> Result<Cmd, i32> {
        let needed = what.data_len(pages.pages);
        assert!(data.len() >= needed, "room for what the command gives");
        let mut cmd = Cmd::new(pages, data);
        self.send(what.request(), &mut cmd).map(|()| cmd)
    }

    /// Moves all of it to the device, and says what the device reads there.
    pub(crate) fn take(self, pages: Span) -> Vec<u8> {
        let mut data = vec![0xa5; pages.pages * PAGE];
        self.take_with(pages, &mut data);
        data
    }

    /// Moves all of it to the device, and puts there what the device reads.
    pub(crate) fn take_with(self, pages: Span, data: &mut [u8]) {
        let done = self.run(Do::MigrateToDev, pages, data).unwrap();
        assert_eq!(done.cpages, pages.pages as u64);
    }

    /// What each page is: one byte of `seen`.
    pub(crate) fn look(self, pages: Span) -> Vec<u8> {
        let mut data = vec![0x77; pages.pages];
        let done = self.run(Do::Snapshot, pages, &mut data).unwrap();
        assert_eq!(done.cpages, pages.pages as u64);
        data
    }

    /// Whether all of it is on the device.
    pub(crate) fn has(self, pages: Span) -> bool {
        self.look(pages).into_iter().all(is_local)
    }

    /// The flags of its commands.
    pub(crate) fn set_flags(self, flags: usize) {
        let nowhere = Span {
            at: std::ptr::null_mut(),
            pages: flags,
        };
        self.run(Do::Flags, nowhere, &mut []).unwrap();
    }
}

/// A device that is open, by a descriptor that nobody else closes.
#[derive(Debug)]
pub(crate) struct Device(Descriptor);

impl Device {
    /// The first one.
    pub(crate) fn open() -> Self {
        Self::number(0)
    }

    /// One of `DEVICES`.
    pub(crate) fn number(number: usize) -> Self {
        Self(Descriptor::open(DEVICES[number], 0).unwrap())
    }

    /// Closes it. Nothing is left on it, or that fails.
    pub(crate) fn close(self) {
        drop(self);
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let closed = self.0.close();
        let is_right = closed.is_ok() || std::thread::panicking();
        assert!(is_right, "something was left: {closed:?}");
    }
}

impl Deref for Device {
    type Target = Descriptor;

    fn deref(&self) -> &Descriptor {
        &self.0
    }
}
