//! Ranges whose memory was unmapped, and what is left of them.

use crate::{GpuSvm, Range, pages};
use alloc::sync::Arc;
use gpusvm_mm::{AddressSpace, Intent, IntervalNotifier, Mirror};
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::Span;

impl<M: AddressSpace> GpuSvm<M> {
    /// Removes the ranges that were unmapped. What of a partially unmapped range is still there comes
    /// home first: ranges are not split, since that is rare and this is simple.
    ///
    /// Says how many ranges it removed. A range that is being served is left for the next time: a fault,
    /// which collects garbage first, must not wait for one in another block. Its cost is that of the
    /// garbage, however many ranges there are. Call it without locks.
    pub fn collect_garbage(&self) -> usize {
        gpusvm_sync::walk!("collect_garbage");
        if self.core.garbage.swap(0, Ordering::AcqRel) == 0 {
            return 0;
        }
        let garbage = self.core.tree.lock().take_garbage();
        // A range that is flagged from here on has counted itself, and is looked for the next time.
        let removed = garbage.iter().filter(|range| self.remove_unmapped(range));
        removed.count()
    }

    fn remove_unmapped(&self, range: &Arc<Range<M>>) -> bool {
        let Some(_serving) = range.try_serve() else {
            self.core.tree.lock().put_garbage_back(range);
            self.core.garbage.fetch_add(1, Ordering::AcqRel);
            return false;
        };
        if range.is_removed() {
            return false;
        }
        if range.is_partially_unmapped() && range.can_migrate() {
            self.evict_rest(range.span());
        }
        self.range_remove(range)
    }

    /// Brings home what of `span` is still mirrored, piece by piece: no mapping covers all of it.
    fn evict_rest(&self, span: Span) {
        let mut rest = Some(span);
        // Each piece ends behind the one before.
        while let Some(span) = rest {
            let mirror = self.mm.mirrored(span.start());
            let Some(piece) = span.intersection(mirror.span()) else {
                return;
            };
            if matches!(mirror, Mirror::Mapping(_)) {
                // Best effort: what cannot come home now is still the CPU's to fault on.
                let _ =
                    self.mm
                        .range_fault(piece, None, Intent::Read, &mut pages::homes_for(piece));
            }
            rest = Span::new(piece.end(), span.end()).ok();
        }
    }

    /// Forgets a range and takes its mapping away (`drm_gpusvm_range_remove`). Whether it was there.
    pub fn range_remove(&self, range: &Arc<Range<M>>) -> bool {
        gpusvm_sync::walk!("range_remove");
        if !range.set_removed() {
            return false;
        }
        // Before it leaves the tree: who closes the mirror finds it there, or unmapped.
        self.range_unmap(range);
        let idle = {
            let mut tree = self.core.tree.lock();
            tree.forget(range);
            tree.take_idle(range.notifier().window())
        };
        self.unsubscribe(idle);
        self.disarm(range);
        true
    }

    /// Hears of nothing any more in a window that was taken out of the tree: there, whoever needs it next
    /// finds none, and subscribes anew. Call it without locks.
    pub(crate) fn unsubscribe(&self, idle: Option<Arc<IntervalNotifier>>) {
        if let Some(notifier) = idle {
            self.mm.notifiers().unsubscribe(&notifier);
        }
    }
}
