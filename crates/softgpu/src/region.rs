//! Memory of the device's own: private and anonymous.
//!
//! Nobody holds a reference into it: it is reached by raw pointers, with atomics and guarded copies.
//!
//! It is wished for in a part of the address space that the kernel gives to nobody who does not ask for it: else it
//! would come to lie in a hole that the program left in its own, and may unmap with what is around it.

use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{BLOCK_SIZE, ByteSize};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::io;

/// A mapping, aligned to a block, as long as the value lives.
#[derive(Debug)]
pub(crate) struct Region {
    base: *mut u8,
    len: ByteSize,
    // The process that has the mapping, when its children do not: what they have there is theirs.
    owner: Option<u32>,
}

// SAFETY: the pointer is an address; who uses it answers for the access.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Reserves `len` bytes, a multiple of the page size. They read as zeroes, and take up memory
    /// when they are touched.
    pub(crate) fn reserve(len: ByteSize) -> io::Result<Self> {
        let block = BLOCK_SIZE.as_usize();
        let padded = len
            .as_usize()
            .checked_add(block)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: an address is only wished for, so that nothing that exists is replaced.
        let start =
            unsafe { rustix::mm::mmap_anonymous(place(padded).cast(), padded, protection, flags)? };
        let start = start.cast::<u8>();
        let head = start.align_offset(block);
        let base = start.wrapping_add(head);
        let end = base.wrapping_add(len.as_usize());
        unmap(start, head);
        unmap(end, block - head);
        // Huge pages are a wish, and some kernels have none.
        let _ = advise(base, len, Advice::LinuxHugepage);
        Ok(Self {
            base,
            len,
            owner: None,
        })
    }

    /// Keeps children of fork from inheriting it, and with it from paying for it.
    pub(crate) fn without_children(mut self) -> io::Result<Self> {
        advise(self.base, self.len, Advice::LinuxDontFork)?;
        self.owner = Some(std::process::id());
        Ok(self)
    }

    /// The first byte.
    pub(crate) fn base(&self) -> *mut u8 {
        self.base
    }

    /// How many bytes.
    pub(crate) fn len(&self) -> ByteSize {
        self.len
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if self.owner.is_none_or(|owner| owner == std::process::id()) {
            unmap(self.base, self.len.as_usize());
        }
    }
}

/// Where to wish for so many bytes. No two are given the same, until all were given.
fn place(len: usize) -> *mut u8 {
    const START: u64 = 0x6800_0000_0000;
    const SIZE: u64 = 0x1000_0000_0000;
    static USED: AtomicU64 = AtomicU64::new(0);
    let block = BLOCK_SIZE.get();
    let wide = (len as u64).div_ceil(block).saturating_add(1) * block;
    let at = START + USED.fetch_add(wide, Ordering::Relaxed) % SIZE;
    // Where there are no such addresses, the kernel chooses.
    usize::try_from(at).map_or(std::ptr::null_mut(), std::ptr::without_provenance_mut)
}

fn unmap(start: *mut u8, len: usize) {
    if len != 0 {
        // SAFETY: a part of a mapping of ours that nobody uses, or uses any more.
        let unmapped = unsafe { rustix::mm::munmap(start.cast(), len) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

fn advise(start: *mut u8, len: ByteSize, advice: Advice) -> io::Result<()> {
    // SAFETY: neither advice changes what the memory holds.
    unsafe { rustix::mm::madvise(start.cast(), len.as_usize(), advice)? };
    Ok(())
}
