//! Where the pages of a span are, and where its mappings begin: for who plans ahead.
//!
//! ```text
//!   a page that is not there            Unpopulated
//!   RAM only                            System
//!   one device memory                   Equal, or Other than the one that was asked about
//!   more than one                       MixedDevice
//!   RAM and device memory               Mixed
//! ```
//!
//! # Differences from the kernel
//!
//! There, no pagemap stands for RAM, so pages of RAM are `EQUAL` to it. Here RAM is `System` whatever is
//! asked about, and without a pagemap pages of one device are `Other`.

use crate::GpuSvm;
use alloc::vec;
use gpusvm_mm::{AddressSpace, DeviceMemoryId, MmError, Seen};
use gpusvm_pagemap::Pagemap;
use gpusvm_types::{DevicePfn, PAGES_PER_BLOCK, Span, VirtAddr};

/// Where pages were when they were looked at (`drm_gpusvm_scan_result`). Out of date when it is read:
/// enough to leave out work that may have been done, not to map anything.
#[must_use = "it is all that a scan does"]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan {
    /// At least one page is not there: never touched, not mapped, or on the move.
    Unpopulated,
    /// All pages are in the device memory that was asked about.
    Equal,
    /// All pages are in one device memory, which is another.
    Other,
    /// All pages are in RAM.
    System,
    /// The pages are in more than one device memory, and none is in RAM.
    MixedDevice,
    /// Some pages are in RAM and some are not.
    Mixed,
}

impl<M: AddressSpace> GpuSvm<M> {
    /// Where the pages of `span` are, seen from a device memory (`drm_gpusvm_scan_mm`). Brings none of
    /// them anywhere. It looks at one block after the other, and ends with the first page that is not
    /// there.
    ///
    /// # Errors
    ///
    /// As [`AddressSpace::snapshot`].
    pub fn scan(&self, span: Span, pagemap: Option<&Pagemap<M>>) -> Result<Scan, MmError> {
        let wanted = pagemap.map(|pagemap| pagemap.page(DevicePfn::new(0)).memory);
        let mut seen = vec![Seen::Unmapped; PAGES_PER_BLOCK];
        let mut places = Places::default();
        for piece in span.blocks() {
            let seen = &mut seen[..piece.page_count().as_usize()];
            self.mm.snapshot(piece, seen)?;
            places.add(seen);
            if places.is_any_missing {
                break;
            }
        }
        Ok(places.classify(wanted))
    }

    /// Where in `span` something is mapped first (`drm_gpusvm_find_vma_start`): a prefetch walks over
    /// what is not. `None` when nothing is.
    ///
    /// # Errors
    ///
    /// `Gone`, and what the address space refused.
    pub fn find_vma_start(&self, span: Span) -> Result<Option<VirtAddr>, MmError> {
        let vma = self.mm.find_vma(span.start())?;
        let mapped = vma.and_then(|vma| vma.span.intersection(span));
        Ok(mapped.map(Span::start))
    }
}

/// Where pages are, so far.
#[derive(Clone, Copy, Debug, Default)]
struct Places {
    is_any_missing: bool,
    is_any_in_ram: bool,
    memory: Option<DeviceMemoryId>,
    is_any_in_another: bool,
}

impl Places {
    fn add(&mut self, seen: &[Seen]) {
        for seen in seen {
            match *seen {
                Seen::Unmapped | Seen::Absent | Seen::Moving => self.is_any_missing = true,
                Seen::System => self.is_any_in_ram = true,
                Seen::Device(page) | Seen::Coherent(page) => {
                    let first = *self.memory.get_or_insert(page.memory);
                    self.is_any_in_another |= first != page.memory;
                }
            }
        }
    }

    const fn classify(&self, wanted: Option<DeviceMemoryId>) -> Scan {
        match (self.is_any_in_ram, self.memory, wanted) {
            _ if self.is_any_missing => Scan::Unpopulated,
            (true, None, _) => Scan::System,
            (true, Some(_), _) => Scan::Mixed,
            (false, Some(_), _) if self.is_any_in_another => Scan::MixedDevice,
            (false, Some(DeviceMemoryId(memory)), Some(DeviceMemoryId(wanted)))
                if memory == wanted =>
            {
                Scan::Equal
            }
            (false, Some(_), _) => Scan::Other,
            (false, None, _) => Scan::Unpopulated,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_mm::DevicePage;
    use gpusvm_types::DevicePfn;

    /// Exhaustive: up to four pages, each in one of six states, for each memory that can be asked about,
    /// against the words of the picture.
    #[test]
    fn every_mix_of_places_has_its_name() {
        let on = |memory| {
            Seen::Device(DevicePage {
                memory: DeviceMemoryId(memory),
                pfn: DevicePfn::new(7),
            })
        };
        let (ram, one, two) = (Seen::System, on(1), on(2));
        let states = [Seen::Unmapped, Seen::Absent, Seen::Moving, ram, one, two];
        for wanted in [None, Some(1), Some(2), Some(3)] {
            for pages in 0..=4u32 {
                for mix in 0..6usize.pow(pages) {
                    let state = |page| states[mix / 6usize.pow(page) % 6];
                    let seen: vec::Vec<Seen> = (0..pages).map(state).collect();
                    let has = |wanted: Seen| seen.contains(&wanted);
                    let memory = if has(one) { 1 } else { 2 };
                    let want =
                        if pages == 0 || !seen.iter().all(|seen| [ram, one, two].contains(seen)) {
                            Scan::Unpopulated
                        } else if has(ram) && (has(one) || has(two)) {
                            Scan::Mixed
                        } else if has(ram) {
                            Scan::System
                        } else if has(one) && has(two) {
                            Scan::MixedDevice
                        } else if wanted == Some(memory) {
                            Scan::Equal
                        } else {
                            Scan::Other
                        };
                    let mut places = Places::default();
                    places.add(&seen);
                    let got = places.classify(wanted.map(DeviceMemoryId));
                    assert_eq!(got, want, "{seen:?} seen from {wanted:?}");
                }
            }
        }
    }
}
