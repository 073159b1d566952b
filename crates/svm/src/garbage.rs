//! Ranges whose memory was unmapped, and what is left of them.

use crate::{GpuSvm, Range};
use alloc::{sync::Arc, vec::Vec};
use gpusvm_mm::AddressSpace;
use gpusvm_sync::atomic::Ordering;

impl<M: AddressSpace> GpuSvm<M> {
    /// Removes the ranges that were unmapped. What of a partially unmapped range is still there comes
    /// home first: ranges are not split, since that is rare and this is simple.
    ///
    /// Says how many ranges it removed. Cheap when there is no garbage. Call it without locks.
    pub fn collect_garbage(&self) -> usize {
        if self.core.garbage.swap(0, Ordering::AcqRel) == 0 {
            return 0;
        }
        let garbage: Vec<Arc<Range>> = {
            let tree = self.core.tree.lock();
            tree.ranges
                .values()
                .filter(|range| range.is_unmapped())
                .cloned()
                .collect()
        };
        let removed = garbage
            .iter()
            .filter(|range| self.remove_unmapped(range))
            .count();
        self.core.garbage.fetch_sub(removed, Ordering::AcqRel);
        removed
    }

    fn remove_unmapped(&self, range: &Arc<Range>) -> bool {
        let _serving = range.serve();
        if range.is_partially_unmapped() && range.can_migrate() {
            // Best effort: what cannot come home now is still the CPU's to fault on.
            let _ = self.range_evict(range);
        }
        self.range_remove(range)
    }

    /// Forgets a range and takes its mapping away (`drm_gpusvm_range_remove`). Whether it was there.
    pub fn range_remove(&self, range: &Arc<Range>) -> bool {
        if !self.forget(range) {
            return false;
        }
        self.take_away(range);
        true
    }
}
