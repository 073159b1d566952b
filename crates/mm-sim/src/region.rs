//! One mirrored mapping: a word for each page, a lock for each block. And the table of them.
//!
//! A region keeps its words when parts of it are unmapped or moved; the table says which parts of
//! which region are still mirrored.

use gpusvm_mm::{ArmToken, Mirror, PageWord};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::{AtomicBool, AtomicU32, Ordering};
use gpusvm_types::{BLOCK_SHIFT, ByteSize, PageIndex, Span, VirtAddr};

/// One mirrored mapping, as it was when it was made.
#[derive(Debug)]
pub(crate) struct Region {
    span: Span,
    token: ArmToken,
    words: Vec<PageWord>,
    blocks: Vec<BlockState>,
}

/// The state of one block. All but the lock changes with the block locked.
#[derive(Debug, Default)]
pub(crate) struct BlockState {
    locked: AtomicBool,
    /// How many ranges are in it.
    pub(crate) armed: AtomicU32,
    /// Whether touches of missing pages are caught.
    pub(crate) registered: AtomicBool,
    /// Pages of it are marked as collected, and accesses that devices began before are awaited.
    pub(crate) clearing: AtomicBool,
    /// It left for a device as one huge page.
    pub(crate) left_huge: AtomicBool,
}

impl BlockState {
    /// Locks the block if it is free.
    pub(crate) fn try_lock(&self) -> bool {
        !self.locked.swap(true, Ordering::AcqRel)
    }

    /// Whether nobody has it.
    pub(crate) fn is_free(&self) -> bool {
        !self.locked.load(Ordering::Acquire)
    }

    pub(crate) fn unlock(&self) {
        let was_locked = self.locked.swap(false, Ordering::AcqRel);
        debug_assert!(was_locked, "unlocked a block that was not locked");
    }
}

impl Region {
    /// For a span, every page in RAM, no block armed.
    pub(crate) fn new(span: Span, token: ArmToken) -> Arc<Self> {
        Arc::new(Self {
            span,
            token,
            words: span.pages().map(|_| PageWord::default()).collect(),
            blocks: span.blocks().map(|_| BlockState::default()).collect(),
        })
    }

    /// Tells it from others that were at its address before.
    pub(crate) fn token(&self) -> ArmToken {
        self.token
    }

    /// The words of the pages of a span inside.
    pub(crate) fn words_in(&self, span: Span) -> &[PageWord] {
        let first = self.span.index_of(span.first_page());
        &self.words[first..first + span.page_count().as_usize()]
    }

    /// The word of a page inside.
    pub(crate) fn word(&self, page: PageIndex) -> &PageWord {
        &self.words[self.span.index_of(page)]
    }

    /// The state of the block that holds `at`.
    pub(crate) fn block(&self, at: VirtAddr) -> &BlockState {
        assert!(self.span.contains(at), "{at} is not in {}", self.span);
        let first = self.span.start().get() >> BLOCK_SHIFT;
        &self.blocks[ByteSize::new((at.get() >> BLOCK_SHIFT) - first).as_usize()]
    }
}

/// A part of a region that is still mirrored.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) span: Span,
    pub(crate) region: Arc<Region>,
}

/// The mirrored mappings: parts of regions, ascending, without overlap.
#[derive(Debug, Default)]
pub(crate) struct Parts(Vec<Part>);

/// The end of what a process can map: 2^47 less the last page.
const END: VirtAddr = VirtAddr::new(0x7fff_ffff_f000);

impl Parts {
    /// The part that holds `at`.
    pub(crate) fn find(&self, at: VirtAddr) -> Option<&Part> {
        let part = self.0.get(self.first_ending_above(at))?;
        part.span.contains(at).then_some(part)
    }

    /// What is mirrored around `at`.
    pub(crate) fn mirror(&self, at: VirtAddr) -> Mirror {
        let next = self.first_ending_above(at);
        if let Some(part) = self.0.get(next).filter(|part| part.span.contains(at)) {
            return Mirror::Mapping(part.span);
        }
        let below = next.checked_sub(1).map(|i| self.0[i].span.end());
        let above = self.0.get(next).map_or(END, |part| part.span.start());
        let gap = Span::new(below.unwrap_or(VirtAddr::new(0)), above);
        Mirror::Gap(gap.unwrap_or_else(|_| Span::page_of(at)))
    }

    /// The parts that overlap `span`, cut to it.
    pub(crate) fn parts_in(&self, span: Span) -> Vec<Part> {
        let cut = |part: &Part| {
            let span = part.span.intersection(span)?;
            let region = Arc::clone(&part.region);
            Some(Part { span, region })
        };
        self.0.iter().filter_map(cut).collect()
    }

    /// The pieces of `span` that are not mirrored.
    pub(crate) fn gaps_in(&self, span: Span) -> Vec<Span> {
        let mut gaps = Vec::new();
        let mut from = span.start();
        for part in self.parts_in(span) {
            gaps.extend(Span::new(from, part.span.start()));
            from = part.span.end();
        }
        gaps.extend(Span::new(from, span.end()));
        gaps
    }

    /// All parts.
    pub(crate) fn all(&self) -> &[Part] {
        &self.0
    }

    /// Adds a region.
    ///
    /// # Errors
    ///
    /// The span that is mirrored already.
    pub(crate) fn insert(&mut self, region: Arc<Region>) -> Result<(), Span> {
        let span = region.span;
        let at = self.first_ending_above(span.start());
        if let Some(other) = self.0.get(at).filter(|part| part.span.overlaps(span)) {
            return Err(other.span);
        }
        self.0.insert(at, Part { span, region });
        Ok(())
    }

    /// Forgets what of `span` is mirrored.
    pub(crate) fn remove(&mut self, span: Span) {
        let parts = core::mem::take(&mut self.0);
        for Part { span: part, region } in parts {
            let rest = part.without(span).into_iter().flatten();
            let region = |span| Part {
                span,
                region: Arc::clone(&region),
            };
            self.0.extend(rest.map(region));
        }
    }

    fn first_ending_above(&self, at: VirtAddr) -> usize {
        self.0.partition_point(|part| part.span.end() <= at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, end: u64) -> Span {
        Span::new(VirtAddr::new(start << 12), VirtAddr::new(end << 12)).unwrap()
    }

    #[test]
    fn parts_and_gaps_cover_a_span() {
        let mut parts = Parts::default();
        parts.insert(Region::new(span(4, 8), ArmToken(1))).unwrap();
        parts
            .insert(Region::new(span(12, 14), ArmToken(2)))
            .unwrap();
        assert!(parts.insert(Region::new(span(7, 9), ArmToken(3))).is_err());
        parts.remove(span(5, 6));
        let found: Vec<Span> = parts.all().iter().map(|part| part.span).collect();
        assert_eq!(found, [span(4, 5), span(6, 8), span(12, 14)]);
        assert_eq!(
            parts.gaps_in(span(2, 13)),
            [span(2, 4), span(5, 6), span(8, 12)]
        );
        assert_eq!(
            parts.mirror(VirtAddr::new(9 << 12)),
            Mirror::Gap(span(8, 12))
        );
        assert_eq!(
            parts.mirror(VirtAddr::new(7 << 12)),
            Mirror::Mapping(span(6, 8))
        );
    }
}
