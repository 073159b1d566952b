//! What a mirror keeps of a process: windows, ranges, and who is about to make a range.
//!
//! ```text
//!   windows   [ notifier           )[ notifier           )     while a range or a look is in them
//!   ranges      [ r )[r)  [   r    )        [ r )              they do not overlap
//!   looks                    [  chunk  )                       one for each fault that makes a range
//! ```
//!
//! # Locking
//!
//! All of it is guarded by the tree lock.
//!
//! # Invariants
//!
//! A window has a notifier as long as a range or a look is in it: whoever trusts what he sees there
//! hears of what happens to it. The list of garbage has room for every range that is not in it, so an
//! invalidation allocates nothing.

use crate::Range;
use alloc::{collections::BTreeMap, sync::Arc, vec::Vec};
use gpusvm_mm::{AddressSpace, IntervalNotifier};
use gpusvm_types::{Span, VirtAddr};

/// Guarded by the tree lock.
#[derive(Debug)]
pub(crate) struct Tree<M: AddressSpace> {
    /// By the start of their window.
    pub(crate) notifiers: BTreeMap<VirtAddr, Arc<IntervalNotifier>>,
    /// By their start; they do not overlap.
    pub(crate) ranges: BTreeMap<VirtAddr, Arc<Range<M>>>,
    /// Nothing is inserted any more.
    pub(crate) closed: bool,
    /// As many as there are faults that make a range.
    looks: Vec<Look>,
    next_look: LookId,
    /// Ranges that were flagged as unmapped and not collected yet, each once.
    garbage: Vec<Arc<Range<M>>>,
}

/// Which look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LookId(u64);

/// Somebody looks at a mapping, to make a range of what he sees.
#[derive(Debug)]
struct Look {
    id: LookId,
    /// The largest range that can come of it.
    chunk: Span,
    /// What of it was unmapped since, in one piece.
    unmapped: Option<Span>,
}

impl<M: AddressSpace> Tree<M> {
    pub(crate) const fn new() -> Self {
        Self {
            notifiers: BTreeMap::new(),
            ranges: BTreeMap::new(),
            closed: false,
            looks: Vec::new(),
            next_look: LookId(0),
            garbage: Vec::new(),
        }
    }

    /// The ranges that overlap `span`, ascending.
    pub(crate) fn overlapping(&self, span: Span) -> impl Iterator<Item = &Arc<Range<M>>> {
        overlapping(&self.ranges, span)
    }

    /// Adds a range, which overlaps no other.
    pub(crate) fn insert(&mut self, range: &Arc<Range<M>>) {
        self.garbage.reserve(self.ranges.len() + 1);
        self.ranges.insert(range.span().start(), Arc::clone(range));
    }

    /// Takes a range out, if it is there.
    pub(crate) fn forget(&mut self, range: &Arc<Range<M>>) {
        let start = &range.span().start();
        let found = self.ranges.get(start);
        if found.is_some_and(|found| Arc::ptr_eq(found, range)) {
            self.ranges.remove(start);
        }
    }

    /// From now on unmappings in `chunk` are remembered for who looks.
    pub(crate) fn begin_look(&mut self, chunk: Span) -> LookId {
        let id = self.next_look;
        self.next_look = LookId(id.0 + 1);
        let unmapped = None;
        self.looks.push(Look {
            id,
            chunk,
            unmapped,
        });
        id
    }

    pub(crate) fn end_look(&mut self, id: LookId) {
        self.looks.retain(|look| look.id != id);
    }

    /// Whether something of `piece` was unmapped since the look began.
    pub(crate) fn is_outdated(&self, id: LookId, piece: Span) -> bool {
        let mut unmapped = self.looks.iter().filter(|look| look.id == id);
        unmapped.any(|look| look.unmapped.is_some_and(|gone| gone.overlaps(piece)))
    }

    /// The notifier of a window that nobody needs any more, taken out.
    pub(crate) fn take_idle(&mut self, window: Span) -> Option<Arc<IntervalNotifier>> {
        let is_looked_at = self.looks.iter().any(|look| window.covers(look.chunk));
        if is_looked_at || self.overlapping(window).next().is_some() {
            return None;
        }
        self.notifiers.remove(&window.start())
    }

    /// Memory is unmapped: ranges and looks that have to do with it are flagged. How many ranges are
    /// garbage by it. Allocates and frees nothing.
    pub(crate) fn unmap(&mut self, event: Span) -> usize {
        for look in &mut self.looks {
            if let Some(gone) = look.chunk.intersection(event) {
                look.unmapped = Some(look.unmapped.map_or(gone, |before| before.union(gone)));
            }
        }
        let before = self.garbage.len();
        for range in overlapping(&self.ranges, event) {
            if range.set_unmapped(event) {
                debug_assert!(self.garbage.len() < self.garbage.capacity(), "it has room");
                self.garbage.push(Arc::clone(range));
            }
        }
        self.garbage.len() - before
    }

    /// What could not be collected now is garbage the next time, too.
    pub(crate) fn put_garbage_back(&mut self, range: &Arc<Range<M>>) {
        // It may have left the tree meanwhile: then no room was kept for it.
        self.garbage.reserve(self.ranges.len() + 1);
        self.garbage.push(Arc::clone(range));
    }

    /// What was flagged since the last time. The list keeps its room.
    pub(crate) fn take_garbage(&mut self) -> Vec<Arc<Range<M>>> {
        self.garbage.drain(..).collect()
    }
}

fn overlapping<M: AddressSpace>(
    ranges: &BTreeMap<VirtAddr, Arc<Range<M>>>,
    span: Span,
) -> impl Iterator<Item = &Arc<Range<M>>> {
    // Ranges do not overlap, so at most one that begins below reaches in.
    let below = ranges.range(..span.start()).next_back();
    let inside = ranges.range(span.start()..span.end());
    below
        .into_iter()
        .chain(inside)
        .map(|(_, range)| range)
        .filter(move |range| range.span().overlaps(span))
}
