//! A device address space of one's own.

use crate::driver::{BindError, Location, Vm, VmStats};
use crate::node::Node;
use crate::{Error, Launch, Object, Prefetch, Resident};
use gpusvm_mm_linux::Process;
use gpusvm_softgpu::{Grid, Lane, LaneError};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, Span, VirtAddr};

/// One address space of a device, which mirrors the process.
///
/// Each device has one from the beginning, for launches that name none ([`Svm::vm`](crate::Svm::vm));
/// [`Svm::create_vm`](crate::Svm::create_vm) makes more. They share the memory of the process and of the
/// device, and nothing else: each has its own mappings, and faults for itself. Launches of several threads
/// may be in flight in one address space.
///
/// Dropping it closes it. Launches in it that touch memory from then on end with
/// [`FaultError::Closed`](crate::FaultError::Closed), or with `NotDeclared` where the device cannot fault;
/// nobody waits for them.
///
/// In a child of fork it is its parent's: every call is refused with `Mm`, and it can be dropped.
#[derive(Debug)]
pub struct DeviceVm {
    pub(crate) process: Arc<Process>,
    node: Arc<Node>,
    pub(crate) vm: Arc<Vm<Process>>,
}

impl DeviceVm {
    /// The address space of a device that it has from the beginning.
    pub(crate) fn first(process: &Arc<Process>, node: Arc<Node>) -> Self {
        Self {
            process: Arc::clone(process),
            vm: Arc::clone(&node.vm),
            node,
        }
    }

    /// A further one.
    pub(crate) fn create(process: &Arc<Process>, node: &Arc<Node>) -> Result<Self, Error> {
        Ok(Self {
            process: Arc::clone(process),
            vm: node.create_vm()?,
            node: Arc::clone(node),
        })
    }

    /// The number of its device.
    pub fn device(&self) -> usize {
        self.node.number
    }

    /// Runs `kernel` in it, once for each lane of the grid, and returns at once.
    ///
    /// # Errors
    ///
    /// As [`DeviceVm::launch_resident`].
    ///
    /// # Safety
    ///
    /// As [`Svm::launch`](crate::Svm::launch).
    #[expect(
        unsafe_code,
        reason = "a promise to the caller that only the caller can keep"
    )]
    pub unsafe fn launch<F>(&self, grid: Grid, kernel: F) -> Result<Launch, Error>
    where
        F: Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + 'static,
    {
        // SAFETY: as the caller promises.
        unsafe { self.launch_resident(grid, Resident::new(), kernel) }
    }

    /// As [`DeviceVm::launch`], with memory that is made resident before the launch begins, and stays
    /// until it has ended.
    ///
    /// # Errors
    ///
    /// `VmClosed` when the engine has ended, `Unbound` when the device was taken out of use, `Declared`
    /// when memory cannot be made resident, `SoftGpu` when the device takes no launch.
    ///
    /// # Safety
    ///
    /// As [`Svm::launch`](crate::Svm::launch).
    #[expect(
        unsafe_code,
        reason = "a promise to the caller that only the caller can keep"
    )]
    pub unsafe fn launch_resident<F>(
        &self,
        grid: Grid,
        resident: Resident,
        kernel: F,
    ) -> Result<Launch, Error>
    where
        F: Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + 'static,
    {
        let device = self.node.number;
        self.process.check_ours()?;
        // Its faults must not be taken for those of another address space, whatever is closed meanwhile.
        let running = self.vm.running().ok_or(Error::VmClosed { device })?;
        if !self.node.region.pagemap().is_bound() {
            return Err(Error::Unbound { device });
        }
        // What the program dropped before must be gone before the device writes there again.
        self.process.settle_events();
        let lease = self.vm.make_resident(&resident.declared);
        let lease = lease.map_err(Error::Declared)?;
        // SAFETY: as the caller promises.
        let launch = unsafe { self.node.gpu.launch(self.vm.id(), grid, kernel) }?;
        launch.on_done(move || drop((lease, running)));
        Ok(Launch::new(launch))
    }

    /// Brings the memory that holds `len` bytes at `pointer` to the device, and maps it in this address
    /// space: as [`Svm::prefetch`](crate::Svm::prefetch).
    ///
    /// # Errors
    ///
    /// `ZeroSized`, `Unbound` when the device was taken out of use. What cannot be done,
    /// [`Prefetch::wait`] tells.
    pub fn prefetch<T>(&self, pointer: *const T, len: ByteSize) -> Result<Prefetch, Error> {
        self.prefetch_to(pointer, len, Location::Device)
    }

    pub(crate) fn prefetch_to<T>(
        &self,
        pointer: *const T,
        len: ByteSize,
        to: Location,
    ) -> Result<Prefetch, Error> {
        self.process.check_ours()?;
        let device = self.node.number;
        if to != Location::Ram && !self.node.region.pagemap().is_bound() {
            return Err(Error::Unbound { device });
        }
        let span = Span::covering(VirtAddr::from(pointer), len).map_err(|_| Error::ZeroSized)?;
        // Memory that moved is shared where it is now.
        self.process.settle_events();
        Ok(Prefetch::new(&self.process, self.vm.prefetch(&[span], to)))
    }

    /// Binds what of `object` begins at `offset`, a multiple of the page size, at `span`: the device sees
    /// it there, and nothing of the process. What was bound there is replaced.
    ///
    /// # Errors
    ///
    /// `Bind`: where the device has pages mapped of memory that is shared (`EBUSY`), with the first range
    /// that is in the way; for what is not in the object, or the object of another device (`EINVAL`).
    pub fn bind_object(&self, span: Span, object: &Object, offset: ByteSize) -> Result<(), Error> {
        self.before_it_is_bound()?;
        let bound = self.vm.bind_object(span, object.of_driver(), offset);
        self.told(bound)
    }

    /// As [`DeviceVm::bind_object`], to read only: a lane that writes there stops with `NotPermitted`.
    ///
    /// # Errors
    ///
    /// As [`DeviceVm::bind_object`].
    pub fn bind_object_read_only(
        &self,
        span: Span,
        object: &Object,
        offset: ByteSize,
    ) -> Result<(), Error> {
        self.before_it_is_bound()?;
        let object = object.of_driver();
        self.told(self.vm.bind_object_read_only(span, object, offset))
    }

    /// Lets `span` mirror the process, as all of it does at first. Objects that are bound there are not
    /// any more.
    ///
    /// # Errors
    ///
    /// `Bind` when the engine has ended.
    pub fn bind_mirror(&self, span: Span) -> Result<(), Error> {
        self.process.check_ours()?;
        self.told(self.vm.bind_mirror(span))
    }

    /// Makes a hole of `span`: a lane that touches it stops with `NotBound`.
    ///
    /// # Errors
    ///
    /// `Bind` where the device has pages mapped of memory that is shared (`EBUSY`).
    pub fn unbind(&self, span: Span) -> Result<(), Error> {
        self.before_it_is_bound()?;
        self.told(self.vm.unbind(span))
    }

    /// What was unmapped before, by any thread, is not in the way of what is bound where it was.
    fn before_it_is_bound(&self) -> Result<(), Error> {
        self.process.check_ours()?;
        self.process.settle_events();
        Ok(())
    }

    fn told(&self, done: Result<(), BindError>) -> Result<(), Error> {
        let device = self.node.number;
        done.map_err(|error| Error::Bind { device, error })
    }

    /// What it did so far.
    pub fn stats(&self) -> VmStats {
        match self.process.is_inherited() {
            true => VmStats::default(),
            false => self.vm.stats(),
        }
    }

    /// Closes it: refuses faults, waits for those that are being served, and takes every mapping away.
    /// Pages stay where they are. Says what it did.
    pub fn close(self) -> VmStats {
        if !self.process.is_inherited() {
            self.vm.shut();
        }
        self.stats()
    }
}

impl Drop for DeviceVm {
    fn drop(&mut self) {
        if self.process.is_inherited() {
            return core::mem::forget((Arc::clone(&self.node), Arc::clone(&self.vm)));
        }
        self.node.close_vm(&self.vm);
    }
}
