//! What is mirrored, and bringing it home.

use crate::Sim;
use crate::block::BlockGuard;
use crate::calls::Call;
use crate::region::Part;
use gpusvm_mm::{FaultOutcome, MmError, Reason, VmaKind, Wanted};
use gpusvm_types::Span;

impl Sim {
    /// Mirrors memory of the program, which must be private and anonymous. `Backing::Mirrored` is
    /// `mmap` with this.
    ///
    /// # Errors
    ///
    /// `NotMirrored` when not all of it is private anonymous memory, `System` with `EEXIST` when some
    /// of it is mirrored already, `Gone`.
    pub fn adopt(&self, span: Span) -> Result<(), MmError> {
        let call = self.enter(format_args!("adopt {span}"));
        // What was unmapped there before must be out of the table.
        self.settle_events();
        self.mirror(&call, span)
    }

    pub(crate) fn mirror(&self, _call: &Call<'_>, span: Span) -> Result<(), MmError> {
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        let is_mapped = |pages: u64| pages == span.page_count().get();
        let mappings = self.kernel.lock().mappings_in(span);
        let private = mappings
            .iter()
            .filter(|mapping| mapping.kind == VmaKind::PrivateAnonymous);
        if !is_mapped(private.map(|mapping| mapping.span.page_count().get()).sum()) {
            return Err(MmError::NotMirrored { span });
        }
        {
            let mut kernel = self.kernel.lock();
            let region = kernel.new_region(span);
            kernel
                .parts
                .insert(region)
                .map_err(|other| MmError::System {
                    call: "mirroring",
                    span: other,
                    errno: 17,
                })?;
        }
        // Devices may have mapped it in place: from now on it can move. Afterwards, so that a range
        // that is made meanwhile is either told, or finds it mirrored.
        self.tell(span, Reason::Unmap);
        Ok(())
    }

    /// Ends `adopt`: everything comes home and is forgotten.
    ///
    /// # Errors
    ///
    /// The first page that could not come home; then all of it stays mirrored.
    pub fn unadopt(&self, span: Span) -> Result<(), MmError> {
        let call = self.enter(format_args!("unadopt {span}"));
        self.settle_events();
        self.bring_home(span)?;
        self.unmirror(&call, span);
        Ok(())
    }

    /// Forgets a mirrored span: what devices have of it is dropped.
    pub(crate) fn unmirror(&self, _call: &Call<'_>, span: Span) {
        self.each_block(span, |block, piece| {
            for word in block.region.words_in(piece) {
                word.unmap();
            }
            block.invalidate(piece, Reason::Unmap);
            block.release_unmapped(piece);
        });
        let mut kernel = self.kernel.lock();
        kernel.unprotect(span);
        kernel.parts.remove(span);
    }

    /// Brings every page of `span` home, for a system call, or another process, to see them.
    /// Timeslices do not hold; leases are waited for.
    ///
    /// # Errors
    ///
    /// The first block with a page that could not come home; `Gone`.
    pub fn bring_home(&self, span: Span) -> Result<(), MmError> {
        self.bring_parts_home(span, Wanted::Asked)
    }

    pub(crate) fn bring_parts_home(&self, span: Span, wanted: Wanted) -> Result<(), MmError> {
        if self.is_gone() {
            return Err(MmError::Gone);
        }
        let parts = self.kernel.lock().parts.parts_in(span);
        for Part { span, .. } in parts {
            for piece in span.blocks() {
                self.bring_block_home(piece, wanted)?;
            }
        }
        Ok(())
    }

    fn bring_block_home(&self, piece: Span, wanted: Wanted) -> Result<(), MmError> {
        loop {
            let Ok(mut block) = BlockGuard::lock(self, piece.start()) else {
                return Ok(());
            };
            let outcome = block.bring_home(piece, wanted);
            drop(block);
            match outcome {
                FaultOutcome::Served => return Ok(()),
                FaultOutcome::NotBefore(due) => self.sleep_until(due),
                FaultOutcome::Failed => {
                    return Err(MmError::StuckOnDevice { at: piece.start() });
                }
            }
        }
    }
}
