//! The threads that take faults from a device's queue.

use crate::driver::VramRegion;
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

/// Starts the workers of a device, for all its address spaces of the region. They end when its fault
/// queue is closed; a device without one gets none.
///
/// # Errors
///
/// Those of starting a thread; those that were started end with the queue.
pub fn start<M: AddressSpace>(region: &Arc<VramRegion<M>>) -> std::io::Result<Vec<JoinHandle<()>>> {
    if region.device().fault_queue().is_none() {
        return Ok(Vec::new());
    }
    let spawn = |i| {
        let region = Arc::clone(region);
        let thread = std::thread::Builder::new().name(format!("gpusvm-worker-{i}"));
        thread.spawn(move || run(&region))
    };
    (0..WORKERS).map(spawn).collect()
}

fn run<M: AddressSpace>(region: &VramRegion<M>) {
    gpusvm_sync::walk!("run");
    // Its own touches of application memory, to break sharing, must not wait for itself.
    let _engine = EngineThread::enter();
    let Some(queue) = region.device().fault_queue() else {
        return;
    };
    let mut fault = [NO_FAULT];
    while !queue.is_closed() {
        let taken = queue.take(&mut fault, IDLE);
        region.vms().iter().for_each(|vm| vm.tend());
        if taken > 0 {
            queue.resolve(&fault[0], serve(region, &fault[0]));
        }
    }
}

fn serve<M: AddressSpace>(region: &VramRegion<M>, fault: &DeviceFault) -> Verdict {
    let at = fault.at;
    let Some(vm) = region.vm(fault.vm) else {
        return Verdict::Fail(FaultError::Closed { at });
    };
    let served = catch_unwind(AssertUnwindSafe(|| vm.serve(fault)));
    served.unwrap_or(Verdict::Fail(FaultError::Gave {
        at,
        reason: "its handler panicked",
    }))
}

const NO_FAULT: DeviceFault = DeviceFault {
    id: FaultId(0),
    vm: VmId(0),
    at: VirtAddr::new(0),
    access: Access::Read,
    stale: false,
};
