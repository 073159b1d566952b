//! Where the pages of a range are, ready to be mapped: `drm_gpusvm_get_pages`.

use crate::reached::Reached;
use crate::{Copies, DeviceIndex, FaultCtx, GetPagesError, GpuSvm, Permission, Range, pages};
use alloc::sync::Arc;
use gpusvm_mm::{AddressSpace, DeviceMemoryId, DevicePage, Home, Intent, Sequence};
use gpusvm_pagemap::{Pagemap, PagemapAddr, Pagemaps, Peer};
use gpusvm_types::{DmaAddr, Span, VirtAddr};

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

/// Which device, and what it reaches.
#[derive(Debug)]
pub struct Reach<'a, M: AddressSpace> {
    /// Which device of the mirror.
    pub device: DeviceIndex,
    /// The device memories that pages can be in.
    pub pagemaps: &'a Pagemaps<M>,
    /// Who wants to reach them.
    pub peer: Peer,
    /// Whether it reaches RAM in place.
    pub ram: bool,
    /// Whether it faults on what it lost. Then it may map pages that are protected, to read them: the
    /// next write takes them away.
    pub faults: bool,
}

/// What can be mapped, as long as the sequence is current. Device pages are mapped for the device to
/// reach: dropping it gives them back.
#[derive(Debug)]
pub struct Prepared<M: AddressSpace> {
    pub(crate) device: DeviceIndex,
    pub(crate) sequence: Sequence,
    pub(crate) permission: Permission,
    pub(crate) reached: Reached<M>,
    /// Whether a page takes up none of the device's own memory.
    is_any_elsewhere: bool,
}

impl<M: AddressSpace> Prepared<M> {
    /// Whether the device reaches any of them as RAM, coherent ones among them.
    pub fn is_partly_in_ram(&self) -> bool {
        let in_ram = |run: &PageRun| matches!(run.address, PagemapAddr::System(_));
        self.runs().iter().any(in_ram)
    }

    /// Whether all of them are in the device's own memory.
    pub fn is_in_vram(&self) -> bool {
        !self.is_any_elsewhere
    }

    /// The pages.
    pub fn runs(&self) -> &[PageRun] {
        self.reached.runs()
    }
}

impl<M: AddressSpace> GpuSvm<M> {
    /// Where the pages of `range` are and how the device reaches them: those that have one by their
    /// copy. A write makes protected pages writable first, a read leaves them protected. Nothing is mapped yet:
    /// [`GpuSvm::commit`] does that if it is still true by then.
    ///
    /// # Errors
    ///
    /// `ReadOnly` (`EPERM`), `Unmapped` (`EFAULT`), `NotOnDevice` when `devmem_only` meets a page in RAM
    /// (`EFAULT`), `OutOfReach` when the device reaches a page nowhere, `MixedPagemaps` when pages are in
    /// more than one device memory, `Mixed` when they are in RAM too and that is not allowed (all three
    /// `EOPNOTSUPP`), and what the address space refused (`EBUSY`, `EFAULT`).
    pub fn get_pages(
        &self,
        range: &Range<M>,
        reach: &Reach<'_, M>,
        ctx: &FaultCtx,
        copies: Option<Copies>,
    ) -> Result<Prepared<M>, GetPagesError> {
        gpusvm_sync::walk!("get_pages");
        let span = range.span();
        let intent = match ctx.read_only && reach.faults {
            true => Intent::Read,
            false => Intent::Write,
        };
        if intent == Intent::Write && range.can_migrate() && copies.is_none() {
            // Coming home and unprotecting invalidate pages: before the sequence is read, or all is for nothing.
            self.is_writable(span, ctx)?;
            let mut homes = pages::homes_for(span);
            self.mm.range_fault(span, ctx.owner, intent, &mut homes)?;
        }
        let (sequence, duplicate) = match copies {
            Some(copies) => (copies.sequence, Some(copies.duplicate)),
            None => (range.notifier().read_begin(), None),
        };
        let writable = self.is_writable(span, ctx)?;
        let mut permission = Permission::Atomic;
        let mut homes = pages::homes_for(span);
        if range.can_migrate() {
            self.mm.range_fault(span, ctx.owner, intent, &mut homes)?;
        }
        let mut mapper = Mapper::new(reach, ctx);
        for (page, home) in span.pages().zip(homes) {
            let at = page.start();
            let copy = duplicate.as_ref().and_then(|copies| copies.copy_of(page));
            let address = match (home, copy) {
                (Home::Protected, Some(copy)) => mapper.on_device(at, copy)?,
                _ => mapper.at_home(at, home)?,
            };
            let of_page = match home {
                Home::Protected => Permission::Read,
                _ => ctx.permission_on(&address, writable),
            };
            permission = permission.min(of_page);
            mapper.reached.push(PageRun {
                span: Span::page_of(at),
                address,
                permission: of_page,
            });
        }
        mapper.reached.keep(duplicate);
        Ok(Prepared {
            device: reach.device,
            sequence,
            permission,
            is_any_elsewhere: mapper.is_any_elsewhere,
            reached: mapper.reached,
        })
    }

    /// Whether the memory at `span` may be written: it is one mapping that allows what `ctx` asks for.
    fn is_writable(&self, span: Span, ctx: &FaultCtx) -> Result<bool, GetPagesError> {
        let vma = self.mm.find_vma(span.start())?;
        let vma = vma.filter(|vma| vma.span.covers(span));
        match vma.ok_or(GetPagesError::Unmapped { span })?.writable {
            false if !ctx.read_only => Err(GetPagesError::ReadOnly { span }),
            writable => Ok(writable),
        }
    }
}

/// Finds out how a device reaches pages, one after the other. Dropping it gives them back.
struct Mapper<'a, M: AddressSpace> {
    reach: &'a Reach<'a, M>,
    ctx: &'a FaultCtx,
    /// Whether a page so far is in RAM.
    any_in_ram: bool,
    /// Whether a page so far is not in the device's own memory.
    is_any_elsewhere: bool,
    /// The coherent memory that was met last, and whether it is the device's own.
    coherent: Option<(DeviceMemoryId, bool)>,
    /// The memory that the device pages so far are of.
    pagemap: Option<Arc<Pagemap<M>>>,
    reached: Reached<M>,
}

impl<'a, M: AddressSpace> Mapper<'a, M> {
    fn new(reach: &'a Reach<'a, M>, ctx: &'a FaultCtx) -> Self {
        Self {
            reach,
            ctx,
            any_in_ram: false,
            is_any_elsewhere: false,
            coherent: None,
            pagemap: None,
            reached: Reached::nothing(),
        }
    }

    /// Where a page lives.
    fn at_home(&mut self, at: VirtAddr, home: Home) -> Result<PagemapAddr, GetPagesError> {
        match home {
            Home::System | Home::Protected => self.in_ram(at),
            Home::Device(device) => self.on_device(at, device),
            Home::Coherent(device) => self.in_place(at, device),
            Home::Moving | Home::Unmapped => {
                let span = Span::page_of(at);
                Err(GetPagesError::Unmapped { span })
            }
        }
    }

    fn in_ram(&mut self, at: VirtAddr) -> Result<PagemapAddr, GetPagesError> {
        if !self.ctx.allow_mixed && self.pagemap.is_some() {
            return Err(GetPagesError::Mixed { at });
        }
        if self.ctx.devmem_only {
            return Err(GetPagesError::NotOnDevice { at });
        }
        self.any_in_ram = true;
        self.is_any_elsewhere = true;
        self.as_ram(at)
    }

    /// As everybody reaches a page that the CPU uses.
    fn as_ram(&self, at: VirtAddr) -> Result<PagemapAddr, GetPagesError> {
        match self.reach.ram {
            true => Ok(PagemapAddr::System(DmaAddr::new(at.get()))),
            false => Err(GetPagesError::OutOfReach { at }),
        }
    }

    /// A coherent page. Where only device memory will do, the CPU must not have it, and no other device.
    fn in_place(&mut self, at: VirtAddr, page: DevicePage) -> Result<PagemapAddr, GetPagesError> {
        let is_own = match self.coherent {
            Some((memory, is_own)) if memory == page.memory => is_own,
            _ => {
                let pagemap = self.reach.pagemaps.page_to_pagemap(page);
                pagemap.is_some_and(|pagemap| pagemap.peer() == self.reach.peer)
            }
        };
        self.coherent = Some((page.memory, is_own));
        match (self.ctx.devmem_only, is_own) {
            (true, true) => return Err(GetPagesError::NotOnDevice { at }),
            (true, false) => return Err(GetPagesError::OutOfReach { at }),
            (false, _) => {}
        }
        self.is_any_elsewhere |= !is_own;
        self.as_ram(at)
    }

    fn on_device(&mut self, at: VirtAddr, page: DevicePage) -> Result<PagemapAddr, GetPagesError> {
        let out_of_reach = GetPagesError::OutOfReach { at };
        if !self.ctx.allow_mixed && self.any_in_ram {
            return Err(GetPagesError::Mixed { at });
        }
        let importer = match (&self.pagemap, self.reached.importer()) {
            (Some(pagemap), _) if !pagemap.contains(page) => {
                return Err(GetPagesError::MixedPagemaps { at });
            }
            (Some(_), Some(importer)) => importer,
            _ => {
                let pagemap = self.reach.pagemaps.page_to_pagemap(page);
                let pagemap = pagemap.ok_or(out_of_reach)?;
                let importer = pagemap.import(self.reach.peer).ok_or(out_of_reach)?;
                self.pagemap = Some(pagemap);
                self.reached.reach_through(importer)
            }
        };
        let address = importer.device_map(page.pfn).ok_or(out_of_reach)?;
        self.is_any_elsewhere |= !matches!(address, PagemapAddr::Vram(_));
        Ok(address)
    }
}
