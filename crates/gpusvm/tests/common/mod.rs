//! What the tests share: an engine, memory of the program's own, and a watchdog.
#![allow(
    dead_code,
    clippy::allow_attributes,
    reason = "each test file uses its own part"
)]

use gpusvm::driver::{Devices, Vm, VramRegion};
pub(crate) mod gated;
pub(crate) mod pinned;

use gpusvm::{Builder, ByteSize, Fabric, FaultInfo, FaultMode, Plan, Policy, SoftGpu, Svm};
use gpusvm::{Grid, Resident, SvmPtr};
use gpusvm_device::Device;
use gpusvm_mm_linux::{Options, Process};
use gpusvm_testkit::Watchdog;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// An engine with one device.
pub(crate) fn engine(vram: ByteSize) -> Svm {
    engine_with(vram, FaultMode::Replayable)
}

/// An engine with one device that faults, or does not.
pub(crate) fn engine_with(vram: ByteSize, faults: FaultMode) -> Svm {
    let gpu = SoftGpu::builder()
        .vram(vram)
        .units(3)
        .fault_mode(faults)
        .build()
        .unwrap();
    built(Svm::builder().device(gpu))
}

/// An engine with two devices, which share a fabric or do not.
pub(crate) fn two_devices(vram: ByteSize, fabric: bool, policy: impl Policy + 'static) -> Svm {
    two_devices_with(vram, fabric, policy, |builder| builder)
}

/// As `two_devices`, and more.
pub(crate) fn two_devices_with(
    vram: ByteSize,
    fabric: bool,
    policy: impl Policy + 'static,
    more: impl FnOnce(Builder) -> Builder,
) -> Svm {
    let gpu = || {
        let gpu = SoftGpu::builder().vram(vram).units(2);
        let gpu = if fabric { gpu.fabric(Fabric(1)) } else { gpu };
        gpu.build().unwrap()
    };
    let builder = Svm::builder().device(gpu()).device(gpu());
    built(more(builder.policy(Arc::new(policy))))
}

/// Migrates on every fault, and lets pages stay so long.
#[derive(Debug)]
pub(crate) struct Stay(pub(crate) Duration);

impl Policy for Stay {
    fn on_device_fault(&self, _: &FaultInfo) -> Plan {
        Plan {
            migrate: true,
            duplicate: false,
            timeslice: self.0,
            ..Plan::default()
        }
    }
}

/// Pages stay where they are, and are looked at again after a while, or never.
#[derive(Debug)]
pub(crate) struct InPlace(pub(crate) Option<Duration>);

impl Policy for InPlace {
    fn on_device_fault(&self, _: &FaultInfo) -> Plan {
        Plan {
            migrate: false,
            ask_again: self.0,
            ..Plan::default()
        }
    }
}

/// The engine, and a note about the rung it is on.
pub(crate) fn built(builder: Builder) -> Svm {
    let svm = builder.build().unwrap();
    let required = std::env::var_os("GPUSVM_REQUIRE_UFFD").is_some_and(|value| value == "1");
    assert!(
        !required || svm.rung().number() < 4,
        "userfaultfd is required: {}",
        gpusvm::doctor()
    );
    if let Some(notice) = svm.rung_notice() {
        eprintln!("note: {notice}");
    }
    svm
}

/// Adds one to `n` numbers on a device, and waits until it is done.
pub(crate) fn add_one(svm: &Svm, device: usize, (p, n): (SvmPtr<u64>, usize)) {
    const LANES: usize = 8;
    // SAFETY: whoever else uses the numbers meanwhile does so by atomics; they outlive the launch.
    let launch = unsafe {
        svm.launch_resident(device, Grid::new(LANES), Resident::new(), move |lane| {
            for i in (lane.id()..n).step_by(LANES) {
                lane.atomic_add(p.add(i), 1u64)?;
            }
            Ok(())
        })
    };
    launch.unwrap().wait().unwrap();
}

/// Whether memory of the program's own can be adopted here; prints why not.
pub(crate) fn can_adopt(svm: &Svm) -> bool {
    let can = svm.rung().number() < 4;
    if !can {
        println!("skipped: without userfaultfd only memory of the library can be mirrored");
    }
    can
}

/// Runs `test`, and ends the process with a dump of where its threads are if it takes too long.
pub(crate) fn within(limit: Duration, test: impl FnOnce()) {
    let _watchdog = Watchdog::start(limit, String::new);
    test();
}

/// Waits until something is so, for twenty seconds.
pub(crate) fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    assert!(is_so_within(Duration::from_secs(20), is_so), "{what}");
}

/// Whether something becomes so in a while.
pub(crate) fn is_so_within(limit: Duration, is_so: impl Fn() -> bool) -> bool {
    (0..limit.as_millis()).any(|_| {
        is_so() || {
            std::thread::sleep(Duration::from_millis(1));
            false
        }
    })
}

/// A private anonymous mapping of the program's own, 2 MiB aligned.
#[derive(Debug)]
pub(crate) struct Map {
    pub(crate) at: *mut u8,
    pub(crate) len: usize,
    whole: *mut u8,
    whole_len: usize,
}

// SAFETY: memory is not bound to a thread.
unsafe impl Send for Map {}
// SAFETY: the tests use it by atomics, or from one thread.
unsafe impl Sync for Map {}

const BLOCK: usize = 2 << 20;

impl Map {
    /// With huge pages, or never.
    pub(crate) fn new(len: usize, huge: bool) -> Self {
        let whole_len = len + BLOCK;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no address is asked for.
        let whole = unsafe { libc::mmap(std::ptr::null_mut(), whole_len, access, flags, -1, 0) };
        assert_ne!(whole, libc::MAP_FAILED);
        let whole = whole.cast::<u8>();
        let at = whole.wrapping_add(whole.align_offset(BLOCK));
        let advice = if huge {
            libc::MADV_HUGEPAGE
        } else {
            libc::MADV_NOHUGEPAGE
        };
        // SAFETY: advice on our own mapping.
        unsafe { libc::madvise(at.cast(), len, advice) };
        Self {
            at,
            len,
            whole,
            whole_len,
        }
    }
}

impl Map {
    /// Its bytes, for one thread that uses nothing else of it meanwhile.
    #[expect(
        clippy::mut_from_ref,
        reason = "it owns the mapping, not a reference to it"
    )]
    pub(crate) fn bytes(&self) -> &mut [u8] {
        // SAFETY: our own mapping; as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more.
        unsafe { libc::munmap(self.whole.cast(), self.whole_len) };
    }
}

/// Sets a flag when it is dropped, so that threads end when a test fails.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(crate) fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.set();
        }
    }
}

/// This process, and devices, by the driver's own interface. Everything ends when it is dropped.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) process: Arc<Process>,
    pub(crate) devices: Arc<Devices<Process>>,
    pub(crate) regions: Vec<Arc<VramRegion<Process>>>,
    pub(crate) vms: Vec<Arc<Vm<Process>>>,
}

pub(crate) fn world(gpus: &[Arc<dyn Device>]) -> World {
    world_with(gpus, Stay(Duration::ZERO))
}

/// As `world`, with somebody else to decide where pages live.
pub(crate) fn world_with(gpus: &[Arc<dyn Device>], policy: impl Policy + 'static) -> World {
    let process = Process::start(Options::default()).unwrap();
    let devices = Devices::new(&process);
    let regions = gpus
        .iter()
        .map(|gpu| VramRegion::new(&devices, Arc::clone(gpu)).unwrap());
    let regions: Vec<_> = regions.collect();
    let policy: Arc<dyn Policy> = Arc::new(policy);
    let vms = regions
        .iter()
        .map(|region| Vm::new(region, Arc::clone(&policy)).unwrap());
    let vms = vms.collect();
    World {
        process,
        devices,
        regions,
        vms,
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.process.stop_migrations();
        self.vms.iter().for_each(|vm| vm.close());
        self.process.stop();
    }
}
