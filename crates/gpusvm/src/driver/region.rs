//! One device's memory in one address space: `xe_vram_region`.
//!
//! ```text
//!   VramRegion ---> Pagemap ---> RegionOps ---> Memory      what is free, copies
//!       |                         ^      |        ^
//!       `-------------------------'      |        |
//!                                        |    allocation
//!                                        v        ^
//!                                     Residents --'         what lives there
//! ```
//!
//! The pagemap belongs to the address space and calls back through `RegionOps`, which knows neither
//! the pagemap nor the region; and what lives in a memory keeps it alive, but not the list of what lives
//! there: nothing keeps itself alive.

use crate::driver::advice::map::AdviceMap;
use crate::driver::counters::{RegionStats, Traffic};
use crate::driver::devices::Fabrics;
use crate::driver::devmem::Bo;
use crate::driver::populate::RegionOps;
use crate::driver::prefetch::Queue;
use crate::driver::stays::Stays;
use crate::driver::vm::{Vm, VmError};
use crate::driver::vram::Vram;
use crate::driver::{Devices, devmem};
use gpusvm_device::{Device, VmId};
use gpusvm_mm::{AddressSpace, Time};
use gpusvm_pagemap::{Cause, EvictError, Owner, Pagemap, PagemapSpec, Pagemaps, Peer, RebindError};
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_sync::{Arc, Mutex, OneShot, Weak};
use gpusvm_types::PageCount;

/// The memory of one device, as one address space uses it. Several [`Vm`]s of the device can share it.
#[derive(Debug)]
pub struct VramRegion<M: AddressSpace> {
    devices: Arc<Devices<M>>,
    pagemap: Arc<Pagemap<M>>,
    ops: Arc<RegionOps<M>>,
    memory: Arc<Memory<M>>,
    prefetches: Arc<Queue<M>>,
    owner: Owner,
}

/// What of a region its allocations, and the address space, keep alive.
#[derive(Debug)]
pub(crate) struct Memory<M: AddressSpace> {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) vram: Vram,
    pub(crate) traffic: Traffic,
    pub(crate) mm: Weak<M>,
    pub(crate) pagemaps: Weak<Pagemaps<M>>,
    pub(crate) peer: Peer,
    pub(crate) fabrics: Arc<Fabrics>,
    pub(crate) stays: Arc<Stays>,
    pub(crate) advice: Arc<AdviceMap>,
    /// Who may have its pages mapped.
    vms: Mutex<Vec<Weak<Vm<M>>>>,
    scrub: AtomicBool,
}

impl<M: AddressSpace> VramRegion<M> {
    /// Adds the memory of `device` to the address space.
    ///
    /// # Errors
    ///
    /// `Mm`: too many devices, or the address space is gone.
    pub fn new(devices: &Arc<Devices<M>>, device: Arc<dyn Device>) -> Result<Arc<Self>, VmError> {
        let pages = device.caps().vram.whole_pages();
        let owner = devices.join(&*device);
        let memory = Arc::new(Memory {
            device,
            vram: Vram::new(pages),
            traffic: Traffic::default(),
            mm: Arc::downgrade(devices.mm()),
            pagemaps: Arc::downgrade(devices.pagemaps()),
            peer: owner.peer(),
            fabrics: Arc::clone(devices.fabrics()),
            stays: Arc::clone(devices.stays()),
            advice: Arc::clone(devices.advice()),
            vms: Mutex::new(Vec::new()),
            scrub: AtomicBool::new(false),
        });
        let spec = PagemapSpec {
            peer: owner.peer(),
            owner: owner.id(),
            pages,
            coherent: memory.device.caps().coherent_memory,
        };
        let ops = Arc::new(RegionOps::new(&memory));
        let pagemap = Pagemap::new(devices.pagemaps(), spec, Arc::clone(&ops) as _)?;
        devices.add_memory(&memory);
        Ok(Arc::new(Self {
            devices: Arc::clone(devices),
            pagemap,
            ops,
            memory,
            prefetches: Queue::new(),
            owner,
        }))
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.memory.device
    }

    /// All devices of the address space.
    pub fn devices(&self) -> &Arc<Devices<M>> {
        &self.devices
    }

    /// The memory, as the address space knows it.
    pub fn pagemap(&self) -> &Arc<Pagemap<M>> {
        &self.pagemap
    }

    /// Whose memory it is, among devices.
    pub fn peer(&self) -> Peer {
        self.owner.peer()
    }

    /// How much of it is allocated, or was lost.
    pub fn used(&self) -> PageCount {
        self.memory.vram.used()
    }

    /// How much there is.
    pub fn total(&self) -> PageCount {
        self.memory.vram.total()
    }

    /// Whether memory is cleared when it is given back, so that nothing of a program's data stays on
    /// the device after it is gone. Off at first. Holds for what is given back from now on.
    pub fn set_scrub(&self, scrub: bool) {
        self.memory.scrub.store(scrub, Ordering::Release);
    }

    /// Makes the next allocation of more than a page find no run of pages: it is made of single ones.
    pub fn no_run(&self) -> &OneShot {
        &self.memory.vram.no_run
    }

    /// Takes the device out of use: lets no page come to its memory any more, waits for those that are
    /// on their way, then gives copies back and brings all others home. Ranges that fault meanwhile are mapped where they
    /// are, if the device reaches them there. What can be called again, after an error.
    ///
    /// # Errors
    ///
    /// `Busy` when pages could not leave, because a launch needs them (`EBUSY`); what the device or the
    /// address space failed at. The memory is unbound all the same.
    pub fn unbind(&self) -> Result<(), EvictError> {
        self.pagemap.unbind();
        self.memory.all_vms().for_each(|vm| vm.drop_duplicates());
        let evicted = self.pagemap.evict_all(Cause::Asked);
        self.ops.residents.forget_gone();
        evicted?;
        Ok(self.memory.settle()?)
    }

    /// Takes the device into use again.
    ///
    /// # Errors
    ///
    /// `Bound` when it is, `InUse` when pages could not leave before (both `EBUSY`).
    pub fn rebind(&self) -> Result<(), RebindError> {
        self.pagemap.rebind(Arc::clone(&self.ops) as _)
    }

    /// The device address space with this number, if it is one of this region's, and open.
    pub fn vm(&self, id: VmId) -> Option<Arc<Vm<M>>> {
        self.memory.vms().into_iter().find(|vm| vm.id() == id)
    }

    /// Its device address spaces that are open.
    pub fn vms(&self) -> Vec<Arc<Vm<M>>> {
        self.memory.vms()
    }

    /// What happened to the memory so far.
    pub fn stats(&self) -> RegionStats {
        self.memory.traffic.snapshot(&self.memory.vram)
    }

    /// Its prefetches that are not done.
    pub(crate) fn prefetches(&self) -> &Arc<Queue<M>> {
        &self.prefetches
    }

    pub(crate) fn memory(&self) -> &Arc<Memory<M>> {
        &self.memory
    }

    /// Device pages for an object, evicting pages of the process if need be.
    pub(crate) fn allocate_object(&self, count: PageCount) -> Option<Bo<M>> {
        let get = || devmem::allocate_bo(&self.memory, count);
        self.ops.make_room(&self.pagemap, count, get).ok()
    }

    /// The driver's part of it.
    pub(crate) fn ops(&self) -> &RegionOps<M> {
        &self.ops
    }

    pub(crate) fn add_vm(&self, vm: &Arc<Vm<M>>) {
        let mut vms = self.memory.vms.lock();
        vms.retain(|vm| vm.strong_count() > 0);
        vms.push(Arc::downgrade(vm));
    }
}

impl<M: AddressSpace> Drop for VramRegion<M> {
    fn drop(&mut self) {
        self.prefetches.close();
    }
}

impl<M: AddressSpace> Memory<M> {
    /// The device address spaces that may have its pages mapped.
    pub(crate) fn vms(&self) -> Vec<Arc<Vm<M>>> {
        self.all_vms().filter(|vm| !vm.is_closed()).collect()
    }

    /// Those too that are being closed.
    fn all_vms(&self) -> impl Iterator<Item = Arc<Vm<M>>> + use<M> {
        let list = self.vms.lock().clone();
        list.into_iter().filter_map(|vm| vm.upgrade())
    }

    pub(crate) fn scrubs(&self) -> bool {
        self.scrub.load(Ordering::Acquire)
    }

    pub(crate) fn now(&self) -> Time {
        self.mm.upgrade().map_or(Time::START, |mm| mm.now())
    }

    /// Waits until what was given back is cleared.
    fn settle(&self) -> Result<(), gpusvm_pagemap::DevmemError> {
        let Some(fence) = self.vram.idle_after() else {
            return Ok(());
        };
        let waited = self.device.copy_engine().wait(fence);
        waited.map_err(devmem::failed)?;
        self.vram.is_idle(fence);
        Ok(())
    }
}
