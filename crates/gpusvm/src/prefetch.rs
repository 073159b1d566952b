//! Memory where it is wanted, before a device touches it.

use crate::driver::{self, FaultReport, Location, PrefetchError, Prefetched};
use crate::{Error, Svm};
use gpusvm_mm_linux::Process;
use gpusvm_sync::Arc;
use gpusvm_types::ByteSize;

/// A prefetch on its way. Dropping it leaves it on its way.
#[derive(Debug)]
#[must_use = "a prefetch ends some time; `wait` says when, and how"]
pub struct Prefetch {
    process: Arc<Process>,
    prefetch: driver::Prefetch<Process>,
}

impl Svm {
    /// Brings the memory that holds `len` bytes at `pointer` to a device, and maps it there, so that a
    /// launch finds it without a fault. Returns at once; pages that cannot move are mapped where they
    /// are, holes are skipped.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number, `ZeroSized`, `Unbound` when the device was taken
    /// out of use. What cannot be done, [`Prefetch::wait`] tells.
    ///
    /// # Examples
    ///
    /// ```
    /// use gpusvm::{ByteSize, Grid, SoftGpu, Svm};
    ///
    /// let svm = Svm::builder().device(SoftGpu::with_vram(ByteSize::mib(8))?).build()?;
    /// let mut xs = svm.alloc_slice::<u64>(1 << 18)?;
    /// xs.fill(3);
    /// let prefetch = svm.prefetch(0, xs.as_ptr(), ByteSize::mib(2))?;
    /// assert_eq!(prefetch.wait()?.moved, 1);
    ///
    /// let (p, n) = (xs.device_ptr(), xs.len());
    /// // Safe, because nobody else touches `xs` until the launch has ended, and it outlives the launch.
    /// let launch = unsafe {
    ///     svm.launch(Grid::new(8), move |lane| {
    ///         for i in (lane.id()..n).step_by(8) {
    ///             lane.store(p.add(i), 4)?;
    ///         }
    ///         Ok(())
    ///     })?
    /// };
    /// launch.wait()?;
    /// assert_eq!(svm.stats().device_faults, 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn prefetch<T>(
        &self,
        device: usize,
        pointer: *const T,
        len: ByteSize,
    ) -> Result<Prefetch, Error> {
        self.prefetch_to(device, pointer, len, Location::Device)
    }

    /// As [`Svm::prefetch`], where a fault of the device would put the memory.
    ///
    /// # Errors
    ///
    /// As [`Svm::prefetch`].
    pub fn prefetch_advised<T>(
        &self,
        device: usize,
        pointer: *const T,
        len: ByteSize,
    ) -> Result<Prefetch, Error> {
        self.prefetch_to(device, pointer, len, Location::Advised)
    }

    /// Brings the memory that holds `len` bytes at `pointer` home, from whichever device it is on, and
    /// maps it on the first device, if that reaches it in RAM. Returns at once.
    ///
    /// # Errors
    ///
    /// `ZeroSized`. What cannot be done, [`Prefetch::wait`] tells.
    pub fn prefetch_to_ram<T>(&self, pointer: *const T, len: ByteSize) -> Result<Prefetch, Error> {
        self.prefetch_to(0, pointer, len, Location::Ram)
    }

    fn prefetch_to<T>(
        &self,
        device: usize,
        pointer: *const T,
        len: ByteSize,
        to: Location,
    ) -> Result<Prefetch, Error> {
        self.vm(device)?.prefetch_to(pointer, len, to)
    }

    /// The last fault of a device, and what became of it; `None` before the first.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number, `Mm` when the engine is its parent's.
    pub fn last_fault(&self, device: usize) -> Result<Option<FaultReport>, Error> {
        let node = self.node(device)?;
        self.process.check_ours()?;
        Ok(node.vm.last_fault())
    }
}

impl Prefetch {
    pub(crate) fn new(process: &Arc<Process>, prefetch: driver::Prefetch<Process>) -> Self {
        Self {
            process: Arc::clone(process),
            prefetch,
        }
    }

    /// Waits until it is done, doing what of it has not begun.
    ///
    /// # Errors
    ///
    /// `Prefetch`, with the first memory that is not where it was wanted, and why; everything else was
    /// tried. `Mm` in a child of fork.
    pub fn wait(&self) -> Result<Prefetched, Error> {
        self.process.check_ours()?;
        let waited: Result<Prefetched, PrefetchError> = self.prefetch.wait();
        Ok(waited?)
    }

    /// Whether nothing of it is left to do.
    pub fn is_done(&self) -> bool {
        self.process.is_inherited() || self.prefetch.is_done()
    }

    /// What came of it so far, errors or not.
    pub fn progress(&self) -> Prefetched {
        match self.process.is_inherited() {
            true => Prefetched::default(),
            false => self.prefetch.progress(),
        }
    }

    /// What has not begun does not begin. Returns when nothing of it is under way.
    pub fn cancel(&self) {
        if !self.process.is_inherited() {
            self.prefetch.cancel();
        }
    }
}
