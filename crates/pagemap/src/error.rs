//! What a migration refuses, and why, with the errno of its kernel twin.

use crate::DevmemError;
use gpusvm_mm::MmError;
use gpusvm_types::{ByteSize, PageCount, Span};

/// Why pages could not move to a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// Nothing is mapped at the start of the span.
    #[error("nothing is mapped at the start of {span}")]
    NoMapping {
        /// What was to move.
        span: Span,
    },
    /// The span reaches out of the mapping that its start is in.
    #[error("{span} crosses the end of its mapping {mapping}")]
    CrossesMapping {
        /// What was to move.
        span: Span,
        /// The mapping of its start.
        mapping: Span,
    },
    /// Only private anonymous memory migrates.
    #[error("{span} is not private anonymous memory")]
    NotAnonymous {
        /// What was to move.
        span: Span,
    },
    /// No page of the span could be taken.
    #[error("no page of {span} could be collected")]
    NothingCollected {
        /// What was to move.
        span: Span,
    },
    /// All or nothing was asked for, and it is not all.
    #[error("{collected:?} of {span} could be collected, not all")]
    NotAllCollected {
        /// What was to move.
        span: Span,
        /// How much of it could have.
        collected: PageCount,
    },
    /// The allocation is smaller than the span.
    #[error("an allocation of {size} is too small for {span}")]
    TooSmall {
        /// What was to move.
        span: Span,
        /// What it was to fit.
        size: ByteSize,
    },
    /// The device memory takes nothing new: it is being unbound.
    #[error("the device memory is unbound: {span} stays where it is")]
    Unbound {
        /// What was to move.
        span: Span,
    },
    /// Device memory is full, and nothing could be evicted.
    #[error("no device memory is left for {span}")]
    NoSpace {
        /// What was to move.
        span: Span,
    },
    /// All that could go to make room is pinned.
    #[error("no device memory for {span}: what lives there is pinned")]
    Pinned {
        /// What was to be moved.
        span: Span,
    },
    /// The device's part failed.
    #[error("moving {span}: {error}")]
    Devmem {
        /// What was to move.
        span: Span,
        /// What failed.
        error: DevmemError,
    },
    /// The address space refused.
    #[error(transparent)]
    Mm(#[from] MmError),
}

impl MigrateError {
    /// What the kernel's twin returns.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::NoMapping { .. } => 2,                                    // ENOENT
            Self::CrossesMapping { .. } | Self::TooSmall { .. } => 22,      // EINVAL
            Self::NotAnonymous { .. } | Self::NotAllCollected { .. } => 16, // EBUSY
            Self::NothingCollected { .. } => 14,                            // EFAULT
            Self::Unbound { .. } => 19,                                     // ENODEV
            Self::NoSpace { .. } | Self::Pinned { .. } => 28,               // ENOSPC
            Self::Devmem { error, .. } => error.errno(),
            Self::Mm(error) => error.errno(),
        }
    }
}

/// Why an allocation could not be emptied.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EvictError {
    /// The address space is gone: its end frees the pages.
    #[error("the address space is gone")]
    Gone,
    /// Pages were still there after the last try.
    #[error("{left:?} were still on the device after {tries} tries")]
    Busy {
        /// How many.
        left: PageCount,
        /// How often it was tried.
        tries: u32,
    },
    /// The device's part failed.
    #[error(transparent)]
    Devmem(#[from] DevmemError),
    /// The address space refused.
    #[error(transparent)]
    Mm(MmError),
}

impl EvictError {
    /// What the kernel's twin returns.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::Gone => 14,        // EFAULT
            Self::Busy { .. } => 16, // EBUSY
            Self::Devmem(error) => error.errno(),
            Self::Mm(error) => error.errno(),
        }
    }
}
