//! Read-modify-write of a lane.
//!
//! One access, in flight as a whole, on VRAM, on RAM, or on the VRAM of a peer. Additions of whole numbers are one locked
//! instruction; the rest loads, computes, and compares and exchanges until nobody was in between.
//! All are acquire and release, towards other lanes and, in RAM, towards the CPU.

use crate::port::aligned;
use crate::word::{Word, load_ram, load_vram, low32};
use crate::{Lane, LaneError, SvmPtr};
use gpusvm_device::Access;
use gpusvm_guarded::{self as guarded, Refused};
use gpusvm_sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A word of 4 or 8 bytes that a lane can add to atomically.
#[expect(private_bounds, reason = "sealed")]
pub trait AtomicAdd: Word + Sum {}

/// A whole number of 4 or 8 bytes, on which a lane has all atomic operations.
#[expect(private_bounds, reason = "sealed")]
pub trait AtomicInt: AtomicAdd + Whole {}

/// How a word is added.
pub(crate) trait Sum: Sized {
    /// Whether adding the bits, wrapping, adds the values.
    const WHOLE: bool;
    /// The sum, wrapping.
    fn sum(self, other: Self) -> Self;
}

/// What only whole numbers have.
pub(crate) trait Whole: Copy + Ord {
    fn negated(self) -> Self;
    fn and(self, other: Self) -> Self;
    fn or(self, other: Self) -> Self;
    fn xor(self, other: Self) -> Self;
}

macro_rules! whole {
    ($($word:ty),*) => {$(
        impl AtomicAdd for $word {}
        impl AtomicInt for $word {}
        impl Sum for $word {
            const WHOLE: bool = true;
            #[inline(always)]
            fn sum(self, other: Self) -> Self { self.wrapping_add(other) }
        }
        impl Whole for $word {
            #[inline(always)]
            fn negated(self) -> Self { self.wrapping_neg() }
            #[inline(always)]
            fn and(self, other: Self) -> Self { self & other }
            #[inline(always)]
            fn or(self, other: Self) -> Self { self | other }
            #[inline(always)]
            fn xor(self, other: Self) -> Self { self ^ other }
        }
    )*};
}
whole!(u32, i32, u64, i64, usize, isize);

macro_rules! float {
    ($($word:ty),*) => {$(
        impl AtomicAdd for $word {}
        impl Sum for $word {
            const WHOLE: bool = false;
            #[inline(always)]
            fn sum(self, other: Self) -> Self { self + other }
        }
    )*};
}
float!(f32, f64);

/// Each returns what was there before. Errors are those of [`Lane::load`].
macro_rules! operation {
    ($($(#[$doc:meta])* $name:ident: $bound:ident, |$old:ident, $value:ident| $new:expr;)*) => {
        impl Lane<'_> {$(
            $(#[$doc])*
            /// Returns what was there.
            ///
            /// # Errors
            ///
            /// As [`Lane::load`].
            #[inline]
            pub fn $name<T: $bound>(
                &mut self,
                at: impl Into<SvmPtr<T>>,
                $value: T,
            ) -> Result<T, LaneError> {
                self.update(at.into(), |$old| Some($new))
            }
        )*}
    };
}

operation! {
    /// Stores the lower of what is there and `value`.
    atomic_min: AtomicInt, |old, value| old.min(value);
    /// Stores the higher of what is there and `value`.
    atomic_max: AtomicInt, |old, value| old.max(value);
    /// Stores the bits that are set in both.
    atomic_and: AtomicInt, |old, value| old.and(value);
    /// Stores the bits that are set in either.
    atomic_or: AtomicInt, |old, value| old.or(value);
    /// Stores the bits that differ.
    atomic_xor: AtomicInt, |old, value| old.xor(value);
    /// Stores `value`.
    atomic_exchange: AtomicInt, |_old, value| value;
}

impl Lane<'_> {
    /// Adds `value`, wrapping if it is a whole number. Returns what was there.
    ///
    /// # Errors
    ///
    /// As [`Lane::load`].
    #[inline]
    pub fn atomic_add<T: AtomicAdd>(
        &mut self,
        at: impl Into<SvmPtr<T>>,
        value: T,
    ) -> Result<T, LaneError> {
        if T::WHOLE {
            self.atomic(at.into(), |place| place.add(value))
        } else {
            self.update(at.into(), |old: T| Some(old.sum(value)))
        }
    }

    /// Subtracts `value`, wrapping. Returns what was there.
    ///
    /// # Errors
    ///
    /// As [`Lane::load`].
    #[inline]
    pub fn atomic_sub<T: AtomicInt>(
        &mut self,
        at: impl Into<SvmPtr<T>>,
        value: T,
    ) -> Result<T, LaneError> {
        self.atomic_add(at, value.negated())
    }

    /// Stores `new` if `expected` is there. Returns what was there: it was exchanged when that is
    /// `expected`.
    ///
    /// # Errors
    ///
    /// As [`Lane::load`]. Needs a writable mapping whether or not it exchanges.
    #[inline]
    pub fn atomic_compare_exchange<T: AtomicInt>(
        &mut self,
        at: impl Into<SvmPtr<T>>,
        expected: T,
        new: T,
    ) -> Result<T, LaneError> {
        self.update(at.into(), |old| (old == expected).then_some(new))
    }

    /// Replaces what is there by what `compute` makes of it, unless it makes nothing.
    #[inline]
    fn update<T: Word>(
        &mut self,
        at: SvmPtr<T>,
        compute: impl Fn(T) -> Option<T>,
    ) -> Result<T, LaneError> {
        self.atomic(at, |place| {
            let mut old = place.load::<T>()?;
            loop {
                let Some(new) = compute(old) else {
                    return Ok(old);
                };
                let seen = place.compare_exchange(old, new)?;
                if seen.to_bits() == old.to_bits() {
                    return Ok(old);
                }
                old = seen;
            }
        })
    }

    /// One access that `operate` makes, again after each fault.
    #[inline]
    fn atomic<T: Word>(
        &mut self,
        at: SvmPtr<T>,
        operate: impl Fn(Place) -> Result<T, Refused>,
    ) -> Result<T, LaneError> {
        let at = at.addr().get();
        aligned::<T>(at)?;
        loop {
            let hit = self.port.open(at, Access::Atomic, 1)?;
            let done = operate(Place {
                at: hit.pointer(),
                system: hit.is_system(),
            });
            self.port.end();
            match done {
                Ok(value) => return Ok(value),
                Err(_) => self.port.refused(at, Access::Atomic, hit.refusal())?,
            }
        }
    }
}

/// A place in VRAM, or in RAM, aligned for the word that is accessed there, and in flight.
#[derive(Clone, Copy)]
struct Place {
    at: *mut u8,
    system: bool,
}

impl Place {
    #[inline(always)]
    fn load<T: Word>(self) -> Result<T, Refused> {
        if self.system {
            // SAFETY: aligned.
            unsafe { load_ram(self.at) }
        } else {
            // SAFETY: in VRAM, and aligned.
            Ok(unsafe { load_vram(self.at) })
        }
    }

    /// Adds the bits of a whole number.
    #[inline(always)]
    fn add<T: Word>(self, value: T) -> Result<T, Refused> {
        let bits = value.to_bits();
        let old = match (self.system, size_of::<T>()) {
            (true, 4) => {
                // SAFETY: aligned; the kernel may write there.
                u64::from(unsafe { guarded::fetch_add32(self.at.cast(), low32(bits)) }?)
            }
            // SAFETY: as above.
            (true, _) => unsafe { guarded::fetch_add64(self.at.cast(), bits) }?,
            (false, 4) => {
                // SAFETY: aligned, in VRAM, which is accessed by atomics only.
                let word = unsafe { AtomicU32::from_ptr(self.at.cast()) };
                u64::from(word.fetch_add(low32(bits), Ordering::AcqRel))
            }
            (false, _) => {
                // SAFETY: as above.
                let word = unsafe { AtomicU64::from_ptr(self.at.cast()) };
                word.fetch_add(bits, Ordering::AcqRel)
            }
        };
        Ok(T::from_bits(old))
    }

    #[inline(always)]
    fn compare_exchange<T: Word>(self, old: T, new: T) -> Result<T, Refused> {
        let (old, new) = (old.to_bits(), new.to_bits());
        let seen = match (self.system, size_of::<T>()) {
            (true, 4) => {
                let (old, new) = (low32(old), low32(new));
                // SAFETY: aligned; the kernel may write there.
                u64::from(unsafe { guarded::compare_exchange32(self.at.cast(), old, new) }?)
            }
            // SAFETY: as above.
            (true, _) => unsafe { guarded::compare_exchange64(self.at.cast(), old, new) }?,
            (false, 4) => {
                // SAFETY: aligned, in VRAM, which is accessed by atomics only.
                let word = unsafe { AtomicU32::from_ptr(self.at.cast()) };
                let (old, new) = (low32(old), low32(new));
                let result = word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire);
                u64::from(result.unwrap_or_else(|seen| seen))
            }
            (false, _) => {
                // SAFETY: as above.
                let word = unsafe { AtomicU64::from_ptr(self.at.cast()) };
                let result = word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire);
                result.unwrap_or_else(|seen| seen)
            }
        };
        Ok(T::from_bits(seen))
    }
}
