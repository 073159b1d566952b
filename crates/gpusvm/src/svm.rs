//! The engine, built and taken down.

use crate::driver::{Devices, MigrateOnTouch, Policy, Times, VmTotals};
use crate::node::Node;
use crate::{DeviceVm, Error, Launch, Object, Resident, Stats, SvmSlice};
use gpusvm_mm_linux::{Allocation, Capabilities, Options, Plain, Process, Protection, Rung};
use gpusvm_softgpu::{Grid, Lane, LaneError, SoftGpu, SoftGpuError};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, Span, VirtAddr};

/// Shared virtual memory of this process and its devices.
///
/// A child of fork has the memory, with what was in it, and not the engine: there every call is refused, and
/// everything can be dropped, which waits for nobody. It can build an engine of its own, with devices of its
/// own. [`Process::start`] says what a child of a process with threads can rely on.
#[derive(Debug)]
pub struct Svm {
    pub(crate) process: Arc<Process>,
    pub(crate) nodes: Vec<Arc<Node>>,
    /// The first address space of each device.
    vms: Vec<DeviceVm>,
    best_rung: Rung,
}

/// What an engine is to be like.
#[derive(Debug, Default)]
#[must_use]
pub struct Builder {
    gpus: Vec<Arc<SoftGpu>>,
    require_uffd: bool,
    rung: Option<Rung>,
    policy: Option<Arc<dyn Policy>>,
    cpu_fault_window: Option<ByteSize>,
    scrub: bool,
    markers: bool,
}

impl Builder {
    /// Adds a device. Launches go to the first unless they name another.
    pub fn device(mut self, gpu: Arc<SoftGpu>) -> Self {
        self.gpus.push(gpu);
        self
    }

    /// Whether to refuse to work without userfaultfd, on the last rung of the ladder.
    pub fn require_uffd(mut self, require: bool) -> Self {
        self.require_uffd = require;
        self
    }

    /// The rung to stand on; the best that there is if none is named.
    pub fn rung(mut self, rung: Option<Rung>) -> Self {
        self.rung = rung;
        self
    }

    /// Who decides where pages live. [`MigrateOnTouch`] if nobody is named.
    pub fn policy(mut self, policy: Arc<dyn Policy>) -> Self {
        self.policy = Some(policy);
        self
    }

    /// The most that one fault of the CPU brings home: all that came to the device together, unless set
    /// smaller, for data that bounces in small pieces. Rounded down to a power of two, at least a page.
    pub fn cpu_fault_window(mut self, window: ByteSize) -> Self {
        self.cpu_fault_window = Some(window);
        self
    }

    /// Whether device memory is cleared when it is given back, so that nothing of the program's data
    /// stays on a device after it is gone. Off unless it is asked for.
    pub fn scrub(mut self, scrub: bool) -> Self {
        self.scrub = scrub;
        self
    }

    /// Whether `/proc/self/pagemap` is to tell pages on devices from pages that nobody has touched: they show
    /// there as swapped out and not present, as the kernel shows pages of device memory. For who reads that
    /// file, or checkpoints by it. [`Svm::shows_in_pagemap`] says whether it is so.
    ///
    /// It is off unless it is asked for, because it costs: to mark a block and to take the marks off again is
    /// two system calls, a page table and 512 entries, and where there is a page table a huge page arrives
    /// in small pages.
    pub fn show_in_pagemap(mut self, show: bool) -> Self {
        self.markers = show;
        self
    }

    /// Builds the engine.
    ///
    /// # Errors
    ///
    /// `NoDevice`, `UserfaultfdRequired`, `Start` when the system refuses, `Vm` when a device does;
    /// `SoftGpu` for a device of the process that forked this one.
    pub fn build(self) -> Result<Svm, Error> {
        if self.gpus.is_empty() {
            return Err(Error::NoDevice);
        }
        if self.gpus.iter().any(|gpu| gpu.is_inherited()) {
            return Err(SoftGpuError::Forked.into());
        }
        let best_rung = Capabilities::probe().best_rung();
        if self.require_uffd && self.rung.unwrap_or(best_rung) == Rung::Signals {
            return Err(Error::UserfaultfdRequired {
                advice: best_rung.advice(),
            });
        }
        let process = Process::start(Options {
            rung: self.rung,
            markers: self.markers,
        })?;
        let mut svm = Svm {
            process,
            nodes: Vec::new(),
            vms: Vec::new(),
            best_rung,
        };
        let policy = self
            .policy
            .unwrap_or_else(|| Arc::new(MigrateOnTouch::default()));
        let devices = Devices::new(&svm.process);
        for gpu in self.gpus {
            // An error drops what was built so far, which takes it down again.
            let node = Node::new(&devices, svm.nodes.len(), gpu, Arc::clone(&policy))?;
            node.region.set_scrub(self.scrub);
            if let Some(window) = self.cpu_fault_window {
                node.region.pagemap().set_cpu_fault_window(window);
            }
            let node = Arc::new(node);
            svm.nodes.push(Arc::clone(&node));
            svm.vms.push(DeviceVm::first(&svm.process, node));
        }
        Ok(svm)
    }
}

impl Svm {
    /// Begins to build an engine.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Whether it is an engine of the process that forked this one: for who keeps an engine for the whole
    /// process, and needs another in a child.
    pub fn is_inherited(&self) -> bool {
        self.process.is_inherited()
    }

    /// The rung of the capability ladder that it stands on.
    pub fn rung(&self) -> Rung {
        self.process.rung()
    }

    /// Whether pages on devices show as swapped out in `/proc/self/pagemap`: it was
    /// [asked for](Builder::show_in_pagemap), and the system can, which takes Linux 6.8, and userfaultfd on a rung
    /// that moves pages. Private mappings of files are not shown so.
    pub fn shows_in_pagemap(&self) -> bool {
        self.process.leaves_markers()
    }

    /// One line for people when it is not the best rung there is: which, and how to get a better one.
    pub fn rung_notice(&self) -> Option<String> {
        let rung = self.rung();
        if rung == Rung::Move {
            return None;
        }
        let advice = if rung == self.best_rung {
            rung.advice()
        } else {
            "a better one was not asked for"
        };
        Some(format!(
            "on rung {}, {}: {advice}",
            rung.number(),
            rung.description()
        ))
    }

    /// Allocates `len` zeroes to share.
    ///
    /// # Errors
    ///
    /// `ZeroSized`, or `Memory` when there is not so much, or the engine is its parent's.
    pub fn alloc_slice<T: Plain>(&self, len: usize) -> Result<SvmSlice<T>, Error> {
        if len == 0 || size_of::<T>() == 0 {
            return Err(Error::ZeroSized);
        }
        Ok(SvmSlice::new(Allocation::new(&self.process, len)?))
    }

    /// Brings memory home, for who cannot wait for pages: a system call on the rung of user mode only,
    /// another process.
    ///
    /// # Errors
    ///
    /// `Mm` with the first page that could not come home.
    pub fn touch<T>(&self, pointer: *const T, len: ByteSize) -> Result<(), Error> {
        let span = Span::covering(VirtAddr::from(pointer), len).map_err(|_| Error::ZeroSized)?;
        Ok(self.process.bring_home(span)?)
    }

    /// Changes what may be done with whole pages of the program's own, or of a slice, as `mprotect`
    /// does, and tells devices: what no longer may be done, no device does when this returns.
    ///
    /// Nobody hears of a plain `mprotect`. After one, a device may go on writing, until it faults
    /// there again, where it has pages mapped to write that live on it; pages that it uses in place
    /// refuse at once. Either way no page is lost, and pages come home to read-only memory.
    ///
    /// # Errors
    ///
    /// `Protect` with what `mprotect` said. On the rung of signals all of it is refused with `ENOTSUP`,
    /// because page protection is how pages are watched there: do not call `mprotect` on memory of the
    /// library either.
    pub fn protect<T>(
        &self,
        pointer: *const T,
        len: ByteSize,
        protection: Protection,
    ) -> Result<(), Error> {
        let span = Span::covering(VirtAddr::from(pointer), len).map_err(|_| Error::ZeroSized)?;
        let protected = self.process.protect(span, protection);
        protected.map_err(|error| Error::Protect { span, error })
    }

    /// Tells devices that the program has changed permissions with an `mprotect` of its own: as
    /// [`Svm::protect`] does after its own.
    ///
    /// # Errors
    ///
    /// `ZeroSized`.
    pub fn was_protected<T>(&self, pointer: *const T, len: ByteSize) -> Result<(), Error> {
        let span = Span::covering(VirtAddr::from(pointer), len).map_err(|_| Error::ZeroSized)?;
        self.process.was_protected(span);
        Ok(())
    }

    /// Tells devices that the program has unmapped memory, moved it away or mapped something else in its
    /// place. The engine hears by itself of the end of memory that is shared; this is for memory that devices
    /// use in place, whose mappings they keep until they fault there.
    ///
    /// # Errors
    ///
    /// `ZeroSized`.
    pub fn was_unmapped<T>(&self, pointer: *const T, len: ByteSize) -> Result<(), Error> {
        let span = Span::covering(VirtAddr::from(pointer), len).map_err(|_| Error::ZeroSized)?;
        self.process.was_unmapped(span);
        Ok(())
    }

    /// Returns when devices know of everything that was done to mappings before: `munmap`,
    /// `mremap`, `madvise(MADV_DONTNEED)` of shared memory. A launch that begins afterwards knows
    /// anyway; this is for kernels that run meanwhile, which may see the old contents until then, and
    /// whose writes may go where the old contents went.
    pub fn settle(&self) {
        self.process.settle_events();
    }

    /// Runs `kernel` on the first device, once for each lane of the grid, and returns at once.
    ///
    /// # Errors
    ///
    /// `SoftGpu` when the device takes no launch, `Unbound` when it was taken out of use.
    ///
    /// # Safety
    ///
    /// A kernel reads and writes memory of the process, by address, while the program goes on. Until
    /// the launch has ended, whatever the kernel writes must not be read or written through Rust
    /// references, and whatever it reads must not be written through them, except by atomics on both
    /// sides. What it leaves in memory must be valid values of the types that the program reads there.
    /// Addresses that are not mapped, or not permitted, are errors of the lane and need no care.
    #[expect(
        unsafe_code,
        reason = "a promise to the caller that only the caller can keep"
    )]
    pub unsafe fn launch<F>(&self, grid: Grid, kernel: F) -> Result<Launch, Error>
    where
        F: Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + 'static,
    {
        // SAFETY: as the caller promises.
        unsafe { self.launch_resident(0, grid, Resident::new(), kernel) }
    }

    /// As [`Svm::launch`], on the device with this number, counted from zero in the order in which they
    /// were added, with memory that is made resident there before the launch begins, and stays until
    /// it has ended. A device in [`FaultMode::Declared`](crate::FaultMode) touches nothing else.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number, `Unbound` when it was taken out of use, `Declared`
    /// when memory cannot be made resident, `SoftGpu` when the device takes no launch.
    ///
    /// # Safety
    ///
    /// As [`Svm::launch`].
    #[expect(
        unsafe_code,
        reason = "a promise to the caller that only the caller can keep"
    )]
    pub unsafe fn launch_resident<F>(
        &self,
        device: usize,
        grid: Grid,
        resident: Resident,
        kernel: F,
    ) -> Result<Launch, Error>
    where
        F: Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + 'static,
    {
        // SAFETY: as the caller promises.
        unsafe { self.vm(device)?.launch_resident(grid, resident, kernel) }
    }

    /// The address space of a device for launches that name none.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number.
    pub fn vm(&self, device: usize) -> Result<&DeviceVm, Error> {
        self.vms.get(device).ok_or(Error::NoDevice)
    }

    /// A further address space of a device, which mirrors this process too. It ends when it is closed or
    /// dropped, or with the engine.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number, `CreateVm` when it has no room for another.
    pub fn create_vm(&self, device: usize) -> Result<DeviceVm, Error> {
        let node = self.nodes.get(device).ok_or(Error::NoDevice)?;
        self.process.check_ours()?;
        DeviceVm::create(&self.process, node)
    }

    /// Memory of a device that is nobody's RAM: `len` bytes, rounded up to pages, all zero. Pages of the
    /// process make room for it; nothing ever evicts it. It is seen where it is
    /// [bound](DeviceVm::bind_object).
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number; `Object`: no bytes (`EINVAL`), no room (`ENOSPC`), a
    /// device that was taken out of use (`ENODEV`).
    pub fn create_object(&self, device: usize, len: ByteSize) -> Result<Object, Error> {
        let node = self.node(device)?;
        self.process.check_ours()?;
        Object::new(&self.process, device, node.region.create_object(len))
    }

    /// Takes a device out of use: everything comes home, and it takes no launches. Launches that run on
    /// it go on, on RAM in place.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number. `Unbind` when pages could not leave, because a
    /// launch declared them: it is out of use all the same; try again when the launch has ended.
    pub fn unbind(&self, device: usize) -> Result<(), Error> {
        let node = self.node(device)?;
        self.process.check_ours()?;
        let unbound = node.region.unbind();
        unbound.map_err(|error| Error::Unbind { device, error })
    }

    /// Takes a device into use again.
    ///
    /// # Errors
    ///
    /// `NoDevice` when there is none with this number, `Rebind` when it is in use, or pages could not
    /// leave it.
    pub fn rebind(&self, device: usize) -> Result<(), Error> {
        let node = self.node(device)?;
        self.process.check_ours()?;
        let bound = node.region.rebind();
        bound.map_err(|error| Error::Rebind { device, error })
    }

    pub(crate) fn node(&self, device: usize) -> Result<&Node, Error> {
        self.nodes
            .get(device)
            .map(|node| &**node)
            .ok_or(Error::NoDevice)
    }

    /// What happened so far. In a child of fork, what is known without the devices of its parent.
    pub fn stats(&self) -> Stats {
        let mm = self.process.stats();
        let mut stats = Stats {
            cpu_faults: mm.cpu_faults,
            delayed_cpu_faults: mm.delayed_faults,
            cpu_fault_time: Times::of(&mm.cpu_fault_time),
            pages_on_devices: self.process.pages_on_devices().get(),
            ..Stats::default()
        };
        if self.process.is_inherited() {
            return stats;
        }
        let mut vms = VmTotals::default();
        for node in &self.nodes {
            node.add_to(&mut stats, &mut vms);
        }
        stats.set_vms(vms.stats());
        stats
    }

    /// The ids of the threads that serve the CPU's faults, for tools that watch threads.
    pub fn handler_threads(&self) -> Vec<i32> {
        self.process.handler_threads()
    }

    /// Takes the engine down: faults are refused, everything comes home, nothing is registered any
    /// more. Slices that are still there are plain memory from then on.
    ///
    /// # Errors
    ///
    /// `Mm` when the engine is its parent's.
    pub fn shutdown(self) -> Result<Stats, Error> {
        self.process.check_ours()?;
        self.close();
        Ok(self.stats())
    }

    fn close(&self) {
        if self.process.is_inherited() {
            return self.leave();
        }
        for node in &self.nodes {
            node.stop_faults();
        }
        self.process.stop_migrations();
        for node in &self.nodes {
            // Everything is home: this waits until device memory is cleared, if it is to be.
            let _ = node.region.unbind();
            node.close();
        }
        self.process.stop();
    }
}

impl Svm {
    /// In a child of fork: nothing of it is ever freed, since other threads of the parent may have had it in
    /// hand, and nobody is waited for.
    fn leave(&self) {
        core::mem::forget((Arc::clone(&self.process), self.nodes.clone()));
    }
}

impl Drop for Svm {
    fn drop(&mut self) {
        self.close();
    }
}
