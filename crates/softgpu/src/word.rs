//! What one access of a lane can load and store.

use crate::SvmPtr;
use gpusvm_guarded::{self as guarded, Refused};
use gpusvm_sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use gpusvm_types::VirtAddr;

/// A value of 1, 2, 4 or 8 bytes that one access moves whole.
///
/// # Safety
///
/// Implemented here only. Every pattern of bits is a value, there is no padding, and alignment is
/// the size.
#[expect(private_bounds, reason = "sealed")]
pub unsafe trait Word: Copy + Bits + 'static {}

/// A word as bits in a register.
pub(crate) trait Bits: Sized {
    /// The bits, zero extended.
    fn to_bits(self) -> u64;
    /// The value with these low bits.
    fn from_bits(bits: u64) -> Self;
}

macro_rules! word {
    ($($word:ty, |$value:ident| $to:expr, |$bits:ident| $from:expr;)*) => {$(
        // SAFETY: a primitive number, whose alignment is its size on 64-bit machines.
        unsafe impl Word for $word {}

        impl Bits for $word {
            #[inline(always)]
            fn to_bits(self) -> u64 {
                let $value = self;
                $to
            }
            #[inline(always)]
            fn from_bits($bits: u64) -> Self {
                $from
            }
        }
    )*};
}

word! {
    u8, |v| u64::from(v), |b| low8(b);
    u16, |v| u64::from(v), |b| low16(b);
    u32, |v| u64::from(v), |b| low32(b);
    u64, |v| v, |b| b;
    usize, |v| v as u64, |b| address(b);
    i8, |v| u64::from(v.cast_unsigned()), |b| low8(b).cast_signed();
    i16, |v| u64::from(v.cast_unsigned()), |b| low16(b).cast_signed();
    i32, |v| u64::from(v.cast_unsigned()), |b| low32(b).cast_signed();
    i64, |v| v.cast_unsigned(), |b| b.cast_signed();
    isize, |v| v.cast_unsigned() as u64, |b| address(b).cast_signed();
    f32, |v| u64::from(v.to_bits()), |b| f32::from_bits(low32(b));
    f64, |v| v.to_bits(), |b| f64::from_bits(b);
}

macro_rules! pointer_word {
    ($pointer:ty, $generic:ident, |$value:ident| $to:expr, |$bits:ident| $from:expr) => {
        // SAFETY: a thin pointer is an address of 8 bytes.
        unsafe impl<$generic: 'static> Word for $pointer {}

        impl<$generic: 'static> Bits for $pointer {
            #[inline(always)]
            fn to_bits(self) -> u64 {
                let $value = self;
                $to
            }
            #[inline(always)]
            fn from_bits($bits: u64) -> Self {
                $from
            }
        }
    };
}
pointer_word!(*const T, T, |v| v.expose_provenance() as u64, |b| {
    std::ptr::with_exposed_provenance(address(b))
});
pointer_word!(*mut T, T, |v| v.expose_provenance() as u64, |b| {
    std::ptr::with_exposed_provenance_mut(address(b))
});
pointer_word!(SvmPtr<T>, T, |v| v.addr().get(), |b| SvmPtr::new(
    VirtAddr::new(b)
));

/// Loads a word of VRAM.
///
/// # Safety
///
/// `at` is in VRAM, and aligned for `T`.
#[inline(always)]
pub(crate) unsafe fn load_vram<T: Word>(at: *mut u8) -> T {
    let bits = match size_of::<T>() {
        // SAFETY: VRAM is there, and accessed by atomics only.
        1 => u64::from(unsafe { AtomicU8::from_ptr(at) }.load(Ordering::Relaxed)),
        // SAFETY: as above, and aligned.
        2 => u64::from(unsafe { AtomicU16::from_ptr(at.cast()) }.load(Ordering::Relaxed)),
        // SAFETY: as above.
        4 => u64::from(unsafe { AtomicU32::from_ptr(at.cast()) }.load(Ordering::Relaxed)),
        // SAFETY: as above.
        _ => unsafe { AtomicU64::from_ptr(at.cast()) }.load(Ordering::Relaxed),
    };
    T::from_bits(bits)
}

/// Stores a word to VRAM.
///
/// # Safety
///
/// As [`load_vram`].
#[inline(always)]
pub(crate) unsafe fn store_vram<T: Word>(at: *mut u8, value: T) {
    let bits = value.to_bits();
    match size_of::<T>() {
        // SAFETY: VRAM is there, and accessed by atomics only.
        1 => unsafe { AtomicU8::from_ptr(at) }.store(low8(bits), Ordering::Relaxed),
        // SAFETY: as above, and aligned.
        2 => unsafe { AtomicU16::from_ptr(at.cast()) }.store(low16(bits), Ordering::Relaxed),
        // SAFETY: as above.
        4 => unsafe { AtomicU32::from_ptr(at.cast()) }.store(low32(bits), Ordering::Relaxed),
        // SAFETY: as above.
        _ => unsafe { AtomicU64::from_ptr(at.cast()) }.store(bits, Ordering::Relaxed),
    }
}

/// Loads a word of RAM, which may refuse.
///
/// # Safety
///
/// `at` is aligned for `T`.
#[inline(always)]
pub(crate) unsafe fn load_ram<T: Word>(at: *mut u8) -> Result<T, Refused> {
    let bits = match size_of::<T>() {
        // SAFETY: a load does no harm.
        1 => unsafe { guarded::load8(at) }.map(u64::from),
        // SAFETY: as above, and aligned.
        2 => unsafe { guarded::load16(at.cast()) }.map(u64::from),
        // SAFETY: as above.
        4 => unsafe { guarded::load32(at.cast()) }.map(u64::from),
        // SAFETY: as above.
        _ => unsafe { guarded::load64(at.cast()) },
    };
    bits.map(T::from_bits)
}

/// Stores a word to RAM, which may refuse.
///
/// # Safety
///
/// `at` is aligned for `T`, and the kernel may write there.
#[inline(always)]
pub(crate) unsafe fn store_ram<T: Word>(at: *mut u8, value: T) -> Result<(), Refused> {
    let bits = value.to_bits();
    match size_of::<T>() {
        // SAFETY: the kernel may write there.
        1 => unsafe { guarded::store8(at, low8(bits)) },
        // SAFETY: as above, and aligned.
        2 => unsafe { guarded::store16(at.cast(), low16(bits)) },
        // SAFETY: as above.
        4 => unsafe { guarded::store32(at.cast(), low32(bits)) },
        // SAFETY: as above.
        _ => unsafe { guarded::store64(at.cast(), bits) },
    }
}

macro_rules! low {
    ($($(#[$doc:meta])* $name:ident -> $word:ty;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        #[expect(clippy::cast_possible_truncation, reason = "the rest of the register is void")]
        pub(crate) const fn $name(bits: u64) -> $word {
            bits as $word
        }
    )*};
}
low! {
    /// The low 8 bits of a register.
    low8 -> u8;
    /// The low 16 bits of a register.
    low16 -> u16;
    /// The low 32 bits of a register.
    low32 -> u32;
    /// A register as an address, or an index, of this process, where all have 64 bits.
    address -> usize;
}
