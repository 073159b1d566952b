//! All devices of one address space.
//!
//! ```text
//!   Devices                  one for each address space
//!     |-- VramRegion, ...    a device's memory in it
//!     |     `-- Vm, ...      a device address space that mirrors it
//!     |-- Pagemaps           to find the memory of a page
//!     `-- OwnerList          who maps whose pages in place: devices of one fabric
//! ```

use crate::driver::advice::DeviceSet;
use crate::driver::advice::map::AdviceMap;
use crate::driver::region::Memory;
use crate::driver::stays::Stays;
use crate::driver::vm::Vm;
use gpusvm_device::{Device, Fabric};
use gpusvm_mm::AddressSpace;
use gpusvm_pagemap::{Owner, OwnerList, Pagemaps, Peer};
use gpusvm_sync::{Arc, Mutex, Weak};

/// All devices of one address space, and who of them reaches whom.
#[derive(Debug)]
pub struct Devices<M: AddressSpace> {
    mm: Arc<M>,
    pagemaps: Arc<Pagemaps<M>>,
    owners: Arc<OwnerList>,
    fabrics: Arc<Fabrics>,
    stays: Arc<Stays>,
    advice: Arc<AdviceMap>,
    memories: Mutex<Vec<Weak<Memory<M>>>>,
}

impl<M: AddressSpace> Devices<M> {
    /// Of `mm`; none yet.
    pub fn new(mm: &Arc<M>) -> Arc<Self> {
        Arc::new(Self {
            mm: Arc::clone(mm),
            pagemaps: Pagemaps::new(mm),
            owners: OwnerList::new(),
            fabrics: Arc::default(),
            stays: Arc::default(),
            advice: Arc::default(),
            memories: Mutex::new(Vec::new()),
        })
    }

    /// The address space.
    pub fn mm(&self) -> &Arc<M> {
        &self.mm
    }

    /// Their memories.
    pub fn pagemaps(&self) -> &Arc<Pagemaps<M>> {
        &self.pagemaps
    }

    /// Who is on which fabric.
    pub(crate) fn fabrics(&self) -> &Arc<Fabrics> {
        &self.fabrics
    }

    /// What stays where it is.
    pub(crate) fn stays(&self) -> &Arc<Stays> {
        &self.stays
    }

    /// What the program advised.
    pub(crate) fn advice(&self) -> &Arc<AdviceMap> {
        &self.advice
    }

    /// How many devices joined.
    pub(crate) fn count(&self) -> usize {
        self.fabrics.0.lock().len()
    }

    /// A device's memory is here.
    pub(crate) fn add_memory(&self, memory: &Arc<Memory<M>>) {
        let mut memories = self.memories.lock();
        memories.retain(|memory| memory.strong_count() > 0);
        memories.push(Arc::downgrade(memory));
    }

    /// The device address spaces of all devices that are open.
    pub(crate) fn vms(&self) -> Vec<Arc<Vm<M>>> {
        let memories = self.memories.lock().clone();
        let memories = memories.iter().filter_map(Weak::upgrade);
        memories.flat_map(|memory| memory.vms()).collect()
    }

    /// The devices whose memory `peer` reaches, itself among them.
    pub(crate) fn reached_by(&self, peer: Peer) -> DeviceSet {
        let mut set = DeviceSet::default();
        for device in 0..self.count().min(DeviceSet::CAPACITY) {
            let other = Peer(u32::try_from(device).expect("few"));
            set = set.with(device, other == peer || self.fabrics.reach(peer, other));
        }
        set
    }

    /// A number and an owner for one more device. It shares its owner with those that it reaches, and
    /// that reach each other.
    pub(crate) fn join(&self, device: &dyn Device) -> Owner {
        let peer = self.fabrics.add(device.caps().fabric);
        self.owners
            .acquire(peer, |one, other| self.fabrics.reach(one, other))
    }
}

impl<M: AddressSpace> Drop for Devices<M> {
    fn drop(&mut self) {
        self.advice.end(&*self.mm);
    }
}

/// Which fabric each device is on. A device's number is its place in the list.
#[derive(Debug, Default)]
pub(crate) struct Fabrics(Mutex<Vec<Option<Fabric>>>);

impl Fabrics {
    fn add(&self, fabric: Option<Fabric>) -> Peer {
        let mut list = self.0.lock();
        list.push(fabric);
        let number = u32::try_from(list.len() - 1);
        Peer(number.expect("fewer devices than numbers"))
    }

    /// Whether two devices reach each other's memory.
    pub(crate) fn reach(&self, one: Peer, other: Peer) -> bool {
        let list = self.0.lock();
        let fabric = |peer: Peer| list.get(usize::try_from(peer.0).ok()?).copied().flatten();
        fabric(one).is_some() && fabric(one) == fabric(other)
    }
}
