//! What happened.

use crate::driver::{Moved, SizeStats, Times, VmStats};

/// What happened since the engine was built, and how things stand.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Faults of devices.
    pub device_faults: u64,
    /// Of them, those that found their range served by another.
    pub coalesced_faults: u64,
    /// Passes over device faults that had to start again.
    pub stale_passes: u64,
    /// Device faults that pages were not moved for any more, after too many passes.
    pub last_resorts: u64,
    /// Device faults that ended in an error.
    pub failed_faults: u64,
    /// Times that memory should have moved to a device and could not: it was mapped where it is.
    pub not_migrated: u64,
    /// Ranges that a device got copies of, to read, while they stayed in RAM.
    pub duplicated_ranges: u64,
    /// Times that the policy wanted copies and there were none.
    pub not_duplicated: u64,
    /// Copies of ranges that were given back after a write, or because their pages went.
    pub duplicates_invalidated: u64,
    /// Copies of ranges that went for others, or because the device was unbound.
    pub duplicates_dropped: u64,
    /// Faults of the CPU on pages that were on a device.
    pub cpu_faults: u64,
    /// Of them, those that slept until a timeslice was over.
    pub delayed_cpu_faults: u64,
    /// Allocations of device memory that went for others.
    pub evictions: u64,
    /// What went to devices.
    pub to_device: Moved,
    /// What came home.
    pub to_ram: Moved,
    /// What went from device to device.
    pub to_peer: Moved,
    /// What became a device's where it is, its memory being coherent: nothing of it was copied.
    pub to_coherent: Moved,
    /// What of that is RAM's again.
    pub from_coherent: Moved,
    /// How long device faults took to serve.
    pub device_fault_time: Times,
    /// What device faults cost, by the size of ranges, descending, and by stage.
    pub device_faults_by_size: Vec<SizeStats>,
    /// Invalidations that devices took part in: each is one flush.
    pub flushes: u64,
    /// How long CPU faults took to serve.
    pub cpu_fault_time: Times,
    /// Ranges that devices know now.
    pub ranges_live: u64,
    /// Device memory.
    pub vram_bytes: u64,
    /// Of it, in use now.
    pub vram_used_bytes: u64,
    /// Of that, what could not be cleared when it was given back, and is not used again.
    pub vram_lost_bytes: u64,
    /// Of what is in use, what objects take.
    pub vram_object_bytes: u64,
    /// Pages of the process that live on devices now.
    pub pages_on_devices: u64,
}

impl Stats {
    /// What all device address spaces did together.
    pub(crate) fn set_vms(&mut self, vms: VmStats) {
        self.device_faults = vms.faults;
        self.coalesced_faults = vms.coalesced;
        self.stale_passes = vms.stale_passes;
        self.last_resorts = vms.last_resorts;
        self.failed_faults = vms.failed;
        self.not_migrated = vms.not_migrated;
        self.device_fault_time = vms.fault_time;
        self.device_faults_by_size = vms.by_size;
        self.flushes = vms.flushes;
        self.duplicated_ranges = vms.duplicated;
        self.not_duplicated = vms.not_duplicated;
        self.duplicates_invalidated = vms.duplicates_invalidated;
        self.duplicates_dropped = vms.duplicates_dropped;
        self.ranges_live = vms.ranges_live;
    }
}
