//! Scalar accesses and atomics: one instruction each, in the guarded text.
//!
//! Loads and stores of aligned words are single, so they are relaxed atomics, and on x86_64 also
//! acquire and release. The read-modify-write operations are sequentially consistent.

use crate::arch;

/// The kernel refused the access with SIGSEGV or SIGBUS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Refused {
    /// The first byte that could not be reached.
    pub addr: usize,
}

impl core::fmt::Display for Refused {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "access to {:#x} was refused", self.addr)
    }
}

impl core::error::Error for Refused {}

/// The outcome of an accessor, as it comes back in two registers.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Outcome {
    /// The value; of a refused access, the address that faulted.
    pub(crate) value: u64,
    /// Zero, or one when the access was refused.
    pub(crate) refused: u64,
}

impl Outcome {
    /// The value, or the refusal of an access at `addr`.
    fn at(self, addr: usize) -> Result<u64, Refused> {
        // The address of the operand is as good as the handler's, and is there even where the
        // processor does not tell it (a non-canonical address).
        if self.refused == 0 {
            Ok(self.value)
        } else {
            Err(Refused { addr })
        }
    }
}

macro_rules! accessors {
    ($word:ty, $load:ident, $store:ident, $cas:ident) => {
        #[doc = concat!("Loads a `", stringify!($word), "`.")]
        ///
        /// # Errors
        ///
        /// When the kernel refuses the access.
        ///
        /// # Safety
        ///
        /// The address is aligned. What is loaded may change at any time, also under other
        /// threads' plain writes: the caller treats it as a number that came from outside.
        #[inline]
        pub unsafe fn $load(addr: *const $word) -> Result<$word, Refused> {
            // SAFETY: a fault is diverted; the caller vouches for the alignment.
            let outcome = unsafe { arch::$load(addr) };
            outcome.at(addr.addr()).map(narrow)
        }

        #[doc = concat!("Stores a `", stringify!($word), "`.")]
        ///
        /// # Errors
        ///
        /// When the kernel refuses the access.
        ///
        /// # Safety
        ///
        /// The address is aligned, and its bytes, when there are any, may be written by this
        /// caller now: no Rust object of somebody else is there.
        #[inline]
        pub unsafe fn $store(addr: *mut $word, value: $word) -> Result<(), Refused> {
            // SAFETY: a fault is diverted; the caller vouches for the target.
            let outcome = unsafe { arch::$store(addr, u64::from(value)) };
            outcome.at(addr.addr()).map(drop)
        }

        #[doc = concat!("Replaces a `", stringify!($word), "` that is `expected` by `new`.")]
        ///
        /// Returns what was there: the exchange took place when that is `expected`.
        ///
        /// # Errors
        ///
        /// When the kernel refuses the access. An access that compares unequal needs a writable
        /// page too.
        ///
        /// # Safety
        ///
        #[doc = concat!("As [`", stringify!($store), "`].")]
        #[inline]
        pub unsafe fn $cas(
            addr: *mut $word,
            expected: $word,
            new: $word,
        ) -> Result<$word, Refused> {
            // SAFETY: a fault is diverted; the caller vouches for the target.
            let outcome = unsafe { arch::$cas(addr, u64::from(expected), u64::from(new)) };
            outcome.at(addr.addr()).map(narrow)
        }
    };
}

accessors!(u8, load8, store8, compare_exchange8);
accessors!(u16, load16, store16, compare_exchange16);
accessors!(u32, load32, store32, compare_exchange32);
accessors!(u64, load64, store64, compare_exchange64);

macro_rules! fetch_add {
    ($word:ty, $name:ident, $store:ident) => {
        #[doc = concat!("Adds to a `", stringify!($word), "`, wrapping, and returns what was there.")]
        ///
        /// # Errors
        ///
        /// When the kernel refuses the access.
        ///
        /// # Safety
        ///
        #[doc = concat!("As [`", stringify!($store), "`].")]
        #[inline]
        pub unsafe fn $name(addr: *mut $word, value: $word) -> Result<$word, Refused> {
            // SAFETY: a fault is diverted; the caller vouches for the target.
            let outcome = unsafe { arch::$name(addr, u64::from(value)) };
            outcome.at(addr.addr()).map(narrow)
        }
    };
}

fetch_add!(u32, fetch_add32, store32);
fetch_add!(u64, fetch_add64, store64);

/// The low bits of a register: what an accessor of that width loaded.
trait Narrow {
    fn narrow(register: u64) -> Self;
}

macro_rules! narrow {
    ($($word:ty),*) => {$(
        impl Narrow for $word {
            #[inline]
            #[expect(clippy::cast_possible_truncation, reason = "the rest of the register is void")]
            fn narrow(register: u64) -> Self {
                register as Self
            }
        }
    )*};
}
narrow!(u8, u16, u32);

impl Narrow for u64 {
    #[inline]
    fn narrow(register: u64) -> Self {
        register
    }
}

#[inline]
fn narrow<T: Narrow>(register: u64) -> T {
    T::narrow(register)
}
