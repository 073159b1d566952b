//! userfaultfd: the faults of a span come here, and pages go in and out of it.
//!
//! ```text
//!   Uffd::open(flavour, wanted)      open.rs, features.rs
//!      register(span)                from now on: a first touch waits
//!      read() -> Event               event.rs
//!      move_pages, copy, zeropage    the touch goes on
//!      unregister(span)              as if nothing had been
//! ```
//!
//! Each method is one ioctl. Those that fill report how far they came ([`Progress`]) and leave
//! going on from there to the caller, who knows whether that makes sense.
//!
//! # Locking
//!
//! None: the kernel orders the calls. A call that changes mappings elsewhere makes fills fail
//! with `EAGAIN` until its event was read.
//!
//! # Differences from the kernel
//!
//! The kernel answers a partial fill with `EAGAIN` and drops the reason; the reason shows when the
//! fill goes on from where it stopped.

mod open; // ways in, and why none was
mod features; // what a kernel offers
mod event; // messages, decoded
mod ioctls; // opcodes and modes
#[cfg(test)]
mod tests; // against the real kernel: what it does, refuses, costs

pub(crate) use event::{Event, Message};
pub use features::Features;
pub(crate) use open::DEVICE;
pub use open::{Attempt, Flavour, OpenError, Way};

use super::ioctl::Call;
use gpusvm_types::{ByteSize, Span, VirtAddr};
use linux_raw_sys::general as raw;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::ioctl::Opcode;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
#[cfg(test)]
use std::os::fd::{FromRawFd, RawFd};

/// An open userfaultfd.
#[derive(Debug)]
pub(crate) struct Uffd {
    // INVARIANT: a userfaultfd whose handshake is done, with `features` granted; after `end`, what refuses
    // every call.
    fd: OwnedFd,
    features: Features,
}

/// Which accesses of a registered span come to the descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RegisterModes {
    /// Touches of pages that are not there.
    pub(crate) missing: bool,
    /// Writes to pages that [`Uffd::write_protect`] protected.
    pub(crate) wp: bool,
    /// Touches of pages that are not there, but in the file behind a mapping of shared memory.
    pub(crate) minor: bool,
}

/// How pages are moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MoveFlags {
    /// Pages that are not in the source are passed over, and count as moved. On Linux 6.18 such a
    /// call may never return when pages of the source are dropped meanwhile.
    pub(crate) allow_holes: bool,
    /// Who waits for the destination goes on waiting.
    pub(crate) dont_wake: bool,
}

/// How pages are copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CopyFlags {
    /// Who waits for the destination goes on waiting.
    pub(crate) dont_wake: bool,
    /// The pages arrive write-protected.
    pub(crate) wp: bool,
}

/// How far a fill came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) struct Progress {
    /// What was done, from the start on.
    pub(crate) done: ByteSize,
    /// Why no more was, or `None` when all was. `AGAIN` after some progress hides the reason.
    pub(crate) errno: Option<Errno>,
}

impl Uffd {
    /// Sends faults of `span` here.
    ///
    /// # Errors
    ///
    /// `EBUSY`: part of it belongs to another userfaultfd. `EINVAL`: not mapped throughout, or
    /// not a kind of memory that can be registered. `ENOMEM`: too many mappings.
    ///
    /// # Safety
    ///
    /// The caller answers for what a touch of `span` finds from now on: every fault must be
    /// answered with the bytes that the memory has to hold there.
    pub(crate) unsafe fn register(&self, span: Span, modes: RegisterModes) -> Result<(), Errno> {
        let mode = mode(&[
            (modes.missing, raw::UFFDIO_REGISTER_MODE_MISSING),
            (modes.wp, raw::UFFDIO_REGISTER_MODE_WP),
            (modes.minor, raw::UFFDIO_REGISTER_MODE_MINOR),
        ]);
        self.call(
            ioctls::REGISTER,
            &mut raw::uffdio_register {
                range: range(span),
                mode,
                ioctls: 0,
            },
        )
    }

    /// Leaves the faults of `span` to the kernel again, and wakes who waited.
    ///
    /// # Errors
    ///
    /// `EINVAL`: part of `span` is not of a kind that can be registered, or nothing is mapped.
    /// `EBUSY`: part of it belongs to another userfaultfd. `ENOMEM`: too many mappings.
    pub(crate) fn unregister(&self, span: Span) -> Result<(), Errno> {
        self.call(ioctls::UNREGISTER, &mut range(span))
    }

    /// Takes the pages from `src` and puts them at `dst`, which must be registered here.
    ///
    /// The errors in the result: `EEXIST`: the destination has a page. `ENOENT`: the source has
    /// none. `EBUSY`: the page is shared with a forked child or pinned. `EINVAL`: the mappings do
    /// not match, or cannot be moved at all. `EAGAIN`: mappings change, or stopped on the way.
    ///
    /// # Safety
    ///
    /// Nobody may rely on the bytes at `src` to stay.
    pub(crate) unsafe fn move_pages(
        &self,
        dst: VirtAddr,
        src: VirtAddr,
        len: ByteSize,
        flags: MoveFlags,
    ) -> Progress {
        let mode = mode(&[
            (flags.dont_wake, ioctls::MOVE_MODE_DONTWAKE),
            (flags.allow_holes, ioctls::MOVE_MODE_ALLOW_SRC_HOLES),
        ]);
        let (dst, src) = (dst.get(), src.get());
        let mut arg = raw::uffdio_move {
            dst,
            src,
            len: len.get(),
            mode,
            move_: 0,
        };
        let result = self.call(ioctls::MOVE, &mut arg);
        Progress::new(arg.move_, result)
    }

    /// Copies from `src` to pages that are missing at `dst`.
    ///
    /// The errors in the result: `EEXIST`: the destination has a page. `EFAULT`: the source
    /// cannot be read. `ENOENT`: the destination is not registered here. `EAGAIN`: mappings
    /// change, or stopped on the way.
    ///
    /// # Safety
    ///
    /// `src` must be readable for `len`, and its bytes must be fit to be seen at `dst`.
    pub(crate) unsafe fn copy(
        &self,
        dst: VirtAddr,
        src: VirtAddr,
        len: ByteSize,
        flags: CopyFlags,
    ) -> Progress {
        let mode = mode(&[
            (flags.dont_wake, raw::UFFDIO_COPY_MODE_DONTWAKE),
            (flags.wp, raw::UFFDIO_COPY_MODE_WP),
        ]);
        let (dst, src) = (dst.get(), src.get());
        let mut arg = raw::uffdio_copy {
            dst,
            src,
            len: len.get(),
            mode,
            copy: 0,
        };
        let result = self.call(ioctls::COPY, &mut arg);
        Progress::new(arg.copy, result)
    }

    /// Maps the zero page at every page of `span`, all of which must be missing.
    ///
    /// The errors in the result are those of [`Uffd::copy`].
    pub(crate) fn zeropage(&self, span: Span, dont_wake: bool) -> Progress {
        let mode = mode(&[(dont_wake, raw::UFFDIO_ZEROPAGE_MODE_DONTWAKE)]);
        let mut arg = raw::uffdio_zeropage {
            range: range(span),
            mode,
            zeropage: 0,
        };
        let result = self.call(ioctls::ZEROPAGE, &mut arg);
        Progress::new(arg.zeropage, result)
    }

    /// Maps the file's pages at the pages of `span`, all of which must be missing, and in the file.
    ///
    /// The errors in the result: `EEXIST`: there is a page. `EFAULT`: the file has none there. `EINVAL`: not
    /// a mapping of shared memory, or behind the end of the file. `ENOENT`, `EAGAIN`: as [`Uffd::copy`].
    pub(crate) fn map_of_file(&self, span: Span, wp: bool) -> Progress {
        let mut arg = raw::uffdio_continue {
            range: range(span),
            mode: mode(&[(wp, ioctls::CONTINUE_MODE_WP)]),
            mapped: 0,
        };
        let result = self.call(ioctls::CONTINUE, &mut arg);
        Progress::new(arg.mapped, result)
    }

    /// Whether every event was read of what happened to mappings before: the kernel counts those that were
    /// not, and says `EAGAIN` as long as there are any, before it looks at what it is asked for, which is
    /// nothing.
    pub(crate) fn has_told_all(&self) -> bool {
        let mut arg = raw::uffdio_zeropage {
            range: raw::uffdio_range { start: 0, len: 0 },
            mode: 0,
            zeropage: 0,
        };
        self.call(ioctls::ZEROPAGE, &mut arg) == Err(Errno::INVAL)
    }

    /// Marks every page of `span` as broken: a touch is a SIGBUS instead of a wait.
    ///
    /// The errors in the result are those of [`Uffd::copy`].
    pub(crate) fn poison(&self, span: Span, dont_wake: bool) -> Progress {
        let mode = mode(&[(dont_wake, ioctls::POISON_MODE_DONTWAKE)]);
        let mut arg = raw::uffdio_poison {
            range: range(span),
            mode,
            updated: 0,
        };
        let result = self.call(ioctls::POISON, &mut arg);
        Progress::new(arg.updated, result)
    }

    /// Wakes everybody who waits for a page of `span`; they touch it again.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the span is outside what a process can map.
    pub(crate) fn wake(&self, span: Span) -> Result<(), Errno> {
        self.call(ioctls::WAKE, &mut range(span))
    }

    /// Write-protects the pages of `span`, or lets them be written again.
    ///
    /// # Errors
    ///
    /// `ENOENT`: not registered here for write protection. `EAGAIN`: mappings change. `EINVAL`:
    /// `dont_wake` with `on`, which wakes nobody anyway.
    pub(crate) fn write_protect(&self, span: Span, on: bool, dont_wake: bool) -> Result<(), Errno> {
        let mode = mode(&[
            (on, ioctls::WRITEPROTECT_MODE_WP),
            (dont_wake, ioctls::WRITEPROTECT_MODE_DONTWAKE),
        ]);
        self.call(
            ioctls::WRITEPROTECT,
            &mut raw::uffdio_writeprotect {
                range: range(span),
                mode,
            },
        )
    }

    /// Reads what is queued, as many as fit; how many came. Does not wait.
    ///
    /// # Errors
    ///
    /// `EAGAIN`: nothing is queued.
    pub(crate) fn read(&self, out: &mut [Message]) -> Result<usize, Errno> {
        let bytes = rustix::io::read(&self.fd, Message::as_bytes(out))?;
        Ok(bytes / size_of::<Message>())
    }

    /// Whether a message is there to be read.
    pub(crate) fn has_messages(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // If that fails, a read says why.
        poll(&mut fds, Some(&now)) != Ok(0)
    }

    /// The features that the handshake granted: those asked for that are offered.
    pub(crate) const fn features(&self) -> Features {
        self.features
    }

    /// The descriptor of a forked child's memory, as an [`Event::Fork`] of `self` names it.
    ///
    /// # Safety
    ///
    /// `fd` must be from such an event, and nobody else may own it.
    #[cfg(test)]
    pub(crate) unsafe fn of_child(&self, fd: RawFd) -> Self {
        // SAFETY: the kernel opened it for the reader of the event, who hands it over.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Self {
            fd,
            features: self.features,
        }
    }

    /// Ends it, whoever else has a reference: nothing is registered with it any more, who waited goes on, and
    /// every call is refused. After a fork that is so once parent and child have ended theirs.
    pub(crate) fn end(&self) {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        // The number stays ours: whatever else got it would get our calls.
        let Ok(other) = eventfd(0, flags) else {
            return;
        };
        // SAFETY: both are open, and ours.
        unsafe { libc::dup3(other.as_raw_fd(), self.fd.as_raw_fd(), libc::O_CLOEXEC) };
    }

    fn call<T>(&self, opcode: Opcode, arg: &mut T) -> Result<(), Errno> {
        // SAFETY: the constants of `ioctls` go with the structures that the methods above pass;
        // what happens at the addresses in them is what the methods' contracts say.
        let call = unsafe { Call::new(opcode, arg) };
        // SAFETY: as above, and the descriptor is a userfaultfd.
        unsafe { rustix::ioctl::ioctl(&self.fd, call) }.map(drop)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Progress {
    /// The kernel's report: bytes, or a negated error number that `result` repeats.
    fn new(reported: i64, result: Result<(), Errno>) -> Self {
        let done = ByteSize::new(u64::try_from(reported).unwrap_or(0));
        Self {
            done,
            errno: result.err(),
        }
    }

    /// Whether everything was done.
    pub(crate) const fn is_complete(self) -> bool {
        self.errno.is_none()
    }
}

fn range(span: Span) -> raw::uffdio_range {
    raw::uffdio_range {
        start: span.start().get(),
        len: span.len().get(),
    }
}

fn mode(flags: &[(bool, u32)]) -> u64 {
    flags
        .iter()
        .filter(|(set, _)| *set)
        .map(|(_, bit)| u64::from(*bit))
        .sum()
}
