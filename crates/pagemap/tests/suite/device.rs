//! A device that is memory, a log, and something that fails on demand.

use gpusvm_mm_sim::{Injector, Sim, Step};
use gpusvm_pagemap::migrate::migrate_to_devmem;
use gpusvm_pagemap::{
    Cause, Devmem, DevmemError, DevmemOps, MigrateError, MigrateRequest, Migrated, Mode, Pagemap,
    PagemapAddr, PagemapOps, Peer, PreMigrateFence, ToDevmem, ToRam,
};
use gpusvm_types::{ByteSize, DevAddr, DevicePfn, DmaAddr, PAGE_SIZE, PageCount, Span};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

/// What a device was asked for, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Populate,
    ToDevmem(Vec<ToDevmem>, bool),
    ToRam(Vec<ToRam>, bool),
    Map(DevicePfn, Peer),
    Unmap(PagemapAddr, Peer),
    Release(Vec<DevicePfn>),
}

/// What all devices of a test share: the log, the injector, and the wires between them.
#[derive(Debug)]
pub(crate) struct Bus {
    pub(crate) sim: Weak<Sim>,
    pub(crate) log: Mutex<Vec<(Peer, Call)>>,
    pub(crate) injector: Arc<Injector>,
    devices: Mutex<Vec<Weak<Device>>>,
}

impl Bus {
    pub(crate) fn new(sim: &Arc<Sim>) -> Arc<Self> {
        Arc::new(Self {
            sim: Arc::downgrade(sim),
            log: Mutex::default(),
            injector: Arc::clone(sim.injector()),
            devices: Mutex::default(),
        })
    }

    pub(crate) fn take_log(&self) -> Vec<(Peer, Call)> {
        core::mem::take(&mut self.log.lock().unwrap())
    }

    fn read(&self, at: DmaAddr, to: &mut [u8]) -> Result<(), DevmemError> {
        let sim = self.sim.upgrade().ok_or(UNREACHABLE)?;
        sim.bus_read(at, to).map_err(|_| UNREACHABLE)
    }

    fn write(&self, at: DmaAddr, from: &[u8]) -> Result<(), DevmemError> {
        let sim = self.sim.upgrade().ok_or(UNREACHABLE)?;
        sim.bus_write(at, from).map_err(|_| UNREACHABLE)
    }

    fn write_to_peer(&self, at: DmaAddr, from: &[u8]) -> Result<(), DevmemError> {
        let devices = self.devices.lock().unwrap().clone();
        let mut devices = devices.iter().filter_map(Weak::upgrade);
        let device = devices.find(|device| device.aperture(at).is_some());
        let device = device.ok_or(UNREACHABLE)?;
        let at = device.aperture(at).ok_or(UNREACHABLE)?;
        device.write(at, from);
        Ok(())
    }
}

const UNREACHABLE: DevmemError = DevmemError::Copy {
    reason: "nothing is at this bus address",
};
const INJECTED: DevmemError = DevmemError::Copy {
    reason: "told to fail",
};

/// A device's memory.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) peer: Peer,
    pub(crate) bus: Arc<Bus>,
    pub(crate) pagemap: OnceLock<Weak<Pagemap<Sim>>>,
    bytes: Mutex<Vec<u8>>,
    /// Which pages are free.
    free: Mutex<Vec<bool>>,
    /// Whether peers of the same owner reach it.
    pub(crate) wired: AtomicBool,
    pub(crate) releases: AtomicU64,
    /// The next allocation lists its pages backwards.
    pub(crate) backwards: AtomicBool,
    /// Which of the next pages `populate_pfn` writes before it fails.
    pub(crate) populates: Mutex<Option<Vec<DevicePfn>>>,
}

impl Device {
    pub(crate) fn new(bus: &Arc<Bus>, peer: Peer, pages: PageCount) -> Arc<Self> {
        let device = Arc::new(Self {
            peer,
            bus: Arc::clone(bus),
            pagemap: OnceLock::new(),
            bytes: Mutex::new(vec![0xEE; pages.bytes().as_usize()]),
            free: Mutex::new(vec![true; pages.as_usize()]),
            wired: AtomicBool::new(true),
            releases: AtomicU64::new(0),
            backwards: AtomicBool::new(false),
            populates: Mutex::new(None),
        });
        bus.devices.lock().unwrap().push(Arc::downgrade(&device));
        device
    }

    /// The pagemap, which its address space keeps.
    pub(crate) fn pagemap(&self) -> Arc<Pagemap<Sim>> {
        self.pagemap.get().unwrap().upgrade().unwrap()
    }

    fn base(&self) -> u64 {
        (u64::from(self.peer.0) + 1) << 52
    }

    /// Where in this memory a bus address leads.
    fn aperture(&self, at: DmaAddr) -> Option<DevAddr> {
        let len = ByteSize::new(self.bytes.lock().unwrap().len() as u64);
        let offset = at.get().checked_sub(self.base())?;
        (offset < len.get()).then(|| DevAddr::new(offset))
    }

    /// Writes device memory, as the device itself would.
    pub(crate) fn write(&self, at: DevAddr, from: &[u8]) {
        let at = ByteSize::new(at.get()).as_usize();
        self.bytes.lock().unwrap()[at..at + from.len()].copy_from_slice(from);
    }

    /// Reads device memory.
    pub(crate) fn read(&self, at: DevAddr, to: &mut [u8]) {
        let at = ByteSize::new(at.get()).as_usize();
        to.copy_from_slice(&self.bytes.lock().unwrap()[at..at + to.len()]);
    }

    /// Takes `count` consecutive pages.
    pub(crate) fn take(&self, count: PageCount) -> Option<Vec<DevicePfn>> {
        if self.bus.injector.step(Step::Allocate) {
            return None;
        }
        let mut free = self.free.lock().unwrap();
        let count = count.as_usize();
        let first = (0..=free.len().checked_sub(count)?)
            .find(|first| free[*first..first + count].iter().all(|free| *free))?;
        free[first..first + count].fill(false);
        let pfn = |i| DevicePfn::new(u32::try_from(i).unwrap());
        let mut pfns: Vec<DevicePfn> = (first..first + count).map(pfn).collect();
        if self.backwards.load(Ordering::Acquire) {
            pfns.reverse();
        }
        Some(pfns)
    }

    pub(crate) fn free_pages(&self) -> usize {
        let free = self.free.lock().unwrap();
        free.iter().filter(|free| **free).count()
    }

    /// An allocation of `count` pages.
    pub(crate) fn allocate(self: &Arc<Self>, count: PageCount) -> Option<Arc<Devmem>> {
        Some(Arc::new(Devmem::new(count, self.bo(self.take(count)?))))
    }

    pub(crate) fn bo(self: &Arc<Self>, pfns: Vec<DevicePfn>) -> Box<dyn DevmemOps> {
        let device = Arc::clone(self);
        Box::new(Bo { device, pfns })
    }

    /// Moves a span here, with an allocation of its own.
    pub(crate) fn migrate(self: &Arc<Self>, span: Span) -> Result<Migrated, MigrateError> {
        self.migrate_as(span, Mode::Partial, Duration::ZERO)
    }

    pub(crate) fn migrate_as(
        self: &Arc<Self>,
        span: Span,
        mode: Mode,
        timeslice: Duration,
    ) -> Result<Migrated, MigrateError> {
        let devmem = self
            .allocate(span.page_count())
            .ok_or(MigrateError::NoSpace { span })?;
        let request = request(span, mode, timeslice);
        migrate_to_devmem(&self.pagemap(), &devmem, &request)
    }

    fn log(&self, call: Call) {
        self.bus.log.lock().unwrap().push((self.peer, call));
    }

    fn fails(&self, step: Step) -> Result<(), DevmemError> {
        match self.bus.injector.step(step) {
            true => Err(INJECTED),
            false => Ok(()),
        }
    }
}

pub(crate) fn request(span: Span, mode: Mode, timeslice: Duration) -> MigrateRequest {
    MigrateRequest {
        span,
        timeslice,
        mode,
        cause: Cause::Asked,
        exclusive: false,
    }
}

/// One allocation.
#[derive(Debug)]
pub(crate) struct Bo {
    device: Arc<Device>,
    pfns: Vec<DevicePfn>,
}

impl DevmemOps for Bo {
    fn populate_pfn(&self, pfns: &mut [DevicePfn]) -> Result<(), DevmemError> {
        self.device.log(Call::Populate);
        if let Some(written) = self.device.populates.lock().unwrap().take() {
            pfns[..written.len()].copy_from_slice(&written);
            return Err(INJECTED);
        }
        self.device.fails(Step::PopulatePfn)?;
        pfns.copy_from_slice(self.pfns.get(..pfns.len()).ok_or(DevmemError::Pages)?);
        Ok(())
    }

    fn copy_to_devmem(
        &self,
        pieces: &mut dyn Iterator<Item = ToDevmem>,
        after: Option<&dyn PreMigrateFence>,
        _cause: Cause,
    ) -> Result<(), DevmemError> {
        after.map_or(Ok(()), PreMigrateFence::wait)?;
        let mut done = Vec::new();
        let mut pieces = pieces;
        let result = (&mut pieces).try_for_each(|piece| {
            done.push(piece);
            self.device.fails(Step::CopyToDevmem)?;
            match piece {
                ToDevmem::Copy { from, to, len } => {
                    let mut bytes = vec![0; len.as_usize()];
                    self.device.bus.read(from, &mut bytes)?;
                    self.device.write(to, &bytes);
                }
                ToDevmem::Clear { to, len } => self.device.write(to, &vec![0; len.as_usize()]),
            }
            Ok(())
        });
        self.device.log(Call::ToDevmem(done, after.is_some()));
        result
    }

    fn copy_to_ram(
        &self,
        pieces: &mut dyn Iterator<Item = ToRam>,
        after: Option<&dyn PreMigrateFence>,
        _cause: Cause,
    ) -> Result<(), DevmemError> {
        after.map_or(Ok(()), PreMigrateFence::wait)?;
        let mut done = Vec::new();
        let mut pieces = pieces;
        let result = (&mut pieces).try_for_each(|piece| {
            done.push(piece);
            let mut bytes = vec![0; piece.len.as_usize()];
            self.device.read(piece.from, &mut bytes);
            match piece.to {
                PagemapAddr::System(to) => {
                    self.device.fails(Step::CopyToRam)?;
                    self.device.bus.write(to, &bytes)
                }
                PagemapAddr::Peer(to) => {
                    self.device.fails(Step::CopyToPeer)?;
                    self.device.bus.write_to_peer(to, &bytes)
                }
                PagemapAddr::Vram(_) => panic!("a copy within the device: {piece:?}"),
            }
        });
        self.device.log(Call::ToRam(done, after.is_some()));
        result
    }

    fn release(&self) {
        self.device.log(Call::Release(self.pfns.clone()));
        self.device.releases.fetch_add(1, Ordering::AcqRel);
        let mut free = self.device.free.lock().unwrap();
        for pfn in &self.pfns {
            assert!(!free[pfn.index()], "{pfn:?} was released twice");
            free[pfn.index()] = true;
            self.device
                .write(pfn.dev_addr(), &[0xDD; PAGE_SIZE.as_usize()]);
        }
    }
}

/// The driver's part of a device's memory.
#[derive(Debug)]
pub(crate) struct Ops(pub(crate) Arc<Device>);

impl PagemapOps<Sim> for Ops {
    fn populate(
        &self,
        _pagemap: &Arc<Pagemap<Sim>>,
        span: Span,
        timeslice: Duration,
        _cause: Cause,
    ) -> Result<(), MigrateError> {
        let migrate = |piece| self.0.migrate_as(piece, Mode::Partial, timeslice);
        span.blocks().try_for_each(|piece| migrate(piece).map(drop))
    }

    fn device_map(&self, page: DevicePfn, peer: Peer) -> Option<PagemapAddr> {
        let is_own = peer == self.0.peer;
        if self.0.bus.injector.step(Step::DeviceMap) {
            return None;
        }
        if !is_own && !self.0.wired.load(Ordering::Acquire) {
            return None;
        }
        self.0.log(Call::Map(page, peer));
        Some(match is_own {
            true => PagemapAddr::Vram(page.dev_addr()),
            false => PagemapAddr::Peer(DmaAddr::new(self.0.base() + page.dev_addr().get())),
        })
    }

    fn device_unmap(&self, address: PagemapAddr, peer: Peer) {
        self.0.log(Call::Unmap(address, peer));
    }
}
