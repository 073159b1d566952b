//! What the SVM layer refuses, and why, with the errno of its kernel twin.

use gpusvm_mm::MmError;
use gpusvm_types::{Span, VirtAddr};

/// Why there is no range for a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FindError {
    /// The address is outside of what the caller has of the process.
    #[error("{at} is not in {within}")]
    Outside {
        /// The address.
        at: VirtAddr,
        /// What the caller has.
        within: Span,
    },
    /// The range that is there reaches out of what the caller has: remove it, and ask again.
    #[error("the range {range} reaches out of {within}")]
    Wider {
        /// What the range covers.
        range: Span,
        /// What the caller has.
        within: Span,
    },
    /// Nothing is mapped there.
    #[error("{at} is not mapped")]
    NoMapping {
        /// The address.
        at: VirtAddr,
    },
    /// Reading is not permitted there.
    #[error("{at} is not readable")]
    NotReadable {
        /// The address.
        at: VirtAddr,
    },
    /// A write is wanted and the mapping is read-only.
    #[error("{at} is in {mapping}, which is read-only")]
    ReadOnly {
        /// The address.
        at: VirtAddr,
        /// Its mapping.
        mapping: Span,
    },
    /// Not even the smallest chunk fits.
    #[error("no chunk that holds {at} fits into {mapping}")]
    NoChunk {
        /// The address.
        at: VirtAddr,
        /// Its mapping.
        mapping: Span,
    },
    /// The mirror is closed.
    #[error("the device address space is closed")]
    Closed,
    /// The address space refused.
    #[error(transparent)]
    Mm(#[from] MmError),
}

impl FindError {
    /// What the kernel's twin returns.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::NoMapping { .. } => 2,                       // ENOENT
            Self::NotReadable { .. } | Self::Closed => 14,     // EFAULT
            Self::ReadOnly { .. } => 1,                        // EPERM
            Self::NoChunk { .. } | Self::Outside { .. } => 22, // EINVAL
            Self::Wider { .. } => 11,                          // EAGAIN
            Self::Mm(error) => error.errno(),
        }
    }
}

/// Why the pages of a range cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GetPagesError {
    /// A write is wanted and the mapping is read-only.
    #[error("{span} is read-only")]
    ReadOnly {
        /// What was to be mapped.
        span: Span,
    },
    /// The memory is not, or not all, there any more.
    #[error("{span} is no longer mapped as a whole")]
    Unmapped {
        /// What was to be mapped.
        span: Span,
    },
    /// Only device memory will do, and a page is in RAM.
    #[error("{at} is in RAM, and only device memory will do")]
    NotOnDevice {
        /// The page.
        at: VirtAddr,
    },
    /// The device reaches the page nowhere.
    #[error("the device cannot reach the page at {at} where it is")]
    OutOfReach {
        /// The page.
        at: VirtAddr,
    },
    /// Pages of one range are in RAM and in a device memory, and that is not allowed.
    #[error("the page at {at} is in RAM and others of its range are not, or the other way round")]
    Mixed {
        /// The first page that is elsewhere than those before it.
        at: VirtAddr,
    },
    /// Pages of one range are in more than one device memory.
    #[error("the page at {at} is in another device memory than those before it")]
    MixedPagemaps {
        /// The first page that is elsewhere.
        at: VirtAddr,
    },
    /// The address space refused.
    #[error(transparent)]
    Mm(#[from] MmError),
}

impl GetPagesError {
    /// What the kernel's twin returns.
    pub const fn errno(&self) -> i32 {
        match self {
            Self::ReadOnly { .. } => 1,                             // EPERM
            Self::Unmapped { .. } | Self::NotOnDevice { .. } => 14, // EFAULT
            Self::OutOfReach { .. } | Self::MixedPagemaps { .. } | Self::Mixed { .. } => 95, // EOPNOTSUPP
            Self::Mm(error) => error.errno(),
        }
    }
}
