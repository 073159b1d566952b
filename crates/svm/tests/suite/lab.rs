//! A process with devices, and a mirror of it.

use crate::device::{Device, Ops, PAGES};
use crate::gpu::{Gpu, Log, NoRoom};
use gpusvm_mm::{AddressSpace, Block, Home, Invalidation, MmError, Reason};
use gpusvm_mm_sim::{Backing, Options, Prot, Sim};
use gpusvm_pagemap::{Pagemap, PagemapAddr, PagemapSpec, Pagemaps, Peer};
use gpusvm_svm::{
    Config, DeviceIndex, FaultCtx, GetPagesError, GpuSvm, PageRun, Prepared, Range, Reach, SvmOps,
};
use gpusvm_types::{ByteSize, OwnerId, PageCount, Span, VirtAddr};
use std::sync::Arc;
use std::time::Duration;

/// The device of a mirror that has only one.
pub(crate) const GPU: DeviceIndex = DeviceIndex(0);
/// How many pages the largest range has here.
pub(crate) const RANGE: u64 = 16;

/// What the first device wants to write.
pub(crate) const WRITE: FaultCtx = FaultCtx {
    owner: Some(OwnerId(0)),
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

/// What the first device wants to read.
pub(crate) const READ: FaultCtx = FaultCtx {
    read_only: true,
    ..WRITE
};

#[derive(Debug)]
pub(crate) struct Lab {
    pub(crate) sim: Arc<Sim>,
    pub(crate) pagemaps: Arc<Pagemaps<Sim>>,
    pub(crate) log: Arc<Log>,
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) svm: GpuSvm<Sim>,
    pub(crate) devices: Vec<Arc<Device>>,
}

impl Lab {
    /// A process with one device for each owner, and a mirror for the first of them.
    pub(crate) fn new(owners: &[u32]) -> Arc<Self> {
        Self::with(Options::default(), owners, ByteSize::mib(512))
    }

    pub(crate) fn with(options: Options, owners: &[u32], notifier_size: ByteSize) -> Arc<Self> {
        let (sim, log) = (Sim::new(options), Arc::new(Log::default()));
        let pagemaps = Pagemaps::new(&sim);
        let devices = (0..).map(Peer).zip(owners).map(|(peer, owner)| {
            let device = Device::new(&sim, peer, &log);
            let (owner, pages) = (OwnerId(*owner), PAGES);
            let spec = PagemapSpec {
                peer,
                owner,
                pages,
                coherent: false,
            };
            let ops = Arc::new(Ops(Arc::clone(&device)));
            device.set_pagemap(Pagemap::new(&pagemaps, spec, ops).unwrap());
            device
        });
        let devices = devices.collect();
        let config = Config {
            notifier_size,
            chunk_sizes: vec![ByteSize::kib(64), ByteSize::kib(4)],
        };
        let gpu = Gpu::new(&log);
        let ops: Arc<dyn SvmOps> = Arc::clone(&gpu) as _;
        Arc::new(Self {
            svm: GpuSvm::new(Arc::clone(&sim), config, [ops as _]),
            sim,
            pagemaps,
            log,
            gpu,
            devices,
        })
    }

    /// A block of mirrored memory that is filled.
    pub(crate) fn block(&self) -> Span {
        let span = self
            .sim
            .mmap(PageCount::new(512), Prot::ReadWrite, Backing::Mirrored);
        self.fill(span);
        span
    }

    /// Memory of this kind, filled, at the start of a block, as long as one range.
    pub(crate) fn some(&self, prot: Prot, backing: Backing) -> Span {
        let whole = self.sim.mmap(PageCount::new(512), Prot::ReadWrite, backing);
        let span = part(whole, 0, RANGE);
        self.fill(span);
        self.sim.munmap(part(whole, RANGE, 512 - RANGE));
        self.sim.mprotect(span, prot);
        span
    }

    /// Each page tells its address.
    pub(crate) fn fill(&self, span: Span) {
        for page in span.pages() {
            let at = page.start();
            self.sim.write_u64(at, at.get()).unwrap();
        }
    }

    /// The CPU reads what was filled, wherever it is: faults bring it home.
    #[track_caller]
    pub(crate) fn check(&self, span: Span) {
        for page in span.pages() {
            let at = page.start();
            assert_eq!(self.sim.read_u64(at), Ok(at.get()), "at {at}");
        }
    }

    /// Looks at what was filled where the device would find it.
    #[track_caller]
    pub(crate) fn check_on_gpu(&self, span: Span) {
        for page in span.pages() {
            let (address, _) = self.gpu.lookup(page).unwrap();
            let mut bytes = [0; 8];
            match address {
                PagemapAddr::System(at) => self.sim.bus_read(at, &mut bytes).unwrap(),
                PagemapAddr::Vram(at) => self.devices[0].read(at, &mut bytes),
                PagemapAddr::Peer(at) => panic!("{page:?} is of a peer, at {at}"),
            }
            assert_eq!(u64::from_le_bytes(bytes), page.start().get(), "{page:?}");
        }
    }

    /// The range that holds `at`, for writing, watched.
    pub(crate) fn range(&self, at: VirtAddr) -> Arc<Range<Sim>> {
        let range = self
            .svm
            .range_find_or_insert(at, Span::EVERYWHERE, &WRITE)
            .unwrap();
        assert_eq!(self.svm.range_arm(&range, &range.serve()), Ok(true));
        range
    }

    /// The range at the start of `span`, all of it in the first device.
    pub(crate) fn range_on_device(&self, span: Span) -> Arc<Range<Sim>> {
        let range = self.range(span.start());
        let moved = self.devices[0].migrate(range.span()).unwrap();
        assert_eq!(moved, range.span().page_count());
        self.log.take();
        range
    }

    /// As `range_on_device`, and the device has it mapped.
    pub(crate) fn mapped_range(&self, span: Span) -> Arc<Range<Sim>> {
        let range = self.range_on_device(span);
        assert!(self.map(&range));
        self.log.take();
        range
    }

    pub(crate) fn get_pages(
        &self,
        range: &Range<Sim>,
        ctx: &FaultCtx,
    ) -> Result<Prepared<Sim>, GetPagesError> {
        self.get_pages_within(range, ctx, true)
    }

    /// As `get_pages`, for a device that reaches RAM, or does not.
    pub(crate) fn get_pages_within(
        &self,
        range: &Range<Sim>,
        ctx: &FaultCtx,
        ram: bool,
    ) -> Result<Prepared<Sim>, GetPagesError> {
        let (pagemaps, peer) = (&*self.pagemaps, Peer(0));
        self.svm.get_pages(
            range,
            &Reach {
                device: GPU,
                pagemaps,
                peer,
                ram,
                faults: true,
            },
            ctx,
            None,
        )
    }

    /// Maps a range where its pages are. Whether that was still true.
    pub(crate) fn map(&self, range: &Range<Sim>) -> bool {
        let prepared = self.get_pages(range, &WRITE).unwrap();
        self.commit(range, prepared)
    }

    pub(crate) fn commit(&self, range: &Range<Sim>, prepared: Prepared<Sim>) -> bool {
        let bind = |runs: &[PageRun]| {
            self.gpu.bind(runs);
            Ok(())
        };
        self.commit_with(range, prepared, bind).unwrap()
    }

    pub(crate) fn commit_with(
        &self,
        range: &Range<Sim>,
        prepared: Prepared<Sim>,
        bind: impl FnOnce(&[PageRun]) -> Result<(), NoRoom>,
    ) -> Result<bool, NoRoom> {
        self.svm.commit(range, prepared, |_, runs| bind(runs))
    }

    pub(crate) fn invalidate(&self, span: Span, reason: Reason) {
        let event = Invalidation { span, reason };
        self.sim.notifiers().invalidate(&event);
    }

    pub(crate) fn homes(&self, span: Span) -> Vec<Home> {
        span.pages().map(|page| self.sim.home(page)).collect()
    }

    pub(crate) fn is_home(&self, span: Span) -> bool {
        self.homes(span).iter().all(|home| *home == Home::System)
    }

    /// Whether pages could leave `span`, which are all at home, for a range that is in its block.
    pub(crate) fn is_watched(&self, span: Span) -> bool {
        // With pages on a device it is watched until the next range lets go: this one.
        let token = self.sim.arm(span).unwrap();
        self.sim.disarm(span, token);
        let mut block = self.sim.lock_block(span).unwrap();
        match block.collect(span, OwnerId(0), &mut |_, _| false) {
            Ok(_) => true,
            Err(MmError::NotArmed { .. }) => false,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Pages `first..first + count` of a span.
pub(crate) fn part(span: Span, first: u64, count: u64) -> Span {
    let first = span.first_page() + PageCount::new(first);
    Span::of_pages(first, PageCount::new(count))
}
