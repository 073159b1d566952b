//! What a device sees of RAM.
//!
//! The bus address of a page in place is its virtual address, as with an IOMMU that walks the
//! process' page tables; staging has addresses of its own. A device that reaches for a page that does
//! not live in RAM is wrong, and is told so.

use crate::Sim;
use crate::access::word_at;
use crate::frame::PAGE_BYTES;
use crate::kernel::Prot;
use crate::staging::Staging;
use gpusvm_mm::{Home, Place};
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{ByteSize, DmaAddr, PAGE_SIZE, VirtAddr};

/// What the bus answers to an access that it cannot make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BusError {
    /// Nothing is there.
    Unmapped(DmaAddr),
    /// Not for this.
    Denied(DmaAddr),
    /// The page does not live in RAM, or is on the move.
    NotInRam(DmaAddr),
    /// The page is lost.
    Lost(DmaAddr),
}

impl core::fmt::Display for BusError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::Unmapped(at) => write!(f, "nothing is at bus address {at}"),
            Self::Denied(at) => write!(f, "bus address {at} allows no such access"),
            Self::NotInRam(at) => write!(f, "the page at bus address {at} is not in RAM"),
            Self::Lost(at) => write!(f, "the page at bus address {at} is lost"),
        }
    }
}

impl core::error::Error for BusError {}

impl Sim {
    /// A device reads. One page at a time is read in one step.
    ///
    /// # Errors
    ///
    /// What is wrong with the first page that cannot be read; the pages before were.
    pub fn bus_read(&self, at: DmaAddr, to: &mut [u8]) -> Result<(), BusError> {
        self.note(format_args!("bus read {at}"));
        let mut rest = to;
        let mut at = at;
        while !rest.is_empty() {
            self.yield_now();
            let offset = page_offset(at);
            let len = rest.len().min(PAGE_BYTES - offset);
            let (piece, more) = rest.split_at_mut(len);
            self.with_bus_page(at, false, |page| {
                piece.copy_from_slice(&page[offset..offset + len]);
            })?;
            (rest, at) = (more, at + ByteSize::from_usize(len));
        }
        Ok(())
    }

    /// A device writes. One page at a time is written in one step.
    ///
    /// # Errors
    ///
    /// What is wrong with the first page that cannot be written; the pages before were.
    pub fn bus_write(&self, at: DmaAddr, from: &[u8]) -> Result<(), BusError> {
        self.note(format_args!("bus write {at}"));
        let (mut rest, mut at) = (from, at);
        while !rest.is_empty() {
            self.yield_now();
            let offset = page_offset(at);
            let (piece, more) = rest.split_at(rest.len().min(PAGE_BYTES - offset));
            self.with_bus_page(at, true, |page| {
                page[offset..offset + piece.len()].copy_from_slice(piece);
            })?;
            (rest, at) = (more, at + ByteSize::from_usize(piece.len()));
        }
        Ok(())
    }

    /// A device adds to an aligned word, in one step; what was there before comes back.
    ///
    /// # Errors
    ///
    /// What is wrong with the page.
    ///
    /// # Panics
    ///
    /// When `at` is not a multiple of eight.
    pub fn bus_fetch_add_u64(&self, at: DmaAddr, by: u64) -> Result<u64, BusError> {
        self.note(format_args!("bus add {at}"));
        self.yield_now();
        self.with_bus_page(at, true, |page| {
            let word = word_at(page, VirtAddr::new(at.get()));
            let before = u64::from_le_bytes(*word);
            *word = before.wrapping_add(by).to_le_bytes();
            before
        })
    }

    fn with_bus_page<T>(
        &self,
        at: DmaAddr,
        write: bool,
        act: impl FnOnce(&mut [u8; PAGE_BYTES]) -> T,
    ) -> Result<T, BusError> {
        if Staging::has(at) {
            let touched = self.staging.with_page(at, write, act);
            return touched.ok_or(BusError::Unmapped(at));
        }
        let mut kernel = self.kernel.lock();
        let virt = VirtAddr::new(at.get());
        let mapping = kernel.mapping(virt).ok_or(BusError::Unmapped(at))?;
        match mapping.prot {
            Prot::ReadWrite => {}
            Prot::Read if !write => {}
            _ => return Err(BusError::Denied(at)),
        }
        let page = virt.page();
        if let Some(part) = kernel.parts.find(virt) {
            let (word, block) = (part.region.word(page), part.region.block(virt));
            match word.get().home() {
                Home::System | Home::Coherent(_) => {}
                // Devices that read copies of it would not hear of a write.
                Home::Protected if write => return Err(BusError::Denied(at)),
                Home::Protected => {}
                // It was given up a moment ago, and is there all the same.
                Home::Moving if matches!(word.get().place, Place::Coherent(_)) => {}
                // It was given up a moment ago: whoever copies it hears of that.
                Home::Moving if word.get().place == Place::System && !write => {}
                // The access began before, and whoever takes the page waits for its end.
                Home::Moving
                    if word.get().place == Place::Collected
                        && block.clearing.load(Ordering::Acquire) => {}
                Home::Unmapped => return Err(BusError::Unmapped(at)),
                Home::Device(_) | Home::Moving => return Err(BusError::NotInRam(at)),
            }
            if !kernel.pages.contains_key(&page) {
                word.saw_hole();
            }
        }
        if write {
            kernel.protected.remove(&page);
        }
        let touched = kernel.with_page(page, write, act);
        touched.ok_or(BusError::Lost(at))
    }
}

fn page_offset(at: DmaAddr) -> usize {
    ByteSize::new(at.get() % PAGE_SIZE.get()).as_usize()
}
