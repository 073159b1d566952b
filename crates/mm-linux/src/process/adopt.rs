//! What is mirrored: memory allocated here, and memory adopted.

use super::Process;
use crate::block::BlockGuard;
use crate::let_go::Listening;
use crate::region::{Behind, Region};
use crate::sys::map::Request;
use crate::sys::procmap::RawVma;
use crate::sys::thp::Thp;
use gpusvm_mm::{AddressSpace, ArmToken, Block, FaultOutcome, MmError, Reason, Wanted};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{BLOCK_SIZE, ByteSize, Span, VirtAddr};
use rustix::io::Errno;

/// Why memory cannot be mirrored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// Nothing to mirror: no whole page.
    #[error("no whole page is in {len} at {at}")]
    Empty {
        /// Where.
        at: VirtAddr,
        /// How long.
        len: ByteSize,
    },
    /// Not all of it is mapped.
    #[error("{at} is not mapped")]
    Unmapped {
        /// The first address that is not.
        at: VirtAddr,
    },
    /// Shared memory, devices and huge pages of hugetlbfs cannot move.
    #[error("{mapping} is not private memory")]
    NotAnonymous {
        /// The mapping that is not.
        mapping: Span,
    },
    /// The kernel does not tell of touches of pages of this file: only private mappings of shared memory
    /// (tmpfs, `memfd`) can be mirrored, from Linux 6.11 on.
    #[error("{mapping} is a private mapping of a file that userfaultfd does not watch")]
    FileNotWatched {
        /// The mapping of the file.
        mapping: Span,
    },
    /// Nobody may read it, so no device may: let it be read first.
    #[error("{mapping} is not readable")]
    NotReadable {
        /// The mapping that is not.
        mapping: Span,
    },
    /// Some of it is mirrored already, and cannot come home; or another thread adopts it now.
    #[error("{other} is mirrored already")]
    Overlaps {
        /// What is mirrored.
        other: Span,
    },
    /// A userfaultfd of the program, or of another engine, has this mapping: there can be one.
    #[error("{span} is registered with another userfaultfd")]
    Taken {
        /// What of it was to be mirrored.
        span: Span,
    },
    /// The last rung hears of no unmapping, so only memory allocated here can be mirrored on it.
    #[error("memory of others cannot be mirrored without userfaultfd: allocate it here")]
    NotOnThisRung,
    /// No memory for it, or more than an address space holds.
    #[error("no memory for {len}")]
    NoMemory {
        /// What was asked for.
        len: ByteSize,
    },
    /// The engine has ended, or this is a child of fork.
    #[error("the engine is gone")]
    Gone,
}

impl Process {
    /// Allocates mirrored memory: zeroed, private, as huge pages where the system allows them.
    ///
    /// # Errors
    ///
    /// `Empty` for no bytes, `NoMemory`, `Gone`.
    pub fn allocate(&self, len: ByteSize) -> Result<Span, AdoptError> {
        let no_memory = AdoptError::NoMemory { len };
        if len.is_zero() {
            return Err(AdoptError::Empty {
                at: VirtAddr::new(0),
                len,
            });
        }
        // More than any address space: sizes beyond it must not overflow further down.
        if len > ByteSize::new(1 << 47) {
            return Err(no_memory);
        }
        if self.is_gone() {
            return Err(AdoptError::Gone);
        }
        let request = Request::new(len);
        let large = len >= BLOCK_SIZE;
        let request = if large { request.aligned() } else { request };
        let request = if large && Thp::read() != Thp::Never {
            request.huge()
        } else {
            request
        };
        let mapping = request.map().map_err(|_| no_memory)?;
        let span = mapping.span();
        // What was unmapped there before must be out of the table, heard of or not.
        self.settle_ends(span);
        self.take_over(span)?;
        self.mirror(span, Behind::Zeroes)
            .map_err(|error| match error {
                AdoptError::NoMemory { .. } => no_memory,
                other => other,
            })?;
        self.owned.lock().push(mapping);
        Ok(span)
    }

    /// Gives memory of `allocate` back: all of it, which must be what one call returned.
    pub fn free(&self, span: Span) {
        if !self.is_gone() {
            self.unmirror(span);
        }
        if self.is_inherited() {
            return self.free_inherited(span);
        }
        let mapping = {
            let mut owned = self.owned.lock();
            let at = owned.iter().position(|mapping| mapping.span() == span);
            at.map(|at| owned.swap_remove(at))
        };
        debug_assert!(mapping.is_some(), "{span} was not allocated here");
    }

    /// The child's own copy goes, if no thread of the parent was allocating or freeing at the fork.
    fn free_inherited(&self, span: Span) {
        if let Some(mut owned) = self.owned.try_lock() {
            owned.retain(|mapping| mapping.span() != span);
        }
    }

    /// Mirrors memory of the program: the whole pages in `len` bytes at `at`, which must be private,
    /// and readable. It stays the program's, to use and to unmap.
    ///
    /// Memory that can be read only migrates as well: by a copy, since the kernel moves only what can be
    /// written. What may be done with it can change at any time ([`Process::protect`]).
    ///
    /// A private mapping of shared memory (a file of tmpfs, `memfd`) can be adopted as well. Pages that the
    /// program has written are its own, and migrate; the others are the file's, and are used in place. Of
    /// a page that the file does not have, and that was read when a device had been there, the program keeps
    /// zeroes, whatever is written to the file afterwards. Private mappings of other files are refused: the
    /// kernel would show the file's page where one of the program's is on a device, and tell nobody.
    ///
    /// What of the span was adopted before is taken over: it comes home, and the earlier adoption ends.
    /// It can be other memory by now, since no event tells of memory that is unmapped while no device
    /// uses it.
    ///
    /// `mremap` moves one mapping of the kernel at a time, and a block of 2 MiB that a device uses is one of
    /// its own, because it is registered with userfaultfd: `mremap` of such a block together with others is
    /// `EFAULT`, and changes nothing. Adopt it with [`Process::adopt_as_one`], or [`Process::unadopt`]
    /// first, and adopt the new place.
    ///
    /// # Errors
    ///
    /// See [`AdoptError`]: each names what is wrong with which part.
    pub fn adopt(&self, at: VirtAddr, len: ByteSize) -> Result<Span, AdoptError> {
        self.adopt_mapping(at, len).map(|(span, _)| span)
    }

    /// As [`Process::adopt`], memory that the program moves: one mapping of the kernel remains one,
    /// whichever blocks devices use, so that `mremap` moves all of it, or any part.
    ///
    /// It is registered with userfaultfd as a whole when a device first needs any of it, or somebody watches
    /// any of it, until the adoption ends, by [`Process::unadopt`], [`Process::stop`] or `munmap`; also where
    /// it moves. The price: as long as it is, each first touch of 64 KiB by the CPU is a message to another
    /// thread: filled page by page, fresh memory takes 1.7 times as long (`examples/migration_cost.rs`, rung
    /// 1); and no huge pages come where nothing was before. On the rung of user mode a system call on pages that
    /// nobody has touched fails with `EFAULT`.
    ///
    /// What was several mappings before, as by `mprotect` of a part, or becomes so, is not made one.
    ///
    /// # Errors
    ///
    /// As [`Process::adopt`].
    pub fn adopt_as_one(&self, at: VirtAddr, len: ByteSize) -> Result<Span, AdoptError> {
        let (span, regions) = self.adopt_mapping(at, len)?;
        regions.iter().for_each(|region| self.becomes_one(region));
        Ok(span)
    }

    fn adopt_mapping(
        &self,
        at: VirtAddr,
        len: ByteSize,
    ) -> Result<(Span, Vec<Arc<Region>>), AdoptError> {
        if self.is_gone() {
            return Err(AdoptError::Gone);
        }
        if self.rung == crate::Rung::Signals {
            return Err(AdoptError::NotOnThisRung);
        }
        let span = Span::inside(at, len).map_err(|_| AdoptError::Empty { at, len })?;
        // What was unmapped there before must be out of the table, whoever did it.
        self.settle_ends(span);
        let pieces = self.check_adoptable(span)?;
        self.take_over(span)?;
        let mut regions = Vec::with_capacity(pieces.len());
        for (piece, behind) in pieces {
            let adopted = self.adopt_piece(piece, behind);
            if let (Err(_), Ok(before)) = (&adopted, Span::new(span.start(), piece.start())) {
                let _ = self.unadopt(before);
            }
            regions.push(adopted?);
        }
        Ok((span, regions))
    }

    /// Memory of one kind.
    fn adopt_piece(&self, piece: Span, behind: Behind) -> Result<Arc<Region>, AdoptError> {
        let region = self.mirror(piece, behind)?;
        // Registered once, to hear of trouble now rather than in a device's fault.
        let refused = match self.arm(piece) {
            Ok(token) => {
                self.disarm(piece, token);
                return Ok(region);
            }
            Err(error) => error,
        };
        let error = self.why_refused(piece, behind, &refused);
        // A device may have taken pages of the blocks before the one that was refused.
        let _ = self.unadopt(piece);
        Err(error)
    }

    fn why_refused(&self, piece: Span, behind: Behind, refused: &MmError) -> AdoptError {
        match *refused {
            MmError::Gone => AdoptError::Gone,
            MmError::System { errno, .. }
                if behind == Behind::File && errno == Errno::INVAL.raw_os_error() =>
            {
                AdoptError::FileNotWatched { mapping: piece }
            }
            MmError::System { errno, .. } if errno == Errno::NOMEM.raw_os_error() => {
                AdoptError::NoMemory { len: piece.len() }
            }
            MmError::System { span, .. } => AdoptError::Taken {
                span: self.taken_of(piece, span, behind),
            },
            _ => AdoptError::Taken { span: piece },
        }
    }

    /// The part of `piece` that is a mapping which another userfaultfd has, in the block that was refused.
    /// Nothing of that block is registered.
    fn taken_of(&self, piece: Span, block: Span, behind: Behind) -> Span {
        let mut rest = piece.intersection(block);
        while let Some(left) = rest {
            let vma = self.vmas.find(left.start()).ok().flatten();
            let Some((mapping, here)) = vma
                .filter(|vma| vma.span.contains(left.start()))
                .and_then(|vma| Some((vma.span, vma.span.intersection(left)?)))
            else {
                break;
            };
            if self.mover.arm(here, behind) == Err(Errno::BUSY) {
                return mapping.intersection(piece).unwrap_or(here);
            }
            self.mover.disarm(here);
            rest = Span::new(here.end(), left.end()).ok();
        }
        piece
    }

    /// Ends `adopt`: everything comes home and is forgotten.
    ///
    /// # Errors
    ///
    /// The first page that could not come home; then all of it stays mirrored, or, if devices still
    /// take pages meanwhile, what comes behind it.
    pub fn unadopt(&self, span: Span) -> Result<(), MmError> {
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        self.bring_parts_home(span, Wanted::Asked)?;
        for part in self.regions.parts_in(span) {
            for piece in part.span.blocks() {
                self.unmirror_at_home(piece)?;
            }
        }
        Ok(())
    }

    /// As [`Process::unadopt`], of the adoption with this token only.
    ///
    /// # Errors
    ///
    /// As [`Process::unadopt`].
    pub fn unadopt_if(&self, span: Span, token: ArmToken) -> Result<(), MmError> {
        self.check_ours()?;
        match self.adoption_of(span.start()) {
            Some(now) if now == token => self.unadopt(span),
            _ => Ok(()),
        }
    }

    /// What tells the adoption of an address from those before and after it.
    pub fn adoption_of(&self, at: VirtAddr) -> Option<ArmToken> {
        self.check_ours().ok()?;
        Some(self.regions.find(at)?.region.token())
    }

    /// Ends earlier adoptions of `span`.
    fn take_over(&self, span: Span) -> Result<(), AdoptError> {
        for part in self.regions.parts_in(span) {
            let other = part.region.span();
            self.unadopt(part.span)
                .map_err(|_| AdoptError::Overlaps { other })?;
        }
        Ok(())
    }

    /// The longest pieces of `span` that are memory of one kind.
    fn check_adoptable(&self, span: Span) -> Result<Vec<(Span, Behind)>, AdoptError> {
        let mut pieces: Vec<(Span, Behind)> = Vec::new();
        let mut at = span.start();
        while at < span.end() {
            let vma = self.vmas.find(at).map_err(|_| AdoptError::Gone)?;
            let vma = vma.filter(|vma| vma.span.contains(at));
            let vma = vma.ok_or(AdoptError::Unmapped { at })?;
            let behind = self.behind(&vma)?;
            if !vma.read {
                return Err(AdoptError::NotReadable { mapping: vma.span });
            }
            let from = match pieces.pop_if(|(_, last)| *last == behind) {
                Some((last, _)) => last.start(),
                None => at,
            };
            at = vma.span.end();
            let piece = Span::new(from, at.min(span.end())).expect("the mapping holds its start");
            pieces.push((piece, behind));
        }
        Ok(pieces)
    }

    /// What is behind pages of a mapping that nobody has written.
    fn behind(&self, vma: &RawVma) -> Result<Behind, AdoptError> {
        let mapping = vma.span;
        if vma.is_plain() {
            return Ok(Behind::Zeroes);
        }
        if !vma.private_file {
            return Err(AdoptError::NotAnonymous { mapping });
        }
        // Without the query it is not known whether it is hugetlbfs.
        match self.mover.can_watch_files() && self.vmas.has_query() {
            true => Ok(Behind::File),
            false => Err(AdoptError::FileNotWatched { mapping }),
        }
    }

    fn mirror(&self, span: Span, behind: Behind) -> Result<Arc<Region>, AdoptError> {
        let no_memory = |_: Errno| AdoptError::NoMemory { len: span.len() };
        let region = Region::new(span, behind, &self.room)
            .map(Arc::new)
            .map_err(no_memory)?;
        self.regions
            .insert(Arc::clone(&region))
            .map_err(|other| AdoptError::Overlaps { other })?;
        // Devices may have mapped it in place: from now on it can move. Afterwards, so that a range
        // that is made meanwhile is either told, or finds it mirrored.
        self.notifiers.invalidate(&gpusvm_mm::Invalidation {
            span,
            reason: Reason::Unmap,
        });
        Ok(region)
    }

    /// Forgets a mirrored span: what devices have of it is dropped, nothing is registered any more.
    pub(super) fn unmirror(&self, span: Span) {
        for part in self.regions.parts_in(span) {
            for piece in part.span.blocks() {
                if let Ok(block) = BlockGuard::lock(self, piece.start()) {
                    self.forget(&block, piece);
                }
            }
        }
        self.regions.remove(span);
    }

    /// Forgets a piece of a block, of which every page is at home then.
    fn unmirror_at_home(&self, piece: Span) -> Result<(), MmError> {
        loop {
            let Ok(mut block) = BlockGuard::lock(self, piece.start()) else {
                return Ok(());
            };
            // A device may have taken pages since they came home. None does as long as it is locked.
            match block.bring_home(piece, Wanted::Asked) {
                FaultOutcome::Served => {
                    self.forget(&block, piece);
                    // With the block locked: or somebody arms what is forgotten, and nobody ends that.
                    self.regions.remove(piece);
                    return Ok(());
                }
                FaultOutcome::NotBefore(due) => {
                    drop(block);
                    std::thread::sleep(due.since(self.now()));
                }
                FaultOutcome::Failed => {
                    return Err(MmError::StuckOnDevice { at: piece.start() });
                }
            }
        }
    }

    fn forget(&self, block: &BlockGuard<'_>, piece: Span) {
        // Another part of the block may stay mirrored: it stays armed.
        let Some(piece) = piece.intersection(block.span()) else {
            return;
        };
        for word in block.region.words_in(piece) {
            word.unmap();
        }
        block.invalidate(piece, Reason::Unmap);
        block.release_unmapped(piece);
        // What is one with it must not be registered together with it any more.
        let _alone = block.region.as_one.alone();
        if block.state().registered.load(Ordering::Relaxed) {
            let _ = block.let_go(piece, Listening::ToTouches);
        } else if block.state().watched.load(Ordering::Relaxed) {
            let _ = block.let_go(piece, Listening::ToItsEnd);
        }
    }
}
