//! Permissions: the one change of mappings that the kernel tells nobody of.

use super::Process;
use crate::Rung;
use crate::sys::map;
use gpusvm_mm::{Invalidation, Reason};
use gpusvm_types::Span;
use rustix::io::Errno;
use rustix::mm::MprotectFlags;

/// What may be done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// Nothing.
    None,
    /// It may be read.
    Read,
    /// It may be read and written.
    ReadWrite,
}

impl Process {
    /// Changes what may be done with `span`, and tells devices afterwards: a device that maps it from
    /// then on finds the new permissions, and what was mapped before is mapped no more.
    ///
    /// # Errors
    ///
    /// Those of `mprotect`. `ENOTSUP` on the last rung, where page protection is how pages are watched.
    pub fn protect(&self, span: Span, protection: Protection) -> std::io::Result<()> {
        if self.rung() == Rung::Signals {
            return Err(Errno::NOTSUP.into());
        }
        let flags = match protection {
            Protection::None => MprotectFlags::empty(),
            Protection::Read => MprotectFlags::READ,
            Protection::ReadWrite => MprotectFlags::READ | MprotectFlags::WRITE,
        };
        // SAFETY: permissions only; whoever uses the memory asked for it, as with `mprotect` itself.
        unsafe { map::protect(span, flags) }?;
        self.was_protected(span);
        Ok(())
    }

    /// `span` was unmapped, or is another mapping by now. What of it is mirrored is heard of anyway; this tells
    /// devices that have other memory mapped in place.
    pub fn was_unmapped(&self, span: Span) {
        self.settle_events();
        self.notifiers.invalidate(&Invalidation {
            span,
            reason: Reason::Unmap,
        });
    }

    /// Permissions of `span` were changed by somebody else: as [`Process::protect`], without changing them.
    pub fn was_protected(&self, span: Span) {
        if self.is_inherited() {
            return;
        }
        // In this order: a look at the mapping that was made before cannot be committed any more.
        self.notifiers.invalidate(&Invalidation {
            span,
            reason: Reason::Protect,
        });
    }
}
