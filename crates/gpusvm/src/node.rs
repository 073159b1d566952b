//! A device of the engine, and its address space.

use crate::driver::{Devices, Policy, Vm, VramRegion, worker};
use crate::{Error, Stats};
use gpusvm_device::Device;
use gpusvm_mm_linux::Process;
use gpusvm_softgpu::SoftGpu;
use gpusvm_sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// A device, and its address space.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) gpu: Arc<SoftGpu>,
    pub(crate) region: Arc<VramRegion<Process>>,
    pub(crate) vm: Arc<Vm<Process>>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl Node {
    pub(crate) fn new(
        devices: &Arc<Devices<Process>>,
        gpu: Arc<SoftGpu>,
        policy: Arc<dyn Policy>,
    ) -> Result<Self, Error> {
        let device: Arc<dyn Device> = Arc::clone(&gpu) as _;
        let region = VramRegion::new(devices, device)?;
        let vm = Vm::new(&region, policy)?;
        let workers = Mutex::new(worker::start(&region).map_err(Error::Thread)?);
        Ok(Self {
            gpu,
            region,
            vm,
            workers,
        })
    }

    /// Lanes that fault from now on stop, and no page comes here any more.
    pub(crate) fn stop_faults(&self) {
        self.vm.refuse_faults();
        self.region.pagemap().unbind();
        if let Some(queue) = self.region.device().fault_queue() {
            queue.close();
        }
        for worker in core::mem::take(&mut *self.workers.lock()) {
            // A worker's panic was caught and told to the lane that it served.
            let _ = worker.join();
        }
    }

    pub(crate) fn add_to(&self, stats: &mut Stats) {
        let vm = self.vm.stats();
        stats.device_faults += vm.faults;
        stats.coalesced_faults += vm.coalesced;
        stats.stale_passes += vm.stale_passes;
        stats.last_resorts += vm.last_resorts;
        stats.failed_faults += vm.failed;
        stats.not_migrated += vm.not_migrated;
        stats.duplicated_ranges += vm.duplicated;
        stats.not_duplicated += vm.not_duplicated;
        stats.duplicates_invalidated += vm.duplicates_invalidated;
        stats.duplicates_dropped += vm.duplicates_dropped;
        stats.device_fault_time = vm.fault_time;
        stats.ranges_live += vm.ranges_live;
        let region = self.region.stats();
        stats.evictions += region.evictions;
        stats.to_device.add(region.to_device);
        stats.to_ram.add(region.to_ram);
        stats.to_peer.add(region.to_peer);
        stats.vram_bytes += region.total.bytes().get();
        stats.vram_used_bytes += region.used.bytes().get();
        stats.vram_lost_bytes += region.lost.bytes().get();
    }
}
