//! The software GPU as a device of the suite.
//!
//! # Locking
//!
//! The list of servers has a lock, held to add and to take.

use super::Gpu;
use crate::dmirror::{CopyHook, Entry, Handler};
use core::time::Duration;
use gpusvm_device::{Access, Device, DeviceFault, FaultError, FaultId, Verdict, VmId};
use gpusvm_guarded::EngineThread;
use gpusvm_softgpu::{Builder, Grid, Lane, LaneError, LaunchError, SoftGpu, SoftGpuError, SvmPtr};
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{PageIndex, VirtAddr};
use std::thread::JoinHandle;

/// A software GPU, with threads that take its faults.
#[derive(Debug)]
pub struct Soft {
    gpu: Arc<SoftGpu>,
    servers: Mutex<Vec<JoinHandle<()>>>,
    stop: Arc<AtomicBool>,
}

/// How many faults are served at once.
const SERVERS: usize = 2;
/// How often a server looks whether it shall end.
const LOOKS: Duration = Duration::from_millis(5);

impl Soft {
    /// What `gpu` builds.
    ///
    /// # Panics
    ///
    /// When there is no memory for it.
    pub fn of(gpu: Builder) -> Arc<Self> {
        Arc::new(Self {
            gpu: gpu.build().expect("a software GPU"),
            servers: Mutex::new(Vec::new()),
            stop: Arc::new(AtomicBool::new(false)),
        })
    }

    /// Runs `kernel` in one lane, to its end.
    fn run<R: Clone + Default + Send + 'static>(
        &self,
        vm: VmId,
        kernel: impl Fn(&mut Lane<'_>) -> Result<R, LaneError> + Send + Sync + 'static,
    ) -> Result<R, FaultError> {
        let result = Arc::new(Mutex::new(R::default()));
        let place = Arc::clone(&result);
        let kernel = move |lane: &mut Lane<'_>| {
            let done = kernel(lane)?;
            *place.lock() = done;
            Ok(())
        };
        // SAFETY: cases use memory that they mapped for the device and the CPU, by atomics.
        let launch = unsafe { self.gpu.launch(vm, Grid::new(1), kernel) };
        let launch = match launch {
            Ok(launch) => launch,
            // Closed meanwhile: no address in particular.
            Err(SoftGpuError::NoVm { .. }) => {
                let at = VirtAddr::new(0);
                return Err(FaultError::Closed { at });
            }
            Err(error) => panic!("{error}"),
        };
        match launch.wait() {
            Ok(_) => Ok(result.lock().clone()),
            Err(LaunchError::Lanes {
                first: LaneError::Fault(error),
                ..
            }) => Err(error),
            Err(error) => panic!("{error}"),
        }
    }
}

fn serve(gpu: &SoftGpu, stop: &AtomicBool, handler: &Handler) {
    let _engine = EngineThread::enter().expect("room for another device thread");
    let Some(queue) = gpu.fault_queue() else {
        return;
    };
    let mut fault = [DeviceFault {
        id: FaultId(0),
        vm: VmId(0),
        at: VirtAddr::new(0),
        access: Access::Read,
        stale: false,
    }];
    while !stop.load(Ordering::Acquire) {
        if queue.take(&mut fault, LOOKS) == 0 {
            continue;
        }
        let at = fault[0].at;
        let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| handler(&fault[0])));
        let reason = "its handler panicked";
        let panicked = Verdict::Fail(FaultError::Gave { at, reason });
        queue.resolve(&fault[0], served.unwrap_or(panicked));
    }
}

impl Gpu for Arc<Soft> {
    fn device(&self) -> Arc<dyn Device> {
        Arc::clone(&self.gpu) as _
    }

    fn attach(&self, _vm: VmId, handler: Option<Handler>) {
        let running = core::mem::take(&mut *self.servers.lock());
        self.stop.store(true, Ordering::Release);
        for server in running {
            // Its panics were caught, and reported as failed faults.
            let _ = server.join();
        }
        let Some(handler) = handler else { return };
        self.stop.store(false, Ordering::Release);
        for _ in 0..SERVERS {
            let (gpu, stop) = (Arc::clone(&self.gpu), Arc::clone(&self.stop));
            let handler = Arc::clone(&handler);
            #[expect(clippy::disallowed_methods, reason = "a device's faults take threads")]
            let server = std::thread::spawn(move || serve(&gpu, &stop, &handler));
            self.servers.lock().push(server);
        }
    }

    fn load(&self, vm: VmId, at: &[VirtAddr]) -> Result<Vec<u64>, FaultError> {
        let at = at.to_vec();
        let load = |lane: &mut Lane<'_>, at: &VirtAddr| lane.load(SvmPtr::<u64>::new(*at));
        self.run(vm, move |lane| at.iter().map(|at| load(lane, at)).collect())
    }

    fn store(&self, vm: VmId, words: &[(VirtAddr, u64)]) -> Result<(), FaultError> {
        let words = words.to_vec();
        self.run(vm, move |lane| {
            let mut words = words.iter();
            words.try_for_each(|(at, value)| lane.store(SvmPtr::<u64>::new(*at), *value))
        })
    }

    fn fetch_add(&self, vm: VmId, at: &[VirtAddr], by: u64) -> Result<Vec<u64>, FaultError> {
        let at = at.to_vec();
        let add =
            move |lane: &mut Lane<'_>, at: &VirtAddr| lane.atomic_add(SvmPtr::<u64>::new(*at), by);
        self.run(vm, move |lane| at.iter().map(|at| add(lane, at)).collect())
    }

    fn faults(&self, _vm: VmId) -> u64 {
        self.gpu.counters().faults
    }

    fn mappings(&self) -> Vec<(VmId, PageIndex, Entry)> {
        Vec::new()
    }

    fn hook(&self) -> Option<&CopyHook> {
        None
    }
}

impl Drop for Soft {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for server in self.servers.lock().drain(..) {
            // As in `attach`.
            let _ = server.join();
        }
    }
}
