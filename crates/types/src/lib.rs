//! Numbers have kinds: an address, a page index, a page count and a byte size are four types.
//!
//! ```text
//!   VirtAddr ---- .page() ----> PageIndex          a place in an address space
//!       |                           |
//!       +---- ByteSize -------------+---- PageCount   a distance
//!       |
//!       +---- Span: [start, end), page aligned, never empty
//! ```
//!
//! Mixing two kinds does not compile, arithmetic that can leave the 64-bit space says so, and a
//! [`Span`] is aligned, non-empty and half open because its constructor made it so.
//!
//! # Differences from the kernel
//!
//! The kernel passes `unsigned long` for all of these; several of its fixed bugs are a page frame
//! number read as an encoded migrate entry, or an order that was not clipped to a range.
#![no_std]
#![forbid(unsafe_code)]

mod addr;
mod page;
mod size;
mod span;

pub use addr::{DevAddr, DmaAddr, VirtAddr};
pub use page::{DevicePfn, PageCount, PageIndex};
pub use size::ByteSize;
pub use span::{Span, SpanError};

/// log2 of the base page size.
pub const PAGE_SHIFT: u32 = 12;
/// The base page: 4 KiB.
pub const PAGE_SIZE: ByteSize = ByteSize::new(1 << PAGE_SHIFT);
/// log2 of the block size.
pub const BLOCK_SHIFT: u32 = 21;
/// The block: 2 MiB, the unit of locking and the largest chunk that migrates at once.
pub const BLOCK_SIZE: ByteSize = ByteSize::new(1 << BLOCK_SHIFT);
/// Base pages in a block: 512.
pub const PAGES_PER_BLOCK: usize = 1 << (BLOCK_SHIFT - PAGE_SHIFT);

/// Who may map device pages in place; everybody else gets them back in RAM.
///
/// The kernel's `dev_pagemap.owner`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OwnerId(pub u32);
