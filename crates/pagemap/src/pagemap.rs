//! A device's memory, as an address space sees it: `drm_pagemap`.
//!
//! ```text
//!   new --> bound --unbind--> unbound --evict_all--> empty --rebind--> bound
//!             |                  |
//!             populate           populate: ENODEV
//! ```
//!
//! Device pages keep their pagemap alive through the address space, which never forgets a memory;
//! so a pagemap cannot go before its pages, whatever the driver drops first.
//!
//! # Locking
//!
//! The binding's lock is held to read for as long as a migration to this memory takes, so `unbind`
//! waits for those that are under way. It comes before any block.

use crate::exclusive::Marks;
use crate::zdd::{Zdd, Zdds};
use crate::{Cause, Devmem, EvictError, MigrateError, PagemapAddr, Pagemaps, Peer, evict};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::time::Duration;
use gpusvm_mm::{
    AddressSpace, CpuFault, DeviceMemoryId, DeviceMemoryOps, DevicePage, DeviceRun, FaultOutcome,
    MmError,
};
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_sync::{RwLock, RwLockReadGuard};
use gpusvm_types::{ByteSize, DevicePfn, OwnerId, PAGE_SIZE, PageCount, Span};

/// What the driver does for a device's memory (`drm_pagemap_ops`).
pub trait PagemapOps<M: AddressSpace>: Send + Sync + core::fmt::Debug {
    /// Fills `span` with pages of this memory, as far as it can. Called without a block locked.
    ///
    /// # Errors
    ///
    /// Why nothing at all could be done.
    fn populate(
        &self,
        pagemap: &Arc<Pagemap<M>>,
        span: Span,
        timeslice: Duration,
        cause: Cause,
    ) -> Result<(), MigrateError>;

    /// As `populate`, out of the reach of the CPU: of memory that is not coherent, that is the same.
    ///
    /// # Errors
    ///
    /// As `populate`.
    fn populate_exclusive(
        &self,
        pagemap: &Arc<Pagemap<M>>,
        span: Span,
        timeslice: Duration,
        cause: Cause,
    ) -> Result<(), MigrateError> {
        self.populate(pagemap, span, timeslice, cause)
    }

    /// How `peer` reaches a page of this memory; `peer` can be the device itself. `None` when it
    /// cannot: the page then has to come home. Called with or without a block locked. What it
    /// returned is given to `device_unmap` once.
    fn device_map(&self, page: DevicePfn, peer: Peer) -> Option<PagemapAddr>;

    /// `peer` will not use the address any more. Called with or without locks, also by a fault
    /// handler: it must not allocate and not wait.
    fn device_unmap(&self, address: PagemapAddr, peer: Peer);
}

/// What a device's memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagemapSpec {
    /// Whose it is.
    pub peer: Peer,
    /// Who may map its pages in place.
    pub owner: OwnerId,
    /// How many pages it has.
    pub pages: PageCount,
    /// Whether the CPU uses its pages in place (`MEMORY_DEVICE_COHERENT`): then pages that come stay where
    /// the program has them, unless they come to be exclusive.
    pub coherent: bool,
}

/// A device's memory in an address space.
#[derive(Debug)]
pub struct Pagemap<M: AddressSpace> {
    pub(crate) mm: Weak<M>,
    pub(crate) pagemaps: Weak<Pagemaps<M>>,
    pub(crate) zdds: Zdds,
    /// What a device has for itself.
    pub(crate) exclusive: Marks,
    spec: PagemapSpec,
    memory: AtomicU64,
    /// `None` while unbound.
    binding: RwLock<Option<Arc<dyn PagemapOps<M>>>>,
    /// The largest window that a CPU fault brings home.
    cpu_fault_window: AtomicU64,
}

/// Not yet added to the address space.
const NO_MEMORY: u64 = u64::MAX;

/// Why a memory cannot be bound again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RebindError {
    /// It is bound.
    #[error("the device memory is bound already")]
    Bound,
    /// Pages of before still live in it.
    #[error("{left:?} pages of before the unbind still live in the device memory")]
    InUse {
        /// How many.
        left: PageCount,
    },
}

impl RebindError {
    /// What the kernel's twin returns.
    pub const fn errno(self) -> i32 {
        16 // EBUSY
    }
}

/// A device that reaches pages of a memory, its own or a peer's. Keeps the driver's part of the memory,
/// so that what was mapped can be unmapped whatever becomes of the binding.
#[derive(Debug)]
pub struct Importer<M: AddressSpace> {
    ops: Arc<dyn PagemapOps<M>>,
    peer: Peer,
}

impl<M: AddressSpace> Importer<M> {
    /// How the device reaches a page; see [`PagemapOps::device_map`].
    pub fn device_map(&self, page: DevicePfn) -> Option<PagemapAddr> {
        self.ops.device_map(page, self.peer)
    }

    /// Ends a `device_map`.
    pub fn device_unmap(&self, address: PagemapAddr) {
        self.ops.device_unmap(address, self.peer);
    }
}

/// Evidence that a memory stays bound.
#[derive(Debug)]
pub(crate) struct Bound<'a, M: AddressSpace>(RwLockReadGuard<'a, Option<Arc<dyn PagemapOps<M>>>>);

impl<M: AddressSpace> Bound<'_, M> {
    /// For `peer` to reach pages of the memory.
    pub(crate) fn import(&self, peer: Peer) -> Importer<M> {
        let ops = self.0.as_ref().expect("checked when it was entered");
        Importer {
            ops: Arc::clone(ops),
            peer,
        }
    }
}

impl<M: AddressSpace> Pagemap<M> {
    /// Adds a device's memory to the address space (`drm_pagemap_create`).
    ///
    /// # Errors
    ///
    /// `TooManyDevices`, `Gone`.
    pub fn new(
        pagemaps: &Arc<Pagemaps<M>>,
        spec: PagemapSpec,
        ops: Arc<dyn PagemapOps<M>>,
    ) -> Result<Arc<Self>, MmError> {
        let mm = pagemaps.mm.upgrade().ok_or(MmError::Gone)?;
        let pagemap = Arc::new(Self {
            mm: Arc::downgrade(&mm),
            pagemaps: Arc::downgrade(pagemaps),
            zdds: Zdds::new(spec.pages),
            exclusive: Marks::new(spec.pages),
            spec,
            memory: AtomicU64::new(NO_MEMORY),
            binding: RwLock::new(Some(ops)),
            cpu_fault_window: AtomicU64::new(u64::MAX),
        });
        let ops: Arc<dyn DeviceMemoryOps<M>> = Arc::clone(&pagemap) as _;
        let memory = mm.add_device_memory(spec.pages, spec.owner, ops)?;
        pagemap.memory.store(u64::from(memory.0), Ordering::Release);
        pagemaps.add(&pagemap);
        Ok(pagemap)
    }

    /// Whose it is.
    pub fn peer(&self) -> Peer {
        self.spec.peer
    }

    /// Who may map its pages in place.
    pub fn owner(&self) -> OwnerId {
        self.spec.owner
    }

    /// How many pages it has.
    pub fn size(&self) -> PageCount {
        self.spec.pages
    }

    /// Whether the CPU uses its pages in place.
    pub fn is_coherent(&self) -> bool {
        self.spec.coherent
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

    /// Whether a page of the address space is one of this memory.
    pub fn contains(&self, page: DevicePage) -> bool {
        self.memory.load(Ordering::Acquire) == u64::from(page.memory.0)
    }

    /// The allocation that a page in use belongs to (`drm_pagemap_page_zone_device_data`). May be out
    /// of date on return.
    pub fn devmem_of(&self, page: DevicePage) -> Option<Arc<Devmem>> {
        self.zdds.devmem(self.zdds.of(page.pfn)?)
    }

    /// The allocations that pages live in, and how many pages each. Out of date on return, unless
    /// nothing else runs.
    pub fn live(&self) -> Vec<(Arc<Devmem>, PageCount)> {
        self.zdds.live()
    }

    /// Fills `span` with pages of this memory, as far as it can (`drm_pagemap_populate_mm`).
    ///
    /// # Errors
    ///
    /// `Gone` when the address space is (`EFAULT`), `Unbound` (`ENODEV`), or why the driver could do
    /// nothing at all.
    pub fn populate(
        self: &Arc<Self>,
        span: Span,
        timeslice: Duration,
        cause: Cause,
    ) -> Result<(), MigrateError> {
        gpusvm_sync::walk!("populate");
        let _mm = self.mm.upgrade().ok_or(MmError::Gone)?;
        self.bound_ops(span)?.populate(self, span, timeslice, cause)
    }

    /// As [`Pagemap::populate`], out of the reach of the CPU, also where the memory is coherent.
    ///
    /// # Errors
    ///
    /// As [`Pagemap::populate`].
    pub fn populate_exclusive(
        self: &Arc<Self>,
        span: Span,
        timeslice: Duration,
        cause: Cause,
    ) -> Result<(), MigrateError> {
        let _mm = self.mm.upgrade().ok_or(MmError::Gone)?;
        let ops = self.bound_ops(span)?;
        ops.populate_exclusive(self, span, timeslice, cause)
    }

    /// Not kept bound: the migrations within enter for themselves.
    fn bound_ops(&self, span: Span) -> Result<Arc<dyn PagemapOps<M>>, MigrateError> {
        let ops = self.binding.read().clone();
        ops.ok_or(MigrateError::Unbound { span })
    }

    /// For `peer` to reach pages of this memory. `None` while it is unbound.
    pub fn import(&self, peer: Peer) -> Option<Importer<M>> {
        let ops = self.binding.read().clone()?;
        Some(Importer { ops, peer })
    }

    /// Whether pages may come here.
    pub fn is_bound(&self) -> bool {
        self.binding.read().is_some()
    }

    /// Lets no page come here any more, and waits for those that are on their way. Those that are here
    /// stay until they come home: see [`Pagemap::evict_all`].
    pub fn unbind(&self) {
        let ops = self.binding.write().take();
        // The driver's part may end with it: without the lock.
        drop(ops);
    }

    /// Lets pages come here again, for a driver that is back.
    ///
    /// # Errors
    ///
    /// `Bound`, or `InUse` when pages of before are still here: the driver that is back does not
    /// know their allocations (`EBUSY`).
    pub fn rebind(&self, ops: Arc<dyn PagemapOps<M>>) -> Result<(), RebindError> {
        let mut binding = self.binding.write();
        if binding.is_some() {
            return Err(RebindError::Bound);
        }
        let left = self.pages_in_use();
        if left > PageCount::ZERO {
            return Err(RebindError::InUse { left });
        }
        *binding = Some(ops);
        Ok(())
    }

    /// Brings every page of this memory home.
    ///
    /// # Errors
    ///
    /// The first of [`evict::evict_to_ram`]; the others are tried all the same.
    pub fn evict_all(&self, cause: Cause) -> Result<(), EvictError> {
        let mut result = Ok(());
        for (devmem, _) in self.live() {
            result = result.and(evict::evict_to_ram(self, &devmem, cause));
        }
        result
    }

    /// How many pages live here.
    pub fn pages_in_use(&self) -> PageCount {
        let pages = |sum, (_, count): &(_, PageCount)| sum + *count;
        self.live().iter().fold(PageCount::ZERO, pages)
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

    /// Keeps the memory bound for as long as the result lives (`drm_dev_enter`).
    pub(crate) fn enter(&self) -> Option<Bound<'_, M>> {
        let binding = self.binding.read();
        binding.is_some().then_some(Bound(binding))
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
        // Before they can be somebody else's.
        self.exclusive.clear(run.first.pfn, run.count);
        self.zdds.put_pages(run.first.pfn, run.count);
    }
}

const fn prev_power_of_two(n: u64) -> u64 {
    1 << n.ilog2()
}
