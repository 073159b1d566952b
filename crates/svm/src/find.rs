//! The range of a fault: `drm_gpusvm_range_find_or_insert`.

use crate::range::Serving;
use crate::{FindError, GpuSvm, Range, chunk};
use alloc::sync::Arc;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, IntervalNotifier, Mirror, Subscriber, Vma, VmaKind};
use gpusvm_types::{ByteSize, OwnerId, Span, VirtAddr};

/// What a fault wants, and what it may have (`drm_gpusvm_ctx`).
#[derive(Clone, Copy, Debug)]
pub struct FaultCtx {
    /// Whose device pages may be mapped in place; others come home first.
    pub owner: Option<OwnerId>,
    /// Whether it is a read: read-only memory will do.
    pub read_only: bool,
    /// Whether pages may live on the device.
    pub devmem_possible: bool,
    /// Whether pages must live on the device.
    pub devmem_only: bool,
    /// How long migrated pages stay.
    pub timeslice: Duration,
    /// What a new range must not reach out of, besides its mapping.
    pub within: Option<Span>,
    /// The largest that a new range may be, if not as large as fits.
    pub largest_chunk: Option<ByteSize>,
}

/// Whoever looks at a mapping hears of what happens to it meanwhile.
#[derive(Debug)]
struct Listening {
    notifier: Arc<IntervalNotifier>,
    /// How many unmappings had been heard of.
    unmaps: u64,
}

impl<M: AddressSpace> GpuSvm<M> {
    /// The range that holds `at`; a new one, as large as fits, if there is none. It may be gone again
    /// already: see [`Range::is_gone`].
    ///
    /// # Errors
    ///
    /// `NoMapping` (`ENOENT`), `ReadOnly` (`EPERM`), `NotReadable` (`EFAULT`), `NoChunk` (`EINVAL`),
    /// `Closed` (`EFAULT`), and what the address space refused.
    pub fn range_find_or_insert(
        &self,
        at: VirtAddr,
        ctx: &FaultCtx,
    ) -> Result<Arc<Range<M>>, FindError> {
        // It listens before it looks: a mapping that goes after the look is heard of.
        let known = self.listen(at);
        let vma = self.look(at, ctx)?;
        if let Some(range) = self.range_find(at).filter(|range| !range.is_unmapped()) {
            return Ok(range);
        }
        let (listening, vma) = match known {
            Some(listening) => (listening, vma),
            None => (self.subscribe(at)?, self.look(at, ctx)?),
        };
        let mirror = self.mm.mirrored(at);
        let can_migrate = ctx.devmem_possible
            && vma.kind == VmaKind::PrivateAnonymous
            && matches!(mirror, Mirror::Mapping(_));
        self.insert(at, (vma, mirror), (can_migrate, ctx), listening)
    }

    /// The mapping that holds `at`, if it allows what is wanted.
    fn look(&self, at: VirtAddr, ctx: &FaultCtx) -> Result<Vma, FindError> {
        let vma = self.mm.find_vma(at)?.filter(|vma| vma.span.contains(at));
        let vma = vma.ok_or(FindError::NoMapping { at })?;
        if !vma.readable {
            return Err(FindError::NotReadable { at });
        }
        if !ctx.read_only && !vma.writable {
            return Err(FindError::ReadOnly {
                at,
                mapping: vma.span,
            });
        }
        Ok(vma)
    }

    /// The notifier of the window that holds `at`, if there is one, and what it has heard so far.
    fn listen(&self, at: VirtAddr) -> Option<Listening> {
        let window = Span::chunk_of(at, self.config.notifier_size);
        let tree = self.core.tree.lock();
        let notifier = tree.notifiers.get(&window.start()).map(Arc::clone)?;
        Some(Listening {
            notifier,
            unmaps: tree.unmaps,
        })
    }

    /// As `listen`, for the first range of a window.
    fn subscribe(&self, at: VirtAddr) -> Result<Listening, FindError> {
        let notifier = self.notifier_find_or_insert(at);
        Ok(Listening {
            notifier: notifier.ok_or(FindError::Closed)?,
            unmaps: self.core.tree.lock().unmaps,
        })
    }

    fn insert(
        &self,
        at: VirtAddr,
        (vma, mirror): (Vma, Mirror),
        (can_migrate, ctx): (bool, &FaultCtx),
        listening: Listening,
    ) -> Result<Arc<Range<M>>, FindError> {
        let Listening { notifier, unmaps } = listening;
        let no_chunk = FindError::NoChunk {
            at,
            mapping: vma.span,
        };
        let bounds = vma.span.intersection(notifier.window());
        let bounds = bounds
            .and_then(|bounds| bounds.intersection(mirror.span()))
            .and_then(|bounds| {
                ctx.within
                    .map_or(Some(bounds), |it| bounds.intersection(it))
            })
            .ok_or(no_chunk)?;
        let mut tree = self.core.tree.lock();
        if tree.closed {
            return Err(FindError::Closed);
        }
        if let Some(range) = tree.overlapping(Span::page_of(at)).next() {
            return Ok(Arc::clone(range));
        }
        let free = |chunk| tree.overlapping(chunk).next().is_none();
        let largest = ctx.largest_chunk.unwrap_or(ByteSize::new(u64::MAX));
        let sizes = &self.config.chunk_sizes;
        // The smallest always may.
        let first = sizes
            .partition_point(|size| *size > largest)
            .min(sizes.len() - 1);
        let chunk = chunk::choose(at, bounds, &sizes[first..], free).ok_or(no_chunk)?;
        let range = Arc::new(Range::new(
            chunk,
            notifier,
            can_migrate,
            self.core.ops.len(),
        ));
        if tree.unmaps == unmaps {
            tree.ranges.insert(range.span().start(), Arc::clone(&range));
        } else {
            // A mapping went meanwhile, perhaps this one: nobody would tell the range any more.
            range.set_removed();
        }
        Ok(range)
    }

    /// Lets pages leave the range: before any of them does, its memory must be watched. `false` when
    /// the range is gone.
    ///
    /// # Errors
    ///
    /// What the address space refused.
    pub fn range_arm(&self, range: &Range<M>, _serving: &Serving<'_>) -> Result<bool, FindError> {
        if range.can_migrate() && !range.is_armed() {
            range.set_armed(self.mm.arm(range.span())?);
        }
        // Removed meanwhile: whoever removed it may have looked for something to disarm too early.
        if range.is_gone() {
            self.disarm(range);
            return Ok(false);
        }
        Ok(true)
    }

    /// The notifier of the window that holds `at`. Subscribed outside the tree lock. `None` when the
    /// mirror is closed.
    fn notifier_find_or_insert(&self, at: VirtAddr) -> Option<Arc<IntervalNotifier>> {
        let window = Span::chunk_of(at, self.config.notifier_size);
        if let Some(notifier) = self.core.tree.lock().notifiers.get(&window.start()) {
            return Some(Arc::clone(notifier));
        }
        let subscriber: Arc<dyn Subscriber> = Arc::clone(&self.core) as _;
        let new = self.mm.notifiers().subscribe(window, subscriber);
        let (kept, surplus) = {
            let mut tree = self.core.tree.lock();
            match tree.notifiers.get(&window.start()) {
                Some(first) => (Some(Arc::clone(first)), Some(new)),
                None if tree.closed => (None, Some(new)),
                None => {
                    tree.notifiers.insert(window.start(), Arc::clone(&new));
                    (Some(new), None)
                }
            }
        };
        if let Some(surplus) = surplus {
            self.mm.notifiers().unsubscribe(&surplus);
        }
        kept
    }

    /// Takes a range out of the tree, if it is there.
    pub(crate) fn forget(&self, range: &Arc<Range<M>>) {
        let mut tree = self.core.tree.lock();
        if tree
            .ranges
            .get(&range.span().start())
            .is_some_and(|found| Arc::ptr_eq(found, range))
        {
            tree.ranges.remove(&range.span().start());
        }
    }
}
