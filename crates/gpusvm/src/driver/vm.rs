//! One device address space: bind, zap, flush.

use crate::driver::counters::Counters;
use crate::driver::policy::Policy;
use crate::driver::revisit::Revisits;
use crate::driver::vram::Vram;
use gpusvm_device::{Device, DeviceError, Mapping, Target, VmId};
use gpusvm_mm::{AddressSpace, MmError, Time};
use gpusvm_pagemap::{Pagemap, PagemapAddr};
use gpusvm_svm::{Config, GpuSvm, PageRun, Permission, Quiesced, SvmOps};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_types::{ByteSize, OwnerId, Span};

/// One address space of one device, which mirrors a process.
#[derive(Debug)]
pub(crate) struct Vm<M: AddressSpace> {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) id: VmId,
    pub(crate) svm: GpuSvm<M>,
    pub(crate) pagemap: Arc<Pagemap<M>>,
    pub(crate) vram: Arc<Vram>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) policy: Arc<dyn Policy>,
    pub(crate) revisits: Revisits,
    closed: AtomicBool,
}

/// Why a device cannot join a process.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VmError {
    /// The device refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The address space refused.
    #[error(transparent)]
    Mm(#[from] MmError),
}

impl<M: AddressSpace> Vm<M> {
    /// An address space of `device` that mirrors `mm`.
    pub(crate) fn new(
        mm: &Arc<M>,
        device: Arc<dyn Device>,
        owner: OwnerId,
        policy: Arc<dyn Policy>,
    ) -> Result<Arc<Self>, VmError> {
        let pages = device.caps().vram.whole_pages();
        let pagemap = Pagemap::new(mm, pages, owner)?;
        let id = device.page_tables().create_vm()?;
        let ops = Arc::new(TableOps {
            device: Arc::clone(&device),
            id,
        });
        let sizes = device.caps().page_sizes.sizes;
        let largest = |size: &ByteSize| *size <= gpusvm_types::BLOCK_SIZE;
        let chunk_sizes = sizes.iter().copied().filter(largest).collect();
        let config = Config {
            chunk_sizes,
            ..Config::default()
        };
        Ok(Arc::new(Self {
            svm: GpuSvm::new(Arc::clone(mm), config, ops),
            device,
            id,
            pagemap,
            vram: Arc::new(Vram::new(pages)),
            counters: Arc::new(Counters::new()),
            policy,
            revisits: Revisits::default(),
            closed: AtomicBool::new(false),
        }))
    }

    /// The clock.
    pub(crate) fn now(&self) -> Time {
        self.svm.mm().now()
    }

    /// Enters mappings. The proof says that nothing of them is invalidated meanwhile.
    pub(crate) fn bind(&self, _proof: &Quiesced<'_>, runs: &[PageRun]) -> Result<(), DeviceError> {
        for run in runs {
            let target = match run.address {
                PagemapAddr::System(at) => Target::System(at),
                PagemapAddr::Vram(at) => Target::Vram(at),
            };
            let writable = run.permission == Permission::Write;
            let mapping = Mapping {
                span: run.span,
                target,
                writable,
            };
            self.device.page_tables().bind(self.id, &mapping)?;
        }
        Ok(())
    }

    /// Whether faults are refused.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Refuses faults from now on.
    pub(crate) fn refuse_faults(&self) {
        self.closed.store(true, Ordering::Release);
        self.pagemap.unbind();
    }

    /// Ends it: nothing is mapped any more. What lives in the device's memory must be home.
    pub(crate) fn close(&self) {
        self.refuse_faults();
        self.svm.close();
        self.device.page_tables().destroy_vm(self.id);
    }
}

/// What invalidations do to the page tables.
#[derive(Debug)]
struct TableOps {
    device: Arc<dyn Device>,
    id: VmId,
}

impl SvmOps for TableOps {
    fn zap(&self, span: Span) {
        self.device.page_tables().zap(self.id, span);
    }

    fn flush(&self, span: Span) {
        self.device.page_tables().flush(self.id, span);
    }

    fn garbage(&self) {
        // The workers look for garbage before every fault, and while they have nothing to do.
    }
}
