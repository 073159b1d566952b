//! What must be true of a mirror whenever nobody is in the middle of anything.

use crate::device::Device;
use crate::lab::Lab;
use gpusvm_mm::{AddressSpace, Home};
use gpusvm_pagemap::{PagemapAddr, Peer};
use gpusvm_types::{DmaAddr, PageIndex, Span, VirtAddr};
use std::sync::Arc;

/// Everything that a refusal must leave as it was.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct State {
    ranges: Vec<Span>,
    entries: Vec<(PageIndex, PagemapAddr)>,
    homes: Vec<Home>,
    reached: Vec<usize>,
    free: Vec<usize>,
}

impl Lab {
    pub(crate) fn state(&self, span: Span) -> State {
        State {
            ranges: self.spans(),
            entries: self.gpu.entries(),
            homes: self.homes(span),
            reached: self.devices.iter().map(|device| device.reached()).collect(),
            free: self
                .devices
                .iter()
                .map(|device| device.free_pages())
                .collect(),
        }
    }

    /// What the ranges cover.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let all = Span::new(VirtAddr::new(0), VirtAddr::new(1 << 47)).unwrap();
        let ranges = self.svm.ranges_in(all);
        ranges.iter().map(|range| range.span()).collect()
    }

    /// What must be true whenever nobody is in the middle of anything.
    #[track_caller]
    pub(crate) fn assert_sound(&self) {
        let seed = self.sim.seed();
        self.sim.check().unwrap();
        let spans = self.spans();
        assert_eq!(spans.len(), self.svm.range_count());
        for pair in spans.windows(2) {
            assert!(!pair[0].overlaps(pair[1]), "seed {seed}: {pair:?}");
        }
        for (page, address) in self.gpu.entries() {
            let at = page.start();
            let range = self.svm.range_find(at);
            let is_mapped = range.is_some_and(|range| range.is_mapped());
            assert!(is_mapped, "seed {seed}: {at} is mapped behind its range");
            assert_eq!(Some(address), self.wanted(page), "seed {seed}: {at}");
        }
        self.assert_reached();
    }

    /// Where the device has to find a page, if it stays where it is.
    fn wanted(&self, page: PageIndex) -> Option<PagemapAddr> {
        match self.sim.home(page) {
            Home::System | Home::Protected | Home::Coherent(_) => {
                Some(PagemapAddr::System(DmaAddr::new(page.start().get())))
            }
            Home::Device(page) => {
                let of = |device: &&Arc<Device>| device.pagemap().contains(page);
                let device = self.devices.iter().find(of).unwrap();
                Some(device.address(page.pfn, Peer(0)))
            }
            Home::Moving | Home::Unmapped => None,
        }
    }

    /// What must be true at any time: the device finds no page where it was before.
    #[track_caller]
    pub(crate) fn assert_not_stale(&self) {
        for (page, address) in self.gpu.entries() {
            let wanted = self.wanted(page);
            let is_stale = wanted.is_some_and(|wanted| wanted != address);
            let seed = self.sim.seed();
            assert!(
                !is_stale,
                "seed {seed}: {page:?} is at {wanted:?}, not at {address:?}"
            );
        }
    }

    /// Exactly what is mapped is reached, as long as nothing is only prepared.
    #[track_caller]
    pub(crate) fn assert_reached(&self) {
        let entries = self.gpu.entries();
        let is_of_device =
            |entry: &&(PageIndex, PagemapAddr)| !matches!(entry.1, PagemapAddr::System(_));
        let mapped = entries.iter().filter(is_of_device).count();
        let reached: usize = self.devices.iter().map(|device| device.reached()).sum();
        assert_eq!(mapped, reached, "seed {}", self.sim.seed());
    }

    /// The mirror ends: nothing is left of it.
    #[track_caller]
    pub(crate) fn assert_ends(&self) {
        self.assert_sound();
        self.svm.close();
        assert_eq!(self.svm.range_count(), 0);
        assert_eq!(self.gpu.entries(), []);
        assert_eq!(self.sim.notifiers().count(), 0);
        self.assert_sound();
    }
}
