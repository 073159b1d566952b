//! A device's memory: bytes, a free list, and who reaches which page.

use crate::gpu::{Done, Log};
use gpusvm_mm_sim::Sim;
use gpusvm_pagemap::migrate::migrate_to_devmem;
use gpusvm_pagemap::{
    Cause, Devmem, DevmemError, DevmemOps, MigrateError, MigrateRequest, Mode, Pagemap,
    PagemapAddr, PagemapOps, Peer, PreMigrateFence, ToDevmem, ToRam,
};
use gpusvm_types::{ByteSize, DevAddr, DevicePfn, DmaAddr, PageCount, Span};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

/// What a device has.
pub(crate) const PAGES: PageCount = PageCount::new(1024);

#[derive(Debug)]
pub(crate) struct Device {
    peer: Peer,
    sim: Weak<Sim>,
    log: Arc<Log>,
    pagemap: OnceLock<Arc<Pagemap<Sim>>>,
    bytes: Mutex<Vec<u8>>,
    free: Mutex<Vec<bool>>,
    /// What was mapped, for whom, and not yet unmapped.
    reached: Mutex<Vec<(PagemapAddr, Peer)>>,
    maps: Mutex<Maps>,
    /// Whether copies home fail.
    stuck: AtomicBool,
}

/// How often `device_map` was called.
#[derive(Debug, Default)]
struct Maps {
    asked: u64,
    refuse: Option<u64>,
}

impl Device {
    pub(crate) fn new(sim: &Arc<Sim>, peer: Peer, log: &Arc<Log>) -> Arc<Self> {
        Arc::new(Self {
            peer,
            sim: Arc::downgrade(sim),
            log: Arc::clone(log),
            pagemap: OnceLock::new(),
            bytes: Mutex::new(vec![0xEE; PAGES.bytes().as_usize()]),
            free: Mutex::new(vec![true; PAGES.as_usize()]),
            reached: Mutex::default(),
            maps: Mutex::default(),
            stuck: AtomicBool::new(false),
        })
    }

    pub(crate) fn set_pagemap(&self, pagemap: Arc<Pagemap<Sim>>) {
        self.pagemap.set(pagemap).unwrap();
    }

    pub(crate) fn pagemap(&self) -> &Arc<Pagemap<Sim>> {
        self.pagemap.get().unwrap()
    }

    /// The page that `device_map` is asked for after `pages` others is refused, and only that.
    pub(crate) fn refuse_map_after(&self, pages: u64) {
        let mut maps = self.maps.lock().unwrap();
        maps.refuse = Some(maps.asked + pages);
    }

    /// Whether copies home fail from now on.
    pub(crate) fn set_stuck(&self, stuck: bool) {
        self.stuck.store(stuck, Ordering::Release);
    }

    /// How many pages are reached by somebody.
    pub(crate) fn reached(&self) -> usize {
        self.reached.lock().unwrap().len()
    }

    pub(crate) fn free_pages(&self) -> usize {
        let free = self.free.lock().unwrap();
        free.iter().filter(|free| **free).count()
    }

    /// Reads device memory.
    pub(crate) fn read(&self, at: DevAddr, to: &mut [u8]) {
        let at = ByteSize::new(at.get()).as_usize();
        to.copy_from_slice(&self.bytes.lock().unwrap()[at..at + to.len()]);
    }

    fn write(&self, at: DevAddr, from: &[u8]) {
        let at = ByteSize::new(at.get()).as_usize();
        self.bytes.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
    }

    /// How `peer` reaches a page.
    pub(crate) fn address(&self, page: DevicePfn, peer: Peer) -> PagemapAddr {
        let bus = (u64::from(self.peer.0) + 1) << 52;
        match peer == self.peer {
            true => PagemapAddr::Vram(page.dev_addr()),
            false => PagemapAddr::Peer(DmaAddr::new(bus + page.dev_addr().get())),
        }
    }

    fn take(&self, count: PageCount) -> Option<Vec<DevicePfn>> {
        let mut free = self.free.lock().unwrap();
        let count = count.as_usize();
        let first = (0..=free.len().checked_sub(count)?)
            .find(|first| free[*first..first + count].iter().all(|free| *free))?;
        free[first..first + count].fill(false);
        let pfn = |i| DevicePfn::new(u32::try_from(i).unwrap());
        Some((first..first + count).map(pfn).collect())
    }

    /// Moves a span here, with an allocation of its own, as far as it can be moved.
    pub(crate) fn migrate(self: &Arc<Self>, span: Span) -> Result<PageCount, MigrateError> {
        let count = span.page_count();
        let pfns = self.take(count).ok_or(MigrateError::NoSpace { span })?;
        let device = Arc::clone(self);
        let devmem = Arc::new(Devmem::new(count, Box::new(Bo { device, pfns })));
        let request = MigrateRequest {
            span,
            timeslice: Duration::ZERO,
            mode: Mode::Partial,
            cause: Cause::Asked,
            exclusive: false,
        };
        migrate_to_devmem(self.pagemap(), &devmem, &request).map(|done| done.moved)
    }
}

/// One allocation.
#[derive(Debug)]
struct Bo {
    device: Arc<Device>,
    pfns: Vec<DevicePfn>,
}

const FAILED: DevmemError = DevmemError::Copy { reason: "told to" };

impl Bo {
    fn sim(&self) -> Result<Arc<Sim>, DevmemError> {
        self.device.sim.upgrade().ok_or(FAILED)
    }
}

impl DevmemOps for Bo {
    fn populate_pfn(&self, pfns: &mut [DevicePfn]) -> Result<(), DevmemError> {
        pfns.copy_from_slice(self.pfns.get(..pfns.len()).ok_or(DevmemError::Pages)?);
        Ok(())
    }

    fn copy_to_devmem(
        &self,
        pieces: &mut dyn Iterator<Item = ToDevmem>,
        _after: Option<&dyn PreMigrateFence>,
        _cause: Cause,
    ) -> Result<(), DevmemError> {
        let sim = self.sim()?;
        for piece in pieces {
            match piece {
                ToDevmem::Copy { from, to, len } => {
                    let mut bytes = vec![0; len.as_usize()];
                    sim.bus_read(from, &mut bytes).map_err(|_| FAILED)?;
                    self.device.write(to, &bytes);
                }
                ToDevmem::Clear { to, len } => self.device.write(to, &vec![0; len.as_usize()]),
            }
        }
        Ok(())
    }

    fn copy_to_ram(
        &self,
        pieces: &mut dyn Iterator<Item = ToRam>,
        _after: Option<&dyn PreMigrateFence>,
        _cause: Cause,
    ) -> Result<(), DevmemError> {
        if self.device.stuck.load(Ordering::Acquire) {
            return Err(FAILED);
        }
        let sim = self.sim()?;
        for piece in pieces {
            let PagemapAddr::System(to) = piece.to else {
                return Err(DevmemError::Unsupported { what: "peers" });
            };
            let mut bytes = vec![0; piece.len.as_usize()];
            self.device.read(piece.from, &mut bytes);
            sim.bus_write(to, &bytes).map_err(|_| FAILED)?;
        }
        Ok(())
    }

    fn release(&self) {
        let mut free = self.device.free.lock().unwrap();
        for pfn in &self.pfns {
            assert!(!free[pfn.index()], "{pfn:?} was released twice");
            free[pfn.index()] = true;
        }
    }
}

/// The driver's part of the memory.
#[derive(Debug)]
pub(crate) struct Ops(pub(crate) Arc<Device>);

impl PagemapOps<Sim> for Ops {
    fn populate(
        &self,
        _pagemap: &Arc<Pagemap<Sim>>,
        span: Span,
        _timeslice: Duration,
        _cause: Cause,
    ) -> Result<(), MigrateError> {
        self.0.migrate(span).map(drop)
    }

    fn device_map(&self, page: DevicePfn, peer: Peer) -> Option<PagemapAddr> {
        {
            let mut maps = self.0.maps.lock().unwrap();
            let this = maps.asked;
            maps.asked += 1;
            if maps.refuse.take_if(|refused| *refused == this).is_some() {
                return None;
            }
        }
        let address = self.0.address(page, peer);
        self.0.log.push(Done::Map(address, peer));
        self.0.reached.lock().unwrap().push((address, peer));
        Some(address)
    }

    fn device_unmap(&self, address: PagemapAddr, peer: Peer) {
        self.0.log.push(Done::Unmap(address, peer));
        let mut reached = self.0.reached.lock().unwrap();
        let at = reached.iter().position(|reach| *reach == (address, peer));
        let at = at.unwrap_or_else(|| panic!("{address:?} is not mapped for {peer:?} here"));
        reached.swap_remove(at);
    }
}
