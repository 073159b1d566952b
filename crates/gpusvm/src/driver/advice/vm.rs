//! Advice through a device address space, and what it does to what is mapped.

use super::attributes::{Advice, Attributes, DeviceSet, Preferred, is_chunk};
use super::map::{Change, Outcome};
use super::{AdviseError, Advised, AdvisedBy};
use crate::driver::counters;
use crate::driver::revisit::BUSY_AGAIN;
use crate::driver::vm::Vm;
use gpusvm_device::FaultMode;
use gpusvm_mm::{AddressSpace, Block, MmError};
use gpusvm_pagemap::{Cause, MigrateError, Pagemap, Peer};
use gpusvm_svm::Range;
use gpusvm_sync::Arc;
use gpusvm_types::{Span, VirtAddr};

impl<M: AddressSpace> Vm<M> {
    /// Advises something of the pages of `span`, all of which must be mirrored. It counts for all devices
    /// of the process: see [`advice`](crate::driver::advice) for the rule. What is mapped otherwise
    /// by now is unmapped, so that the next touch decides anew; pages stay where they are until then.
    /// What was advised before changes nothing.
    ///
    /// # Errors
    ///
    /// See [`AdviseError`]. `NotMirrored` also of what went meanwhile: then the rest is advised.
    pub fn advise(&self, span: Span, advice: Advice) -> Result<(), AdviseError> {
        let devices = self.region.devices();
        let named = match advice {
            Advice::PreferredLocation(Preferred::Device(device))
            | Advice::AccessedBy { device, .. } => Some(device),
            _ => None,
        };
        if let Some(device) = named.filter(|device| *device >= devices.count()) {
            return Err(AdviseError::NoDevice { device });
        }
        if let Advice::Granularity(Some(size)) = advice
            && !is_chunk(size)
        {
            return Err(AdviseError::Granularity { size });
        }
        if self.is_closed() {
            return Err(AdviseError::Closed);
        }
        let (device, vm) = (self.device_number(), self.id());
        let by = AdvisedBy { device, vm };
        let Outcome { changes, gone } =
            devices
                .advice()
                .advise(&**self.svm().mm(), span, (advice, by))?;
        for vm in devices.vms() {
            changes.iter().for_each(|change| vm.reconsider(change));
        }
        gone.map_or(Ok(()), |span| Err(AdviseError::NotMirrored { span }))
    }

    /// What is advised of the pages of `span`: ascending, without holes, also where that is nothing.
    pub fn advice(&self, span: Span) -> Vec<Advised> {
        let advice = self.region.devices().advice();
        advice.query(&**self.svm().mm(), span)
    }

    /// Moves the pages of `span` to where they are advised to live, if they can; where nothing says so,
    /// to this device.
    ///
    /// # Errors
    ///
    /// The first reason why something did not move; the rest is tried all the same.
    pub fn migrate_as_advised(&self, span: Span, cause: Cause) -> Result<(), MigrateError> {
        let mut result = Ok(());
        for Advised {
            span, attributes, ..
        } in self.advice(span)
        {
            let moved = match attributes.preferred {
                Preferred::Ram => self.migrate_to_ram(span).map_err(MigrateError::Mm),
                Preferred::Device(device) if device != self.device_number() => {
                    let vms = self.region.devices().vms();
                    let there = vms.iter().find(|vm| vm.device_number() == device);
                    there.map_or(Err(MigrateError::Unbound { span }), |vm| {
                        vm.migrate_to_devmem(span, cause)
                    })
                }
                Preferred::Device(_) | Preferred::Anywhere => self.migrate_to_devmem(span, cause),
            };
            result = result.and(moved);
        }
        result
    }

    /// The number of its device.
    pub(crate) fn device_number(&self) -> usize {
        usize::try_from(self.region.peer().0).expect("fewer devices than addresses")
    }

    /// The devices whose memory its device reaches, itself among them.
    pub(crate) fn reaches(&self) -> DeviceSet {
        self.region.devices().reached_by(self.region.peer())
    }

    /// What is advised at `at`, and how far around it, within its block.
    pub(crate) fn advised_around(&self, at: VirtAddr) -> (Attributes, Span) {
        let advice = self.region.devices().advice();
        advice.around(&**self.svm().mm(), at)
    }

    /// The memory of another device, if pages may go there now.
    pub(crate) fn memory_of(&self, device: usize) -> Option<Arc<Pagemap<M>>> {
        let peer = Peer(u32::try_from(device).ok()?);
        let pagemap = self.region.devices().pagemaps().of_peer(peer)?;
        pagemap.is_bound().then_some(pagemap)
    }

    /// Whether nothing of the range has to stay as it is mapped, for a launch whose device cannot fault.
    /// What another device needs of its pages is nothing to the mappings of one that faults.
    pub(crate) fn may_change(&self, range: &Range<M>) -> bool {
        self.caps().faults == FaultMode::Replayable
            || !self.region.devices().stays().is_staying(range.span())
    }

    /// Brings the pages of a range home. `false` when a launch needs any of them where they are: a lease
    /// can last long, and is not waited for by who serves the range.
    pub(crate) fn take_home(&self, range: &Range<M>) -> Result<bool, MmError> {
        let is_leased = {
            let block = self.svm().mm().lock_block(range.span())?;
            let pagemaps = self.region.devices().pagemaps();
            let devmem_of = |page| pagemaps.page_to_pagemap(page)?.devmem_of(page);
            let mut homes = range.span().pages().map(|page| block.home(page));
            homes.any(|home| {
                let devmem = home.device_page().and_then(devmem_of);
                devmem.is_some_and(|devmem| devmem.is_leased())
            })
        };
        if is_leased {
            return Ok(false);
        }
        self.svm().range_evict(range).map(|()| true)
    }

    /// What is advised changed: what is mapped goes, with its ranges, which may be made otherwise now.
    fn reconsider(&self, change: &Change) {
        if !change
            .before
            .is_otherwise(change.after, self.device_number())
        {
            return;
        }
        let Some(_working) = self.enter() else {
            return;
        };
        for range in self.svm().ranges_in(change.span) {
            // Who serves it may have asked what is advised before it changed.
            let _serving = range.serve();
            if !self.may_change(&range) {
                self.revisits.add(self.now().after(BUSY_AGAIN), &range);
                continue;
            }
            counters::count(&self.counters.reconsidered);
            self.svm().range_remove(&range);
        }
    }
}
