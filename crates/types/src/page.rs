//! Pages: where one is, and how many there are.

use crate::{ByteSize, PAGE_SHIFT, VirtAddr};
use core::fmt;

/// The index of a page in an address space: its address without the offset bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(u64);

impl PageIndex {
    /// The page with this index.
    pub const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The index as a number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The address of the first byte of the page.
    pub const fn start(self) -> VirtAddr {
        VirtAddr::new(self.0 << PAGE_SHIFT)
    }

    /// How many pages this one is above `base`.
    ///
    /// # Panics
    ///
    /// When `base` is a higher page.
    pub const fn offset_from(self, base: Self) -> PageCount {
        assert!(base.0 <= self.0, "offset from a higher page");
        PageCount::new(self.0 - base.0)
    }
}

impl core::ops::Add<PageCount> for PageIndex {
    type Output = Self;
    fn add(self, by: PageCount) -> Self {
        Self(self.0 + by.get())
    }
}

impl fmt::Debug for PageIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// A number of base pages. Not an index, not a byte size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageCount(u64);

impl PageCount {
    /// No page.
    pub const ZERO: Self = Self(0);
    /// One page.
    pub const ONE: Self = Self(1);

    /// This many pages.
    pub const fn new(count: u64) -> Self {
        Self(count)
    }

    /// The count as a number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The count as an index type of this machine.
    ///
    /// # Panics
    ///
    /// Never on a 64-bit machine.
    pub const fn as_usize(self) -> usize {
        assert!(size_of::<usize>() >= size_of::<u64>(), "a 64-bit machine");
        #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
        {
            self.0 as usize
        }
    }

    /// A count of things in memory.
    pub const fn from_usize(count: usize) -> Self {
        Self(count as u64)
    }

    /// The size in bytes, or `None` when it does not fit.
    pub const fn checked_bytes(self) -> Option<ByteSize> {
        match self.0.checked_mul(1 << PAGE_SHIFT) {
            Some(bytes) => Some(ByteSize::new(bytes)),
            None => None,
        }
    }

    /// The size in bytes.
    ///
    /// # Panics
    ///
    /// When it does not fit 64 bits: 2^52 pages and up, which no machine has.
    pub const fn bytes(self) -> ByteSize {
        self.checked_bytes().expect("a page count that exists")
    }
}

impl core::ops::Add for PageCount {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl core::ops::AddAssign for PageCount {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl core::ops::Sub for PageCount {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(
            self.0
                .checked_sub(other.0)
                .expect("fewer pages than are taken away"),
        )
    }
}

/// The page frame number of a page of device memory, counted from the start of that memory.
///
/// It is *raw*: never an encoded entry of a migration. The kernel keeps both in one array of
/// `unsigned long`, and had to fix an error path that read the one as the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevicePfn(u32);

impl DevicePfn {
    /// The page with this number.
    pub const fn new(pfn: u32) -> Self {
        Self(pfn)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The number as an index into per-page arrays.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The page `by` pages higher.
    ///
    /// # Panics
    ///
    /// Past 2^32 pages, which is 16 TiB of device memory.
    pub fn offset(self, by: PageCount) -> Self {
        let by = u32::try_from(by.get()).expect("at most 16 TiB of device memory");
        Self(
            self.0
                .checked_add(by)
                .expect("at most 16 TiB of device memory"),
        )
    }

    /// The byte offset of the page in device memory.
    pub const fn dev_addr(self) -> crate::DevAddr {
        crate::DevAddr::new((self.0 as u64) << PAGE_SHIFT)
    }
}
