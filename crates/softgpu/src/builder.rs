//! What a device is made of, and what cannot be made.

use crate::SoftGpu;
use crate::arena::Arena;
use crate::copy::Engine;
use crate::fault::FaultBuffer;
use crate::flush::Units;
use crate::mmu::Mmu;
use crate::peers::{Aperture, MOST_APERTURES};
use crate::port::Board;
use crate::queue::Queue;
use crate::region::Region;
use crate::unit::{self, Workplace};
use gpusvm_device::{Caps, Fabric, FaultMode, PageSizes, VmId};
use gpusvm_guarded as guarded;
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::AtomicU64;
use gpusvm_types::{ByteSize, DmaAddr, PAGE_SIZE};
use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

/// The most units a device can have.
const MOST_UNITS: usize = 128;
/// The most device memory: what half of all device page numbers can name.
const MOST_VRAM: ByteSize = ByteSize::gib(8 << 10);

/// Why a device cannot be built, or a launch not begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SoftGpuError {
    /// A device without memory.
    #[error("a device needs at least one page of memory")]
    NoVram,
    /// Device memory that is not a multiple of the page size.
    #[error("{vram} of device memory are not a multiple of {PAGE_SIZE}")]
    UnalignedVram {
        /// What was asked for.
        vram: ByteSize,
    },
    /// More device memory than page numbers.
    #[error("{vram} of device memory: at most {most}")]
    TooMuchVram {
        /// What was asked for.
        vram: ByteSize,
        /// What there can be.
        most: ByteSize,
    },
    /// A device without units, or with too many.
    #[error("{units} units: a device has 1 to {most}")]
    UnitCount {
        /// What was asked for.
        units: usize,
        /// The most there can be.
        most: usize,
    },
    /// A device whose memory the CPU uses in place, and that does not reach RAM.
    #[error("coherent memory is reached in place: the device must reach RAM, and does not")]
    NotCoherent,
    /// The process has no room on its record of engine threads for the units.
    #[error("no room for {units} units in this process: {source}")]
    TooManyThreads {
        /// What was asked for.
        units: usize,
        /// What is full.
        source: guarded::RegistryFull,
    },
    /// The kernel gave no address space.
    #[error("cannot reserve {vram} of device memory: {source}")]
    Reserve {
        /// What was asked for.
        vram: ByteSize,
        /// Why.
        source: io::Error,
    },
    /// The process has as many devices with a fabric as can be.
    #[error("at most {most} devices of a process can have a fabric")]
    TooManyPeers {
        /// How many there can be.
        most: usize,
    },
    /// The kernel started no thread.
    #[error("cannot start a unit: {source}")]
    Thread {
        /// Why.
        source: io::Error,
    },
    /// The fault handler could not be installed.
    #[error("cannot install the fault handler: {source}")]
    Handler {
        /// Why.
        source: io::Error,
    },
    /// A launch in an address space that does not exist.
    #[error("the device has no address space {}", vm.0)]
    NoVm {
        /// Which one.
        vm: VmId,
    },
    /// A launch in a child of the process that has the device.
    #[error("the device belongs to the process that forked this one")]
    Forked,
}

/// What a device shall be.
#[derive(Clone, Debug)]
#[must_use = "`build` makes the device"]
pub struct Builder {
    vram: ByteSize,
    units: usize,
    faults: FaultMode,
    coherent: bool,
    coherent_memory: bool,
    atomics_on_ram: bool,
    fabric: Option<Fabric>,
}

impl Builder {
    /// 256 MiB, 4 units, replayable faults, coherent access to RAM where this machine allows it, and
    /// no fabric.
    pub(crate) fn new() -> Self {
        Self {
            vram: ByteSize::mib(256),
            units: 4,
            faults: FaultMode::Replayable,
            coherent: true,
            coherent_memory: false,
            atomics_on_ram: true,
            fabric: None,
        }
    }

    /// How much memory it has: a multiple of the page size.
    pub fn vram(self, vram: ByteSize) -> Self {
        Self { vram, ..self }
    }

    /// How many units, and so threads, it has.
    pub fn units(self, units: usize) -> Self {
        Self { units, ..self }
    }

    /// What happens on a touch of an unmapped page.
    pub fn fault_mode(self, faults: FaultMode) -> Self {
        Self { faults, ..self }
    }

    /// Whether it can reach RAM in place. Where [`guarded::SUPPORTED`] is false, it cannot.
    pub fn coherent(self, coherent: bool) -> Self {
        Self { coherent, ..self }
    }

    /// Whether the CPU uses its memory in place (the kernel's `MEMORY_DEVICE_COHERENT`): pages that migrate to
    /// it are the device's, and count as such, but a touch of the CPU reads and writes them where they are, moves
    /// nothing and does not fault. A device in software has no other bytes than RAM's; so such a page is
    /// not copied either: device memory is set aside for it, and CPU and device work on the same page. It
    /// works on every rung. Such a device reaches RAM in place.
    ///
    /// What is to be exclusive to the device, because its atomic operations do not work on RAM, is taken
    /// from the CPU all the same, and a touch of the CPU takes it back. A launch that declares memory must
    /// declare its atomic operations too then: what it declares to read stays coherent for it.
    pub fn coherent_memory(self, coherent_memory: bool) -> Self {
        Self {
            coherent_memory,
            ..self
        }
    }

    /// Whether its atomic operations work on RAM, where it reaches RAM at all. On a device where they do not,
    /// pages come to device memory for them: while they are mapped there, no one else touches them.
    pub fn atomics_on_ram(self, atomics_on_ram: bool) -> Self {
        Self {
            atomics_on_ram,
            ..self
        }
    }

    /// Which devices reach its memory, and it theirs. Where [`guarded::SUPPORTED`] is false, none.
    pub fn fabric(self, fabric: Fabric) -> Self {
        Self {
            fabric: Some(fabric),
            ..self
        }
    }

    /// Makes the device, and starts its units.
    ///
    /// # Errors
    ///
    /// `NoVram`, `UnalignedVram`, `TooMuchVram`, `UnitCount`, `NotCoherent` for what cannot be; `Reserve`,
    /// `Thread`, `TooManyThreads`, `TooManyPeers`, `Handler` for what there is no room for, or the
    /// system refuses.
    pub fn build(self) -> Result<Arc<SoftGpu>, SoftGpuError> {
        self.check()?;
        guarded::install().map_err(|source| SoftGpuError::Handler { source })?;
        let reserve = |source| SoftGpuError::Reserve {
            vram: self.vram,
            source,
        };
        let vram = Region::reserve(self.vram).and_then(Region::without_children);
        let vram = Arc::new(vram.map_err(reserve)?);
        let arena = Arena::new().map_err(reserve)?;
        let caps = self.caps();
        let bus = vram.base().expose_provenance() as u64;
        let aperture = self.open_aperture(&caps, DmaAddr::new(bus))?;
        let units = Arc::new(Units::new(self.units));
        let replayable = self.faults == FaultMode::Replayable;
        let board = Arc::new(Board {
            faults: replayable.then(|| FaultBuffer::new(self.units)),
            vram: bus,
            asymmetric: units.asymmetric,
            _memory: Arc::clone(&vram),
        });
        let queue = Arc::new(Queue::default());
        let place = Workplace {
            queue,
            units: Arc::clone(&units),
            board,
        };
        let mut gpu = SoftGpu {
            aperture,
            mmu: Mmu::new(arena, units, &caps),
            engine: Engine::new(vram, caps.fabric),
            caps,
            place,
            threads: Vec::with_capacity(self.units),
            owner: std::process::id(),
            launches: AtomicU64::new(0),
        };
        // From here on, dropping the device ends the units that did start.
        self.start_units(&gpu.place, &mut gpu.threads)?;
        Ok(Arc::new(gpu))
    }

    fn check(&self) -> Result<(), SoftGpuError> {
        let (vram, units) = (self.vram, self.units);
        if vram.is_zero() {
            return Err(SoftGpuError::NoVram);
        }
        if !vram.get().is_multiple_of(PAGE_SIZE.get()) {
            return Err(SoftGpuError::UnalignedVram { vram });
        }
        if vram > MOST_VRAM {
            return Err(SoftGpuError::TooMuchVram {
                vram,
                most: MOST_VRAM,
            });
        }
        if self.coherent_memory && !(self.coherent && guarded::SUPPORTED) {
            return Err(SoftGpuError::NotCoherent);
        }
        if units == 0 || units > MOST_UNITS {
            return Err(SoftGpuError::UnitCount {
                units,
                most: MOST_UNITS,
            });
        }
        Ok(())
    }

    fn caps(&self) -> Caps {
        let coherent = self.coherent && guarded::SUPPORTED;
        Caps {
            name: "softgpu",
            vram: self.vram,
            page_sizes: PageSizes::COMMON,
            faults: self.faults,
            coherent,
            coherent_memory: self.coherent_memory,
            atomics_on_ram: coherent && self.atomics_on_ram,
            fabric: self.fabric.filter(|_| guarded::SUPPORTED),
        }
    }

    /// Makes VRAM, which begins at `bus`, known to the fabric, if there is one.
    fn open_aperture(&self, caps: &Caps, bus: DmaAddr) -> Result<Option<Aperture>, SoftGpuError> {
        let most = MOST_APERTURES;
        let open = |fabric| Aperture::open(fabric, bus, self.vram);
        caps.fabric
            .map(|fabric| open(fabric).ok_or(SoftGpuError::TooManyPeers { most }))
            .transpose()
    }

    /// Starts the units and waits until each is on record as an engine thread.
    fn start_units(
        &self,
        place: &Workplace,
        threads: &mut Vec<JoinHandle<()>>,
    ) -> Result<(), SoftGpuError> {
        let (ready, told) = mpsc::channel();
        for index in 0..self.units {
            let thread = unit::start(index, place.clone(), ready.clone());
            threads.push(thread.map_err(|source| SoftGpuError::Thread { source })?);
        }
        drop(ready);
        for result in told {
            let units = self.units;
            result.map_err(|source| SoftGpuError::TooManyThreads { units, source })?;
        }
        Ok(())
    }
}
