//! A software GPU whose copies stand at a gate when a test says so, and whose faults are counted: each
//! that was taken is resolved once.

use super::wait_until;
use gpusvm::{ByteSize, SoftGpu};
use gpusvm_device::{
    Caps, CopyEngine, CopyOp, Device, DeviceError, DeviceFault, FaultId, FaultQueue, Fence,
    PageTables, Verdict,
};
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Gated {
    pub(crate) gpu: Arc<SoftGpu>,
    gate: Mutex<Gate>,
    changed: Condvar,
    faults: Mutex<Faults>,
    panics: Mutex<Panics>,
}

/// When somebody panics who asks what the device can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Panics {
    #[default]
    Never,
    /// Who asks first after a fault was resolved.
    AfterAnAnswer,
    Now,
}

#[derive(Debug, Default)]
struct Gate {
    /// How many copies to the device that come now are to stand at the gate.
    hold: u32,
    held: u32,
    open: bool,
}

#[derive(Debug, Default)]
struct Faults {
    /// How often each was taken, and resolved.
    seen: BTreeMap<FaultId, (u32, u32)>,
}

impl Gated {
    pub(crate) fn new(vram: ByteSize, units: usize) -> Arc<Self> {
        Arc::new(Self {
            gpu: SoftGpu::builder().vram(vram).units(units).build().unwrap(),
            gate: Mutex::default(),
            changed: Condvar::new(),
            faults: Mutex::default(),
            panics: Mutex::default(),
        })
    }

    /// The next `count` copies to the device wait for `open`.
    pub(crate) fn hold(&self, count: u32) {
        *self.gate.lock().unwrap() = Gate {
            hold: count,
            held: 0,
            open: false,
        };
    }

    /// Waits until `count` copies stand at the gate.
    pub(crate) fn wait_held(&self, count: u32) {
        wait_until("copies come", || self.held() >= count);
    }

    /// How many stand there.
    pub(crate) fn held(&self) -> u32 {
        self.gate.lock().unwrap().held
    }

    /// Copies go on.
    pub(crate) fn open(&self) {
        let mut gate = self.gate.lock().unwrap();
        gate.open = true;
        gate.hold = 0;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut gate = self.gate.lock().unwrap();
        if gate.hold > 0 {
            gate.hold -= 1;
            gate.held += 1;
            while !gate.open {
                gate = self.changed.wait(gate).unwrap();
            }
        }
    }

    /// Who asks for the capabilities next after a fault was resolved panics, once.
    pub(crate) fn panic_after_an_answer(&self) {
        *self.panics.lock().unwrap() = Panics::AfterAnAnswer;
    }

    /// How many faults were taken.
    pub(crate) fn taken(&self) -> usize {
        self.faults.lock().unwrap().seen.len()
    }

    /// Every fault that was taken was taken once and resolved once.
    pub(crate) fn assert_each_resolved_once(&self) {
        let faults = self.faults.lock().unwrap();
        let wrong: Vec<_> = faults.seen.iter().filter(|(_, n)| **n != (1, 1)).collect();
        assert!(wrong.is_empty(), "(taken, resolved): {wrong:?}");
    }
}

impl Device for Gated {
    fn caps(&self) -> &Caps {
        let mut panics = self.panics.lock().unwrap();
        let is_to_panic = *panics == Panics::Now;
        if is_to_panic {
            *panics = Panics::Never;
        }
        drop(panics);
        assert!(!is_to_panic, "a test wants this panic");
        self.gpu.caps()
    }

    fn copy_engine(&self) -> &dyn CopyEngine {
        self
    }

    fn page_tables(&self) -> &dyn PageTables {
        self.gpu.page_tables()
    }

    fn fault_queue(&self) -> Option<&dyn FaultQueue> {
        Some(self)
    }
}

impl CopyEngine for Gated {
    fn submit(&self, batch: &[CopyOp]) -> Result<Fence, DeviceError> {
        if batch.iter().any(|op| matches!(op, CopyOp::ToDevice { .. })) {
            self.pass();
        }
        self.gpu.copy_engine().submit(batch)
    }

    fn wait(&self, fence: Fence) -> Result<(), DeviceError> {
        self.gpu.copy_engine().wait(fence)
    }
}

impl FaultQueue for Gated {
    fn take(&self, out: &mut [DeviceFault], timeout: Duration) -> usize {
        let taken = self.gpu.fault_queue().unwrap().take(out, timeout);
        let mut faults = self.faults.lock().unwrap();
        for fault in &out[..taken] {
            faults.seen.entry(fault.id).or_default().0 += 1;
        }
        taken
    }

    fn is_closed(&self) -> bool {
        self.gpu.fault_queue().unwrap().is_closed()
    }

    fn resolve(&self, fault: &DeviceFault, verdict: Verdict) {
        let mut faults = self.faults.lock().unwrap();
        faults.seen.entry(fault.id).or_default().1 += 1;
        drop(faults);
        let mut panics = self.panics.lock().unwrap();
        if *panics == Panics::AfterAnAnswer {
            *panics = Panics::Now;
        }
        drop(panics);
        self.gpu.fault_queue().unwrap().resolve(fault, verdict);
    }

    fn close(&self) {
        self.gpu.fault_queue().unwrap().close();
    }
}
