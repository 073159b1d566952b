//! Advice: what the program says of its memory beforehand (`DRM_IOCTL_XE_MADVISE`).
//!
//! ```text
//!   Vm::advise ---> map: watches the memory, remembers        tree: which pages, what
//!        |           ^
//!        |           `--- notices: what is unmapped is forgotten
//!        `--> every address space of every device: what changed is unmapped there
//!
//!   fault ---> what is advised here? ---> policy: where to; range: how large; eviction: who
//! ```
//!
//! # The rule for conflicts
//!
//! A page has one home, so what is advised of it is kept once for the address space of the process, in
//! [`Devices`](crate::driver::Devices), whichever device address space it came through: for each
//! attribute the last advice counts. What concerns one device, [`Advice::AccessedBy`], is kept for each
//! device; what names a device, [`Preferred::Device`], names one for all. What a device cannot do, it
//! does otherwise, and the advice stands:
//!
//! 1. Atomics that work in device memory only, and a device that does not reach RAM: its own memory.
//! 2. A preferred device: its memory, if whoever faults reaches it; else the memory of who faults; if
//!    that is full, RAM. So devices without a fabric between them never wait for each other.
//! 3. Preferred RAM: RAM, for those who reach it.
//! 4. Accessed by who faults: where the pages are.
//! 5. Else as the policy would without advice.
//!
//! A [`Policy`](crate::driver::Policy) of your own may weigh this otherwise: it is told what is advised.
//!
//! # How long it lasts
//!
//! As long as the mapping at its address is mirrored: `munmap`, a new mapping over it and the end of an
//! adoption forget it, at once, also of memory that was never touched. `MADV_DONTNEED`, `mprotect` and
//! fork do not. It does not move along with `mremap`: the new place begins without, as ranges do.
//! `MREMAP_DONTUNMAP` forgets what was advised of the old place, too.
//!
//! # Differences from the kernel
//!
//! There, advice is kept for each GPU address space, and where several disagree the outcome is
//! undefined. It stays with the address after an unmap, unless `MADVISE_AUTORESET` asks for more, and
//! also then if no GPU touched the memory. A foreign device without an interconnect is refused
//! (`ENOLINK`); here one address space speaks for all devices, some of which may reach it.

pub(crate) mod attributes; // what can be advised
mod tree; // of which pages
mod notices; // what was unmapped since
pub(crate) mod map; // all of it
mod vm; // through a device address space

pub use attributes::{Advice, Atomics, Attributes, DeviceSet, Preferred, Priority};

use gpusvm_device::VmId;
use gpusvm_mm::MmError;
use gpusvm_types::{ByteSize, Span};

/// What is advised of some pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Advised {
    /// Which pages.
    pub span: Span,
    /// What is advised of them.
    pub attributes: Attributes,
    /// Through which address space it came, the last of it. `None` if nothing is advised.
    pub by: Option<AdvisedBy>,
}

/// A device address space that advice came through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdvisedBy {
    /// The number of its device.
    pub device: usize,
    /// What the device calls it.
    pub vm: VmId,
}

/// Why something cannot be advised. Nothing of it is, then; unless a part of the memory went meanwhile:
/// the rest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdviseError {
    /// Memory that is not mirrored stays where it is, whatever is advised.
    #[error("{span} is not mirrored: allocate it here or adopt it before it is advised")]
    NotMirrored {
        /// What of it is not.
        span: Span,
    },
    /// There is no such device.
    #[error("there is no device {device}")]
    NoDevice {
        /// Its number.
        device: usize,
    },
    /// Pages are not mapped or moved in such pieces.
    #[error("{size} is not a power of two from 4 KiB to 2 MiB")]
    Granularity {
        /// What was asked for.
        size: ByteSize,
    },
    /// The device address space is closed.
    #[error("the device address space is closed")]
    Closed,
    /// The address space refused.
    #[error(transparent)]
    Mm(#[from] MmError),
}

impl AdviseError {
    /// What the kernel's twin returns.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::NotMirrored { .. } => 2,  // ENOENT
            Self::NoDevice { .. } => 19,    // ENODEV
            Self::Granularity { .. } => 22, // EINVAL
            Self::Closed => 14,             // EFAULT
            Self::Mm(error) => error.errno(),
        }
    }
}
