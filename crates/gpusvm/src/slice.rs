//! Memory to share.

use core::fmt;
use core::ops::{Deref, DerefMut};
use gpusvm_mm_linux::{Allocation, Plain};
use gpusvm_softgpu::SvmPtr;
use gpusvm_types::Span;

/// A zeroed slice of memory that the CPU and devices share. It is given back when it is dropped.
///
/// On the CPU it is a `[T]`. In kernels it is reached by [`SvmSlice::device_ptr`], or by any pointer
/// into it, also one that was stored in shared memory.
pub struct SvmSlice<T: Plain>(Allocation<T>);

impl<T: Plain> SvmSlice<T> {
    pub(crate) fn new(allocation: Allocation<T>) -> Self {
        Self(allocation)
    }

    /// The first element, for kernels.
    pub fn device_ptr(&self) -> SvmPtr<T> {
        SvmPtr::from(self.0.as_ptr().cast_mut())
    }

    /// The pages it is in.
    pub fn span(&self) -> Span {
        self.0.span()
    }
}

impl<T: Plain> Deref for SvmSlice<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Plain> DerefMut for SvmSlice<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T: Plain> fmt::Debug for SvmSlice<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
