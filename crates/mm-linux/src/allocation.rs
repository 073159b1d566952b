//! Memory that a program gets from here: a slice whose pages live anywhere.

use crate::process::{AdoptError, Process};
use core::fmt;
use core::marker::PhantomData;
use core::ops::{Deref, DerefMut};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, PAGE_SIZE, Span};

/// Types that any bytes are a value of: what a device may write at any time.
///
/// # Safety
///
/// Every pattern of bits must be a valid value, zeroes included; there is no `Drop`, and nothing
/// inside that may not change behind a reference while a kernel runs. Raw pointers are fine.
pub unsafe trait Plain: Copy + 'static {}

macro_rules! plain {
    ($($type:ty)*) => {
        $(
            // SAFETY: any bits are a value.
            unsafe impl Plain for $type {}
        )*
    };
}

plain!(u8 u16 u32 u64 u128 usize i8 i16 i32 i64 i128 isize f32 f64);

// SAFETY: any bits are a pointer; to follow it is another matter.
unsafe impl<T: 'static> Plain for *const T {}
// SAFETY: as above.
unsafe impl<T: 'static> Plain for *mut T {}
// SAFETY: as its elements; an array has no padding of its own.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// A zeroed slice of shared memory. It goes back to the system when it is dropped.
pub struct Allocation<T: Plain> {
    process: Arc<Process>,
    // INVARIANT: allocated by `process`, at least `len` elements long, given back once.
    span: Span,
    len: usize,
    elements: PhantomData<T>,
}

// SAFETY: owned memory, like a `Box<[T]>`.
unsafe impl<T: Plain + Send> Send for Allocation<T> {}
// SAFETY: as above.
unsafe impl<T: Plain + Sync> Sync for Allocation<T> {}

impl<T: Plain> Allocation<T> {
    /// `len` zeroes.
    ///
    /// # Errors
    ///
    /// `NoMemory`, also for sizes that no address space holds; `Empty` for none; `Gone`.
    ///
    /// # Panics
    ///
    /// When a `T` is aligned to more than a page.
    pub fn new(process: &Arc<Process>, len: usize) -> Result<Self, AdoptError> {
        assert!(
            align_of::<T>() <= PAGE_SIZE.as_usize(),
            "aligned to at most a page"
        );
        let bytes = len.checked_mul(size_of::<T>()).map(ByteSize::from_usize);
        let too_large = AdoptError::NoMemory {
            len: ByteSize::new(u64::MAX),
        };
        let span = process.allocate(bytes.ok_or(too_large)?)?;
        Ok(Self {
            process: Arc::clone(process),
            span,
            len,
            elements: PhantomData,
        })
    }

    /// The pages it is in.
    pub fn span(&self) -> Span {
        self.span
    }

    /// The first element.
    pub fn as_ptr(&self) -> *const T {
        core::ptr::with_exposed_provenance(self.address())
    }

    /// The first element, to write through.
    pub fn as_mut_ptr(&mut self) -> *mut T {
        core::ptr::with_exposed_provenance_mut(self.address())
    }

    fn address(&self) -> usize {
        ByteSize::new(self.span.start().get()).as_usize()
    }
}

impl<T: Plain> Deref for Allocation<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: by the invariant; any bytes are a `T`, and a page that is elsewhere comes home
        // before the access completes.
        unsafe { core::slice::from_raw_parts(self.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Allocation<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as `deref`, and borrowed exclusively. What a kernel writes meanwhile is the
        // business of who launched it, in an unsafe block.
        unsafe { core::slice::from_raw_parts_mut(self.as_mut_ptr(), self.len) }
    }
}

impl<T: Plain> Drop for Allocation<T> {
    fn drop(&mut self) {
        self.process.free(self.span);
    }
}

impl<T: Plain> fmt::Debug for Allocation<T> {
    /// Where it is, not what is in it: looking would bring it home.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Allocation({} elements in {})", self.len, self.span)
    }
}
