//! One device address space: faults in, bind, zap and flush out.
//!
//! # Locking
//!
//! Whoever works on the address space holds `working` to read, as long as one pass over a fault takes.
//! Closing it holds it to write, after it was announced: so nothing is mapped behind its back. Binding and
//! unbinding hold it to write too: see [`bind`](crate::driver::bind).

use crate::driver::counters::{self, Counters, VmStats, VmTotals};
use crate::driver::duplicate::Duplicates;
use crate::driver::fault::{self, Request};
use crate::driver::gpuva::Gpuvas;
use crate::driver::object::Object;
use crate::driver::policy::Policy;
use crate::driver::region::VramRegion;
use crate::driver::report::{FaultReport, LastFault};
use crate::driver::revisit::Revisits;
use crate::driver::running::Running;
use crate::driver::stages::{Stage, Timed};
use gpusvm_device::{
    Access, Caps, Device, DeviceError, DeviceFault, FaultError, Mapping, Target, Verdict, VmId,
};
use gpusvm_mm::{AddressSpace, Home, Intent, MmError, Time};
use gpusvm_pagemap::{Cause, PagemapAddr};
use gpusvm_svm::{Config, GpuSvm, PageRun, Permission, Quiesced, Range, SvmOps};
use gpusvm_sync::atomic::{AtomicBool, AtomicU64, Ordering};
use gpusvm_sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};
use gpusvm_types::{BLOCK_SIZE, PAGE_SIZE, Span, VirtAddr};

/// One address space of one device, which mirrors a process. Dropping it closes it.
#[derive(Debug)]
pub struct Vm<M: AddressSpace> {
    id: VmId,
    svm: GpuSvm<M>,
    pub(crate) region: Arc<VramRegion<M>>,
    pub(crate) counters: Counters,
    table: Arc<TableOps>,
    pub(crate) policy: Arc<dyn Policy>,
    pub(crate) revisits: Revisits<M>,
    pub(crate) last_fault: LastFault,
    /// What is bound where.
    pub(crate) vmas: Gpuvas<Object<M>>,
    pub(crate) duplicates: Duplicates<M>,
    closed: AtomicBool,
    /// Its number, until it is closed.
    working: RwLock<Option<Running>>,
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

/// Evidence that an address space is not closed meanwhile.
#[derive(Debug)]
pub(crate) struct Working<'vm>(
    #[expect(dead_code, reason = "held, not read")] RwLockReadGuard<'vm, Option<Running>>,
);

impl<M: AddressSpace> Vm<M> {
    /// A new address space of the device of `region`, which mirrors the process of its `Devices`.
    ///
    /// # Errors
    ///
    /// `Device` when it has no room for another.
    pub fn new(region: &Arc<VramRegion<M>>, policy: Arc<dyn Policy>) -> Result<Arc<Self>, VmError> {
        let device = Arc::clone(region.device());
        let id = device.page_tables().create_vm()?;
        let sizes = device.caps().page_sizes.sizes;
        // A range that does not fit the device's memory could never live there.
        let largest = region.total().bytes().clamp(PAGE_SIZE, BLOCK_SIZE);
        let sizes = sizes.iter().copied().filter(|size| *size <= largest);
        let config = Config {
            chunk_sizes: sizes.collect(),
            ..Config::default()
        };
        let mm = Arc::clone(region.devices().mm());
        let running = Running::new(&device, id);
        let table = Arc::new(TableOps {
            device,
            id,
            flushes: AtomicU64::new(0),
        });
        let vm = Arc::new(Self {
            id,
            svm: GpuSvm::new(mm, config, [Arc::clone(&table) as _]),
            region: Arc::clone(region),
            counters: Counters::new(),
            table,
            policy,
            revisits: Revisits::new(),
            last_fault: LastFault::default(),
            vmas: Gpuvas::new(),
            duplicates: Duplicates::new(),
            closed: AtomicBool::new(false),
            working: RwLock::new(Some(running)),
        });
        region.add_vm(&vm);
        Ok(vm)
    }

    /// What the device calls it.
    pub fn id(&self) -> VmId {
        self.id
    }

    /// Its ranges.
    pub fn svm(&self) -> &GpuSvm<M> {
        &self.svm
    }

    /// The memory of its device.
    pub fn region(&self) -> &Arc<VramRegion<M>> {
        &self.region
    }

    /// What it did so far.
    pub fn stats(&self) -> VmStats {
        self.counters.snapshot(
            self.svm.range_count(),
            self.table.flushes.load(Ordering::Relaxed),
        )
    }

    /// The last fault of the device that was answered, and how. `None` before the first.
    pub fn last_fault(&self) -> Option<FaultReport> {
        self.last_fault.get()
    }

    /// Adds what it did so far to a sum over several.
    pub fn add_to(&self, totals: &mut VmTotals) {
        totals.add(&self.stats(), &self.counters);
    }

    /// Serves a fault of the device, and says what becomes of it. Several threads may, at once.
    pub fn serve(&self, fault: &DeviceFault) -> Verdict {
        fault::serve(self, fault)
    }

    /// Makes the page at `at` accessible to the device, with as much around it as one range holds: as
    /// a fault of the device would.
    ///
    /// # Errors
    ///
    /// What the lane would stop with.
    pub fn make_accessible(&self, at: VirtAddr, access: Access) -> Result<(), FaultError> {
        let request = Request {
            at,
            access,
            stale: false,
            cause: Cause::DeviceFault,
            in_place: false,
        };
        fault::make_accessible(self, &request)
    }

    /// Brings the pages of `span` home, from whichever device they are on. Timeslices and leases hold:
    /// it waits for them.
    ///
    /// # Errors
    ///
    /// As [`AddressSpace::range_fault`].
    pub fn migrate_to_ram(&self, span: Span) -> Result<(), MmError> {
        for piece in span.blocks() {
            let mut homes = vec![Home::System; piece.page_count().as_usize()];
            self.svm
                .mm()
                .range_fault(piece, None, Intent::Read, &mut homes)?;
        }
        Ok(())
    }

    /// Ends it: refuses faults, waits for those that are being served, and takes every mapping away.
    /// Pages stay where they are. Nothing may run in it any more. Closing it again does nothing.
    pub fn close(&self) {
        if let Some(running) = self.leave() {
            running.end();
        }
    }

    /// As [`Vm::close`], while launches may still run in it: their faults end with `Closed`, and the
    /// device forgets it when the last [`Running`] of it is gone.
    pub fn shut(&self) {
        drop(self.leave());
    }

    /// Takes every mapping away. The number, if it was not closed before.
    fn leave(&self) -> Option<Running> {
        self.refuse_faults();
        let mut working = self.working.write();
        let running = working.take();
        if running.is_some() {
            self.svm.close();
            self.take_away(&self.vmas.clear());
        }
        running
    }

    /// To run something in it. `None` when it is closed.
    pub fn running(&self) -> Option<Running> {
        self.working.read().clone().filter(|_| !self.is_closed())
    }

    /// Refuses faults from now on; some may still be being served.
    pub fn refuse_faults(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Whether faults are refused.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// To work on it. `None` when it is closed, or about to be.
    pub(crate) fn enter(&self) -> Option<Working<'_>> {
        let working = self.working.read();
        let open = working.is_some() && !self.is_closed();
        open.then_some(Working(working))
    }

    /// To change what is bound: nobody works on it. `None` when it is closed, or about to be.
    pub(crate) fn exclude(&self) -> Option<RwLockWriteGuard<'_, Option<Running>>> {
        let working = self.working.write();
        let open = working.is_some() && !self.is_closed();
        open.then_some(working)
    }

    pub(crate) fn device(&self) -> &dyn Device {
        &**self.region.device()
    }

    pub(crate) fn caps(&self) -> &Caps {
        self.device().caps()
    }

    /// The clock.
    pub(crate) fn now(&self) -> Time {
        self.svm.mm().now()
    }

    /// A stage of serving a fault in `range` begins.
    pub(crate) fn time(&self, range: &Range<M>, stage: Stage) -> Timed<'_, M> {
        self.counters
            .stages
            .time(self.svm.mm(), range.span(), stage)
    }

    /// Enters mappings. The proof says that nothing of them is invalidated meanwhile.
    pub(crate) fn bind(&self, _proof: &Quiesced<'_>, runs: &[PageRun]) -> Result<(), DeviceError> {
        gpusvm_sync::walk!("bind");
        for run in runs {
            let target = match run.address {
                PagemapAddr::System(at) => Target::System(at),
                PagemapAddr::Vram(at) => Target::Vram(at),
                PagemapAddr::Peer(at) => Target::Peer(at),
            };
            let allows = match run.permission {
                Permission::Read => Access::Read,
                Permission::Write => Access::Write,
                Permission::Atomic => Access::Atomic,
            };
            let mapping = Mapping {
                span: run.span,
                target,
                allows,
            };
            self.device().page_tables().bind(self.id, &mapping)?;
        }
        Ok(())
    }
}

impl<M: AddressSpace> Drop for Vm<M> {
    fn drop(&mut self) {
        self.shut();
    }
}

/// What invalidations do to the page tables.
#[derive(Debug)]
struct TableOps {
    device: Arc<dyn Device>,
    id: VmId,
    flushes: AtomicU64,
}

impl SvmOps for TableOps {
    fn zap(&self, span: Span) {
        self.device.page_tables().zap(self.id, span);
    }

    fn flush(&self, span: Span) {
        counters::count(&self.flushes);
        self.device.page_tables().flush(self.id, span);
    }

    fn garbage(&self) {
        // The workers look for garbage before every fault, and while they have nothing to do.
    }
}
