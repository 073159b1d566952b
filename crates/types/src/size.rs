//! Byte sizes.

use crate::{PAGE_SHIFT, PageCount};
use core::fmt;

/// A number of bytes. Not an address, not a page count.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// No bytes.
    pub const ZERO: Self = Self(0);

    /// This many bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// This many KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// This many MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// This many GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The size as an index type of this machine.
    ///
    /// # Panics
    ///
    /// Never on a 64-bit machine.
    pub const fn as_usize(self) -> usize {
        PageCount::new(self.0).as_usize()
    }

    /// The size of something in memory.
    pub const fn from_usize(bytes: usize) -> Self {
        Self(bytes as u64)
    }

    /// How many whole pages fit: rounded down.
    pub const fn whole_pages(self) -> PageCount {
        PageCount::new(self.0 >> PAGE_SHIFT)
    }

    /// How many pages hold this many bytes: rounded up.
    pub const fn pages(self) -> PageCount {
        PageCount::new(self.0.div_ceil(1 << PAGE_SHIFT))
    }

    /// Whether there is nothing.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }
}

impl core::ops::Add for ByteSize {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl core::ops::AddAssign for ByteSize {
    fn add_assign(&mut self, other: Self) {
        self.0 += other.0;
    }
}

impl core::ops::Sub for ByteSize {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(
            self.0
                .checked_sub(other.0)
                .expect("fewer bytes than are taken away"),
        )
    }
}

impl fmt::Debug for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// In the largest unit that divides it: `2 MiB`, `4 KiB`, `1234 B`.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in units {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    extern crate alloc;
    use super::*;
    use alloc::format;

    #[test]
    fn shown_in_the_largest_exact_unit() {
        for (size, text) in [
            (ByteSize::mib(2), "2 MiB"),
            (ByteSize::kib(4), "4 KiB"),
            (ByteSize::new(4097), "4097 B"),
            (ByteSize::ZERO, "0 B"),
            (ByteSize::gib(3), "3 GiB"),
        ] {
            assert_eq!(format!("{size}"), text);
        }
    }

    #[test]
    fn pages_round_up_and_whole_pages_down() {
        assert_eq!(ByteSize::new(4097).pages(), PageCount::new(2));
        assert_eq!(ByteSize::new(4097).whole_pages(), PageCount::ONE);
        assert_eq!(ByteSize::ZERO.pages(), PageCount::ZERO);
    }
}
