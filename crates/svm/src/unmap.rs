//! What is mapped goes: of a range, of a device, of all.

use crate::{DeviceIndex, GpuSvm, Range};
use alloc::{sync::Arc, vec::Vec};
use gpusvm_mm::AddressSpace;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::Span;

impl<M: AddressSpace> GpuSvm<M> {
    /// Takes the mapping of a range away from every device (`drm_gpusvm_range_unmap_pages`): who wants
    /// it back faults.
    pub fn range_unmap(&self, range: &Range<M>) {
        let _writer = self.core.notifier_lock.write();
        for device in (0..self.core.ops.len()).map(DeviceIndex) {
            self.unmap_if_mapped(range, device);
        }
    }

    /// As `range_unmap`, from one of the devices (`drm_gpusvm_unmap_pages`). The others keep theirs.
    ///
    /// # Panics
    ///
    /// When the mirror has no device with this number.
    pub fn unmap_pages(&self, range: &Range<M>, device: DeviceIndex) {
        let _writer = self.core.notifier_lock.write();
        self.unmap_if_mapped(range, device);
    }

    /// A device leaves a mirror that it shares: nothing is mapped on it when this returns, and nothing
    /// that was prepared for it is committed any more. Ranges stay, for the others.
    ///
    /// # Panics
    ///
    /// When the mirror has no device with this number.
    pub fn leave(&self, device: DeviceIndex) {
        {
            let _writer = self.core.notifier_lock.write();
            self.core.left[device.0].store(true, Ordering::Release);
        }
        // Nothing is mapped on it from here on. The lock is taken for each range: others need it too.
        for range in self.ranges_in(Span::EVERYWHERE) {
            self.unmap_pages(&range, device);
        }
    }

    /// Takes every mapping away, forgets every range and hears of nothing any more. No range is found
    /// or inserted from then on, and nothing that was prepared is committed.
    pub fn close(&self) {
        let ranges: Vec<Arc<Range<M>>> = {
            let mut tree = self.core.tree.lock();
            tree.closed = true;
            tree.ranges.values().cloned().collect()
        };
        // In the tree, it hears of changes for as long as any of them is mapped.
        for range in &ranges {
            range.set_removed();
            self.range_unmap(range);
        }
        let (notifiers, gone) = {
            let mut tree = self.core.tree.lock();
            let gone = (core::mem::take(&mut tree.ranges), tree.take_garbage());
            (core::mem::take(&mut tree.notifiers), gone)
        };
        drop(gone);
        for notifier in notifiers.values() {
            self.mm.notifiers().unsubscribe(notifier);
        }
        for range in &ranges {
            self.disarm(range);
        }
        self.core.garbage.store(0, Ordering::Release);
    }

    /// With the notifier lock held to write.
    fn unmap_if_mapped(&self, range: &Range<M>, device: DeviceIndex) {
        if range.pages(device).is_mapped() {
            self.core.unmap(range, device);
        }
    }
}
