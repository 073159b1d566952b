//! What a device reaches of others is given back once, whatever happens in between.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

use core::time::Duration;
use gpusvm_device::{CopyOp, Device};
use gpusvm_mm_linux::{Allocation, Options, Process};
use gpusvm_pagemap::{
    Cause, Devmem, DevmemError, DevmemOps, MigrateError, MigrateRequest, Mode, OwnerList, Pagemap,
    PagemapAddr, PagemapOps, PagemapSpec, Pagemaps, Peer, PreMigrateFence, ToDevmem, ToRam,
    migrate,
};
use gpusvm_softgpu::SoftGpu;
use gpusvm_svm::{
    Config, DeviceIndex, FaultCtx, GetPagesError, GpuSvm, Prepared, Range, Reach, SvmOps,
};
use gpusvm_types::{ByteSize, DevicePfn, DmaAddr, PAGE_SIZE, PageCount, Span};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// The device that maps pages of others.
const ME: Peer = Peer(7);

/// A device memory that counts what is mapped of it. Its pages are handed out once, and lie apart, so
/// that every page is a run of its own.
#[derive(Debug)]
struct Counting {
    gpu: Arc<SoftGpu>,
    next: AtomicU32,
    mapped: Mutex<BTreeMap<u64, i64>>,
    /// How many pages can still be mapped, before one cannot.
    until_refusal: AtomicI64,
}

impl Counting {
    fn mapped(&self) -> MutexGuard<'_, BTreeMap<u64, i64>> {
        self.mapped.lock().unwrap()
    }

    fn total(&self) -> i64 {
        self.mapped().values().sum()
    }
}

impl PagemapOps<Process> for Counting {
    fn populate(
        &self,
        pagemap: &Arc<Pagemap<Process>>,
        span: Span,
        timeslice: Duration,
        cause: Cause,
    ) -> Result<(), MigrateError> {
        let pages = span.page_count();
        let first = u32::try_from(pages.get()).unwrap();
        let first = DevicePfn::new(self.next.fetch_add(first, Ordering::Relaxed));
        let gpu = Arc::clone(&self.gpu);
        let devmem = Arc::new(Devmem::new(pages, Box::new(Copier { gpu, first })));
        let request = MigrateRequest {
            span,
            timeslice,
            mode: Mode::AllOrNothing,
            cause,
            exclusive: false,
        };
        migrate::migrate_to_devmem(pagemap, &devmem, &request).map(drop)
    }

    fn device_map(&self, page: DevicePfn, peer: Peer) -> Option<PagemapAddr> {
        if peer != ME {
            // A migration from the other memory: not directly.
            return None;
        }
        if self.until_refusal.fetch_sub(1, Ordering::Relaxed) <= 0 {
            return None;
        }
        let at = u64::from(page.get()) * 2 * PAGE_SIZE.get();
        *self.mapped().entry(at).or_default() += 1;
        Some(PagemapAddr::Peer(DmaAddr::new(at)))
    }

    fn device_unmap(&self, address: PagemapAddr, peer: Peer) {
        assert_eq!(peer, ME);
        let PagemapAddr::Peer(at) = address else {
            panic!("{address:?} was never given out");
        };
        let mut mapped = self.mapped();
        let count = mapped.get_mut(&at.get()).expect("it was mapped");
        *count -= 1;
        assert!(*count >= 0, "{at} is given back twice");
    }
}

#[derive(Debug)]
struct Copier {
    gpu: Arc<SoftGpu>,
    first: DevicePfn,
}

impl Copier {
    fn run(&self, op: CopyOp) -> Result<(), DevmemError> {
        let done = self.gpu.copy_engine().submit(&[op]);
        done.map(drop).map_err(|_| DevmemError::Pages)
    }
}

impl DevmemOps for Copier {
    fn populate_pfn(&self, pfns: &mut [DevicePfn]) -> Result<(), DevmemError> {
        for (i, pfn) in pfns.iter_mut().enumerate() {
            *pfn = self.first.offset(PageCount::from_usize(i));
        }
        Ok(())
    }

    fn copy_to_devmem(
        &self,
        pieces: &mut dyn Iterator<Item = ToDevmem>,
        _: Option<&dyn PreMigrateFence>,
        _: Cause,
    ) -> Result<(), DevmemError> {
        let mut ops = pieces.map(|piece| match piece {
            ToDevmem::Copy { from, to, len } => CopyOp::ToDevice { from, to, len },
            ToDevmem::Clear { to, len } => CopyOp::Clear { to, len },
        });
        ops.try_for_each(|op| self.run(op))
    }

    fn copy_to_ram(
        &self,
        pieces: &mut dyn Iterator<Item = ToRam>,
        _: Option<&dyn PreMigrateFence>,
        _: Cause,
    ) -> Result<(), DevmemError> {
        for ToRam { from, to, len } in pieces {
            let PagemapAddr::System(to) = to else {
                return Err(DevmemError::Pages);
            };
            self.run(CopyOp::ToRam { from, to, len })?;
        }
        Ok(())
    }

    fn release(&self) {}
}

#[derive(Debug)]
struct NoTables;

impl SvmOps for NoTables {
    fn zap(&self, _: Span) {}
    fn flush(&self, _: Span) {}
    fn garbage(&self) {}
}

/// This process, two memories of one owner, and a mirror of the first 16 pages of a block as one range.
struct World {
    process: Arc<Process>,
    pagemaps: Arc<Pagemaps<Process>>,
    memories: [(Arc<Pagemap<Process>>, Arc<Counting>); 2],
    svm: GpuSvm<Process>,
    data: Allocation<u8>,
}

const PAGES: u64 = 16;
const CTX: FaultCtx = FaultCtx {
    owner: None,
    read_only: false,
    devmem_possible: true,
    devmem_only: false,
    atomics_on_ram: true,
    atomics_on_devmem: true,
    allow_mixed: true,
    check_pages_threshold: ByteSize::ZERO,
    timeslice: Duration::ZERO,
    within: None,
    largest_chunk: None,
};

impl World {
    fn new() -> Self {
        let process = Process::start(Options::default()).unwrap();
        let pagemaps = Pagemaps::new(&process);
        // Both stay in the list until both have joined.
        let list = OwnerList::new();
        let owners = [0, 1].map(|peer| list.acquire(Peer(peer), |_, _| true));
        let memories = owners.each_ref().map(|owner| {
            let vram = ByteSize::mib(256);
            let ops = Arc::new(Counting {
                gpu: SoftGpu::builder().vram(vram).units(1).build().unwrap(),
                next: AtomicU32::new(0),
                mapped: Mutex::default(),
                until_refusal: AtomicI64::new(i64::MAX),
            });
            let spec = PagemapSpec {
                peer: owner.peer(),
                owner: owner.id(),
                pages: vram.pages(),
                coherent: false,
            };
            let pagemap = Pagemap::new(&pagemaps, spec, ops.clone()).unwrap();
            (pagemap, ops)
        });
        let config = Config {
            chunk_sizes: [ByteSize::kib(64), ByteSize::kib(4)].into(),
            ..Config::default()
        };
        let svm = GpuSvm::new(Arc::clone(&process), config, [Arc::new(NoTables) as _]);
        let mut data = Allocation::<u8>::new(&process, 2 << 20).unwrap();
        data.fill(5);
        Self {
            process,
            pagemaps,
            memories,
            svm,
            data,
        }
    }

    fn ctx(&self) -> FaultCtx {
        let owner = Some(self.memories[0].0.owner());
        FaultCtx { owner, ..CTX }
    }

    fn range(&self) -> Arc<Range<Process>> {
        let at = self.data.span().start();
        let range = self
            .svm
            .range_find_or_insert(at, Span::EVERYWHERE, &self.ctx())
            .unwrap();
        assert_eq!(range.span().page_count().get(), PAGES);
        let armed = self.svm.range_arm(&range, &range.serve());
        assert!(armed.unwrap());
        range
    }

    fn get_pages(&self, range: &Range<Process>) -> Result<Prepared<Process>, GetPagesError> {
        let reach = Reach {
            device: DeviceIndex(0),
            pagemaps: &self.pagemaps,
            peer: ME,
            ram: true,
            faults: true,
        };
        self.svm.get_pages(range, &reach, &self.ctx(), None)
    }

    /// Moves some of the pages that are in RAM to a memory.
    fn populate(&self, memory: usize, first: u64, count: u64) -> bool {
        let first = self.data.span().first_page() + PageCount::new(first);
        let span = Span::of_pages(first, PageCount::new(count));
        let pagemap = &self.memories[memory].0;
        pagemap.populate(span, Duration::ZERO, Cause::Asked).is_ok()
    }

    fn mapped(&self) -> i64 {
        self.memories.iter().map(|(_, ops)| ops.total()).sum()
    }

    /// All pages come home, without a step of the device.
    fn bring_home(&self) {
        self.process.bring_home(self.data.span()).unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.process.stop_migrations();
        self.svm.close();
        self.process.stop();
    }
}

#[test]
fn a_second_pagemap_is_refused_and_nothing_stays_mapped() {
    let world = World::new();
    let range = world.range();
    // RAM first, then one memory, RAM again, then the other.
    assert!(world.populate(0, 3, 4) && world.populate(1, 10, 2));
    let error = world.get_pages(&range).unwrap_err();
    let at = world.data.span().start() + PageCount::new(10).bytes();
    assert_eq!(error, GetPagesError::MixedPagemaps { at });
    assert_eq!((error.errno(), world.mapped()), (95, 0));
    world.svm.range_evict(&range).unwrap();
    assert!(world.populate(1, 0, 2) && world.populate(1, 10, 2));
    let prepared = world.get_pages(&range).unwrap();
    assert_eq!(
        world.mapped(),
        4,
        "two allocations of one memory are one memory"
    );
    drop(prepared);
    assert_eq!(world.mapped(), 0);
}

#[test]
fn a_memory_that_is_unbound_is_out_of_reach() {
    let world = World::new();
    let range = world.range();
    assert!(world.populate(0, 0, 16));
    let prepared = world.get_pages(&range).unwrap();
    let bound = world.svm.commit(&range, prepared, |_, _| Ok::<_, ()>(()));
    assert_eq!((bound, world.mapped()), (Ok(true), 16));
    world.memories[0].0.unbind();
    let error = world.get_pages(&range).unwrap_err();
    assert!(matches!(error, GetPagesError::OutOfReach { .. }));
    assert_eq!(world.mapped(), 16, "what is mapped stays so");
    world.memories[0].0.evict_all(Cause::Asked).unwrap();
    assert_eq!(
        world.mapped(),
        0,
        "and is given back to the driver that mapped it"
    );
}

/// Random numbers, and what the steps so far should have left mapped.
struct Run<'w> {
    world: &'w World,
    seed: u64,
    expected: i64,
    refused: u32,
    mixed: u32,
}

impl Run<'_> {
    fn random(&mut self, below: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % below
    }

    fn step(&mut self, range: &Arc<Range<Process>>) {
        match self.random(9) {
            0..3 => {
                let memory = usize::try_from(self.random(2)).unwrap();
                let first = self.random(PAGES);
                let count = 1 + self.random(PAGES - first);
                self.world.populate(memory, first, count);
            }
            3..6 => self.map(range),
            6 => self.world.svm.range_unmap(range),
            7 => drop(self.world.svm.range_remove(range)),
            _ => self.world.bring_home(),
        }
        // Whoever moved pages unmapped the range before.
        if !range.is_mapped() {
            self.expected = 0;
        }
    }

    /// The pass of a fault: it is refused half way, dropped, fails to be bound, or is bound.
    fn map(&mut self, range: &Range<Process>) {
        let limit = i64::try_from(self.random(40)).unwrap();
        for (_, ops) in &self.world.memories {
            ops.until_refusal.store(limit, Ordering::Relaxed);
        }
        let prepared = match self.world.get_pages(range) {
            Ok(prepared) if self.random(4) > 0 => prepared,
            Ok(prepared) => return drop(prepared),
            Err(GetPagesError::OutOfReach { .. }) => return self.refused += 1,
            Err(GetPagesError::MixedPagemaps { .. }) => return self.mixed += 1,
            Err(error) => panic!("{error}"),
        };
        let runs = prepared.runs().iter();
        let of_device = runs.filter(|run| matches!(run.address, PagemapAddr::Peer(_)));
        let pages = i64::try_from(of_device.count()).unwrap();
        let result = if self.random(4) == 0 { Err(()) } else { Ok(()) };
        let bound = self.world.svm.commit(range, prepared, |_, _| result);
        assert_eq!(bound, result.map(|()| true));
        self.expected = pages;
    }
}

/// Random steps, each of which can fail half way.
#[test]
fn maps_and_unmaps_balance() {
    let world = World::new();
    let seed = 0x9e37_79b9_7f4a_7c15;
    println!("seed {seed:#x}");
    let mut run = Run {
        world: &world,
        seed,
        expected: 0,
        refused: 0,
        mixed: 0,
    };
    for step in 0..5000 {
        let range = world.range();
        run.step(&range);
        assert_eq!(world.mapped(), run.expected, "after step {step}");
    }
    let (refused, mixed) = (run.refused, run.mixed);
    assert!(
        refused > 20 && mixed > 20,
        "{refused} refused, {mixed} mixed"
    );
    assert!(world.data.iter().all(|x| *x == 5));
    world.svm.close();
    assert_eq!(world.mapped(), 0);
}
