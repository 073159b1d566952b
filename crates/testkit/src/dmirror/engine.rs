//! The copy engine: on the thread that submits, page by page, through the hook.
//!
//! # Locking
//!
//! The list of late clears has a lock, held for one push or one take. Nothing is allocated.

use super::memory::{Interconnect, Memory, Reached};
use super::{CopyHook, Spec};
use crate::world::NoAnswer;
use gpusvm_device::{CopyEngine, CopyOp, DeviceError, Fabric, Fence};
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_sync::{Arc, Mutex, yield_now};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, PAGE_SIZE};

/// What moves bytes.
#[derive(Debug)]
pub(super) struct Engine {
    memory: Arc<Memory>,
    bus: Arc<Interconnect>,
    fabric: Option<Fabric>,
    hook: CopyHook,
    batches: AtomicU64,
    /// Clears that nobody waited for yet; `None` when clears are done at once.
    late: Option<Mutex<Vec<(DevAddr, ByteSize)>>>,
}

/// How many clears may be late at a time.
const MOST_LATE: usize = 64;
/// After so many pages of a copy others may run.
const PAGES_AT_ONCE: u64 = 16;

/// Which way a copy goes.
#[derive(Clone, Copy)]
enum Way {
    In,
    Out,
}

impl Engine {
    pub(super) fn new(memory: &Arc<Memory>, bus: &Arc<Interconnect>, spec: &Spec) -> Self {
        let late = || Mutex::new(Vec::with_capacity(MOST_LATE));
        Self {
            memory: Arc::clone(memory),
            bus: Arc::clone(bus),
            fabric: spec.fabric,
            hook: CopyHook::default(),
            batches: AtomicU64::new(0),
            late: spec.late_clears.then(late),
        }
    }

    pub(super) fn hook(&self) -> &CopyHook {
        &self.hook
    }

    fn run(&self, op: CopyOp) -> Result<(), DeviceError> {
        match op {
            CopyOp::ToDevice { from, to, len } => self.copy(from, to, len, Way::In),
            CopyOp::ToRam { from, to, len } => self.copy(to, from, len, Way::Out),
            CopyOp::Clear { to, len } => {
                self.check(to, len)?;
                if !self.is_put_off(to, len) {
                    self.catch_up()?;
                    self.clear(to, len)?;
                }
                Ok(())
            }
        }
    }

    fn copy(
        &self,
        bus: DmaAddr,
        vram: DevAddr,
        len: ByteSize,
        way: Way,
    ) -> Result<(), DeviceError> {
        self.check(vram, len)?;
        self.catch_up()?;
        let mut page = [0; PAGE_SIZE.as_usize()];
        let mut done = 0;
        while done < len.get() {
            if (done / PAGE_SIZE.get()).is_multiple_of(PAGES_AT_ONCE) {
                yield_now();
            }
            let piece = PAGE_SIZE.get().min(len.get() - done);
            let bytes = &mut page[..ByteSize::new(piece).as_usize()];
            let (bus, vram) = (bus + ByteSize::new(done), vram + ByteSize::new(done));
            let copied = match way {
                Way::In => self
                    .read_bus(bus, bytes)?
                    .and_then(|()| self.memory.write(vram, bytes)),
                Way::Out => match self.memory.read(vram, bytes) {
                    Ok(()) => self.write_bus(bus, bytes)?,
                    Err(error) => Err(error),
                },
            };
            copied.map_err(|NoAnswer| DeviceError::RamUnreachable { at: bus, len })?;
            done += piece;
        }
        Ok(())
    }

    fn read_bus(&self, at: DmaAddr, into: &mut [u8]) -> Result<Result<(), NoAnswer>, DeviceError> {
        match self.bus.find(at, self.fabric) {
            Reached::Ram(ram) => Ok(ram.read(at, into)),
            Reached::Peer(memory, at) => Ok(memory.read(at, into)),
            Reached::Gone => Ok(Err(NoAnswer)),
            Reached::Foreign => Err(FOREIGN),
        }
    }

    fn write_bus(&self, at: DmaAddr, from: &[u8]) -> Result<Result<(), NoAnswer>, DeviceError> {
        match self.bus.find(at, self.fabric) {
            Reached::Ram(ram) => Ok(ram.write(at, from)),
            Reached::Peer(memory, at) => Ok(memory.write(at, from)),
            Reached::Gone => Ok(Err(NoAnswer)),
            Reached::Foreign => Err(FOREIGN),
        }
    }

    fn check(&self, at: DevAddr, len: ByteSize) -> Result<(), DeviceError> {
        let vram = self.memory.len();
        match at.checked_add(len) {
            Some(end) if end.get() <= vram.get() => Ok(()),
            _ => Err(DeviceError::OutsideVram { at, len, vram }),
        }
    }

    fn clear(&self, at: DevAddr, len: ByteSize) -> Result<(), DeviceError> {
        let vram = self.memory.len();
        let outside = |NoAnswer| DeviceError::OutsideVram { at, len, vram };
        self.memory.clear(at, len).map_err(outside)
    }

    fn is_put_off(&self, at: DevAddr, len: ByteSize) -> bool {
        let Some(late) = &self.late else { return false };
        let mut late = late.lock();
        let fits = late.len() < MOST_LATE;
        if fits {
            late.push((at, len));
        }
        fits
    }

    /// Does what is late, before anything that comes behind it.
    fn catch_up(&self) -> Result<(), DeviceError> {
        let Some(late) = &self.late else {
            return Ok(());
        };
        let mut late = late.lock();
        late.drain(..).try_for_each(|(at, len)| self.clear(at, len))
    }
}

const FOREIGN: DeviceError = DeviceError::Unsupported {
    what: "copies from or to a device of another fabric",
};

impl CopyEngine for Engine {
    fn submit(&self, batch: &[CopyOp]) -> Result<Fence, DeviceError> {
        if !self.hook.pass() {
            return Err(DeviceError::Lost {
                reason: "a test wanted this copy to fail",
            });
        }
        batch.iter().try_for_each(|op| self.run(*op))?;
        Ok(Fence(self.batches.fetch_add(1, Ordering::AcqRel) + 1))
    }

    fn wait(&self, fence: Fence) -> Result<(), DeviceError> {
        assert!(
            fence.0 <= self.batches.load(Ordering::Acquire),
            "a fence of this engine"
        );
        yield_now();
        self.catch_up()
    }
}
