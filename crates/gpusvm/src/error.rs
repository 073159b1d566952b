//! What was refused, and why.

use crate::driver::{AdviseError, BindError, ObjectError, PrefetchError, VmError};
use gpusvm_device::FaultError;
use gpusvm_mm::MmError;
use gpusvm_mm_linux::{AdoptError, StartError};
use gpusvm_pagemap::{EvictError, MigrateError, RebindError};
use gpusvm_softgpu::{LaunchError, SoftGpuError};
use gpusvm_types::Span;

/// What was refused, and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no engine.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Userfaultfd was required, and is not to be had.
    #[error("userfaultfd is required, and refused here: {advice}")]
    UserfaultfdRequired {
        /// How to get it.
        advice: &'static str,
    },
    /// An engine without a device.
    #[error("an engine needs a device")]
    NoDevice,
    /// A device cannot be had, or does not take a launch.
    #[error(transparent)]
    SoftGpu(#[from] SoftGpuError),
    /// A device cannot join the process.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A device takes no further address space.
    #[error("device {device} takes no further address space: {error}")]
    CreateVm {
        /// Its number.
        device: usize,
        /// Why.
        error: VmError,
    },
    /// The device address space was closed.
    #[error("an address space of device {device} that is closed")]
    VmClosed {
        /// The number of the device.
        device: usize,
    },
    /// Something could not be bound in a device address space, or unbound.
    #[error("device {device}: {error}")]
    Bind {
        /// The number of the device.
        device: usize,
        /// Why not.
        error: BindError,
    },
    /// There is no object, or nothing of it can be read or written.
    #[error("device {device}: {error}")]
    Object {
        /// The number of the device.
        device: usize,
        /// Why not.
        error: ObjectError,
    },
    /// No memory of no elements.
    #[error("a slice of no elements has no address to share")]
    ZeroSized,
    /// Memory cannot be shared.
    #[error(transparent)]
    Memory(#[from] AdoptError),
    /// The device was taken out of use.
    #[error("device {device} is unbound")]
    Unbound {
        /// Its number.
        device: usize,
    },
    /// Pages could not leave a device that was taken out of use.
    #[error("unbinding device {device}: {error}")]
    Unbind {
        /// Its number.
        device: usize,
        /// Why.
        error: EvictError,
    },
    /// A device cannot be taken into use again.
    #[error("binding device {device} again: {error}")]
    Rebind {
        /// Its number.
        device: usize,
        /// Why.
        error: RebindError,
    },
    /// Pages did not leave a device.
    #[error("evicting the pages of device {device}: {error}")]
    Evict {
        /// Its number.
        device: usize,
        /// Why.
        error: EvictError,
    },
    /// Pages did not come to a device.
    #[error("device {device}: {error}")]
    Migrate {
        /// Its number.
        device: usize,
        /// Why not.
        error: MigrateError,
    },
    /// Memory cannot be mapped on a device.
    #[error("mapping on device {device}: {error}")]
    Populate {
        /// Its number.
        device: usize,
        /// Why not.
        error: FaultError,
    },
    /// Permissions of memory cannot be changed.
    #[error("protecting {span}: {error}")]
    Protect {
        /// Which memory.
        span: Span,
        /// What the system said.
        error: std::io::Error,
    },
    /// Something cannot be advised.
    #[error(transparent)]
    Advise(#[from] AdviseError),
    /// Something a launch declared cannot be made resident.
    #[error("declared memory cannot be made resident: {0}")]
    Declared(FaultError),
    /// Memory is not where a prefetch was to bring it.
    #[error(transparent)]
    Prefetch(#[from] PrefetchError),
    /// Lanes of a launch stopped.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The address space refused.
    #[error(transparent)]
    Mm(#[from] MmError),
    /// A thread could not be started.
    #[error("starting a thread: {0}")]
    Thread(#[source] std::io::Error),
}

impl Error {
    /// What the kernel's twin of the operation returns.
    pub fn errno(&self) -> i32 {
        match self {
            Self::UserfaultfdRequired { .. } => 1, // EPERM
            Self::NoDevice | Self::Unbound { .. } | Self::SoftGpu(_) => 19, // ENODEV
            Self::Unbind { error, .. } | Self::Evict { error, .. } => error.errno(),
            Self::Migrate { error, .. } => error.errno(),
            Self::Populate { error, .. } => errno_of_fault(error),
            Self::Rebind { error, .. } => error.errno(),
            Self::ZeroSized => 22, // EINVAL
            Self::Advise(error) => error.errno(),
            Self::VmClosed { .. } => 2, // ENOENT
            Self::Bind { error, .. } => error.errno(),
            Self::Object { error, .. } => error.errno(),
            Self::Mm(error)
            | Self::Vm(VmError::Mm(error))
            | Self::CreateVm {
                error: VmError::Mm(error),
                ..
            } => error.errno(),
            Self::Vm(_) | Self::CreateVm { .. } => 28, // ENOSPC
            Self::Memory(error) => errno_of(error),
            Self::Prefetch(_) => 61,                   // ENODATA
            Self::Launch(_) | Self::Declared(_) => 14, // EFAULT
            Self::Start(_) | Self::Thread(_) => 11,    // EAGAIN
            Self::Protect { error, .. } => error.raw_os_error().unwrap_or(22),
        }
    }
}

/// As `hmm_range_fault` says it.
const fn errno_of_fault(error: &FaultError) -> i32 {
    match error {
        FaultError::NotPermitted { access, .. } if access.is_write() => 1, // EPERM
        FaultError::Gave { .. } => 16,                                     // EBUSY
        _ => 14,                                                           // EFAULT
    }
}

const fn errno_of(error: &AdoptError) -> i32 {
    match error {
        AdoptError::Unmapped { .. } => 2, // ENOENT
        AdoptError::NotAnonymous { .. } | AdoptError::Taken { .. } => 16, // EBUSY
        AdoptError::NotReadable { .. } => 14, // EFAULT
        AdoptError::FileNotWatched { .. } => 95, // EOPNOTSUPP
        AdoptError::Overlaps { .. } => 17, // EEXIST
        AdoptError::NoMemory { .. } => 12, // ENOMEM
        AdoptError::Gone => 14,           // EFAULT
        _ => 22,                          // EINVAL
    }
}
