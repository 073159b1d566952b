//! Loads, stores and atomics of the device, on the thread that asks.

use super::Dmirror;
use super::memory::Reached;
use super::table::{self, Entry, Miss, Vm};
use crate::world::NoAnswer;
use gpusvm_device::{Access, DeviceFault, FaultError, FaultId, FaultMode, Target, Verdict, VmId};
use gpusvm_sync::atomic::Ordering;
use gpusvm_sync::{Arc, yield_now};
use gpusvm_types::{PageIndex, VirtAddr};

/// What serves the faults of an address space.
pub type Handler = Arc<dyn Fn(&DeviceFault) -> Verdict + Send + Sync>;

/// So many replays of one access mean that the handler serves nothing.
const MOST_REPLAYS: u32 = 2_000;

/// What to do to a word.
#[derive(Clone, Copy, Debug)]
enum Op {
    Load,
    Store(u64),
    Add(u64),
}

impl Op {
    const fn access(self) -> Access {
        match self {
            Self::Load => Access::Read,
            Self::Store(_) => Access::Write,
            Self::Add(_) => Access::Atomic,
        }
    }
}

impl Dmirror {
    /// Who serves the faults of `vm`.
    pub fn set_handler(&self, vm: VmId, handler: Option<Handler>) {
        if let Some(vm) = self.tables.vm(vm) {
            let before = core::mem::replace(&mut *vm.handler.lock(), handler);
            // It may keep who keeps the device.
            drop(before);
        }
    }

    /// How many faults `vm` had.
    pub fn faults(&self, vm: VmId) -> u64 {
        self.tables.vm(vm).map_or(0, |vm| table::faults(&vm))
    }

    /// Every mapping of every address space.
    pub fn mappings(&self) -> Vec<(VmId, PageIndex, Entry)> {
        self.tables.mappings()
    }

    /// Loads words, one after the other.
    ///
    /// # Errors
    ///
    /// Why one of them could not be loaded.
    pub fn load(&self, vm: VmId, at: &[VirtAddr]) -> Result<Vec<u64>, FaultError> {
        let ops = at.iter().map(|at| (*at, Op::Load));
        self.each(vm, ops)
    }

    /// Stores words, one after the other: those before an error stay stored.
    ///
    /// # Errors
    ///
    /// Why one of them could not be stored.
    pub fn store(&self, vm: VmId, words: &[(VirtAddr, u64)]) -> Result<(), FaultError> {
        let ops = words.iter().map(|(at, value)| (*at, Op::Store(*value)));
        self.each(vm, ops).map(drop)
    }

    /// Adds to words, one after the other, and says what was there.
    ///
    /// # Errors
    ///
    /// Why one of them could not be added to.
    pub fn fetch_add(&self, vm: VmId, at: &[VirtAddr], by: u64) -> Result<Vec<u64>, FaultError> {
        let ops = at.iter().map(|at| (*at, Op::Add(by)));
        self.each(vm, ops)
    }

    fn each(
        &self,
        id: VmId,
        ops: impl Iterator<Item = (VirtAddr, Op)>,
    ) -> Result<Vec<u64>, FaultError> {
        let mut ops = Some(ops);
        let mut result = Ok(Vec::new());
        self.bus.ram().as_device(&mut || {
            let Some(ops) = ops.take() else { return };
            result = ops.map(|(at, op)| self.access(id, at, op)).collect();
        });
        result
    }

    /// One access, replayed until it is served or refused.
    fn access(&self, id: VmId, at: VirtAddr, op: Op) -> Result<u64, FaultError> {
        let vm = self.tables.vm(id).ok_or(FaultError::Closed { at })?;
        for _ in 0..MOST_REPLAYS {
            yield_now();
            let stale = match self.attempt(&vm, at, op) {
                Ok(value) => return Ok(value),
                Err(Failed::Miss(miss)) if self.caps.faults == FaultMode::Declared => {
                    return Err(match miss {
                        Miss::Unmapped => FaultError::NotDeclared { at },
                        Miss::NotPermitted => FaultError::NotPermitted {
                            at,
                            access: op.access(),
                        },
                    });
                }
                Err(Failed::NoAnswer(Target::Peer(_))) => return Err(FaultError::PeerLost { at }),
                Err(Failed::NoAnswer(_)) if self.caps.faults == FaultMode::Declared => {
                    return Err(FaultError::Unmapped { at });
                }
                Err(Failed::Miss(_)) => false,
                Err(Failed::NoAnswer(_)) => true,
            };
            let number = vm.faults.fetch_add(1, Ordering::AcqRel);
            let fault = DeviceFault {
                id: FaultId(number),
                vm: id,
                at,
                access: op.access(),
                stale,
            };
            let handler = vm.handler.lock().clone();
            let handler = handler.ok_or(FaultError::Closed { at })?;
            match handler(&fault) {
                Verdict::Replay => {}
                Verdict::Fail(error) => return Err(error),
            }
        }
        let entry = vm.translate(at, Access::Read);
        panic!("{op:?} at {at} was replayed {MOST_REPLAYS} times and never served: {entry:?}");
    }

    /// One try. In flight for as long as it takes.
    fn attempt(&self, vm: &Vm, at: VirtAddr, op: Op) -> Result<u64, Failed> {
        let _flight = vm.flight.read();
        let target = vm.translate(at, op.access()).map_err(Failed::Miss)?;
        yield_now();
        self.reach(target, op)
            .map_err(|NoAnswer| Failed::NoAnswer(target))
    }

    fn reach(&self, target: Target, op: Op) -> Result<u64, NoAnswer> {
        let bus = match target {
            Target::Vram(at) => return on_memory(&self.memory, at, op),
            Target::System(at) | Target::Peer(at) => at,
        };
        let ram = match self.bus.find(bus, self.caps.fabric) {
            Reached::Ram(ram) => ram,
            Reached::Peer(memory, at) => return on_memory(&memory, at, op),
            Reached::Foreign | Reached::Gone => return Err(NoAnswer),
        };
        let mut word = [0; 8];
        match op {
            Op::Load => ram.read(bus, &mut word).map(|()| u64::from_ne_bytes(word)),
            Op::Store(value) => ram.write(bus, &value.to_ne_bytes()).map(|()| value),
            Op::Add(by) => ram.fetch_add(bus, by),
        }
    }
}

/// Why one try failed.
enum Failed {
    Miss(Miss),
    NoAnswer(Target),
}

fn on_memory(
    memory: &super::memory::Memory,
    at: gpusvm_types::DevAddr,
    op: Op,
) -> Result<u64, NoAnswer> {
    let mut word = [0; 8];
    match op {
        Op::Load => memory
            .read(at, &mut word)
            .map(|()| u64::from_ne_bytes(word)),
        Op::Store(value) => memory.write(at, &value.to_ne_bytes()).map(|()| value),
        Op::Add(by) => memory.fetch_add(at, by),
    }
}
