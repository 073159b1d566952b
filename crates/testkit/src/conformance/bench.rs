//! A world with devices, and memory whose words say which page they are of.

use super::{Kit, Model};
use crate::check;
use crate::dmirror::{Dmirror, Interconnect, Spec};
use crate::gpu::{Gpu, Soft};
use crate::mirror::{Mirror, words_of};
use crate::world::{Feature, Kind, Prot, Thread, World};
use core::time::Duration;
use gpusvm::driver::{Devices, FaultInfo, MigrateOnTouch, Plan, Policy};
use gpusvm_device::{Fabric, FaultError};
use gpusvm_softgpu::SoftGpu;
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{ByteSize, PageCount, Span, VirtAddr};

/// Where pages go that a device touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Places {
    /// To the device.
    Device,
    /// Nowhere: they are reached in place.
    InPlace,
    /// To the device if they are written, and nowhere if they are read: the device gets copies.
    Duplicate,
}

/// What is on a bench.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// How many devices.
    pub devices: usize,
    /// Whether they reach each other's memory.
    pub fabric: bool,
    /// How much memory each has.
    pub vram: ByteSize,
    /// Where pages go that they touch.
    pub places: Places,
    /// Whether their atomics work on RAM.
    pub atomics_on_ram: bool,
    /// How many of them, from the first on, have memory that the CPU uses in place.
    pub coherent: usize,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            devices: 1,
            fabric: false,
            vram: ByteSize::mib(8),
            places: Places::Device,
            atomics_on_ram: true,
            coherent: 0,
        }
    }
}

/// A world with devices.
#[derive(Debug)]
pub struct Bench<W: World> {
    seed: u64,
    kit: Kit,
    setup: Setup,
    // Before the world, which they work in: fields go in this order.
    mirrors: Vec<Arc<Mirror<W::Mm>>>,
    devices: Arc<Devices<W::Mm>>,
    bus: Arc<Interconnect>,
    world: Arc<W>,
    /// All that was ever mapped.
    spans: Mutex<Vec<Span>>,
}

/// What one thread does on a bench.
pub type Part<W> = Box<dyn FnOnce(&Arc<Bench<W>>) + Send>;

impl<W: World> Bench<W> {
    /// A new world with devices. `None` after saying why there is none.
    pub(super) fn start(kit: &Kit, setup: &Setup, seed: u64) -> Option<Self> {
        let world = W::start(seed)?;
        let bus = Interconnect::new(world.bus());
        let mut bench = Self {
            seed,
            kit: *kit,
            setup: *setup,
            mirrors: Vec::new(),
            devices: Devices::new(world.mm()),
            bus,
            world,
            spans: Mutex::new(Vec::new()),
        };
        for _ in 0..setup.devices {
            bench.mirrors.push(Arc::new(bench.join()));
        }
        Some(bench)
    }

    /// One more device.
    pub fn join(&self) -> Mirror<W::Mm> {
        let policy: Arc<dyn Policy> = match self.setup.places {
            Places::Device => Arc::new(MigrateOnTouch::default()),
            Places::InPlace => Arc::new(InPlace),
            Places::Duplicate => Arc::new(Duplicates),
        };
        Mirror::new(&self.devices, self.gpu(), policy)
    }

    fn gpu(&self) -> Arc<dyn Gpu> {
        let (faults, vram) = (self.kit.faults, self.setup.vram);
        let fabric = self.setup.fabric.then_some(Fabric(1));
        let coherent_memory = self.kit.coherent || self.mirrors.len() < self.setup.coherent;
        let atomics_on_ram = self.setup.atomics_on_ram;
        match self.kit.model {
            Model::Soft => {
                let mut gpu = SoftGpu::builder().vram(vram).units(2).fault_mode(faults);
                if let Some(fabric) = fabric {
                    gpu = gpu.fabric(fabric);
                }
                gpu = match coherent_memory {
                    true => gpu.coherent_memory(true).atomics_on_ram(atomics_on_ram),
                    false => gpu.coherent(atomics_on_ram),
                };
                Arc::new(Soft::of(gpu))
            }
            Model::Dmirror => Arc::new(Dmirror::new(
                &self.bus,
                &Spec {
                    vram,
                    faults,
                    fabric,
                    atomics_on_ram,
                    coherent_memory,
                    ..Spec::default()
                },
            )),
        }
    }

    /// What decides how this world goes.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// The world.
    pub fn world(&self) -> &Arc<W> {
        &self.world
    }

    /// The first device.
    pub fn mirror(&self) -> &Arc<Mirror<W::Mm>> {
        &self.mirrors[0]
    }

    /// A device.
    pub fn mirror_at(&self, number: usize) -> &Arc<Mirror<W::Mm>> {
        &self.mirrors[number]
    }

    /// What kind of device it is.
    pub fn model(&self) -> Model {
        self.kit.model
    }

    /// Whether its devices fault.
    pub fn is_faulting(&self) -> bool {
        self.kit.faults == gpusvm_device::FaultMode::Replayable
    }

    /// Whether the world can do all this; says so if not.
    pub fn can(&self, features: &[Feature]) -> bool {
        let refused = features
            .iter()
            .find_map(|it| self.world.supports(*it).err());
        if let Some(why) = refused {
            println!("skipped: {why}");
        }
        refused.is_none()
    }

    /// Maps memory.
    pub fn map(&self, pages: u64, prot: Prot, kind: Kind) -> Span {
        let span = self.world.map(PageCount::new(pages), prot, kind);
        self.spans.lock().push(span);
        span
    }

    /// Mirrored memory, readable and writable.
    pub fn memory(&self, pages: u64) -> Span {
        self.map(pages, Prot::ReadWrite, Kind::Mirrored)
    }

    /// Moves a mapping.
    pub fn remap(&self, span: Span, dontunmap: bool) -> Span {
        let to = self.world.remap(span, dontunmap);
        self.spans.lock().push(to);
        to
    }

    /// Runs threads to their end.
    pub fn run(self: &Arc<Self>, parts: Vec<Part<W>>) {
        let with_bench = |part: Part<W>| -> Thread {
            let bench = Arc::clone(self);
            Box::new(move || part(&bench))
        };
        self.world.run(parts.into_iter().map(with_bench).collect());
    }

    /// The CPU writes words that say which page they are of, and which time it is.
    pub fn fill(&self, span: Span, tag: u64) {
        for at in words_of(span) {
            assert_eq!(self.world.write(at, value(tag, at)), Ok(()));
        }
    }

    /// The CPU reads what `fill` wrote.
    pub fn expect(&self, span: Span, tag: u64) {
        self.expect_moved(span, span, tag);
    }

    /// The CPU reads in `span` what was written to `written`.
    pub fn expect_moved(&self, span: Span, written: Span, tag: u64) {
        for (at, old) in words_of(span).into_iter().zip(words_of(written)) {
            assert_eq!(
                self.world.read(at),
                Ok(value(tag, old)),
                "the CPU reads {at}"
            );
        }
    }

    /// The CPU reads zeroes.
    pub fn expect_zero(&self, span: Span) {
        for at in words_of(span) {
            assert_eq!(self.world.read(at), Ok(0), "the CPU reads {at}");
        }
    }

    /// A device writes as `fill` does.
    ///
    /// # Errors
    ///
    /// Why it could not.
    pub fn device_fill(&self, device: usize, span: Span, tag: u64) -> Result<(), FaultError> {
        let words: Vec<_> = words_of(span)
            .into_iter()
            .map(|at| (at, value(tag, at)))
            .collect();
        self.mirrors[device].write(&words)
    }

    /// A device reads what `fill` wrote.
    pub fn device_expect(&self, device: usize, span: Span, tag: u64) {
        self.device_expect_moved(device, span, span, tag);
    }

    /// A device reads in `span` what was written to `written`.
    pub fn device_expect_moved(&self, device: usize, span: Span, written: Span, tag: u64) {
        let read = self.mirrors[device].read(&words_of(span));
        let wanted = words_of(written).into_iter().map(|old| value(tag, old));
        assert_eq!(read, Ok(wanted.collect()), "device {device} reads {span}");
    }

    /// A device reads zeroes.
    pub fn device_expect_zero(&self, device: usize, span: Span) {
        let read = self.mirrors[device].read(&words_of(span));
        assert!(
            read.as_ref()
                .is_ok_and(|words| words.iter().all(|word| *word == 0)),
            "device {device} reads {span}: {read:?}"
        );
    }

    /// All pages of `span` go to a device.
    pub fn to_device(&self, device: usize, span: Span) {
        let moved = self.mirrors[device].migrate_to_dev(span);
        assert_eq!(
            moved,
            Ok(span.page_count()),
            "{span} goes to device {device}"
        );
    }

    /// What must hold when nothing moves holds.
    pub fn check(&self) {
        self.world.settle();
        for mirror in &self.mirrors {
            mirror.vm.svm().collect_garbage();
        }
        let mirrors: Vec<_> = self.mirrors.iter().map(|mirror| &**mirror).collect();
        let spans = self.spans.lock().clone();
        let wrong = check::check(&*self.world, &mirrors, &spans);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    /// The end of a case: all holds, and once everything is home, nothing is in use.
    pub(super) fn finish(&self) {
        self.check();
        for (number, mirror) in self.mirrors.iter().enumerate() {
            let unbound = mirror.region.unbind();
            let gone = matches!(unbound, Err(gpusvm_pagemap::EvictError::Gone));
            assert!(
                unbound.is_ok() || gone,
                "device {number} leaves: {unbound:?}"
            );
            let used = mirror.region.used();
            assert_eq!(
                used,
                PageCount::ZERO,
                "in use on device {number} at the end"
            );
        }
        self.check();
        self.mirrors.iter().for_each(|mirror| mirror.vm.close());
        for mirror in &self.mirrors {
            assert_eq!(mirror.gpu.mappings(), [], "mapped after the end");
        }
    }
}

/// Pages stay where they are.
#[derive(Debug)]
struct InPlace;

impl Policy for InPlace {
    fn on_device_fault(&self, _fault: &FaultInfo) -> Plan {
        Plan {
            migrate: false,
            duplicate: false,
            timeslice: Duration::ZERO,
            ..Plan::default()
        }
    }
}

/// Readers get copies.
#[derive(Debug)]
struct Duplicates;

impl Policy for Duplicates {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        Plan {
            duplicate: true,
            ..MigrateOnTouch::default().on_device_fault(fault)
        }
    }
}

/// What a word holds: never zero, and not the same twice.
pub(super) fn value(tag: u64, at: VirtAddr) -> u64 {
    (at.get() ^ (tag << 48)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}
