//! The threads that take faults from a device's queue.
//!
//! ```text
//!   waits ---- takes A1 ---- nobody else waits? starts another ---- serves A1, and what is parked on A
//!     ^                                                                             |
//!     `--------------------------------- tends what is due -------------------------'
//! ```
//!
//! One thread is there from the beginning, waits, and tends. Others are started when a fault is to be
//! served and nobody would be left to take the next one; those that had nothing to do for a while end.
//! So faults in different blocks do not wait for each other, and a device that does nothing costs one
//! thread that looks around now and then.

use crate::driver::intake::Intake;
use crate::driver::{VramRegion, fault};
use core::time::Duration;
use gpusvm_device::{Access, DeviceFault, FaultError, FaultId, FaultQueue, Verdict, VmId};
use gpusvm_guarded::EngineThread;
use gpusvm_mm::AddressSpace;
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::{AtomicUsize, Ordering};
use gpusvm_types::VirtAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::{JoinHandle, Scope};

/// How many blocks of one device are served at once. A service mostly waits: for a copy, a timeslice, a
/// page of another device. So it is more than processors would need; and less than the slots that
/// blocks are copied through, of which each service needs one and two devices must have enough.
pub const MAX_WORKERS: usize = 8;
/// How often somebody who has nothing to do looks for garbage, and for ranges to look at again.
const IDLE: Duration = Duration::from_millis(50);
/// How long a worker that is not the first waits for a fault before it ends.
const REST: Duration = Duration::from_secs(1);

/// Starts to serve the faults of a device, in all its address spaces of the region, until its fault queue
/// is closed; a device without one gets no thread. Who joins the threads has joined all of them. From
/// now on the device's prefetches go on in the background, too, until
/// [`VramRegion::close_prefetches`].
///
/// # Errors
///
/// Those of starting a thread.
pub fn start<M: AddressSpace>(region: &Arc<VramRegion<M>>) -> std::io::Result<Vec<JoinHandle<()>>> {
    region.prefetches().go_to_background();
    if region.device().fault_queue().is_none() {
        return Ok(Vec::new());
    }
    let region = Arc::clone(region);
    let thread = std::thread::Builder::new().name("gpusvm-worker-0".into());
    let first = thread.spawn(move || {
        let Some(queue) = region.device().fault_queue() else {
            return;
        };
        let crew = Crew {
            region: &region,
            queue,
            intake: Intake::default(),
            workers: AtomicUsize::new(1),
            waiting: AtomicUsize::new(0),
        };
        std::thread::scope(|scope| crew.run(scope, true));
    })?;
    Ok(vec![first])
}

/// The workers of a device.
struct Crew<'a, M: AddressSpace> {
    region: &'a VramRegion<M>,
    queue: &'a dyn FaultQueue,
    intake: Intake,
    /// How many there are.
    workers: AtomicUsize,
    /// How many of them would take a fault.
    waiting: AtomicUsize,
}

impl<M: AddressSpace> Crew<'_, M> {
    fn run<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, is_first: bool) {
        // Its own touches of application memory, to break sharing, must not wait for itself.
        let _engine = EngineThread::enter();
        while !self.queue.is_closed() {
            match self.take(is_first) {
                Some(fault) => self.answer(scope, &fault),
                None if !is_first && self.waiting.load(Ordering::Acquire) > 0 => break,
                None => {}
            }
            self.region.vms().iter().for_each(|vm| vm.tend());
        }
        self.workers.fetch_sub(1, Ordering::AcqRel);
    }

    fn take(&self, is_first: bool) -> Option<DeviceFault> {
        let mut fault = [NO_FAULT];
        self.waiting.fetch_add(1, Ordering::AcqRel);
        let timeout = if is_first { IDLE } else { REST };
        let taken = self.queue.take(&mut fault, timeout);
        self.waiting.fetch_sub(1, Ordering::AcqRel);
        (taken > 0).then_some(fault[0])
    }

    /// Serves a fault, and those of its block that come meanwhile; or leaves it to who serves the block.
    fn answer<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, fault: &DeviceFault) {
        gpusvm_sync::walk!("answer");
        let Some(mut lead) = self.intake.begin(self.queue, fault) else {
            return;
        };
        self.relieve(scope);
        let verdict = verdict_of(fault, || self.serve(fault));
        self.queue.resolve(fault, verdict);
        while let Some(parked) = lead.next() {
            let verdict = verdict_of(&parked, || {
                fault::replay(self.region, &parked).unwrap_or_else(|| self.serve(&parked))
            });
            self.queue.resolve(&parked, verdict);
        }
    }

    /// Somebody is to take the next fault, while this one is served. If no thread can be started, those
    /// that are there do what they can.
    fn relieve<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        if self.waiting.load(Ordering::Acquire) > 0 {
            return;
        }
        let number = self.workers.fetch_add(1, Ordering::AcqRel);
        let thread = std::thread::Builder::new().name(format!("gpusvm-worker-{number}"));
        let started = number < MAX_WORKERS
            && thread
                .spawn_scoped(scope, move || self.run(scope, false))
                .is_ok();
        if !started {
            self.workers.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn serve(&self, fault: &DeviceFault) -> Verdict {
        match self.region.vm(fault.vm) {
            Some(vm) => vm.serve(fault),
            None => Verdict::Fail(FaultError::Closed { at: fault.at }),
        }
    }
}

/// A fault that was taken is answered, whatever happens meanwhile: its launch would wait for ever.
fn verdict_of(fault: &DeviceFault, serve: impl FnOnce() -> Verdict) -> Verdict {
    let served = catch_unwind(AssertUnwindSafe(serve));
    served.unwrap_or(Verdict::Fail(FaultError::Gave {
        at: fault.at,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_verdict() {
        let at = VirtAddr::new(0x5000);
        let fault = DeviceFault { at, ..NO_FAULT };
        assert_eq!(verdict_of(&fault, || Verdict::Replay), Verdict::Replay);
        let verdict = verdict_of(&fault, || panic!("a test wants this panic"));
        let reason = "its handler panicked";
        assert_eq!(verdict, Verdict::Fail(FaultError::Gave { at, reason }));
    }
}
