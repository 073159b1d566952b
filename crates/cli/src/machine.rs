//! The machine of a run: a software GPU and the memory it shares with the CPU.
//!
//! All of the command that sets up or takes down a device is here; workloads see a [`Context`].

use crate::args::Options;
use crate::clock::Stopwatch;
use crate::error::CliError;
use crate::progress::Progress;
use gpusvm::{Grid, Lane, LaneError, Rung, SoftGpu, Stats, Svm, SvmSlice};
use std::cell::Cell;
use std::time::Duration;

/// A device and its shared memory.
#[derive(Debug)]
pub(crate) struct Machine {
    svm: Svm,
    vram: u64,
    seed: u64,
}

/// What the machine of a run did, and in which state it was left.
#[derive(Debug)]
pub(crate) struct AtExit {
    /// The rung of the capability ladder that was used.
    pub(crate) rung: Rung,
    /// What a better rung would take, if there is one.
    pub(crate) notice: Option<String>,
    /// All counters, after everything was torn down.
    pub(crate) stats: Stats,
}

impl Machine {
    /// Builds the device, and shared memory on the best rung or on the one that was asked for.
    pub(crate) fn start(options: &Options) -> Result<Self, CliError> {
        let gpu = SoftGpu::builder()
            .vram(options.vram)
            .units(options.units())
            .build()
            .map_err(|error| CliError::Setup(error.into()))?;
        let svm = Svm::builder()
            .device(gpu)
            .require_uffd(options.require_uffd)
            .rung(options.rung.and_then(Rung::from_number))
            .build()
            .map_err(CliError::Setup)?;
        Ok(Self {
            svm,
            vram: options.vram.get(),
            seed: options.seed,
        })
    }

    /// One line when this is not the best rung: says so, and how to get a better one.
    pub(crate) fn rung_notice(&self) -> Option<String> {
        self.svm.rung_notice()
    }

    /// What a workload sees.
    pub(crate) fn context<'a>(&'a self, progress: &'a Progress) -> Context<'a> {
        let Self { svm, vram, seed } = self;
        Context {
            svm,
            progress,
            vram: *vram,
            seed: *seed,
            allocated: Cell::new(0),
        }
    }

    /// Takes everything down.
    pub(crate) fn shutdown(self) -> Result<AtExit, CliError> {
        let (rung, notice) = (self.svm.rung(), self.svm.rung_notice());
        Ok(AtExit {
            rung,
            notice,
            stats: self.svm.shutdown()?,
        })
    }
}

/// What this machine allows.
pub(crate) fn doctor() -> String {
    gpusvm::doctor()
}

/// What a workload works with.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    svm: &'a Svm,
    /// Tells how far the run is.
    pub(crate) progress: &'a Progress,
    /// Memory of the device, in bytes.
    pub(crate) vram: u64,
    /// Seed of everything that is random.
    pub(crate) seed: u64,
    allocated: Cell<u64>,
}

impl Context<'_> {
    /// Shared memory, zeroed.
    pub(crate) fn alloc<T: gpusvm::Plain>(&self, count: usize) -> Result<SvmSlice<T>, CliError> {
        let slice = self.svm.alloc_slice::<T>(count)?;
        self.allocated
            .set(self.allocated.get() + size_of_val::<[T]>(&slice) as u64);
        Ok(slice)
    }

    /// The shared memory that was allocated so far, in bytes. Workloads keep theirs until they end.
    pub(crate) fn working_set(&self) -> u64 {
        self.allocated.get()
    }

    /// Runs a kernel on the device to its end, and says how long it took.
    ///
    /// # Safety
    ///
    /// The kernel's pointers are to shared memory that lives, and that no other thread touches meanwhile.
    pub(crate) unsafe fn launch<K>(&self, lanes: usize, kernel: K) -> Result<Duration, CliError>
    where
        K: Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + 'static,
    {
        let watch = Stopwatch::start();
        // SAFETY: as the caller promises; the launch is over when `wait` returns.
        let launch = unsafe { self.svm.launch(Grid::new(lanes), kernel) }?;
        launch.wait()?;
        Ok(watch.elapsed())
    }
}
