//! All device memories of an address space, to find a page's by the page.

use crate::{Pagemap, Peer};
use alloc::sync::Weak;
use alloc::vec::Vec;
use gpusvm_mm::{AddressSpace, DevicePage};
use gpusvm_sync::{Arc, RwLock};

/// The pagemaps of one address space. Those whose device is unbound stay in it, to be bound again:
/// an address space never forgets a memory.
#[derive(Debug)]
pub struct Pagemaps<M: AddressSpace> {
    pub(crate) mm: Weak<M>,
    list: RwLock<Vec<Arc<Pagemap<M>>>>,
}

impl<M: AddressSpace> Pagemaps<M> {
    /// None yet.
    pub fn new(mm: &Arc<M>) -> Arc<Self> {
        Arc::new(Self {
            mm: Arc::downgrade(mm),
            list: RwLock::new(Vec::new()),
        })
    }

    /// The memory that a page is of (`drm_pagemap_page_to_dpagemap`).
    pub fn page_to_pagemap(&self, page: DevicePage) -> Option<Arc<Pagemap<M>>> {
        let list = self.list.read();
        list.iter()
            .find(|pagemap| pagemap.contains(page))
            .map(Arc::clone)
    }

    /// The memory of a device, bound or not (`drm_pagemap_get_from_cache`).
    pub fn of_peer(&self, peer: Peer) -> Option<Arc<Pagemap<M>>> {
        let list = self.list.read();
        list.iter()
            .find(|pagemap| pagemap.peer() == peer)
            .map(Arc::clone)
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<Pagemap<M>>> {
        self.list.read().clone()
    }

    pub(crate) fn add(&self, pagemap: &Arc<Pagemap<M>>) {
        self.list.write().push(Arc::clone(pagemap));
    }
}
