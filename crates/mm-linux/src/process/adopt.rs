//! What is mirrored: memory allocated here, and memory adopted.

use super::Process;
use crate::block::BlockGuard;
use crate::let_go::Listening;
use crate::region::Region;
use crate::sys::map::Request;
use crate::sys::thp::Thp;
use gpusvm_mm::{AddressSpace, ArmToken, Block, FaultOutcome, MmError, Reason, VmaKind, Wanted};
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
    /// Files, shared memory and huge pages of hugetlbfs cannot move.
    #[error("{mapping} is not private anonymous memory")]
    NotAnonymous {
        /// The mapping that is not.
        mapping: Span,
    },
    /// It could not be put back where it is read-only.
    #[error("{mapping} is not writable")]
    NotWritable {
        /// The mapping that is not.
        mapping: Span,
    },
    /// Some of it is mirrored already, and cannot come home; or another thread adopts it now.
    #[error("{other} is mirrored already")]
    Overlaps {
        /// What is mirrored.
        other: Span,
    },
    /// Userfaultfd of the program, or of another engine, has it.
    #[error("{span} is registered with another userfaultfd")]
    Taken {
        /// What was to be mirrored.
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
        self.mirror(span).map_err(|error| match error {
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
        let mapping = {
            let mut owned = self.owned.lock();
            let at = owned.iter().position(|mapping| mapping.span() == span);
            at.map(|at| owned.swap_remove(at))
        };
        debug_assert!(mapping.is_some(), "{span} was not allocated here");
    }

    /// Mirrors memory of the program: the whole pages in `len` bytes at `at`, which must be private,
    /// anonymous and writable. It stays the program's, to use and to unmap.
    ///
    /// What of the span was adopted before is taken over: it comes home, and the earlier adoption ends.
    /// It can be other memory by now, since no event tells of memory that is unmapped while no device
    /// uses it.
    ///
    /// `mremap` moves one mapping of the kernel at a time, and a block of 2 MiB that a device uses is one of
    /// its own, because it is registered with userfaultfd: `mremap` of such a block together with others is
    /// `EFAULT`, and changes nothing. [`Process::unadopt`] first, and adopt the new place.
    ///
    /// # Errors
    ///
    /// See [`AdoptError`]: each names what is wrong with which part.
    pub fn adopt(&self, at: VirtAddr, len: ByteSize) -> Result<Span, AdoptError> {
        if self.is_gone() {
            return Err(AdoptError::Gone);
        }
        if self.rung == crate::Rung::Signals {
            return Err(AdoptError::NotOnThisRung);
        }
        let span = Span::inside(at, len).map_err(|_| AdoptError::Empty { at, len })?;
        // What was unmapped there before must be out of the table, whoever did it.
        self.settle_ends(span);
        self.check_adoptable(span)?;
        self.take_over(span)?;
        self.mirror(span)?;
        // Registered once, to hear of trouble now rather than in a device's fault.
        match self.arm(span) {
            Ok(token) => self.disarm(span, token),
            Err(MmError::Gone) => return Err(AdoptError::Gone),
            Err(_) => {
                // A device may have taken pages of the blocks before the one that was refused.
                let _ = self.unadopt(span);
                return Err(AdoptError::Taken { span });
            }
        }
        Ok(span)
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
        match self.adoption_of(span.start()) {
            Some(now) if now == token => self.unadopt(span),
            _ => Ok(()),
        }
    }

    /// What tells the adoption of an address from those before and after it.
    pub fn adoption_of(&self, at: VirtAddr) -> Option<ArmToken> {
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

    fn check_adoptable(&self, span: Span) -> Result<(), AdoptError> {
        let mut at = span.start();
        while at < span.end() {
            let vma = self.find_vma(at).map_err(|_| AdoptError::Gone)?;
            let vma = vma.filter(|vma| vma.span.contains(at));
            let vma = vma.ok_or(AdoptError::Unmapped { at })?;
            if vma.kind != VmaKind::PrivateAnonymous {
                return Err(AdoptError::NotAnonymous { mapping: vma.span });
            }
            if !vma.writable {
                return Err(AdoptError::NotWritable { mapping: vma.span });
            }
            at = vma.span.end();
        }
        Ok(())
    }

    fn mirror(&self, span: Span) -> Result<(), AdoptError> {
        let no_memory = |_: Errno| AdoptError::NoMemory { len: span.len() };
        let region = Region::new(span, &self.room)
            .map(Arc::new)
            .map_err(no_memory)?;
        self.regions
            .insert(region)
            .map_err(|other| AdoptError::Overlaps { other })?;
        // Devices may have mapped it in place: from now on it can move. Afterwards, so that a range
        // that is made meanwhile is either told, or finds it mirrored.
        self.notifiers.invalidate(&gpusvm_mm::Invalidation {
            span,
            reason: Reason::Unmap,
        });
        Ok(())
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
                    drop(block);
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
        if block.state().registered.load(Ordering::Relaxed) {
            let _ = block.let_go(piece, Listening::ToTouches);
        } else if block.state().watched.load(Ordering::Relaxed) {
            let _ = block.let_go(piece, Listening::ToItsEnd);
        }
    }
}
