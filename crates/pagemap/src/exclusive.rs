//! Pages that a device has for itself: `make_device_exclusive`.
//!
//! ```text
//!   in RAM ---- migrate ----> on the device ---- make_exclusive ----> on the device, marked
//!      ^                           |                                        |
//!      `---------------------------'---- a touch of the CPU, a fork, ... ---'
//! ```
//!
//! What keeps the CPU from a page is that it is elsewhere. The mark tells a page that somebody asked to have
//! for the device alone from one that merely lives there. It goes when the page leaves, whoever took it.
//!
//! # Locking
//!
//! A mark is made and taken away with the block locked that its page is in, and read as a hint.
//!
//! # Differences from the kernel
//!
//! There the page stays in RAM, and entries of the page table say that a device has it.

use crate::Pagemap;
use crate::migrate_back::each_mirrored;
use alloc::boxed::Box;
use gpusvm_mm::{AddressSpace, Block, DevicePage, Home, MmError};
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{DevicePfn, PageCount, Span};

/// Marks the pages of `span` that live in this memory, and says how many do. Who wants all of them and gets
/// fewer brings the rest and asks again.
///
/// # Errors
///
/// What the address space refused.
pub fn make_exclusive<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    span: Span,
) -> Result<PageCount, MmError> {
    let mm = pagemap.mm.upgrade().ok_or(MmError::Gone)?;
    let mut count = PageCount::ZERO;
    each_mirrored(&*mm, span, |piece| {
        let block = mm.lock_block(piece)?;
        for page in piece.pages() {
            if let Home::Device(device) = block.home(page)
                && pagemap.contains(device)
            {
                pagemap.exclusive.mark(device.pfn);
                count += PageCount::ONE;
            }
        }
        Ok(())
    })?;
    Ok(count)
}

impl<M: AddressSpace> Pagemap<M> {
    /// Whether the device has a page of this memory for itself. Out of date on return.
    pub fn is_exclusive(&self, page: DevicePage) -> bool {
        self.contains(page) && self.exclusive.is_marked(page.pfn)
    }
}

/// Which pages of a memory are exclusive: one bit each.
#[derive(Debug)]
pub(crate) struct Marks(Box<[AtomicU64]>);

impl Marks {
    pub(crate) fn new(pages: PageCount) -> Self {
        let words = pages.as_usize().div_ceil(64);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }

    fn mark(&self, pfn: DevicePfn) {
        self.0[pfn.index() / 64].fetch_or(bit(pfn), Ordering::AcqRel);
    }

    fn is_marked(&self, pfn: DevicePfn) -> bool {
        let word = self.0.get(pfn.index() / 64);
        word.is_some_and(|word| word.load(Ordering::Acquire) & bit(pfn) != 0)
    }

    /// They are free again. Allocates nothing.
    pub(crate) fn clear(&self, first: DevicePfn, count: PageCount) {
        for i in 0..count.get() {
            let pfn = first.offset(PageCount::new(i));
            let word = &self.0[pfn.index() / 64];
            // Most have no mark.
            if word.load(Ordering::Acquire) & bit(pfn) != 0 {
                word.fetch_and(!bit(pfn), Ordering::AcqRel);
            }
        }
    }
}

const fn bit(pfn: DevicePfn) -> u64 {
    1 << (pfn.index() % 64)
}
