//! Several devices share the ranges of one mirror, each with pages of its own.

use crate::gpu::{Done, Gpu, Log, NoRoom};
use crate::lab::{Lab, RANGE, WRITE, part};
use gpusvm_mm::{AddressSpace, Home, Reason};
use gpusvm_mm_sim::{Backing, Options, Prot, Sim};
use gpusvm_pagemap::{PagemapAddr, Peer};
use gpusvm_svm::{Config, DeviceIndex, GetPagesError, GpuSvm, PageRun, Prepared, Range, Reach};
use gpusvm_types::{ByteSize, DmaAddr, PageIndex, Span, VirtAddr};
use std::sync::Arc;

const FIRST: DeviceIndex = DeviceIndex(0);
const SECOND: DeviceIndex = DeviceIndex(1);

/// Two devices that reach each other, and a mirror for both.
struct Pair {
    lab: Arc<Lab>,
    gpus: [Arc<Gpu>; 2],
    svm: GpuSvm<Sim>,
}

impl Pair {
    fn new(seed: u64) -> Arc<Self> {
        let options = Options {
            seed,
            late_events: seed % 2 == 1,
            ..Options::default()
        };
        let lab = Lab::with(options, &[0, 0], ByteSize::kib(128));
        let gpus = [(); 2].map(|()| Gpu::new(&Arc::new(Log::default())));
        let config = Config {
            notifier_size: ByteSize::kib(128),
            chunk_sizes: vec![ByteSize::kib(64), ByteSize::kib(4)],
        };
        let ops: [Arc<dyn gpusvm_svm::SvmOps>; 2] = [gpus[0].clone(), gpus[1].clone()];
        let svm = GpuSvm::new(Arc::clone(&lab.sim), config, ops);
        Arc::new(Self { lab, gpus, svm })
    }

    fn range(&self, at: VirtAddr) -> Arc<Range<Sim>> {
        let range = self.svm.range_find_or_insert(at, Span::EVERYWHERE, &WRITE);
        let range = range.unwrap();
        assert_eq!(self.svm.range_arm(&range, &range.serve()), Ok(true));
        range
    }

    fn get_pages(
        &self,
        range: &Range<Sim>,
        device: DeviceIndex,
    ) -> Result<Prepared<Sim>, GetPagesError> {
        let reach = Reach {
            device,
            pagemaps: &self.lab.pagemaps,
            peer: Peer(u32::try_from(device.0).unwrap()),
            ram: true,
            faults: true,
        };
        self.svm.get_pages(range, &reach, &WRITE, None)
    }

    fn commit(&self, range: &Range<Sim>, device: DeviceIndex, prepared: Prepared<Sim>) -> bool {
        let bind = |runs: &[PageRun]| {
            self.gpus[device.0].bind(runs);
            Ok::<(), NoRoom>(())
        };
        let done = self.svm.commit(range, prepared, |_, runs| bind(runs));
        done.unwrap()
    }

    fn map(&self, range: &Range<Sim>, device: DeviceIndex) -> bool {
        let prepared = self.get_pages(range, device).unwrap();
        self.commit(range, device, prepared)
    }

    /// A range that both have mapped.
    fn mapped_by_both(&self, span: Span) -> Arc<Range<Sim>> {
        let range = self.range(span.start());
        assert!(self.map(&range, FIRST) && self.map(&range, SECOND));
        self.take();
        range
    }

    /// What both were told since they were asked last.
    fn take(&self) -> [Vec<Done>; 2] {
        self.lab.log.take();
        self.gpus.each_ref().map(|gpu| gpu.log.take())
    }

    fn entries(&self) -> [usize; 2] {
        self.gpus.each_ref().map(|gpu| gpu.entries().len())
    }

    /// What each device finds is there, in a range that it has mapped, and reached once.
    #[track_caller]
    fn assert_sound(&self) {
        self.lab.sim.check().unwrap();
        let seed = self.lab.sim.seed();
        let mut mapped = 0;
        for (device, gpu) in self.gpus.iter().enumerate() {
            for (page, address) in gpu.entries() {
                let range = self.svm.range_find(page.start()).unwrap();
                let is_mapped = range.pages(DeviceIndex(device)).is_mapped();
                assert!(is_mapped, "seed {seed}: {page:?} on {device}");
                assert_eq!(address, self.wanted(page, device), "seed {seed}: {page:?}");
                mapped += usize::from(!matches!(address, PagemapAddr::System(_)));
            }
        }
        let reached = self.lab.devices.iter().map(|device| device.reached());
        assert_eq!(reached.sum::<usize>(), mapped, "seed {seed}");
    }

    fn wanted(&self, page: PageIndex, device: usize) -> PagemapAddr {
        match self.lab.sim.home(page) {
            Home::System => PagemapAddr::System(DmaAddr::new(page.start().get())),
            Home::Device(there) => {
                let mut devices = self.lab.devices.iter();
                let owner = devices.find(|device| device.pagemap().contains(there));
                owner
                    .unwrap()
                    .address(there.pfn, Peer(u32::try_from(device).unwrap()))
            }
            home => panic!("{page:?} is mapped, and {home:?}"),
        }
    }

    #[track_caller]
    fn assert_ends(&self) {
        self.assert_sound();
        self.svm.close();
        assert_eq!((self.svm.range_count(), self.entries()), (0, [0, 0]));
        assert_eq!(self.lab.sim.notifiers().count(), 0);
        self.assert_sound();
        self.lab.assert_ends();
    }
}

#[test]
fn one_unmap_is_one_flush_for_each_device() {
    let pair = Pair::new(0);
    let block = pair.lab.block();
    let spans = [0, 1].map(|i| part(block, i * RANGE, RANGE));
    let ranges = spans.map(|span| pair.mapped_by_both(span));
    assert_eq!(pair.entries(), [32, 32]);
    pair.lab.sim.munmap(part(block, 0, 2 * RANGE));
    let [first, second] = spans;
    let told = vec![
        Done::Zap(first),
        Done::Zap(second),
        Done::Flush(first.union(second)),
        Done::Garbage,
    ];
    assert_eq!(pair.take(), [told.clone(), told]);
    for range in &ranges {
        assert!(range.is_unmapped() && !range.is_mapped());
    }
    assert_eq!((pair.svm.collect_garbage(), pair.svm.range_count()), (2, 0));
    pair.assert_ends();
}

#[test]
fn a_commit_is_nothing_to_other_devices() {
    let pair = Pair::new(0);
    let range = pair.range(pair.lab.block().start());
    pair.lab.devices[0].migrate(range.span()).unwrap();
    let prepared = [FIRST, SECOND].map(|device| pair.get_pages(&range, device).unwrap());
    pair.take();
    let [first, second] = prepared;
    assert!(pair.commit(&range, FIRST, first));
    assert_eq!(pair.take()[1], [], "it is not asked");
    assert!(!range.pages(SECOND).is_mapped());
    assert!(pair.commit(&range, SECOND, second), "nothing has changed");
    let runs = |device: DeviceIndex| pair.gpus[device.0].lookup(range.span().first_page());
    assert!(matches!(runs(FIRST), Some((PagemapAddr::Vram(_), _))));
    assert!(matches!(runs(SECOND), Some((PagemapAddr::Peer(_), _))));
    pair.take();
    // A bind that fails takes away what its own device had, and no more.
    let prepared = pair.get_pages(&range, SECOND).unwrap();
    let fails = |runs: &[PageRun]| pair.gpus[1].bind_and_fail(runs);
    let failed = pair.svm.commit(&range, prepared, |_, runs| fails(runs));
    assert_eq!(failed, Err(NoRoom));
    assert_eq!(pair.take()[0], []);
    assert_eq!(pair.entries(), [16, 0]);
    assert!(range.is_mapped() && !range.pages(SECOND).is_mapped());
    pair.assert_ends();
}

#[test]
fn who_maps_nothing_is_not_told() {
    for reason in [Reason::Protect, Reason::Clear, Reason::Unmap] {
        let pair = Pair::new(0);
        let block = pair.lab.block();
        let range = pair.range(block.start());
        assert!(pair.map(&range, SECOND));
        pair.take();
        let span = range.span();
        pair.lab.invalidate(span, reason);
        let [first, second] = pair.take();
        let mut told = vec![Done::Zap(span), Done::Flush(span)];
        let garbage = (reason == Reason::Unmap).then_some(Done::Garbage);
        told.extend(garbage);
        assert_eq!(second, told, "{reason:?}");
        assert_eq!(first, Vec::from_iter(garbage), "{reason:?}");
        pair.assert_ends();
    }
}

#[test]
fn a_partial_unmap_is_garbage_once() {
    let pair = Pair::new(0);
    let block = pair.lab.block();
    let range = pair.range(block.start());
    pair.lab.devices[1].migrate(range.span()).unwrap();
    assert!(pair.map(&range, FIRST) && pair.map(&range, SECOND));
    pair.lab.sim.munmap(part(block, 4, 4));
    assert!(range.is_partially_unmapped() && !range.is_mapped());
    assert_eq!(pair.entries(), [0, 0]);
    assert_eq!(pair.svm.collect_garbage(), 1);
    assert_eq!(pair.svm.collect_garbage(), 0);
    assert!(pair.lab.is_home(part(block, 0, 4)) && pair.lab.is_home(part(block, 8, 8)));
    pair.assert_ends();
}

#[test]
fn a_device_that_leaves_takes_only_its_own() {
    let pair = Pair::new(0);
    let block = pair.lab.block();
    let ranges = [0, 1].map(|i| pair.mapped_by_both(part(block, i * RANGE, RANGE)));
    // One range of one device.
    pair.svm.unmap_pages(&ranges[0], FIRST);
    let span = ranges[0].span();
    assert_eq!(
        pair.take(),
        [vec![Done::Zap(span), Done::Flush(span)], vec![]]
    );
    pair.svm.unmap_pages(&ranges[0], FIRST);
    assert_eq!(pair.take(), [vec![], vec![]], "it had nothing");
    // All of one device.
    let prepared = pair.get_pages(&ranges[0], FIRST).unwrap();
    pair.svm.leave(FIRST);
    assert_eq!(pair.entries(), [0, 32]);
    assert!(!pair.commit(&ranges[0], FIRST, prepared));
    assert!(!pair.map(&ranges[1], FIRST), "nor what is found out later");
    pair.take();
    pair.lab.invalidate(block, Reason::Protect);
    let [first, second] = pair.take();
    assert_eq!((first.len(), second.len()), (0, 3), "zap, zap, flush");
    assert!(pair.map(&ranges[0], SECOND));
    pair.assert_ends();
}

#[test]
fn a_device_leaves_while_others_map() {
    for seed in 0..200 {
        let pair = Pair::new(seed);
        let block = pair.lab.block();
        let ranges = [0, 1].map(|i| pair.range(part(block, i * RANGE, RANGE).start()));
        let maps = [FIRST, SECOND].map(|device| {
            let (pair, ranges) = (Arc::clone(&pair), ranges.clone());
            Box::new(move || {
                for range in &ranges {
                    let _serving = range.serve();
                    pair.map(range, device);
                }
            }) as Box<dyn FnOnce() + Send>
        });
        let other = Arc::clone(&pair);
        let leaves = move || {
            other.svm.leave(FIRST);
            assert_eq!(other.entries()[0], 0, "seed {seed}");
        };
        let threads = maps.into_iter().chain([Box::new(leaves) as _]);
        pair.lab.sim.run(threads.collect());
        assert_eq!(pair.entries(), [0, 32], "seed {seed}");
        pair.assert_ends();
    }
}

/// One pass over a fault of a device.
fn fault(pair: &Pair, at: VirtAddr, device: DeviceIndex, to: Option<usize>) {
    pair.svm.collect_garbage();
    let Ok(range) = pair.svm.range_find_or_insert(at, Span::EVERYWHERE, &WRITE) else {
        return;
    };
    let serving = range.serve();
    if range.is_gone() || pair.svm.range_arm(&range, &serving) != Ok(true) {
        return;
    }
    if let Some(to) = to.filter(|_| range.can_migrate()) {
        // Full, or gone meanwhile: get_pages sees where the pages are.
        let _ = pair.lab.devices[to].migrate(range.span());
    }
    match pair.get_pages(&range, device) {
        Ok(prepared) => drop(pair.commit(&range, device, prepared)),
        Err(GetPagesError::MixedPagemaps { .. }) => drop(pair.svm.range_evict(&range)),
        Err(_) => {}
    }
}

#[test]
fn two_devices_and_a_program_in_any_order() {
    for seed in 0..150 {
        let pair = Pair::new(seed);
        let block = pair.lab.block();
        let pages = 4 * RANGE;
        let faults = [FIRST, SECOND].map(|device| {
            let pair = Arc::clone(&pair);
            Box::new(move || {
                for _ in 0..6 {
                    let random = |end| pair.lab.sim.random(end);
                    let at = part(block, random(pages), 1).start();
                    let to = [None, Some(0), Some(1)][usize::try_from(random(3)).unwrap()];
                    fault(&pair, at, device, to);
                }
            }) as Box<dyn FnOnce() + Send>
        });
        let other = Arc::clone(&pair);
        let program = move || {
            let random = |end| other.lab.sim.random(end);
            for _ in 0..6 {
                let first = random(pages - 8);
                let span = part(block, first, 1 + random(8));
                match random(4) {
                    0 => other.lab.sim.munmap(span),
                    1 => {
                        let backing = Backing::Mirrored;
                        other.lab.sim.mmap_fixed(span, Prot::ReadWrite, backing);
                    }
                    2 => other.lab.invalidate(span, Reason::Protect),
                    _ => drop(other.lab.sim.read_u64(span.start())),
                }
            }
        };
        let threads = faults.into_iter().chain([Box::new(program) as _]);
        pair.lab.sim.run(threads.collect());
        pair.lab.sim.settle_events();
        pair.svm.collect_garbage();
        pair.assert_ends();
        for device in &pair.lab.devices {
            assert_eq!(device.reached(), 0, "seed {seed}");
        }
    }
}
