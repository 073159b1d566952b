//! The engine that is tested: a machine of software GPUs, and the address spaces on them.
//!
//! ```text
//!   Machine ---- Svm ---- device 0, device 1, ...
//!      |
//!      `-- Engine(n): executes lists of commands in device address space n, on device n mod devices
//! ```

use crate::Skip;
use crate::buffer::Buffer;
use crate::record::{self, Fence, Record};
use gpusvm::{
    Access, Advice, AdviseError, Attributes, ByteSize, DeviceVm, Error, Fabric, FaultInfo,
};
use gpusvm::{
    Grid, Launch, MigrateOnTouch, Plan, Policy, Preferred, Prefetched, SoftGpu, Span, Stats,
};
use gpusvm::{Svm, VmStats, driver::BindError};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many engines work at once in families of threads and processes.
pub(crate) const ENGINES: usize = 3;
/// How long a thing may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(120);

/// The devices of a test.
#[derive(Debug)]
pub(crate) struct Machine {
    vms: Vec<DeviceVm>,
    svm: Svm,
}

/// An address space on a device, and what executes in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Engine<'m> {
    machine: &'m Machine,
    vm: usize,
}

/// Pages move on every touch, unless something is advised, and stay for no time at all, but for atomics; a fault that got nowhere
/// makes them stay a while.
#[derive(Debug)]
struct AsXe;

impl Policy for AsXe {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        let atomic = fault.access == Access::Atomic;
        let timeslice = match fault.attempt {
            0 if atomic => Duration::from_micros(500),
            0 => Duration::ZERO,
            attempt => Duration::from_micros(50 << attempt.min(6)),
        };
        let plan = MigrateOnTouch::default().on_device_fault(fault);
        Plan {
            migrate: plan.migrate || fault.advice == Attributes::NONE,
            timeslice,
            ..plan
        }
    }
}

/// Memory that no device may move takes no advice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NotShared;

/// What the devices of a machine are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spec {
    pub(crate) devices: usize,
    /// Device address spaces, on one device after the other.
    pub(crate) vms: usize,
    pub(crate) vram: ByteSize,
    pub(crate) fabric: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            devices: 1,
            vms: 1,
            vram: ByteSize::mib(32),
            fabric: false,
        }
    }
}

impl Machine {
    /// Where the program's own memory can be shared.
    pub(crate) fn new(vms: usize) -> Result<Self, Skip> {
        Self::with(Spec {
            vms,
            ..Spec::default()
        })
    }

    pub(crate) fn with(spec: Spec) -> Result<Self, Skip> {
        let mut builder = Svm::builder().policy(Arc::new(AsXe));
        for _ in 0..spec.devices {
            let gpu = SoftGpu::builder().vram(spec.vram).units(2);
            let gpu = if spec.fabric {
                gpu.fabric(Fabric(7))
            } else {
                gpu
            };
            builder = builder.device(gpu.build().expect("a device"));
        }
        let svm = builder.build().expect("an engine");
        if svm.rung().number() < 4 {
            let vm = |number| {
                svm.create_vm(number % spec.devices)
                    .expect("an address space")
            };
            let vms = (0..spec.vms).map(vm).collect();
            return Ok(Self { vms, svm });
        }
        let reason = "without userfaultfd only memory of the library can be shared";
        let required = std::env::var_os(gpusvm_testkit::require::REQUIRE);
        assert!(required.is_none_or(|value| value != "1"), "{reason}");
        Err(Skip(reason.to_owned()))
    }

    /// What executes in address space `vm`.
    pub(crate) fn engine(&self, vm: usize) -> Engine<'_> {
        Engine { machine: self, vm }
    }

    pub(crate) fn svm(&self) -> &Svm {
        &self.svm
    }

    pub(crate) fn stats(&self) -> Stats {
        self.svm.stats()
    }

    /// Brings memory home.
    pub(crate) fn home(&self, buffer: &Buffer) -> Prefetched {
        let len = ByteSize::from_usize(buffer.len());
        let prefetch = self.svm.prefetch_to_ram(buffer.at().cast_const(), len);
        let done = prefetch.expect("a prefetch").wait();
        done.expect("memory can always come home")
    }

    /// Ends it, when everything that was shared is gone: nothing is left on the devices, and no fault
    /// failed, but for `failed` of them.
    pub(crate) fn finish(self, failed: u64) {
        let since = Instant::now();
        while self.svm.stats().vram_used_bytes > 0 {
            let stats = self.svm.stats();
            assert!(since.elapsed() < PATIENCE, "device memory leaks: {stats:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(self.vms);
        let stats = self.svm.shutdown().expect("the end of the engine");
        let left = (
            stats.vram_used_bytes,
            stats.vram_lost_bytes,
            stats.pages_on_devices,
        );
        assert_eq!(left, (0, 0, 0), "used, lost, and pages that live there");
        assert_eq!(stats.failed_faults, failed, "faults that failed: {stats:?}");
    }
}

impl<'m> Engine<'m> {
    pub(crate) fn machine(self) -> &'m Machine {
        self.machine
    }

    /// Has the device read the list of a record and obey, and signal `fence` then.
    pub(crate) fn exec(self, record: Record, fence: Fence) -> Launch {
        let (list, fence) = (record.list(), fence.pointer());
        let kernel = move |lane: &mut gpusvm::Lane<'_>| record::execute(lane, list, fence);
        self.launch(Grid::new(1), kernel)
    }

    /// Runs a kernel in this address space.
    pub(crate) fn launch<F>(self, grid: Grid, kernel: F) -> Launch
    where
        F: Fn(&mut gpusvm::Lane<'_>) -> Result<(), gpusvm::LaneError> + Send + Sync + 'static,
    {
        // SAFETY: the tests touch what kernels touch by atomics, or when the launch has ended.
        let launch = unsafe { self.vm().launch(grid, kernel) };
        launch.expect("a launch")
    }

    /// Its device address space.
    pub(crate) fn vm(self) -> &'m DeviceVm {
        &self.machine.vms[self.vm]
    }

    /// What its address space did so far.
    pub(crate) fn stats(self) -> VmStats {
        self.vm().stats()
    }

    /// Waits for an exec: for its fence in memory, and for the launch.
    pub(crate) fn wait(self, launch: Launch, fence: Fence) {
        let since = Instant::now();
        while !fence.is_signalled() && !launch.is_done() {
            assert!(since.elapsed() < PATIENCE, "{fence:?} is not signalled");
            std::thread::yield_now();
        }
        if let Err(error) = launch.wait() {
            panic!("{error}: {:?}", self.machine.stats());
        }
        assert!(fence.is_signalled(), "{fence:?} was lost");
    }

    /// Says where memory shall live.
    pub(crate) fn prefer(self, at: *mut u8, len: usize, device: bool) -> Result<(), NotShared> {
        let preferred = match device {
            true => Preferred::Device(self.vm().device()),
            false => Preferred::Ram,
        };
        self.advise(at, len, Advice::PreferredLocation(preferred))
    }

    /// Says something of memory.
    pub(crate) fn advise(self, at: *mut u8, len: usize, advice: Advice) -> Result<(), NotShared> {
        let len = ByteSize::from_usize(len);
        match self.machine.svm.advise(at.cast_const(), len, advice) {
            Ok(()) => Ok(()),
            Err(Error::Advise(AdviseError::NotMirrored { .. })) => Err(NotShared),
            Err(error) => panic!("advice of {len} at {at:?}: {error}"),
        }
    }

    /// Brings memory to the device.
    pub(crate) fn prefetch(self, at: *mut u8, len: usize) -> Prefetched {
        let len = ByteSize::from_usize(len);
        let prefetch = self.vm().prefetch(at.cast_const(), len);
        let prefetch = prefetch.expect("a prefetch");
        let done = prefetch.wait();
        done.unwrap_or_else(|error| panic!("{error}: {:?}", prefetch.progress()))
    }

    /// Brings memory to the device from another one, which keeps it for its timeslice.
    pub(crate) fn prefetch_from_peer(self, at: *mut u8, len: usize) -> Prefetched {
        let since = Instant::now();
        loop {
            let len = ByteSize::from_usize(len);
            let prefetch = self.vm().prefetch(at.cast_const(), len);
            match prefetch.expect("a prefetch").wait() {
                Ok(done) => return done,
                Err(error) => assert!(since.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// That the mirror cannot be unbound now.
    pub(crate) fn expect_busy(self) {
        let unbound = self.unbind(Span::EVERYWHERE);
        assert!(!unbound, "ranges were in use: {:?}", self.stats());
    }

    /// Unbinds the mirror of some memory, as soon as nothing of it is in use, and binds it again.
    pub(crate) fn unbind_at_last(self, span: Span) {
        let since = Instant::now();
        while !self.unbind(span) {
            let stats = self.stats();
            assert!(since.elapsed() < PATIENCE, "busy for ever: {stats:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.vm().bind_mirror(span).expect("an open address space");
    }

    /// Unbinds the mirror, unless it is in use.
    fn unbind(self, span: Span) -> bool {
        match self.vm().unbind(span) {
            Ok(()) => true,
            Err(Error::Bind {
                error: BindError::Busy { .. },
                ..
            }) => false,
            Err(error) => panic!("{error}"),
        }
    }
}
