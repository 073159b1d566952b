//! Kernels on shared memory.

use crate::driver::Declared;
use crate::{Error, SvmSlice};
use gpusvm_device::Access;
use gpusvm_mm_linux::Plain;
use gpusvm_softgpu::LaunchReport;
use gpusvm_types::Span;

/// A launch on its way. Dropping it leaves the launch running.
#[derive(Debug)]
#[must_use = "a launch ends some time; `wait` says when, and how"]
pub struct Launch(gpusvm_softgpu::Launch);

impl Launch {
    pub(crate) fn new(launch: gpusvm_softgpu::Launch) -> Self {
        Self(launch)
    }

    /// Waits until every lane has ended.
    ///
    /// # Errors
    ///
    /// `Launch` when lanes stopped: how many, and the first of them with its reason.
    pub fn wait(self) -> Result<LaunchReport, Error> {
        Ok(self.0.wait()?)
    }

    /// Whether every lane has ended.
    pub fn is_done(&self) -> bool {
        self.0.is_done()
    }

    /// Stops the launch: lanes end at their next access. Returns at once.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

/// Memory that a launch touches.
///
/// A device without replayable faults touches nothing else; to others it saves the faults.
#[derive(Clone, Debug, Default)]
#[must_use]
pub struct Resident {
    pub(crate) declared: Vec<Declared>,
}

impl Resident {
    /// Nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// And this, to read.
    pub fn reads<T: Plain>(self, slice: &SvmSlice<T>) -> Self {
        self.span(slice.span(), Access::Read)
    }

    /// And this, to read and write.
    pub fn writes<T: Plain>(self, slice: &SvmSlice<T>) -> Self {
        self.span(slice.span(), Access::Write)
    }

    /// And these pages.
    pub fn span(mut self, span: Span, access: Access) -> Self {
        self.declared.push(Declared { span, access });
        self
    }
}
