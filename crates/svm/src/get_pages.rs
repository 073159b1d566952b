//! Where the pages of a range are, ready to be mapped: `drm_gpusvm_get_pages`.

use crate::{FaultCtx, GetPagesError, GpuSvm, Pages, Permission, Range};
use alloc::vec::Vec;
use gpusvm_mm::{AddressSpace, Home, Sequence};
use gpusvm_pagemap::{Pagemap, PagemapAddr, PagemapOps};
use gpusvm_types::{DmaAddr, PAGE_SIZE, PageIndex, Span};

/// Consecutive pages at consecutive places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Which pages.
    pub span: Span,
    /// Where the device reaches the first; the others follow.
    pub address: PagemapAddr,
    /// What the device may do.
    pub permission: Permission,
}

/// What can be mapped, as long as the sequence is current.
#[derive(Debug)]
pub struct Prepared {
    pub(crate) sequence: Sequence,
    pub(crate) permission: Permission,
    pub(crate) runs: Vec<PageRun>,
}

impl Prepared {
    /// Whether any of them is in RAM.
    pub fn is_partly_in_ram(&self) -> bool {
        let in_ram = |run: &PageRun| matches!(run.address, PagemapAddr::System(_));
        self.runs.iter().any(in_ram)
    }

    /// The pages.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }
}

impl<M: AddressSpace> GpuSvm<M> {
    /// Where the pages of `range` are and how the device reaches them. Nothing is mapped yet:
    /// [`GpuSvm::commit`] does that if it is still true by then.
    ///
    /// # Errors
    ///
    /// `ReadOnly` (`EPERM`), `Unmapped` (`EFAULT`), `NotOnDevice` when `devmem_only` meets a page in RAM
    /// (`EFAULT`), `OutOfReach` when the device reaches a page nowhere (`EOPNOTSUPP`), and what the
    /// address space refused (`EBUSY`, `EFAULT`).
    pub fn get_pages(
        &self,
        range: &Range,
        pagemap: Option<(&Pagemap<M>, &dyn PagemapOps)>,
        reaches_ram: bool,
        ctx: &FaultCtx,
    ) -> Result<Prepared, GetPagesError> {
        let span = range.span();
        let sequence = range.notifier().read_begin();
        let vma = self
            .mm
            .find_vma(span.start())?
            .filter(|vma| vma.span.covers(span));
        let vma = vma.ok_or(GetPagesError::Unmapped { span })?;
        if !vma.writable && !ctx.read_only {
            return Err(GetPagesError::ReadOnly { span });
        }
        let permission = if vma.writable {
            Permission::Write
        } else {
            Permission::Read
        };
        let mut homes = Pages::homes_for(span);
        if range.can_migrate() {
            self.mm.range_fault(span, ctx.owner, &mut homes)?;
        }
        let mut runs = Vec::new();
        for (page, home) in span.pages().zip(&homes) {
            let address = match *home {
                Home::System if ctx.devmem_only => {
                    return Err(GetPagesError::NotOnDevice { at: page.start() });
                }
                Home::System if reaches_ram => {
                    Some(PagemapAddr::System(DmaAddr::new(page.start().get())))
                }
                Home::Device(device) => pagemap
                    .filter(|(pagemap, _)| pagemap.contains(device))
                    .and_then(|(pagemap, ops)| ops.device_map(device.pfn, pagemap.owner())),
                Home::System => None,
                Home::Moving | Home::Unmapped => return Err(GetPagesError::Unmapped { span }),
            };
            let address = address.ok_or(GetPagesError::OutOfReach { at: page.start() })?;
            push(&mut runs, page, address, permission);
        }
        Ok(Prepared {
            sequence,
            permission,
            runs,
        })
    }
}

/// Adds a page to the last run if it continues it.
fn push(runs: &mut Vec<PageRun>, page: PageIndex, address: PagemapAddr, permission: Permission) {
    let span = Span::page_of(page.start());
    if let Some(last) = runs.last_mut()
        && last.span.end() == span.start()
        && last.address.continues_with(address, last.span.len())
    {
        last.span = last.span.union(span);
        return;
    }
    debug_assert_eq!(span.len(), PAGE_SIZE);
    runs.push(PageRun {
        span,
        address,
        permission,
    });
}
