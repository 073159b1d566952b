//! The device as a whole: its parts, launches, and its end.
//!
//! # Life cycle
//!
//! Dropping the last reference cancels every launch, closes the fault buffer, and joins the units.
//! Lanes end with `Cancelled`, also those that wait in a fault that nobody serves. When the last
//! reference goes on a unit (a callback or a kernel held it), that unit is not joined; it ends when
//! it returns. Peers find its VRAM no more then: what they still map of it answers no more, or is
//! by then something else of the process. The driver has taken it away from them before.
//!
//! In a child of fork there are no units and no VRAM: launching and copying are errors, changes of
//! page tables are to a copy of them, and dropping the device there waits for nobody, and frees nothing that
//! other threads of the parent may have had in hand. A device that is built in the child is as any other.

use crate::copy::Engine;
use crate::launch::{LaunchState, Work};
use crate::mmu::Mmu;
use crate::peers::Aperture;
use crate::unit::Workplace;
use crate::{Builder, Counters, Grid, Lane, LaneError, Launch, SoftGpuError};
use gpusvm_device::{Caps, CopyEngine, Device, FaultQueue, PageTables, VmId};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{ByteSize, DmaAddr};
use std::fmt;
use std::thread::JoinHandle;

/// The software GPU.
pub struct SoftGpu {
    // Before whatever holds VRAM: fields go in this order.
    pub(crate) aperture: Option<Aperture>,
    pub(crate) caps: Caps,
    pub(crate) engine: Engine,
    pub(crate) mmu: Mmu,
    pub(crate) place: Workplace,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) owner: u32,
    pub(crate) launches: AtomicU64,
}

impl SoftGpu {
    /// Says what the device shall be.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// A device with this much memory, and the rest as by default.
    ///
    /// # Errors
    ///
    /// As [`Builder::build`].
    pub fn with_vram(vram: ByteSize) -> Result<Arc<Self>, SoftGpuError> {
        Self::builder().vram(vram).build()
    }

    /// How many units it has.
    pub fn units(&self) -> usize {
        self.place.units.shared.len()
    }

    /// What it has done so far.
    pub fn counters(&self) -> Counters {
        let mut sum = Counters {
            launches: self.launches.load(Ordering::Relaxed),
            flushes: self.mmu.flushes.load(Ordering::Relaxed),
            copied_bytes: self.engine.copied_bytes.load(Ordering::Relaxed),
            ..Counters::default()
        };
        self.place
            .units
            .shared
            .iter()
            .for_each(|unit| unit.counters.add_to(&mut sum));
        sum
    }

    /// Runs `kernel` once for each lane of `grid`, in the address space `vm`, and returns at once.
    ///
    /// Launches start in the order in which they came, and may overlap. Lanes run in any order, on
    /// any unit. A lane that returns an error, or panics, stops; the others go on.
    ///
    /// # Errors
    ///
    /// `NoVm`; `Forked` in a child of the process that built the device.
    ///
    /// # Safety
    ///
    /// A kernel stores to addresses of the process. The caller vouches that
    /// - what the address space maps in RAM, now or by the time a fault is served, may be written by
    ///   this kernel until the launch has ended: no Rust reference to bytes that it stores to is in
    ///   use, and none to bytes that it loads is used to write, other than atomics on both sides;
    /// - whoever reads what the kernel stored finds a value of its type there;
    /// - a peer whose memory the address space maps lives until the launch has ended, or the mapping
    ///   was zapped and flushed.
    ///
    /// Bad addresses need no care: they are faults, not accesses.
    pub unsafe fn launch<F>(
        self: &Arc<Self>,
        vm: VmId,
        grid: Grid,
        kernel: F,
    ) -> Result<Launch, SoftGpuError>
    where
        F: Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + 'static,
    {
        self.launch_work(vm, grid, Arc::new(kernel))
    }

    fn launch_work(
        &self,
        vm_id: VmId,
        grid: Grid,
        kernel: Arc<dyn Work>,
    ) -> Result<Launch, SoftGpuError> {
        if self.is_inherited() {
            return Err(SoftGpuError::Forked);
        }
        let vm = self.mmu.vm(vm_id).ok_or(SoftGpuError::NoVm { vm: vm_id })?;
        self.launches.fetch_add(1, Ordering::Relaxed);
        let state = Arc::new(LaunchState::new(vm_id, vm, grid, self.units(), kernel));
        if grid.lanes() == 0 {
            state.finish();
        } else {
            // The queue closes when the device is dropped, and here is a reference to it.
            let queued = self.place.queue.push(&state);
            debug_assert!(queued);
        }
        Ok(Launch {
            state,
            board: Arc::clone(&self.place.board),
            owner: self.owner,
        })
    }

    /// Whether this is a child of the process that built the device.
    pub fn is_inherited(&self) -> bool {
        self.owner != std::process::id()
    }
}

impl Device for SoftGpu {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn copy_engine(&self) -> &dyn CopyEngine {
        &self.engine
    }

    fn page_tables(&self) -> &dyn PageTables {
        &self.mmu
    }

    fn fault_queue(&self) -> Option<&dyn FaultQueue> {
        self.place
            .board
            .faults
            .as_ref()
            .map(|faults| faults as &dyn FaultQueue)
    }

    fn aperture(&self) -> Option<DmaAddr> {
        self.aperture.as_ref().map(Aperture::start)
    }
}

impl Drop for SoftGpu {
    fn drop(&mut self) {
        if self.is_inherited() {
            // Their names may be those of threads of this process by now.
            std::mem::forget(std::mem::take(&mut self.threads));
            self.mmu.abandon();
            return;
        }
        // First the mark, then the wake: lanes that wait in a fault see that they are cancelled.
        self.place.queue.close();
        if let Some(faults) = &self.place.board.faults {
            faults.close();
        }
        let this = std::thread::current().id();
        for thread in self
            .threads
            .drain(..)
            .filter(|thread| thread.thread().id() != this)
        {
            // A unit catches the panics of kernels; of its own there is nobody to tell here.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for SoftGpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SoftGpu")
            .field("caps", &self.caps)
            .field("units", &self.units())
            .field("counters", &self.counters())
            .finish_non_exhaustive()
    }
}
