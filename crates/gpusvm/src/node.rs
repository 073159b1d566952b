//! A device of the engine, and its address spaces.
//!
//! # Locking
//!
//! The list of address spaces has a lock, held to add, to look and to close.

use crate::driver::{Devices, Policy, Vm, VmTotals, VramRegion, worker};
use crate::{Error, Stats};
use gpusvm_device::Device;
use gpusvm_mm_linux::Process;
use gpusvm_softgpu::SoftGpu;
use gpusvm_sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A device, and its address spaces.
#[derive(Debug)]
pub(crate) struct Node {
    /// Its number among the devices of the engine.
    pub(crate) number: usize,
    pub(crate) gpu: Arc<SoftGpu>,
    pub(crate) region: Arc<VramRegion<Process>>,
    /// The address space for launches that name none.
    pub(crate) vm: Arc<Vm<Process>>,
    policy: Arc<dyn Policy>,
    vms: Mutex<Vms>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

/// All address spaces of a device.
#[derive(Debug, Default)]
struct Vms {
    list: Vec<Arc<Vm<Process>>>,
    /// What those did that are gone.
    gone: VmTotals,
    /// None is added any more.
    is_closed: bool,
}

impl Vms {
    /// Forgets those that are closed and that nobody uses any more, but not what they did.
    fn prune(&mut self) {
        let gone = &mut self.gone;
        self.list.retain(|vm| {
            let is_gone = vm.is_closed() && Arc::strong_count(vm) == 1;
            if is_gone {
                vm.add_to(gone);
            }
            !is_gone
        });
    }
}

impl Node {
    pub(crate) fn new(
        devices: &Arc<Devices<Process>>,
        number: usize,
        gpu: Arc<SoftGpu>,
        policy: Arc<dyn Policy>,
    ) -> Result<Self, Error> {
        let device: Arc<dyn Device> = Arc::clone(&gpu) as _;
        let region = VramRegion::new(devices, device)?;
        let vm = Vm::new(&region, Arc::clone(&policy))?;
        let workers = Mutex::new(worker::start(&region).map_err(Error::Thread)?);
        let vms = Vms {
            list: vec![Arc::clone(&vm)],
            ..Vms::default()
        };
        Ok(Self {
            number,
            gpu,
            region,
            vm,
            policy,
            vms: Mutex::new(vms),
            workers,
        })
    }

    /// One more address space.
    pub(crate) fn create_vm(&self) -> Result<Arc<Vm<Process>>, Error> {
        let device = self.number;
        let mut vms = self.vms.lock();
        vms.prune();
        if vms.is_closed {
            return Err(Error::VmClosed { device });
        }
        let created = Vm::new(&self.region, Arc::clone(&self.policy));
        let vm = created.map_err(|error| Error::CreateVm { device, error })?;
        vms.list.push(Arc::clone(&vm));
        Ok(vm)
    }

    /// Closes an address space, whatever runs in it. It is forgotten when the next one comes.
    pub(crate) fn close_vm(&self, vm: &Vm<Process>) {
        vm.shut();
        self.vms.lock().prune();
    }

    /// Lanes that fault from now on stop, and no page comes here any more.
    pub(crate) fn stop_faults(&self) {
        let mut vms = self.vms.lock();
        vms.is_closed = true;
        vms.list.iter().for_each(|vm| vm.refuse_faults());
        drop(vms);
        self.region.pagemap().unbind();
        self.region.close_prefetches();
        if let Some(queue) = self.region.device().fault_queue() {
            queue.close();
        }
        for worker in core::mem::take(&mut *self.workers.lock()) {
            // A worker's panic was caught and told to the lane that it served.
            let _ = worker.join();
        }
    }

    /// Closes every address space.
    pub(crate) fn close(&self) {
        let vms = self.vms.lock().list.clone();
        vms.iter().for_each(|vm| vm.shut());
    }

    pub(crate) fn add_to(&self, stats: &mut Stats, totals: &mut VmTotals) {
        let mut vms = self.vms.lock();
        vms.prune();
        totals.append(&vms.gone);
        vms.list.iter().for_each(|vm| vm.add_to(totals));
        drop(vms);
        let region = self.region.stats();
        stats.evictions += region.evictions;
        stats.to_device.add(region.to_device);
        stats.to_ram.add(region.to_ram);
        stats.to_peer.add(region.to_peer);
        stats.to_coherent.add(region.to_coherent);
        stats.from_coherent.add(region.from_coherent);
        stats.vram_bytes += region.total.bytes().get();
        stats.vram_used_bytes += region.used.bytes().get();
        stats.vram_object_bytes += region.object_pages.bytes().get();
        stats.vram_lost_bytes += region.lost.bytes().get();
    }
}
