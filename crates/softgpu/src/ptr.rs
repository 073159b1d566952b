//! Addresses in kernels.

use gpusvm_types::VirtAddr;
use std::fmt;
use std::marker::PhantomData;

/// A pointer that a kernel can hold: an address of the mirrored process with the type of what is
/// there. It is a number, never dereferenced by itself; a [`Lane`](crate::Lane) loads and stores
/// through it.
///
/// Unlike a raw pointer it may be sent to other threads, so that a kernel, which runs on all units,
/// can capture it. Arithmetic wraps, as on an address register.
#[repr(transparent)]
pub struct SvmPtr<T> {
    addr: u64,
    points_to: PhantomData<fn() -> *mut T>,
}

impl<T> SvmPtr<T> {
    /// The pointer to `addr`.
    pub const fn new(addr: VirtAddr) -> Self {
        Self {
            addr: addr.get(),
            points_to: PhantomData,
        }
    }

    /// Where it points.
    #[inline]
    pub const fn addr(self) -> VirtAddr {
        VirtAddr::new(self.addr)
    }

    /// The element `index` places further on.
    #[inline]
    pub const fn add(self, index: usize) -> Self {
        let by = (index as u64).wrapping_mul(size_of::<T>() as u64);
        Self {
            addr: self.addr.wrapping_add(by),
            ..self
        }
    }

    /// The element `index` places further on, or back.
    #[inline]
    pub const fn offset(self, index: isize) -> Self {
        self.add(index.cast_unsigned())
    }

    /// The same place, as another type.
    #[inline]
    pub const fn cast<U>(self) -> SvmPtr<U> {
        SvmPtr {
            addr: self.addr,
            points_to: PhantomData,
        }
    }

    /// The pointer for the CPU.
    ///
    /// It has the provenance of whatever pointer was turned into an address before.
    ///
    /// # Panics
    ///
    /// Never on a 64-bit machine.
    pub fn as_ptr(self) -> *mut T {
        let addr = usize::try_from(self.addr).expect("an address of this process");
        std::ptr::with_exposed_provenance_mut(addr)
    }
}

impl<T> Clone for SvmPtr<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for SvmPtr<T> {}

impl<T> PartialEq for SvmPtr<T> {
    fn eq(&self, other: &Self) -> bool {
        self.addr == other.addr
    }
}

impl<T> Eq for SvmPtr<T> {}

impl<T> fmt::Debug for SvmPtr<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SvmPtr({:#x})", self.addr)
    }
}

impl<T> From<*const T> for SvmPtr<T> {
    #[inline]
    fn from(pointer: *const T) -> Self {
        Self::new(VirtAddr::new(pointer.expose_provenance() as u64))
    }
}

impl<T> From<*mut T> for SvmPtr<T> {
    #[inline]
    fn from(pointer: *mut T) -> Self {
        Self::new(VirtAddr::new(pointer.expose_provenance() as u64))
    }
}

impl<T> From<VirtAddr> for SvmPtr<T> {
    #[inline]
    fn from(addr: VirtAddr) -> Self {
        Self::new(addr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arithmetic_is_by_elements_and_wraps() {
        let pointer = SvmPtr::<u32>::new(VirtAddr::new(0x1000));
        assert_eq!(pointer.add(3).addr(), VirtAddr::new(0x100c));
        assert_eq!(pointer.offset(-1).addr(), VirtAddr::new(0xffc));
        assert_eq!(pointer.cast::<u8>().add(3).addr(), VirtAddr::new(0x1003));
        let low = SvmPtr::<u64>::new(VirtAddr::new(0));
        assert_eq!(low.offset(-1).addr(), VirtAddr::new(u64::MAX - 7));
    }

    #[test]
    fn keeps_the_pointer_of_the_cpu() {
        let mut value = 5u16;
        let pointer = SvmPtr::from(&raw mut value);
        // SAFETY: the pointer to a local, after a round trip as an address.
        unsafe { pointer.as_ptr().write(6) };
        assert_eq!(value, 6);
    }
}
