//! Where the engine's own mappings are wished to be.
//!
//! The kernel puts a mapping into the highest hole that is large enough, and some holes are the program's: left
//! there to be mapped again, or to be unmapped together with what is around them. So what the engine keeps for
//! itself is asked for in a part of the address space that the kernel gives to nobody who does not ask for it, far
//! below where it maps from and far above where heaps begin. Devices in software have a part of their own.
//!
//! It is a wish: where there is something already, or no such addresses at all, the kernel chooses.

use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{BLOCK_SIZE, ByteSize, VirtAddr};

const START: u64 = 0x6000_0000_0000;
const SIZE: u64 = 0x0800_0000_0000;

/// A place for `len` bytes. No two are given the same, until all were given.
pub(super) fn next(len: ByteSize) -> VirtAddr {
    static USED: AtomicU64 = AtomicU64::new(0);
    let block = BLOCK_SIZE.get();
    let wide = len.get().div_ceil(block).saturating_add(1) * block;
    VirtAddr::new(START + USED.fetch_add(wide, Ordering::Relaxed) % SIZE)
}
