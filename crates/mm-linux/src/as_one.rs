//! Memory that stays one mapping of the kernel while devices use parts of it.
//!
//! ```text
//!   by blocks    |  RAM  | device |  RAM  |     three mappings: mremap of all is EFAULT
//!                        ^registered
//!
//!   as one       |  RAM  | device |  RAM  |     one mapping: mremap moves all of it
//!                ^registered, from the first need of a device to the end of the adoption
//! ```
//!
//! The kernel has one mapping where memory is registered with userfaultfd and others beside it, and
//! `mremap` moves one mapping at a time if userfaultfd has any. So memory that was adopted as one is
//! registered as a whole when a device first needs any block of it, and nothing ends that but the end
//! of the adoption. The price: every first touch of the CPU, anywhere in it, is a message from then on.
//!
//! # Locking
//!
//! Who registers all of it has the block locked for which it is, and no other: so it writes `registered`
//! of blocks that others have locked. That is right because it only ever goes on there: an `on` that comes
//! late makes its reader register what is registered already. The two that must not interleave are a
//! registration of all, and the end of one block's, which would leave that block registered behind its
//! adoption. Both hold the lock here: who lets go of a block has marked its pages as unmapped before, so
//! that the registration passes them over, or comes before and is ended.
//!
//! # Invariants
//!
//! A region becomes one once, and its pages remain so where `mremap` brings them.

use crate::block::BlockGuard;
use crate::outbound::runs;
use crate::process::Process;
use crate::region::Region;
use gpusvm_mm::AddressSpace;
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_sync::{Arc, Mutex, MutexGuard};
use gpusvm_types::Span;
use rustix::io::Errno;

/// Whether a region is registered as a whole, and one registration or end of one at a time.
#[derive(Debug, Default)]
pub(crate) struct AsOne {
    is_on: AtomicBool,
    registering: Mutex<()>,
}

impl AsOne {
    /// Whether it is registered as a whole, if at all.
    pub(crate) fn is_on(&self) -> bool {
        self.is_on.load(Ordering::SeqCst)
    }

    /// From now on it is.
    pub(crate) fn begin(&self) {
        self.is_on.store(true, Ordering::SeqCst);
    }

    /// Keeps it from being registered as a whole meanwhile. With a block locked.
    pub(crate) fn alone(&self) -> MutexGuard<'_, ()> {
        self.registering.lock()
    }
}

impl Process {
    /// What was registered of `region` until now was so by blocks; from now on all of it is.
    pub(crate) fn becomes_one(&self, region: &Arc<Region>) {
        region.as_one.begin();
        for piece in region.span().blocks() {
            // Who registers has its block locked: if it was done before, it is seen here.
            let Ok(block) = BlockGuard::lock(self, piece.start()) else {
                continue;
            };
            let is_ours = Arc::ptr_eq(&block.region, region);
            if is_ours && block.state().registered.load(Ordering::Relaxed) {
                block.register_all();
                return;
            }
        }
    }

    /// Calls `each` with every mapping of the program in `run` that can be registered. Of a part of which
    /// nobody hears, something else can be there by now, that must not be.
    fn each_private(&self, run: Span, mut each: impl FnMut(Span)) {
        let mut rest = Some(run);
        while let Some(left) = rest {
            let Ok(Some(vma)) = self.find_vma(left.start()) else {
                return;
            };
            if let Some(there) = vma.span.intersection(left)
                && vma.kind.can_migrate()
            {
                each(there);
            }
            rest = Span::new(vma.span.end(), left.end()).ok();
        }
    }
}

impl BlockGuard<'_> {
    /// As [`BlockGuard::register`], with everything that is one with the block.
    pub(crate) fn register_as_one(&self, piece: Span) -> Result<(), Errno> {
        // In one go: if `piece` came first, what is touched meanwhile could keep the kernel from having
        // one mapping again.
        self.register_all();
        let registered = &self.state().registered;
        match self.process.mover.arm(piece, self.region.behind()) {
            Ok(()) => registered.store(true, Ordering::Relaxed),
            Err(errno) => {
                if !registered.load(Ordering::Relaxed) {
                    self.process.mover.disarm(piece);
                }
                return Err(errno);
            }
        }
        Ok(())
    }

    /// Registers what is left of the region, as far as it lets itself be registered.
    fn register_all(&self) {
        let (process, region) = (self.process, &self.region);
        let _alone = region.as_one.alone();
        let parts = process.regions.parts_in(region.span()).into_iter();
        for part in parts.filter(|part| Arc::ptr_eq(&part.region, region)) {
            let words = region.words_in(part.span);
            for run in runs(part.span, |i| !words[i].get().unmapped) {
                process.each_private(run, |there| {
                    if process.mover.arm(there, region.behind()).is_ok() {
                        for piece in there.blocks() {
                            let state = region.block(piece.start());
                            state.registered.store(true, Ordering::Relaxed);
                        }
                    }
                });
            }
        }
    }
}
