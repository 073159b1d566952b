//! Something changes: nothing of it stays mapped.
//!
//! ```text
//!   begin   zap every affected range, on every device     (cheap, many)
//!           ONE flush over all of them, for each device   (expensive, once)
//!   end     pages are unmapped, and no longer reached; an unmap flags the range and calls the
//!           garbage collector
//! ```

use crate::gpusvm::Core;
use crate::{DeviceIndex, Pages, Range};
use alloc::sync::Arc;
use gpusvm_mm::{AddressSpace, IntervalNotifier, Invalidation, Reason, Subscriber};
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::Span;

impl<M: AddressSpace> Subscriber for Core<M> {
    /// Bounded by the ranges of the event in one window, for each device: few, unless memory in one
    /// piece is mapped in pages.
    fn invalidate(&self, notifier: &IntervalNotifier, event: &Invalidation) {
        gpusvm_sync::walk!("invalidate");
        let Some(span) = event.span.intersection(notifier.window()) else {
            return;
        };
        let _writer = self.notifier_lock.write();
        notifier.bump();
        let mut tree = self.tree.lock();

        for (device, ops) in self.ops.iter().enumerate() {
            let mut zapped: Option<Span> = None;
            let is_mapped = |range: &&Arc<Range<M>>| range.pages(DeviceIndex(device)).is_mapped();
            for range in tree.overlapping(span).filter(is_mapped) {
                ops.zap(range.span());
                zapped = Some(zapped.map_or(range.span(), |union| union.union(range.span())));
            }
            if let Some(union) = zapped {
                ops.flush(union);
            }
        }

        for range in tree.overlapping(span) {
            range.pages_by_device().iter().for_each(Pages::set_unmapped);
        }
        if event.reason == Reason::Unmap {
            let garbage = tree.unmap(span);
            if garbage > 0 {
                self.garbage.fetch_add(garbage, Ordering::AcqRel);
                self.ops.iter().for_each(|ops| ops.garbage());
            }
        }
    }
}
