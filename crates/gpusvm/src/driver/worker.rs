//! The threads that take faults from a device's queue.

use crate::driver::{Vm, fault};
use core::time::Duration;
use gpusvm_device::{Access, DeviceFault, FaultError, FaultId, Verdict, VmId};
use gpusvm_guarded::EngineThread;
use gpusvm_mm::AddressSpace;
use gpusvm_sync::Arc;
use gpusvm_types::VirtAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

/// How many faults of one device are served at once.
pub(crate) const WORKERS: usize = 3;
/// How often a worker with nothing to do looks for garbage, and for ranges to look at again.
const IDLE: Duration = Duration::from_millis(50);

/// Starts the workers of a device address space. They end when its fault queue is closed.
///
/// # Errors
///
/// Those of starting a thread.
pub(crate) fn start<M: AddressSpace>(vm: &Arc<Vm<M>>) -> std::io::Result<Vec<JoinHandle<()>>> {
    if vm.device.fault_queue().is_none() {
        return Ok(Vec::new());
    }
    let spawn = |i| {
        let vm = Arc::clone(vm);
        let thread = std::thread::Builder::new().name(format!("gpusvm-worker-{i}"));
        thread.spawn(move || run(&vm))
    };
    (0..WORKERS).map(spawn).collect()
}

fn run<M: AddressSpace>(vm: &Vm<M>) {
    // Its own touches of application memory, to break sharing, must not wait for itself.
    let _engine = EngineThread::enter();
    let Some(queue) = vm.device.fault_queue() else {
        return;
    };
    let mut fault = [NO_FAULT];
    while !queue.is_closed() {
        let taken = queue.take(&mut fault, IDLE);
        vm.revisit();
        if taken == 0 {
            vm.svm.collect_garbage();
            continue;
        }
        let at = fault[0].at;
        let served = catch_unwind(AssertUnwindSafe(|| fault::serve(vm, &fault[0])));
        let panicked = Verdict::Fail(FaultError::Gave {
            at,
            reason: "its handler panicked",
        });
        queue.resolve(&fault[0], served.unwrap_or(panicked));
    }
}

const NO_FAULT: DeviceFault = DeviceFault {
    id: FaultId(0),
    vm: VmId(0),
    at: VirtAddr::new(0),
    access: Access::Read,
    stale: false,
};
