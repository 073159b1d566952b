//! One device that mirrors the program: the kernel's `dmirror`, with the meaning of its ioctls.
//!
//! ```text
//!   read, write, add     HMM_DMIRROR_READ, _WRITE         declared first where the device cannot fault
//!   migrate_to_dev       HMM_DMIRROR_MIGRATE_TO_DEV
//!   migrate_to_sys       HMM_DMIRROR_MIGRATE_TO_SYS
//!   snapshot             HMM_DMIRROR_SNAPSHOT             nothing faults
//!   evict_all            HMM_DMIRROR_RELEASE
//! ```

use crate::gpu::Gpu;
use gpusvm::driver::{Declared, Devices, Policy, Vm, VramRegion};
use gpusvm_device::{Access, FaultError, FaultMode};
use gpusvm_mm::{AddressSpace, Block, Home, Mirror as Mirrored};
use gpusvm_pagemap::{Cause, MigrateError, Pagemap};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, PageCount, Span, VirtAddr};

/// What a page is, for who must not touch it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Snap {
    /// Not mapped, or not readable.
    Error,
    /// In RAM, or nowhere yet: the engine does not know which.
    System {
        /// Whether it may be written.
        writable: bool,
    },
    /// In the memory of this device.
    Local {
        /// Whether it may be written.
        writable: bool,
    },
    /// In the memory of this device, where the CPU uses it.
    Coherent {
        /// Whether it may be written.
        writable: bool,
    },
    /// In the memory of another.
    Elsewhere,
    /// In the memory of another, where the CPU uses it.
    CoherentElsewhere {
        /// Whether it may be written.
        writable: bool,
    },
    /// On its way.
    Moving,
}

/// A device and its address space.
#[derive(Debug)]
pub struct Mirror<M: AddressSpace> {
    /// The device.
    pub gpu: Arc<dyn Gpu>,
    /// Its memory.
    pub region: Arc<VramRegion<M>>,
    /// Its address space.
    pub vm: Arc<Vm<M>>,
}

impl<M: AddressSpace> Mirror<M> {
    /// A device joins the program.
    ///
    /// # Panics
    ///
    /// When the engine refuses.
    pub fn new(devices: &Arc<Devices<M>>, gpu: Arc<dyn Gpu>, policy: Arc<dyn Policy>) -> Self {
        let region = VramRegion::new(devices, gpu.device()).expect("the device has memory");
        Self::of(region, gpu, policy)
    }

    /// One more address space of the same device.
    ///
    /// # Panics
    ///
    /// When the engine refuses.
    #[must_use]
    pub fn beside(&self, policy: Arc<dyn Policy>) -> Self {
        Self::of(Arc::clone(&self.region), Arc::clone(&self.gpu), policy)
    }

    fn of(region: Arc<VramRegion<M>>, gpu: Arc<dyn Gpu>, policy: Arc<dyn Policy>) -> Self {
        let vm = Vm::new(&region, policy).expect("an address space on the device");
        let weak = Arc::downgrade(&vm);
        let serve = move |fault: &gpusvm_device::DeviceFault| match weak.upgrade() {
            Some(vm) => vm.serve(fault),
            None => gpusvm_device::Verdict::Fail(FaultError::Closed { at: fault.at }),
        };
        gpu.attach(vm.id(), Some(Arc::new(serve)));
        Self { gpu, region, vm }
    }

    /// Its device pages.
    pub fn pagemap(&self) -> &Arc<Pagemap<M>> {
        self.region.pagemap()
    }

    /// Whether it faults.
    pub fn is_faulting(&self) -> bool {
        self.gpu.device().caps().faults == FaultMode::Replayable
    }

    /// Loads words.
    ///
    /// # Errors
    ///
    /// Why one of them could not be loaded.
    pub fn read(&self, at: &[VirtAddr]) -> Result<Vec<u64>, FaultError> {
        self.declare(at.iter().copied(), Access::Read, || {
            self.gpu.load(self.vm.id(), at)
        })
    }

    /// Stores words.
    ///
    /// # Errors
    ///
    /// Why one of them could not be stored.
    pub fn write(&self, words: &[(VirtAddr, u64)]) -> Result<(), FaultError> {
        self.declare(words.iter().map(|(at, _)| *at), Access::Write, || {
            self.gpu.store(self.vm.id(), words)
        })
    }

    /// Adds to words.
    ///
    /// # Errors
    ///
    /// Why one of them could not be added to.
    pub fn add(&self, at: &[VirtAddr], by: u64) -> Result<Vec<u64>, FaultError> {
        self.declare(at.iter().copied(), Access::Atomic, || {
            self.gpu.fetch_add(self.vm.id(), at, by)
        })
    }

    /// How many faults `work` costs.
    pub fn faults_of<R>(&self, work: impl FnOnce() -> R) -> (R, u64) {
        let before = self.gpu.faults(self.vm.id());
        let result = work();
        (result, self.gpu.faults(self.vm.id()) - before)
    }

    /// Moves pages to the device, as far as they can move. How many live there then.
    ///
    /// # Errors
    ///
    /// Why nothing could be done.
    pub fn migrate_to_dev(&self, span: Span) -> Result<PageCount, MigrateError> {
        self.vm.migrate_to_devmem(span, Cause::Prefetch)?;
        Ok(self.on_device(span))
    }

    /// Brings pages home.
    ///
    /// # Errors
    ///
    /// Why one of them could not come.
    pub fn migrate_to_sys(&self, span: Span) -> Result<(), gpusvm_mm::MmError> {
        self.vm.migrate_to_ram(span)
    }

    /// Brings every page of the device's home.
    ///
    /// # Errors
    ///
    /// Why one of them could not come.
    pub fn evict_all(&self) -> Result<(), gpusvm_pagemap::EvictError> {
        self.pagemap().evict_all(Cause::Eviction)
    }

    /// How many pages of `span` live on this device.
    pub fn on_device(&self, span: Span) -> PageCount {
        let snaps = self.snapshot(span);
        let local = |snap: &&Snap| matches!(snap, Snap::Local { .. } | Snap::Coherent { .. });
        PageCount::from_usize(snaps.iter().filter(local).count())
    }

    /// What each page of `span` is. Nothing faults.
    pub fn snapshot(&self, span: Span) -> Vec<Snap> {
        span.pages().map(|page| self.snap(page.start())).collect()
    }

    fn snap(&self, at: VirtAddr) -> Snap {
        let mm = self.vm.svm().mm();
        let vma = mm.find_vma(at).ok().flatten();
        let Some(vma) = vma.filter(|vma| vma.span.contains(at) && vma.readable) else {
            return Snap::Error;
        };
        let writable = vma.writable;
        match home_of(&**mm, at) {
            Home::System | Home::Protected => Snap::System { writable },
            Home::Device(page) if self.pagemap().contains(page) => Snap::Local { writable },
            Home::Device(_) => Snap::Elsewhere,
            Home::Coherent(page) if self.pagemap().contains(page) => Snap::Coherent { writable },
            Home::Coherent(_) => Snap::CoherentElsewhere { writable },
            Home::Moving => Snap::Moving,
            Home::Unmapped => Snap::Error,
        }
    }

    /// Runs `access`; where the device cannot fault, with the pages of `words` resident.
    fn declare<R>(
        &self,
        words: impl Iterator<Item = VirtAddr>,
        access: Access,
        run: impl FnOnce() -> Result<R, FaultError>,
    ) -> Result<R, FaultError> {
        if self.is_faulting() {
            return run();
        }
        let declared: Vec<_> = pages_of(words)
            .into_iter()
            .map(|span| Declared { span, access })
            .collect();
        let _lease = self.vm.make_resident(&declared)?;
        run()
    }
}

impl<M: AddressSpace> Drop for Mirror<M> {
    fn drop(&mut self) {
        self.gpu.attach(self.vm.id(), None);
        self.vm.close();
    }
}

/// Where a page lives. Memory that is not mirrored lives in RAM.
pub fn home_of<M: AddressSpace>(mm: &M, at: VirtAddr) -> Home {
    match mm.mirrored(at) {
        Mirrored::Gap(_) => Home::System,
        Mirrored::Mapping(_) => match mm.lock_block(Span::page_of(at)) {
            Ok(block) => block.home(at.page()),
            Err(_) => Home::Unmapped,
        },
    }
}

/// The pages that hold `words`, as spans.
fn pages_of(words: impl Iterator<Item = VirtAddr>) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    for word in words {
        let page = Span::page_of(word);
        match spans.last_mut() {
            Some(last) if last.covers(page) => {}
            Some(last) if last.end() == page.start() => *last = last.union(page),
            _ => spans.push(page),
        }
    }
    spans
}

/// Words that say which page they are of: two of each page.
pub fn words_of(span: Span) -> Vec<VirtAddr> {
    let ends = |at: VirtAddr| [at, at + ByteSize::new(4088)];
    span.pages().flat_map(|page| ends(page.start())).collect()
}
