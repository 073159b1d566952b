//! A device's memory, as an address space sees it: `drm_pagemap`.

use crate::zdd::{Zdd, Zdds};
use crate::{Devmem, MigrateError};
use alloc::sync::{Arc, Weak};
use core::time::Duration;
use gpusvm_mm::{
    AddressSpace, CpuFault, DeviceMemoryId, DeviceMemoryOps, DevicePage, DeviceRun, FaultOutcome,
    MmError,
};
use gpusvm_sync::atomic::{AtomicBool, AtomicU64, Ordering};
use gpusvm_types::{ByteSize, DevAddr, DevicePfn, DmaAddr, OwnerId, PAGE_SIZE, PageCount, Span};

/// A page as a device reaches it (`drm_pagemap_addr`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagemapAddr {
    /// RAM, in place.
    System(DmaAddr),
    /// The device's own memory.
    Vram(DevAddr),
}

impl PagemapAddr {
    /// Whether `next` is what follows a page at this address after `len` bytes.
    pub fn continues_with(self, next: Self, len: ByteSize) -> bool {
        match (self, next) {
            (Self::System(a), Self::System(b)) => a + len == b,
            (Self::Vram(a), Self::Vram(b)) => a + len == b,
            _ => false,
        }
    }
}

/// What the driver does for a device's memory (`drm_pagemap_ops`).
pub trait PagemapOps: Send + Sync + core::fmt::Debug {
    /// Fills `span` with pages of this memory, as far as it can. Called without locks.
    ///
    /// # Errors
    ///
    /// Why nothing at all could be done.
    fn populate(&self, span: Span, timeslice: Duration) -> Result<(), MigrateError>;

    /// How the device `for_owner` belongs to reaches a page of this memory. `None` when it cannot:
    /// the page then has to come home.
    fn device_map(&self, page: DevicePfn, for_owner: OwnerId) -> Option<PagemapAddr>;

    /// Ends what `device_map` began.
    fn device_unmap(&self, address: &PagemapAddr, for_owner: OwnerId);
}

/// A device's memory, as an address space sees it.
#[derive(Debug)]
pub struct Pagemap<M: AddressSpace> {
    pub(crate) mm: Weak<M>,
    pub(crate) zdds: Zdds,
    memory: AtomicU64,
    owner: OwnerId,
    pages: PageCount,
    bound: AtomicBool,
    /// The largest window that a CPU fault brings home.
    cpu_fault_window: AtomicU64,
}

/// Not yet added to the address space.
const NO_MEMORY: u64 = u64::MAX;

impl<M: AddressSpace> Pagemap<M> {
    /// Adds `pages` of device memory to `mm`.
    ///
    /// # Errors
    ///
    /// `TooManyDevices`.
    pub fn new(mm: &Arc<M>, pages: PageCount, owner: OwnerId) -> Result<Arc<Self>, MmError> {
        let pagemap = Arc::new(Self {
            mm: Arc::downgrade(mm),
            zdds: Zdds::new(pages),
            memory: AtomicU64::new(NO_MEMORY),
            owner,
            pages,
            bound: AtomicBool::new(true),
            cpu_fault_window: AtomicU64::new(u64::MAX),
        });
        let ops: Arc<dyn DeviceMemoryOps<M>> = Arc::clone(&pagemap) as _;
        let memory = mm.add_device_memory(pages, owner, ops)?;
        pagemap.memory.store(u64::from(memory.0), Ordering::Release);
        Ok(pagemap)
    }

    /// Who may map its pages in place.
    pub fn owner(&self) -> OwnerId {
        self.owner
    }

    /// How many pages it has.
    pub fn size(&self) -> PageCount {
        self.pages
    }

    /// A page of it, as the address space names it.
    ///
    /// # Panics
    ///
    /// Never: `new` has added it to its address space.
    pub fn page(&self, pfn: DevicePfn) -> DevicePage {
        let memory = u8::try_from(self.memory.load(Ordering::Acquire));
        DevicePage {
            memory: DeviceMemoryId(memory.expect("added to its address space")),
            pfn,
        }
    }

    /// Whether a page of the address space is one of this memory (`drm_pagemap_page_to_dpagemap`).
    pub fn contains(&self, page: DevicePage) -> bool {
        page.memory == self.page(page.pfn).memory
    }

    /// The allocation that a page in use belongs to. May be out of date on return.
    pub fn devmem_of(&self, page: DevicePage) -> Option<Arc<Devmem>> {
        self.zdds.devmem(self.zdds.of(page.pfn)?)
    }

    /// Whether pages may come here.
    pub fn is_bound(&self) -> bool {
        self.bound.load(Ordering::Acquire)
    }

    /// Lets no page come here any more. Those that are here stay until they are evicted.
    pub fn unbind(&self) {
        self.bound.store(false, Ordering::Release);
    }

    /// The most that one CPU fault brings home: the whole allocation unless set smaller, since a
    /// single page that bounces should not move 2 MiB.
    pub fn set_cpu_fault_window(&self, window: ByteSize) {
        let window = window.get().max(PAGE_SIZE.get());
        self.cpu_fault_window
            .store(prev_power_of_two(window), Ordering::Relaxed);
    }

    pub(crate) fn window_for(&self, devmem: &Devmem) -> ByteSize {
        let allocation = devmem.size().bytes().get().next_power_of_two();
        ByteSize::new(allocation.min(self.cpu_fault_window.load(Ordering::Relaxed)))
    }

    pub(crate) fn is_same(&self, page: DevicePage, zdd: Zdd) -> bool {
        self.contains(page) && self.zdds.of(page.pfn) == Some(zdd)
    }
}

impl<M: AddressSpace> DeviceMemoryOps<M> for Pagemap<M> {
    fn migrate_to_ram(&self, mm: &M, block: &mut M::Block<'_>, fault: &CpuFault) -> FaultOutcome {
        crate::fault::migrate_to_ram(self, mm, block, fault)
    }

    fn free_pages(&self, run: DeviceRun) {
        self.zdds.put_pages(run.first.pfn, run.count);
    }
}

const fn prev_power_of_two(n: u64) -> u64 {
    1 << n.ilog2()
}
