//! A test device with the meaning of the kernel's test mirror (`test_hmm`): memory, a page table,
//! a copy engine, and accesses on the thread that asks for them.
//!
//! ```text
//!   read, write, add  --> in flight: page table --> memory | RAM | a peer, by the interconnect
//!        ^                               |
//!        |                               miss --> the handler, called here and now --+
//!        +------------------------- replay ------------------------------------------+
//!
//!   copies    pass the hook: they fail, or stand at a gate, when a test says so
//!   clears    may be late: done when somebody waits for them, or something comes behind
//! ```
//!
//! Nothing here has a thread of its own, so that a simulated world decides all that happens.
//! Between accesses, inside of them and in copies others may run.
//!
//! # Locking
//!
//! An access holds `flight` to read, a flush takes it to write: that is how it knows that nothing is
//! in flight. No lock is held while a handler runs, or at the gate.
//!
//! # Differences from hardware
//!
//! Memory begins as garbage, so that what was never cleared is seen.

mod hook; // copies that fail, or wait
mod memory; // its bytes, and those of peers
mod engine; // the copy engine
mod table; // page tables
mod access; // loads, stores, faults

pub use access::Handler;
pub use hook::CopyHook;
pub use memory::Interconnect;
pub use table::Entry;

use engine::Engine;
use gpusvm_device::{
    Caps, CopyEngine, Device, Fabric, FaultMode, FaultQueue, PageSizes, PageTables,
};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, DmaAddr};
use memory::Memory;
use table::Tables;

/// What a device is made of.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// How much memory it has.
    pub vram: ByteSize,
    /// What it does about a page that is not mapped.
    pub faults: FaultMode,
    /// Whether it reaches RAM in place.
    pub coherent: bool,
    /// Whether the CPU uses its memory in place.
    pub coherent_memory: bool,
    /// Whether its atomics work there.
    pub atomics_on_ram: bool,
    /// With whom it shares its memory.
    pub fabric: Option<Fabric>,
    /// Whether clears are late.
    pub late_clears: bool,
}

impl Default for Spec {
    /// 8 MiB, faults, reaches RAM, alone, with late clears.
    fn default() -> Self {
        Self {
            vram: ByteSize::mib(8),
            faults: FaultMode::Replayable,
            coherent: true,
            coherent_memory: false,
            atomics_on_ram: true,
            fabric: None,
            late_clears: true,
        }
    }
}

/// The test device.
#[derive(Debug)]
pub struct Dmirror {
    caps: Caps,
    memory: Arc<Memory>,
    bus: Arc<Interconnect>,
    tables: Tables,
    engine: Engine,
    aperture: Option<DmaAddr>,
}

impl Dmirror {
    /// A device on `bus`.
    pub fn new(bus: &Arc<Interconnect>, spec: &Spec) -> Arc<Self> {
        let caps = Caps {
            name: "dmirror",
            vram: spec.vram,
            page_sizes: PageSizes::COMMON,
            faults: spec.faults,
            coherent: spec.coherent,
            coherent_memory: spec.coherent_memory,
            atomics_on_ram: spec.atomics_on_ram,
            fabric: spec.fabric,
        };
        let memory = Memory::new(spec.vram);
        let aperture = spec.fabric.map(|fabric| bus.attach(&memory, fabric));
        Arc::new(Self {
            engine: Engine::new(&memory, bus, spec),
            tables: Tables::new(&caps),
            bus: Arc::clone(bus),
            memory,
            aperture,
            caps,
        })
    }

    /// What decides about its copies.
    pub fn hook(&self) -> &CopyHook {
        self.engine.hook()
    }
}

impl Device for Dmirror {
    fn caps(&self) -> &Caps {
        &self.caps
    }

    fn copy_engine(&self) -> &dyn CopyEngine {
        &self.engine
    }

    fn page_tables(&self) -> &dyn PageTables {
        &self.tables
    }

    /// Faults are handled where they happen.
    fn fault_queue(&self) -> Option<&dyn FaultQueue> {
        None
    }

    fn aperture(&self) -> Option<DmaAddr> {
        self.aperture
    }
}
