//! The ways to a userfaultfd, and why each was closed.
//!
//! ```text
//!   full:       /dev/userfaultfd  --refused-->  system call  --refused-->  OpenError
//!   user mode:                                  system call  --refused-->  OpenError
//! ```
//!
//! The handshake can be done once per descriptor, and asking for a feature that is not offered
//! fails it. So a first descriptor is asked what is offered, and thrown away; the second is asked
//! for what is both wanted and offered.

use super::{Features, Uffd, ioctls};
use crate::sys::ioctl::Call;
use core::ffi::c_void;
use core::fmt;
use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};
use rustix::mm::UserfaultfdFlags;
use std::os::fd::{FromRawFd, OwnedFd};

/// The device that hands out userfaultfds to whoever may open it.
pub(crate) const DEVICE: &str = "/dev/userfaultfd";

/// Which faults a userfaultfd sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// Those of the program and those of system calls on its behalf.
    Full,
    /// Those of the program; system calls on a missing page fail with `EFAULT`.
    UserModeOnly,
}

/// How a userfaultfd was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through `/dev/userfaultfd`.
    Device,
    /// By the system call.
    Syscall,
    /// It opened, but the handshake failed.
    Handshake,
}

/// One way that was tried in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// Which way.
    pub way: Way,
    /// What the kernel said.
    pub errno: Errno,
}

/// No userfaultfd: every way that was tried, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenError {
    /// What was to be opened.
    pub flavour: Flavour,
    /// The ways; the first is always there.
    pub attempts: [Option<Attempt>; 2],
}

impl Uffd {
    /// Opens a userfaultfd with those of the features `wanted` that are to be had:
    /// [`Uffd::features`] says which.
    ///
    /// # Errors
    ///
    /// Every way was refused; the error keeps which, and why.
    pub(crate) fn open(flavour: Flavour, wanted: Features) -> Result<Self, OpenError> {
        let offered = Self::offered(flavour)?;
        let wanted = wanted.intersection(offered);
        let fd = open_raw(flavour)?;
        let failed = |errno| OpenError::one(flavour, Way::Handshake, errno);
        let features = match handshake(&fd, wanted) {
            Ok(_) => wanted,
            // Offered to everybody, granted to few; a refused handshake may be tried again.
            Err(Errno::PERM) if wanted.contains(Features::EVENT_FORK) => {
                let rest = wanted.without(Features::EVENT_FORK);
                handshake(&fd, rest).map_err(failed)?;
                rest
            }
            Err(errno) => return Err(failed(errno)),
        };
        Ok(Self { fd, features })
    }

    /// What the kernel offers: all it knows, whether granted to us or not.
    ///
    /// # Errors
    ///
    /// As [`Uffd::open`].
    pub(crate) fn offered(flavour: Flavour) -> Result<Features, OpenError> {
        let fd = open_raw(flavour)?;
        handshake(&fd, Features::NONE)
            .map_err(|errno| OpenError::one(flavour, Way::Handshake, errno))
    }
}

fn open_raw(flavour: Flavour) -> Result<OwnedFd, OpenError> {
    let by_syscall = |flags| Attempt::syscall(flags);
    match flavour {
        Flavour::UserModeOnly => {
            let flags = UserfaultfdFlags::from_bits_retain(raw::UFFD_USER_MODE_ONLY);
            by_syscall(flags).map_err(|attempt| OpenError {
                flavour,
                attempts: [Some(attempt), None],
            })
        }
        Flavour::Full => Attempt::device().or_else(|device| {
            by_syscall(UserfaultfdFlags::empty()).map_err(|call| OpenError {
                flavour,
                attempts: [Some(device), Some(call)],
            })
        }),
    }
}

impl Attempt {
    fn device() -> Result<OwnedFd, Self> {
        let failed = |errno| Self {
            way: Way::Device,
            errno,
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let device = rustix::fs::open(DEVICE, flags, Mode::empty()).map_err(failed)?;
        // SAFETY: the device makes a new descriptor from an integer; no memory is involved.
        unsafe { rustix::ioctl::ioctl(&device, New) }.map_err(failed)
    }

    fn syscall(flags: UserfaultfdFlags) -> Result<OwnedFd, Self> {
        let flags = flags | UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        // SAFETY: nothing is registered; what the descriptor is used for is said there.
        unsafe { rustix::mm::userfaultfd(flags) }.map_err(|errno| Self {
            way: Way::Syscall,
            errno,
        })
    }
}

fn handshake(fd: &OwnedFd, wanted: Features) -> Result<Features, Errno> {
    let mut arg = raw::uffdio_api {
        api: u64::from(raw::UFFD_API),
        features: wanted.bits(),
        ioctls: 0,
    };
    // SAFETY: the structure is the one of this ioctl, and holds no address.
    let call = unsafe { Call::new(ioctls::API, &mut arg) };
    // SAFETY: as above, on a userfaultfd.
    unsafe { rustix::ioctl::ioctl(fd, call) }?;
    Ok(Features::from_bits(arg.features))
}

/// `USERFAULTFD_IOC_NEW`: the argument is the flags, the answer a descriptor.
struct New;

// SAFETY: the argument is an integer in a pointer's clothes, and the answer is a new descriptor
// that nobody else owns.
unsafe impl Ioctl for New {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        ioctls::DEVICE_NEW
    }

    fn as_ptr(&mut self) -> *mut c_void {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        core::ptr::without_provenance_mut(flags.bits() as usize)
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _argument: *mut c_void,
    ) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the kernel has just opened it for us.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

impl OpenError {
    const fn one(flavour: Flavour, way: Way, errno: Errno) -> Self {
        Self {
            flavour,
            attempts: [Some(Attempt { way, errno }), None],
        }
    }
}

/// Each way, what the kernel said, and what would help.
impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.flavour {
            Flavour::Full => f.write_str("no full userfaultfd")?,
            Flavour::UserModeOnly => f.write_str("no user-mode userfaultfd")?,
        }
        for attempt in self.attempts.iter().flatten() {
            write!(f, "; {attempt}")?;
        }
        Ok(())
    }
}

impl core::error::Error for OpenError {}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = match self.way {
            Way::Device => DEVICE,
            Way::Syscall => "system call",
            Way::Handshake => "handshake",
        };
        write!(f, "{way}: {} ({})", self.errno, self.cure())
    }
}

impl Attempt {
    /// What would help.
    pub const fn cure(&self) -> &'static str {
        match (self.way, self.errno) {
            (_, Errno::NOSYS) => "the kernel was built without userfaultfd, or a sandbox hides it",
            (Way::Device, Errno::NOENT) => {
                "no such device: Linux before 6.1, or not in this container"
            }
            (Way::Device, Errno::ACCESS | Errno::PERM) => {
                "this user may not open it: grant read and write on it"
            }
            (Way::Syscall, Errno::PERM) => {
                "needs vm.unprivileged_userfaultfd=1 or CAP_SYS_PTRACE, and no seccomp filter against it"
            }
            (Way::Syscall, Errno::INVAL) => "user-mode-only is unknown: Linux before 5.11",
            (Way::Handshake, Errno::INVAL) => "the kernel speaks another version of the protocol",
            (_, Errno::MFILE | Errno::NFILE) => "too many open files",
            _ => "unexpected",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_names_every_way_and_its_cure() {
        let error = OpenError {
            flavour: Flavour::Full,
            attempts: [
                Some(Attempt {
                    way: Way::Device,
                    errno: Errno::ACCESS,
                }),
                Some(Attempt {
                    way: Way::Syscall,
                    errno: Errno::PERM,
                }),
            ],
        };
        let text = error.to_string();
        for part in [DEVICE, "vm.unprivileged_userfaultfd=1", "CAP_SYS_PTRACE"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
}
