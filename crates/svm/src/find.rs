//! The range of a fault: `drm_gpusvm_range_find_or_insert`.
//!
//! ```text
//!   found, inside the bounds ----------------------------------------> it
//!   found, reaches out of them --------------------------------------> Wider: the caller removes it
//!   listen -> look at the mapping -> which pages are there? -> insert, unless some of it went meanwhile
//! ```

use crate::chunk::{self, Limits};
use crate::range::Serving;
use crate::tree::LookId;
use crate::{FindError, GpuSvm, Permission, Range};
use alloc::{sync::Arc, vec, vec::Vec};
use core::time::Duration;
use gpusvm_mm::{AddressSpace, IntervalNotifier, Mirror, Seen, Subscriber, Vma};
use gpusvm_pagemap::PagemapAddr;
use gpusvm_types::{ByteSize, OwnerId, PAGE_SIZE, Span, VirtAddr};

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
    /// Whether the device's atomic operations may work on pages in RAM.
    pub atomics_on_ram: bool,
    /// Whether they may work on pages in device memory.
    pub atomics_on_devmem: bool,
    /// Whether a range may be mapped with pages of RAM and of a device memory at once.
    pub allow_mixed: bool,
    /// A new range up to this size is made only where every page is there already, in RAM or on a device;
    /// else a smaller one is, down to a page. Larger ones are made all the same. Zero, or a page, is no
    /// check at all.
    ///
    /// The kernel needs it to not fault in what the CPU never touched. Here a page that is not there is
    /// not faulted in when its range moves, it is cleared on the device; so the check saves nothing by
    /// itself, and costs a look at the pages and more, smaller ranges.
    pub check_pages_threshold: ByteSize,
    /// How long migrated pages stay.
    pub timeslice: Duration,
    /// What a new range must not reach out of, besides its mapping and what is bound. A range that is
    /// there is returned however far it reaches.
    pub within: Option<Span>,
    /// The largest that a new range may be, if not as large as fits.
    pub largest_chunk: Option<ByteSize>,
}

impl Default for FaultCtx {
    /// A write by nobody in particular, to pages that may be anywhere.
    fn default() -> Self {
        Self {
            owner: None,
            read_only: false,
            devmem_possible: true,
            devmem_only: false,
            atomics_on_ram: true,
            atomics_on_devmem: true,
            allow_mixed: true,
            check_pages_threshold: ByteSize::ZERO,
            timeslice: Duration::ZERO,
            within: None,
            largest_chunk: None,
        }
    }
}

impl FaultCtx {
    /// What a page at `address`, of a mapping that is writable or not, may be mapped with.
    pub(crate) const fn permission_on(&self, address: &PagemapAddr, writable: bool) -> Permission {
        let atomics = match address {
            PagemapAddr::System(_) => self.atomics_on_ram,
            PagemapAddr::Vram(_) | PagemapAddr::Peer(_) => self.atomics_on_devmem,
        };
        match (writable, atomics) {
            (true, true) => Permission::Atomic,
            (true, false) => Permission::Write,
            (false, _) => Permission::Read,
        }
    }
}

/// Whoever looks at a mapping hears of what happens to it meanwhile. Dropped without locks.
#[derive(Debug)]
struct Listening<'a, M: AddressSpace> {
    svm: &'a GpuSvm<M>,
    notifier: Arc<IntervalNotifier>,
    look: LookId,
}

impl<M: AddressSpace> Drop for Listening<'_, M> {
    fn drop(&mut self) {
        let idle = {
            let mut tree = self.svm.core.tree.lock();
            tree.end_look(self.look);
            tree.take_idle(self.notifier.window())
        };
        self.svm.unsubscribe(idle);
    }
}

impl<M: AddressSpace> GpuSvm<M> {
    /// The range that holds `at`; a new one, as large as fits, if there is none. It may be gone again
    /// already: see [`Range::is_gone`].
    ///
    /// A range that is made lies in `within`: the part of the device address space that is bound to the
    /// process (`gpuva_start`, `gpuva_end`). One that was made when more was bound, or for another
    /// device, can reach further. It is not returned, since its pages would be mapped where they must
    /// not be, and it is not removed either, since other devices lose it too and that is not for a
    /// look-up to decide: the error names it, the caller removes it ([`GpuSvm::range_remove`]) and asks
    /// again. Whoever changes what is bound removes the ranges that reach over the new borders himself;
    /// then only faults that are under way meet one.
    ///
    /// # Errors
    ///
    /// `Outside` (`EINVAL`), `NoMapping` (`ENOENT`), `ReadOnly` (`EPERM`), `NotReadable` (`EFAULT`),
    /// `Wider` (`EAGAIN`), `NoChunk` (`EINVAL`), `Closed` (`EFAULT`), and what the address space refused.
    pub fn range_find_or_insert(
        &self,
        at: VirtAddr,
        within: Span,
        ctx: &FaultCtx,
    ) -> Result<Arc<Range<M>>, FindError> {
        gpusvm_sync::walk!("range_find_or_insert");
        if !within.contains(at) {
            return Err(FindError::Outside { at, within });
        }
        if let Some(range) = self.range_find(at).filter(|range| !range.is_unmapped()) {
            self.look(at, ctx)?;
            return inside(range, within);
        }
        // It listens before it looks: a mapping that goes after the look is heard of.
        let known = self.listen(at);
        let vma = self.look(at, ctx)?;
        let (listening, vma) = match known {
            Some(listening) => (listening, vma),
            None => (self.subscribe(at)?, self.look(at, ctx)?),
        };
        let mirror = self.mm.mirrored(at);
        let can_migrate =
            ctx.devmem_possible && vma.kind.can_migrate() && matches!(mirror, Mirror::Mapping(_));
        let no_chunk = FindError::NoChunk {
            at,
            mapping: vma.span,
        };
        let mut bounds = [listening.notifier.window(), mirror.span(), within]
            .into_iter()
            .chain(ctx.within);
        let bounds = bounds.try_fold(vma.span, Span::intersection);
        let limits = Limits {
            bounds: bounds.ok_or(no_chunk)?,
            sizes: self.sizes_up_to(ctx.largest_chunk),
            check_pages_threshold: ctx.check_pages_threshold,
        };
        let there = self.populated(at, &limits)?;
        let range = self.insert(at, (&limits, &there), can_migrate, &listening)?;
        inside(range.ok_or(no_chunk)?, within)
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

    /// Listens in the window that holds `at`, if it has a notifier.
    fn listen(&self, at: VirtAddr) -> Option<Listening<'_, M>> {
        let window = Span::chunk_of(at, self.config.notifier_size);
        let mut tree = self.core.tree.lock();
        let notifier = tree.notifiers.get(&window.start()).map(Arc::clone)?;
        let look = tree.begin_look(self.largest_chunk(at));
        Some(Listening {
            svm: self,
            notifier,
            look,
        })
    }

    /// As `listen`, for the first range of a window: subscribed outside the tree lock.
    fn subscribe(&self, at: VirtAddr) -> Result<Listening<'_, M>, FindError> {
        let window = Span::chunk_of(at, self.config.notifier_size);
        let subscriber: Arc<dyn Subscriber> = Arc::clone(&self.core) as _;
        let new = self.mm.notifiers().subscribe(window, subscriber);
        let (kept, surplus) = {
            let mut tree = self.core.tree.lock();
            let first = tree.notifiers.get(&window.start()).map(Arc::clone);
            let (notifier, surplus) = match first {
                Some(first) => (Some(first), Some(new)),
                None if tree.closed => (None, Some(new)),
                None => {
                    tree.notifiers.insert(window.start(), Arc::clone(&new));
                    (Some(new), None)
                }
            };
            // In one go: from here on the window has somebody who needs its notifier.
            let kept = notifier.map(|notifier| Listening {
                svm: self,
                notifier,
                look: tree.begin_look(self.largest_chunk(at)),
            });
            (kept, surplus)
        };
        self.unsubscribe(surplus);
        kept.ok_or(FindError::Closed)
    }

    /// The sizes of ranges that are not larger than that; the smallest always may be.
    fn sizes_up_to(&self, largest: Option<ByteSize>) -> &[ByteSize] {
        let sizes = &self.config.chunk_sizes;
        let is_larger = |size: &ByteSize| largest.is_some_and(|largest| *size > largest);
        let first = sizes.partition_point(is_larger).min(sizes.len() - 1);
        &sizes[first..]
    }

    /// What a range that holds `at` lies in, whatever it will be.
    fn largest_chunk(&self, at: VirtAddr) -> Span {
        Span::chunk_of(at, self.config.chunk_sizes[0])
    }

    /// Which pages are there, of the largest chunk that is to be looked at for that. Nothing to look at
    /// is the page of `at`.
    fn populated(&self, at: VirtAddr, limits: &Limits<'_>) -> Result<Populated, FindError> {
        let largest = limits.checked_sizes().next().unwrap_or(PAGE_SIZE);
        let span = Span::chunk_of(at, largest).intersection(limits.bounds);
        let span = span.unwrap_or_else(|| Span::page_of(at));
        let mut seen = vec![Seen::Absent; span.page_count().as_usize()];
        if largest > PAGE_SIZE {
            self.mm.snapshot(span, &mut seen)?;
        }
        Ok(Populated { span, seen })
    }

    /// Makes the range, or finds one that was made meanwhile. `None` when not even a page fits.
    fn insert(
        &self,
        at: VirtAddr,
        (limits, there): (&Limits<'_>, &Populated),
        can_migrate: bool,
        listening: &Listening<'_, M>,
    ) -> Result<Option<Arc<Range<M>>>, FindError> {
        let mut tree = self.core.tree.lock();
        if tree.closed {
            return Err(FindError::Closed);
        }
        if let Some(range) = tree.overlapping(Span::page_of(at)).next() {
            return Ok(Some(Arc::clone(range)));
        }
        let free = |chunk| tree.overlapping(chunk).next().is_none();
        let populated = |chunk| there.covers(chunk);
        let Some(chunk) = chunk::choose(at, limits, free, populated) else {
            return Ok(None);
        };
        let range = Arc::new(Range::new(
            chunk,
            Arc::clone(&listening.notifier),
            can_migrate,
            self.core.ops.len(),
        ));
        if tree.is_outdated(listening.look, chunk) {
            // Some of it was unmapped since the look: nobody would tell the range any more.
            range.set_removed();
        } else {
            tree.insert(&range);
        }
        Ok(Some(range))
    }

    /// Lets pages leave the range: before any of them does, its memory must be watched. `false` when
    /// the range is gone.
    ///
    /// # Errors
    ///
    /// What the address space refused.
    pub fn range_arm(&self, range: &Range<M>, _serving: &Serving<'_>) -> Result<bool, FindError> {
        gpusvm_sync::walk!("range_arm");
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
}

/// Which pages were there, of a span.
#[derive(Debug)]
struct Populated {
    span: Span,
    seen: Vec<Seen>,
}

impl Populated {
    /// Whether every page of a piece was.
    fn covers(&self, piece: Span) -> bool {
        let first = self.span.index_of(piece.first_page());
        let seen = &self.seen[first..first + piece.page_count().as_usize()];
        seen.iter().all(|seen| seen.is_populated())
    }
}

/// A range that the caller may have.
fn inside<M: AddressSpace>(range: Arc<Range<M>>, within: Span) -> Result<Arc<Range<M>>, FindError> {
    let span = range.span();
    match within.covers(span) {
        true => Ok(range),
        false => Err(FindError::Wider {
            range: span,
            within,
        }),
    }
}
