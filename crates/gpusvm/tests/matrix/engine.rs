//! The engine that is tested: a machine of software GPUs, and the address spaces on them.
//!
//! ```text
//!   Machine ---- Svm ---- device 0, device 1, ...   one for each address space that a test needs
//!      |
//!      `-- Engine(n): executes lists of commands in address space n
//! ```

use crate::Skip;
use crate::record::{self, Fence, Record};
use gpusvm::{ByteSize, Fabric, FaultInfo, Grid, Launch, MigrateOnTouch, Plan, Policy, Resident};
use gpusvm::{SoftGpu, Stats, Svm};
use gpusvm_device::Access;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many engines work at once in families of threads and processes.
pub(crate) const ENGINES: usize = 3;
/// Whether memory can be fetched before the device touches it.
pub(crate) const CAN_PREFETCH: bool = false;
/// Whether the program can say where memory shall live.
pub(crate) const CAN_ADVISE: bool = false;
/// Whether mirrors and device objects can be bound and unbound.
pub(crate) const CAN_BIND: bool = false;
/// How long a thing may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(120);

/// The devices of a test.
#[derive(Debug)]
pub(crate) struct Machine {
    svm: Svm,
}

/// An address space on a device, and what executes in it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Engine<'m> {
    machine: &'m Machine,
    vm: usize,
}

/// Pages move on every touch and stay for no time at all, but for atomics; a fault that got nowhere
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
        Plan {
            migrate: true,
            timeslice,
            ..MigrateOnTouch::default().on_device_fault(fault)
        }
    }
}

/// What the devices of a machine are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spec {
    pub(crate) vms: usize,
    pub(crate) vram: ByteSize,
    pub(crate) fabric: bool,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
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
        for _ in 0..spec.vms {
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
            return Ok(Self { svm });
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

    /// Ends it, when everything that was shared is gone: nothing is left on the devices, and no fault
    /// failed, but for `failed` of them.
    pub(crate) fn finish(self, failed: u64) {
        let since = Instant::now();
        while self.svm.stats().vram_used_bytes > 0 {
            let stats = self.svm.stats();
            assert!(since.elapsed() < PATIENCE, "device memory leaks: {stats:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
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
        let launch = unsafe {
            self.machine
                .svm
                .launch_resident(self.vm, grid, Resident::new(), kernel)
        };
        launch.expect("a launch")
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
    pub(crate) fn prefer(self, _at: *mut u8, _len: usize, _device: bool) {
        unreachable!("sections with advice are pending");
    }

    /// Brings memory to the device.
    pub(crate) fn prefetch(self, _at: *mut u8, _len: usize) {
        unreachable!("sections that prefetch are pending");
    }

    /// That the mirror cannot be unbound now.
    pub(crate) fn expect_busy(self) {
        unreachable!("sections that unbind are pending");
    }

    /// Binds a device object over memory, and the mirror again.
    pub(crate) fn bind_and_unbind(self, _at: *mut u8, _len: usize) {
        unreachable!("sections that bind are pending");
    }
}
