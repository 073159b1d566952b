//! Hearing of the end of memory that no device uses.
//!
//! ```text
//!   not watched ---watch---> watched: write protection only, by a descriptor of its own
//!                               |  arm
//!                               v
//!                            armed: as any other, until it is not watched any more
//! ```
//!
//! Memory that is registered for missing pages makes every first touch a message to another thread, and
//! gets no huge pages. Registered for write protection only, which nobody asks for, it costs nothing;
//! and unmaps and remaps are heard of all the same. `MADV_DONTNEED` is not, on purpose: what is given up
//! where no page is missing for anybody would never be seen to be filled again. Events are chosen for a
//! descriptor as a whole, so watched memory has a descriptor of its own.
//!
//! A block that is armed goes from that descriptor to the other, with its lock held. The kernel has no
//! one step for this: for the moment between two system calls an unmap of another part of the same block
//! is not heard of. It stays with the other until it is not watched any more: going back would be such a
//! moment too.
//!
//! Where there is no write protection, watched memory is registered for missing pages. So is memory that was
//! adopted as one, all of it: registered for something else, a block would be a mapping of its own. On the last rung
//! there are no events: memory that is mirrored there ends with [`Process::free`] only, which tells.

use super::Process;
use crate::block::BlockGuard;
use crate::let_go::Listening;
use gpusvm_mm::{ArmToken, MmError};
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{Span, VirtAddr};
use rustix::io::Errno;

impl Process {
    pub(super) fn watch_mapping(&self, span: Span) -> Result<ArmToken, MmError> {
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        // What was unmapped before is marked.
        self.source.fence();
        let not_mirrored = MmError::NotMirrored { span };
        let part = self.regions.find(span.start());
        let part = part.filter(|part| part.span.covers(span));
        let token = part.ok_or(not_mirrored)?.region.token();
        for piece in span.blocks() {
            let block = BlockGuard::lock(self, piece.start()).map_err(|_| not_mirrored)?;
            let mut words = block.region.words_in(piece).iter();
            if block.region.token() != token || words.any(|word| word.get().unmapped) {
                return Err(not_mirrored);
            }
            block.watch(piece).map_err(|errno| match errno {
                // Nothing is there: it went, and nobody listened.
                Errno::INVAL => not_mirrored,
                errno => MmError::System {
                    call: "registering with userfaultfd",
                    span: piece,
                    errno: errno.raw_os_error(),
                },
            })?;
        }
        Ok(token)
    }

    pub(super) fn unwatch_mapping(&self, span: Span, token: ArmToken) {
        for piece in span.blocks() {
            if let Some(block) = self.lock_what_is_left(piece, token) {
                block.unwatch();
            }
        }
    }

    pub(super) fn watched_from(&self, at: VirtAddr, token: ArmToken) -> Option<Span> {
        if self.is_gone() {
            return None;
        }
        // What was unmapped before is marked.
        self.source.fence();
        let part = self.regions.find(at)?;
        let in_block = part.span.intersection(Span::block_of(at))?;
        if part.region.token() != token {
            return None;
        }
        let rest = Span::new(Span::page_of(at).start(), in_block.end()).ok()?;
        let is_gone = |page: &gpusvm_types::PageIndex| part.region.word(*page).get().unmapped;
        let end = rest
            .pages()
            .find(is_gone)
            .map_or(rest.end(), |page| page.start());
        Span::new(rest.start(), end).ok()
    }
}

impl BlockGuard<'_> {
    /// Begins to hear of the end of the mapping, in any case of `piece`. Of the rest of the block nobody
    /// may have heard that it went, or what is there by now.
    ///
    /// # Errors
    ///
    /// What the kernel refused; then `piece` is not watched, unless it was.
    fn watch(&self, piece: Span) -> Result<(), Errno> {
        let (state, mover) = (self.state(), &self.process.mover);
        if state.registered.load(Ordering::Relaxed) {
            mover.arm(piece, self.region.behind())?;
        } else if self.region.as_one.is_on() {
            self.register(piece)?;
        } else {
            match mover.watch(piece) {
                // There is no write protection: so it is heard of by missing pages. Or it is so already, without
                // anybody's knowledge; what is another's refuses that too.
                Err(Errno::NOSYS | Errno::BUSY) => self.register(piece)?,
                watched => watched?,
            }
            if !state.watched.load(Ordering::Relaxed) {
                for rest in self.parts().flat_map(|part| part.without(piece)).flatten() {
                    let _ = mover.watch(rest);
                }
            }
        }
        state.watched.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Ends it.
    fn unwatch(&self) {
        let state = self.state();
        if !state.watched.swap(false, Ordering::Relaxed) {
            return;
        }
        // Or it is registered together with others before it is let go.
        let alone = self.region.as_one.alone();
        if state.registered.load(Ordering::Relaxed) {
            drop(alone);
            self.unregister_if_unused();
            return;
        }
        for part in self.parts() {
            let _ = self.let_go(part, Listening::ToItsEnd);
        }
    }
}
