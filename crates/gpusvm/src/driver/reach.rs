//! What a device can reach without a fault: made so, and looked at.
//!
//! ```text
//!   populate    range by range, where the pages are: hmm_range_fault of a span, and dma_map
//!   mapped      what is mapped now; nothing is made
//! ```

use crate::driver::fault::{self, Request};
use crate::driver::vm::Vm;
use gpusvm_device::{Access, FaultError};
use gpusvm_mm::AddressSpace;
use gpusvm_types::{PAGE_SIZE, Span};

impl<M: AddressSpace> Vm<M> {
    /// Maps what of `span` is not mapped yet, where its pages are: none moves, unless the device can use
    /// it so only in its own memory. Ranges that reach out of the span are mapped whole.
    ///
    /// # Errors
    ///
    /// What a lane would stop with, for the first page that cannot be mapped: what comes before it is
    /// mapped.
    pub fn populate(&self, span: Span, access: Access) -> Result<(), FaultError> {
        let mut at = span.start();
        while at < span.end() {
            fault::make_accessible(self, &Request::in_place(at, access))?;
            let range = self.svm().range_find(at).map(|range| range.span().end());
            // A range that is gone already is made again by whoever needs it.
            at = range
                .or_else(|| self.object_end(at))
                .unwrap_or(at + PAGE_SIZE);
        }
        Ok(())
    }

    /// What the device may do with each page of `span` without a fault, of those that mirror the process. A
    /// hint: it is out of date when it returns.
    pub fn mapped(&self, span: Span) -> Vec<Option<Access>> {
        let mut mapped = vec![None; span.page_count().as_usize()];
        let mut at = span.start();
        while at < span.end() {
            let range = self.svm().range_find(at);
            let reached = range.as_ref().map_or(Span::page_of(at), |it| it.span());
            let piece = reached.intersection(span);
            let piece = piece.unwrap_or_else(|| Span::page_of(at));
            let allows = |wanted| {
                let range = range.as_ref()?;
                fault::is_served(range, wanted).then_some(wanted)
            };
            let first = span.index_of(piece.first_page());
            let access = [Access::Atomic, Access::Write, Access::Read];
            mapped[first..first + piece.page_count().as_usize()]
                .fill(access.into_iter().find_map(allows));
            at = piece.end();
        }
        mapped
    }
}
