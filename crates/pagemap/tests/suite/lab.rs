//! A simulated process with devices, and memory whose bytes are known.

use crate::device::{Bus, Device, Ops};
use gpusvm_mm::{AddressSpace, Home};
use gpusvm_mm_sim::{Backing, Options, Prot, Sim};
use gpusvm_pagemap::{Pagemap, PagemapSpec, Pagemaps, Peer};
use gpusvm_types::{DmaAddr, OwnerId, PAGE_SIZE, PageCount, Span, VirtAddr};
use std::sync::Arc;

/// How large a block is.
pub(crate) const BLOCK: PageCount = PageCount::new(512);

#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) sim: Arc<Sim>,
    pub(crate) pagemaps: Arc<Pagemaps<Sim>>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) devices: Vec<Arc<Device>>,
}

impl Lab {
    /// A process with one device for each owner, of 2,048 pages each.
    pub(crate) fn new(owners: &[u32]) -> Self {
        Self::seeded(1, owners)
    }

    pub(crate) fn seeded(seed: u64, owners: &[u32]) -> Self {
        let sim = Sim::new(Options {
            seed,
            ..Options::default()
        });
        Self::on(sim, owners, PageCount::new(2048))
    }

    pub(crate) fn on(sim: Arc<Sim>, owners: &[u32], pages: PageCount) -> Self {
        let (bus, pagemaps) = (Bus::new(&sim), Pagemaps::new(&sim));
        let devices = (0..).zip(owners).map(|(peer, owner)| {
            let device = Device::new(&bus, Peer(peer), pages);
            let spec = PagemapSpec {
                peer: Peer(peer),
                owner: OwnerId(*owner),
                pages,
                coherent: false,
            };
            let ops = Arc::new(Ops(Arc::clone(&device)));
            let pagemap = Pagemap::new(&pagemaps, spec, ops).unwrap();
            device.pagemap.set(Arc::downgrade(&pagemap)).unwrap();
            device
        });
        let devices = devices.collect();
        Self {
            sim,
            pagemaps,
            bus,
            devices,
        }
    }

    /// The only device, or the first.
    pub(crate) fn device(&self) -> &Arc<Device> {
        &self.devices[0]
    }

    /// A block of mirrored memory, armed and filled.
    pub(crate) fn block(&self, seed: u64) -> Span {
        let span = self.sim.mmap(BLOCK, Prot::ReadWrite, Backing::Mirrored);
        // First, so that the kernel can make it a huge page.
        self.fill(span, seed);
        self.sim.arm(span).unwrap();
        span
    }

    /// Mirrored memory, armed, that nobody has touched.
    pub(crate) fn untouched(&self, pages: PageCount) -> Span {
        let span = self.sim.mmap(pages, Prot::ReadWrite, Backing::Mirrored);
        self.sim.arm(span).unwrap();
        span
    }

    /// Writes a word that tells its page and `seed` to each page.
    pub(crate) fn fill(&self, span: Span, seed: u64) {
        for page in span.pages() {
            self.sim
                .write_u64(page.start(), word(page.start(), seed))
                .unwrap();
            let last = last_word(page.start());
            self.sim.write_u64(last, word(last, seed)).unwrap();
        }
    }

    /// The CPU reads what was filled, wherever it is: faults bring it home.
    pub(crate) fn check(&self, span: Span, seed: u64) {
        for page in span.pages() {
            for at in [page.start(), last_word(page.start())] {
                let found = self.sim.read_u64(at);
                assert_eq!(found, Ok(word(at, seed)), "at {at}");
            }
        }
    }

    /// Looks at what was filled where it is, and moves nothing.
    pub(crate) fn peek(&self, span: Span, seed: u64) {
        for page in span.pages() {
            for at in [page.start(), last_word(page.start())] {
                assert_eq!(self.peek_word(at), word(at, seed), "at {at}");
            }
        }
    }

    pub(crate) fn peek_word(&self, at: VirtAddr) -> u64 {
        let mut bytes = [0; 8];
        match self.home(at) {
            Home::System | Home::Coherent(_) => self
                .sim
                .bus_read(DmaAddr::new(at.get()), &mut bytes)
                .unwrap(),
            Home::Device(page) => {
                let of = |device: &&Arc<Device>| device.pagemap().contains(page);
                let device = self.devices.iter().find(of).unwrap();
                let offset = at.offset_from(at.page().start());
                device.read(page.pfn.dev_addr() + offset, &mut bytes);
            }
            home => panic!("{at} is {home:?}"),
        }
        u64::from_le_bytes(bytes)
    }

    pub(crate) fn home(&self, at: VirtAddr) -> Home {
        self.sim.home(at.page())
    }

    pub(crate) fn homes(&self, span: Span) -> Vec<Home> {
        span.pages().map(|page| self.sim.home(page)).collect()
    }

    pub(crate) fn on_device(&self, span: Span) -> usize {
        let is_there = |home: &&Home| matches!(home, Home::Device(_));
        self.homes(span).iter().filter(is_there).count()
    }

    /// DESIGN's invariants, as far as there is anything to ask.
    pub(crate) fn assert_sound(&self) {
        if let Err(wrong) = self.sim.check() {
            panic!("{wrong}\n{}", self.sim.trace().join("\n"));
        }
        for device in &self.devices {
            let pagemap = device.pagemap();
            let memory = pagemap.page(gpusvm_types::DevicePfn::new(0)).memory;
            let in_use = pagemap.pages_in_use();
            assert_eq!(self.sim.pages_on(memory), in_use, "words and zdds");
            let allocated: u64 = pagemap
                .live()
                .iter()
                .map(|(devmem, _)| devmem.size().get())
                .sum();
            let free = device.free_pages() as u64;
            assert_eq!(
                free + allocated,
                pagemap.size().get(),
                "free and used device memory"
            );
        }
    }

    /// Everything is home, and every allocation was given back.
    pub(crate) fn assert_empty(&self) {
        self.assert_sound();
        for device in &self.devices {
            assert_eq!(device.pagemap().pages_in_use(), PageCount::ZERO);
            assert_eq!(device.free_pages() as u64, device.pagemap().size().get());
        }
    }
}

fn last_word(page: VirtAddr) -> VirtAddr {
    page + (PAGE_SIZE - gpusvm_types::ByteSize::new(8))
}

pub(crate) fn word(at: VirtAddr, seed: u64) -> u64 {
    at.get().wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ seed
}

/// Pages `first..first + count` of a span.
pub(crate) fn part(span: Span, first: u64, count: u64) -> Span {
    let first = span.first_page() + PageCount::new(first);
    Span::of_pages(first, PageCount::new(count))
}
