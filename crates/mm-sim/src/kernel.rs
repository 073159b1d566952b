//! What the kernel knows of the process: mappings, and which frame is where.
//!
//! ```text
//!   vmas    [ Mirrored rw )   [ Private r )        what may be touched
//!   pages    F F Z . . F       F                   F frame, Z zero page, . nothing yet, or elsewhere
//!   parts   [ region      )                        what the engine mirrors
//!   jobs    Unmapped, Remapped ...                 what the engine has yet to hear of
//! ```
//!
//! One lock guards all of it, and is never held across a yield. So whatever is done under it in one
//! go is one step of the world.

use crate::events::Job;
use crate::frame::{FrameRef, Frames, PAGE_BYTES};
use crate::region::{Parts, Region};
use gpusvm_mm::{ArmToken, Seen, Vma, VmaKind};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{BLOCK_SIZE, ByteSize, PAGE_SIZE, PageCount, PageIndex, Span, VirtAddr};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prot {
    /// Nothing.
    None,
    /// Reads.
    Read,
    /// Reads and writes.
    ReadWrite,
}

/// What is behind a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory that the engine mirrors.
    Mirrored,
    /// Private anonymous memory that it does not.
    Private,
    /// Memory that is mapped in place only, as files and shared memory are.
    Shared,
}

/// A mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapping {
    pub(crate) span: Span,
    pub(crate) prot: Prot,
    pub(crate) kind: VmaKind,
    /// It is about to go: who asks does not find it, who has it uses it a moment longer.
    pub(crate) going: bool,
}

/// What the page table has for a page; nothing if it was never touched, or is elsewhere.
#[derive(Clone, Debug)]
pub(crate) enum Pte {
    /// The zero page: reads are zero, a write allocates.
    Zero,
    Frame(FrameRef),
    /// The page is lost.
    Poisoned,
}

/// What the kernel does not do for a thread that touches a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Nothing is mapped, or not so.
    Segv,
    /// The page is lost.
    Bus,
    /// The engine is asked: the page is missing, or protected and to be written.
    Missing,
}

#[derive(Debug)]
pub(crate) struct Kernel {
    vmas: BTreeMap<VirtAddr, Mapping>,
    pub(crate) pages: BTreeMap<PageIndex, Pte>,
    /// Blocks whose pages are one huge page.
    pub(crate) huge: BTreeSet<VirtAddr>,
    pub(crate) pinned: BTreeSet<PageIndex>,
    /// Pages that are there and cannot be written before the engine was asked.
    pub(crate) protected: BTreeSet<PageIndex>,
    pub(crate) parts: Parts,
    pub(crate) jobs: VecDeque<Job>,
    pub(crate) frames: Frames,
    /// What must not happen, and did.
    pub(crate) lost: Vec<String>,
    /// Children may have frames that the parent has no more.
    pub(crate) has_forked: bool,
    wants_huge: bool,
    next_free: VirtAddr,
    next_token: u64,
}

impl Kernel {
    pub(crate) fn new(wants_huge: bool) -> Self {
        Self {
            vmas: BTreeMap::new(),
            pages: BTreeMap::new(),
            huge: BTreeSet::new(),
            pinned: BTreeSet::new(),
            protected: BTreeSet::new(),
            parts: Parts::default(),
            jobs: VecDeque::new(),
            frames: Frames::default(),
            lost: Vec::new(),
            has_forked: false,
            wants_huge,
            next_free: VirtAddr::new(0x10_0000_0000),
            next_token: 1,
        }
    }

    /// A span that was never used, with a page between it and others. Large ones are aligned.
    pub(crate) fn free_span(&mut self, pages: PageCount, aligned: bool) -> Span {
        let len = pages.bytes();
        let align = if aligned || len >= BLOCK_SIZE {
            BLOCK_SIZE
        } else {
            PAGE_SIZE
        };
        let start = self
            .next_free
            .align_up(align)
            .expect("addresses never run out");
        let span = Span::from_len(start, len).expect("a mapping has a page");
        self.next_free = span.end() + PAGE_SIZE;
        span
    }

    /// Words for a span that is mirrored from now on.
    pub(crate) fn new_region(&mut self, span: Span) -> Arc<Region> {
        self.next_token += 1;
        Region::new(span, ArmToken(self.next_token))
    }

    pub(crate) fn map(&mut self, mapping: Mapping) {
        // Addresses that were asked for are not given to others later.
        if mapping.span.end() >= self.next_free {
            self.next_free = mapping.span.end() + PAGE_SIZE;
        }
        self.vmas.insert(mapping.span.start(), mapping);
    }

    /// The mapping that holds `at`.
    pub(crate) fn mapping(&self, at: VirtAddr) -> Option<&Mapping> {
        let (_, mapping) = self.vmas.range(..=at).next_back()?;
        mapping.span.contains(at).then_some(mapping)
    }

    /// The mapping that holds `at`, or the next one above, for who asks.
    pub(crate) fn find_vma(&self, at: VirtAddr) -> Option<Vma> {
        let stays = |mapping: &&Mapping| !mapping.going && mapping.span.end() > at;
        let mapping = self.vmas.values().find(stays)?;
        Some(Vma {
            span: mapping.span,
            readable: mapping.prot != Prot::None,
            writable: mapping.prot == Prot::ReadWrite,
            kind: mapping.kind,
        })
    }

    /// Where a page is, for who only looks.
    pub(crate) fn see(&self, page: PageIndex) -> Seen {
        let at = page.start();
        if self.mapping(at).is_none_or(|mapping| mapping.going) {
            return Seen::Unmapped;
        }
        let part = self.parts.find(at);
        if let Some(told) = part.and_then(|part| Seen::by_word(part.region.word(page).get().home()))
        {
            return told;
        }
        match self.pages.get(&page) {
            Some(Pte::Frame(_) | Pte::Zero | Pte::Poisoned) => Seen::System,
            // It was moved here, and is perhaps on a device: the engine will know in a moment.
            None if part.is_none() && self.is_arriving(at) => Seen::Moving,
            None => Seen::Absent,
        }
    }

    /// The mappings in `span`, cut to it.
    pub(crate) fn mappings_in(&self, span: Span) -> Vec<Mapping> {
        let cut = |mapping: &Mapping| {
            let span = mapping.span.intersection(span)?;
            Some(Mapping { span, ..*mapping })
        };
        self.vmas.values().filter_map(cut).collect()
    }

    /// Changes the mappings in `span`, which are split where it begins and ends; none removes.
    pub(crate) fn change(&mut self, span: Span, change: impl Fn(Mapping) -> Option<Mapping>) {
        let touched: Vec<Mapping> = self.vmas.values().copied().collect();
        for whole in touched {
            let Some(inside) = whole.span.intersection(span) else {
                continue;
            };
            self.vmas.remove(&whole.span.start());
            let rest = whole.span.without(inside).into_iter().flatten();
            let rest = rest.map(|span| Mapping { span, ..whole });
            let changed = change(Mapping {
                span: inside,
                ..whole
            });
            for mapping in rest.chain(changed) {
                self.vmas.insert(mapping.span.start(), mapping);
            }
        }
    }

    /// Drops the pages of `span`.
    pub(crate) fn zap(&mut self, span: Span) {
        self.split_huge(span);
        let first = span.first_page();
        let pages = self.pages.range(first..first + span.page_count());
        let pages: Vec<PageIndex> = pages.map(|(page, _)| *page).collect();
        for page in pages {
            self.pages.remove(&page);
            self.protected.remove(&page);
        }
    }

    /// Pages of `span` can be written.
    pub(crate) fn unprotect(&mut self, span: Span) {
        for page in span.pages() {
            self.protected.remove(&page);
        }
    }

    /// Moves pages to another address.
    pub(crate) fn move_pages(&mut self, from: Span, to: VirtAddr) {
        let stays_huge = from.start().get() % BLOCK_SIZE.get() == to.get() % BLOCK_SIZE.get();
        for piece in from.blocks() {
            let offset = piece.start().offset_from(from.start());
            if self.huge.remove(&piece.block_start()) && stays_huge && piece.len() == BLOCK_SIZE {
                self.huge.insert(to + offset);
            }
        }
        for (old, new) in from
            .pages()
            .zip((0..).map(|i| to.page() + PageCount::new(i)))
        {
            if let Some(pte) = self.pages.remove(&old) {
                self.pages.insert(new, pte);
            }
            if self.pinned.remove(&old) {
                self.pinned.insert(new);
            }
            // As with userfaultfd: what is protected stays so, wherever it is.
            if self.protected.remove(&old) {
                self.protected.insert(new);
            }
        }
    }

    /// Puts a frame where nothing is. The frame comes back if there is no room for it.
    ///
    /// # Errors
    ///
    /// `ENOENT` without a mapping, `EEXIST` when something is there.
    pub(crate) fn put(&mut self, page: PageIndex, frame: &FrameRef) -> Result<(), i32> {
        if self.mapping(page.start()).is_none() {
            return Err(2);
        }
        match self.pages.get(&page) {
            Some(Pte::Frame(_) | Pte::Poisoned) => return Err(17),
            Some(Pte::Zero) | None => {}
        }
        self.pages.insert(page, Pte::Frame(Arc::clone(frame)));
        Ok(())
    }

    /// The pages of a block are one again, if all of them came back as they went.
    pub(crate) fn join_huge(&mut self, block: Span) {
        let is_frame = |page| matches!(self.pages.get(&page), Some(Pte::Frame(_)));
        if block.len() == BLOCK_SIZE && block.pages().all(is_frame) {
            self.huge.insert(block.start());
        }
    }

    /// Pages of `span` change one by one.
    pub(crate) fn split_huge(&mut self, span: Span) {
        for piece in span.blocks() {
            self.huge.remove(&piece.block_start());
        }
    }

    /// A touch of a page by a thread, which the kernel serves if it can.
    ///
    /// # Errors
    ///
    /// What it refuses.
    pub(crate) fn touch<T>(
        &mut self,
        at: VirtAddr,
        write: bool,
        act: impl FnOnce(&mut [u8; PAGE_BYTES]) -> T,
    ) -> Result<T, Refused> {
        let prot = self.mapping(at).map(|mapping| mapping.prot);
        match prot {
            Some(Prot::ReadWrite) => {}
            Some(Prot::Read) if !write => {}
            _ => return Err(Refused::Segv),
        }
        let page = at.page();
        if !self.pages.contains_key(&page) {
            match self.parts.find(at) {
                Some(part) => {
                    if part.region.block(at).registered.load(Ordering::Acquire) {
                        return Err(Refused::Missing);
                    }
                    part.region.word(page).saw_hole();
                }
                None if self.is_arriving(at) => return Err(Refused::Missing),
                None => {}
            }
            self.fill(page, write);
        }
        if write && self.protected.contains(&page) {
            if self.parts.find(at).is_some() {
                return Err(Refused::Missing);
            }
            // Nobody's any more, or not known yet: nobody has copies of it.
            self.protected.remove(&page);
        }
        self.with_page(page, write, act).ok_or(Refused::Bus)
    }

    /// Reads or writes a page that is there, or a hole. `None` when the page is lost.
    pub(crate) fn with_page<T>(
        &mut self,
        page: PageIndex,
        write: bool,
        act: impl FnOnce(&mut [u8; PAGE_BYTES]) -> T,
    ) -> Option<T> {
        match self.pages.get_mut(&page) {
            Some(Pte::Poisoned) => return None,
            Some(Pte::Frame(frame)) if write => {
                return Some(act(Arc::make_mut(frame).bytes_mut()));
            }
            Some(Pte::Frame(frame)) => return Some(act(&mut frame.bytes().clone())),
            Some(Pte::Zero) | None if !write => return Some(act(&mut [0; PAGE_BYTES])),
            Some(Pte::Zero) | None => {}
        }
        let mut frame = self.frames.zeroed();
        let result = act(Arc::make_mut(&mut frame).bytes_mut());
        self.pages.insert(page, Pte::Frame(frame));
        Some(result)
    }

    /// The kernel fills a page that was never touched, or all of its block as one.
    fn fill(&mut self, page: PageIndex, write: bool) {
        let block = Span::block_of(page.start());
        let first = block.first_page();
        let is_empty = |kernel: &Self| {
            let mut pages = kernel.pages.range(first..first + block.page_count());
            pages.next().is_none()
        };
        let covers = |span: Span| span.covers(block);
        let part = self.parts.find(page.start());
        if write
            && self.wants_huge
            && part.is_some_and(|part| covers(part.span))
            && self
                .mapping(page.start())
                .is_some_and(|vma| covers(vma.span))
            && is_empty(self)
        {
            for page in block.pages() {
                let frame = self.frames.zeroed();
                self.pages.insert(page, Pte::Frame(frame));
            }
            self.huge.insert(block.start());
        } else if !write {
            self.pages.insert(page, Pte::Zero);
        }
    }

    /// Whether `at` is where something was remapped to that the engine has yet to hear of.
    pub(crate) fn is_arriving(&self, at: VirtAddr) -> bool {
        self.jobs.iter().any(|job| match *job {
            Job::Remapped { from, to, .. } => {
                Span::from_len(to, from.len()).is_ok_and(|there| there.contains(at))
            }
            _ => false,
        })
    }
}

/// Where `page` of `from` is when `from` is at `to`.
pub(crate) fn translate(page: PageIndex, from: Span, to: VirtAddr) -> Option<PageIndex> {
    if !from.contains(page.start()) {
        return None;
    }
    let offset: ByteSize = page.start().offset_from(from.start());
    Some(to.checked_add(offset)?.page())
}

/// The start of the block that a piece of it lies in.
trait InBlock {
    fn block_start(&self) -> VirtAddr;
}

impl InBlock for Span {
    fn block_start(&self) -> VirtAddr {
        self.start().block_start()
    }
}
