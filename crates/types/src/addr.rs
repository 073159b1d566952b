//! Addresses: of a process, of device memory, and of RAM as a copy engine sees it.

use crate::{BLOCK_SHIFT, ByteSize, PAGE_SHIFT, PageIndex};
use core::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u64);

        impl $name {
            /// The address with this value.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The value of the address.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// The address `by` bytes higher, or `None` past the end of the space.
            pub const fn checked_add(self, by: ByteSize) -> Option<Self> {
                match self.0.checked_add(by.get()) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }

            /// The distance from `base` up to this address.
            ///
            /// # Panics
            ///
            /// When `base` is higher than this address.
            pub const fn offset_from(self, base: Self) -> ByteSize {
                assert!(base.0 <= self.0, "offset from a higher address");
                ByteSize::new(self.0 - base.0)
            }

            /// Whether the address is a multiple of `align`.
            pub const fn is_aligned(self, align: ByteSize) -> bool {
                self.0.is_multiple_of(align.get())
            }
        }

        impl core::ops::Add<ByteSize> for $name {
            type Output = Self;
            /// Panics past the end of the space, in every build.
            fn add(self, by: ByteSize) -> Self {
                self.checked_add(by).expect("address past the end of the space")
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// An address in a process: valid on the CPU and on every device that mirrors the process.
    VirtAddr
}

address! {
    /// A byte offset in the memory of one device.
    DevAddr
}

address! {
    /// RAM as a copy engine or a device page table sees it.
    ///
    /// An integer, as in the kernel: it says where to copy, and is only as good as whoever made
    /// it. Address spaces make them, of memory that stays put while the address is in use; a
    /// device that is told to write to another one corrupts memory, as hardware would.
    DmaAddr
}

impl VirtAddr {
    /// The page that holds the address.
    pub const fn page(self) -> PageIndex {
        PageIndex::new(self.0 >> PAGE_SHIFT)
    }

    /// The offset of the address in its page.
    pub const fn page_offset(self) -> ByteSize {
        ByteSize::new(self.0 & ((1 << PAGE_SHIFT) - 1))
    }

    /// The highest multiple of `align` that is not above the address.
    pub const fn align_down(self, align: ByteSize) -> Self {
        Self(self.0 - self.0 % align.get())
    }

    /// The lowest multiple of `align` that is not below the address, or `None` when there is none.
    pub const fn align_up(self, align: ByteSize) -> Option<Self> {
        match self.0.checked_next_multiple_of(align.get()) {
            Some(value) => Some(Self(value)),
            None => None,
        }
    }

    /// The start of the 2 MiB block that holds the address.
    pub const fn block_start(self) -> Self {
        Self(self.0 >> BLOCK_SHIFT << BLOCK_SHIFT)
    }
}

impl<T: ?Sized> From<*const T> for VirtAddr {
    fn from(pointer: *const T) -> Self {
        Self(pointer.cast::<u8>().addr() as u64)
    }
}

impl<T: ?Sized> From<*mut T> for VirtAddr {
    fn from(pointer: *mut T) -> Self {
        Self(pointer.cast::<u8>().addr() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BLOCK_SIZE;

    #[test]
    fn alignment_rounds_both_ways() {
        let at = VirtAddr::new(0x20_1234);
        assert_eq!(at.align_down(BLOCK_SIZE), VirtAddr::new(0x20_0000));
        assert_eq!(at.align_up(BLOCK_SIZE), Some(VirtAddr::new(0x40_0000)));
        assert_eq!(at.block_start(), VirtAddr::new(0x20_0000));
        assert_eq!(at.page_offset(), ByteSize::new(0x234));
        assert_eq!(VirtAddr::new(u64::MAX).align_up(BLOCK_SIZE), None);
    }

    #[test]
    fn addition_past_the_end_is_none() {
        assert_eq!(VirtAddr::new(u64::MAX).checked_add(ByteSize::new(1)), None);
    }
}
