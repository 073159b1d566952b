//! What an address space refuses, and why.

use gpusvm_types::{Span, VirtAddr};

/// What an address space refuses, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MmError {
    /// The address space is being torn down, or this is a child of fork.
    #[error("the address space is gone")]
    Gone,
    /// Nobody gave this memory to the engine.
    #[error("{span} is not mirrored: allocate it here or adopt it")]
    NotMirrored {
        /// What was asked for.
        span: Span,
    },
    /// Pages would leave a block that nobody watches: a touch of a missing page would find zeroes.
    #[error("{span} is not armed")]
    NotArmed {
        /// What was asked for.
        span: Span,
    },
    /// One block at a time.
    #[error("{span} crosses the boundary of a 2 MiB block")]
    CrossesBlock {
        /// What was asked for.
        span: Span,
    },
    /// The staging pool is empty: more migrations at once than it has room for.
    #[error("no staging block is free for {span}")]
    NoStaging {
        /// What was to be moved.
        span: Span,
    },
    /// The pages kept moving.
    #[error("{span} was not stable for a second")]
    Unstable {
        /// What was looked at.
        span: Span,
    },
    /// A page could not come home.
    #[error("the page at {at} could not be brought home")]
    StuckOnDevice {
        /// Which page.
        at: VirtAddr,
    },
    /// Not every write of the program to a protected page would be caught, or some would fail.
    #[error("writes to {span} cannot be watched here: it is not read in copies")]
    UnwatchedWrites {
        /// What was to be read in copies.
        span: Span,
    },
    /// No room for another device memory.
    #[error("too many device memories in one address space")]
    TooManyDevices,
    /// The system refused.
    #[error("{call} of {span} failed: errno {errno}")]
    System {
        /// What was asked of it.
        call: &'static str,
        /// Of which pages.
        span: Span,
        /// What it said.
        errno: i32,
    },
}

impl MmError {
    /// What the kernel's twin returns.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Gone | Self::StuckOnDevice { .. } => 14, // EFAULT
            Self::NotMirrored { .. } | Self::Unstable { .. } => 16, // EBUSY
            Self::CrossesBlock { .. } | Self::NotArmed { .. } => 22, // EINVAL
            Self::NoStaging { .. } => 12,                  // ENOMEM
            Self::UnwatchedWrites { .. } => 95,            // EOPNOTSUPP
            Self::TooManyDevices => 28,                    // ENOSPC
            Self::System { errno, .. } => *errno,
        }
    }
}
