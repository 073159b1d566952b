//! A device that is only memory, and worlds with one in it.
#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "for tests, and no test uses all of it"
)]

use gpusvm_mm::{
    AddressSpace, Block, CpuFault, DeviceMemoryId, DeviceMemoryOps, DevicePage, DeviceRun,
    FaultOutcome, Home, Inbound, Leaving, MmError, Outbound, Source, Time, Wanted,
};
use gpusvm_mm_sim::{Backing, BlockGuard, Body, Options, Prot, Sim, Step};
use gpusvm_sync::Mutex;
use gpusvm_types::{ByteSize, DevicePfn, OwnerId, PageCount, PageIndex, Span, VirtAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub(crate) const PAGE: usize = 4096;

/// Memory with an owner, and knobs.
#[derive(Debug)]
pub(crate) struct Device {
    id: OnceLock<DeviceMemoryId>,
    owner: OwnerId,
    state: Mutex<State>,
    /// The next faults fail.
    pub(crate) fails: AtomicBool,
    /// One copy to the device in so many fails.
    pub(crate) slips_out: AtomicU64,
}

#[derive(Debug)]
struct State {
    pages: Vec<Page>,
    /// Not before this time.
    stays_until: Time,
    window: ByteSize,
}

#[derive(Debug)]
struct Page {
    bytes: [u8; PAGE],
    state: PageState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageState {
    Free,
    Taken,
    Held,
}

impl Device {
    /// A device with so many pages, in a world.
    pub(crate) fn add(sim: &Arc<Sim>, owner: u32, pages: usize) -> Arc<Self> {
        let page = || Page {
            bytes: [0xdd; PAGE],
            state: PageState::Free,
        };
        let device = Arc::new(Self {
            id: OnceLock::new(),
            owner: OwnerId(owner),
            state: Mutex::new(State {
                pages: (0..pages).map(|_| page()).collect(),
                stays_until: Time::START,
                window: ByteSize::mib(2),
            }),
            fails: AtomicBool::new(false),
            slips_out: AtomicU64::new(0),
        });
        let ops = Arc::clone(&device) as Arc<dyn DeviceMemoryOps<Sim>>;
        let id = sim.add_device_memory(PageCount::from_usize(pages), OwnerId(owner), ops);
        device.id.set(id.unwrap()).unwrap();
        device
    }

    pub(crate) fn id(&self) -> DeviceMemoryId {
        *self.id.get().unwrap()
    }

    pub(crate) fn set_window(&self, window: ByteSize) {
        self.state.lock().window = window;
    }

    pub(crate) fn set_timeslice(&self, now: Time, slice: Duration) {
        self.state.lock().stays_until = now.after(slice);
    }

    /// How many pages are in use.
    pub(crate) fn held(&self) -> usize {
        let state = self.state.lock();
        let used = state
            .pages
            .iter()
            .filter(|page| page.state != PageState::Free);
        used.count()
    }

    /// Takes pages, wherever they are.
    fn take(&self, count: usize) -> Option<Vec<DevicePage>> {
        let mut state = self.state.lock();
        let free = state.pages.iter_mut().enumerate();
        let free: Vec<_> = free
            .filter(|(_, page)| page.state == PageState::Free)
            .take(count)
            .collect();
        if free.len() < count {
            return None;
        }
        let page = |(i, page): (usize, &mut Page)| {
            page.state = PageState::Taken;
            DevicePage {
                memory: self.id(),
                pfn: DevicePfn::new(u32::try_from(i).unwrap()),
            }
        };
        Some(free.into_iter().map(page).collect())
    }

    fn with_page<T>(&self, page: DevicePage, act: impl FnOnce(&mut [u8; PAGE]) -> T) -> T {
        act(&mut self.state.lock().pages[page.pfn.index()].bytes)
    }

    /// Moves the pages of `span` here: those of RAM, and those of `peer`.
    ///
    /// # Errors
    ///
    /// What the world refused, or `StuckOnDevice` when the copy failed.
    pub(crate) fn pull(
        &self,
        sim: &Sim,
        span: Span,
        peer: Option<&Self>,
    ) -> Result<Vec<Source>, MmError> {
        let mut block = sim.lock_block(span)?;
        let Some(pages) = self.take(span.page_count().as_usize()) else {
            return Err(MmError::TooManyDevices);
        };
        let mut from_peer =
            |_: PageIndex, page: DevicePage| peer.is_some_and(|peer| peer.id() == page.memory);
        let result = block
            .collect(span, self.owner, &mut from_peer)
            .and_then(|collected| {
                for (source, page) in collected.sources().iter().zip(&pages) {
                    self.copy_in(sim, *source, *page, peer);
                    if self.slips(sim) {
                        return Err(MmError::StuckOnDevice { at: span.start() });
                    }
                }
                let sources = collected.sources().to_vec();
                collected.commit(&mut |i| self.hold(pages[i]));
                Ok(sources)
            });
        self.let_go_unused(&pages);
        result
    }

    fn copy_in(&self, sim: &Sim, source: Source, page: DevicePage, peer: Option<&Self>) {
        let mut bytes = [0; PAGE];
        match source {
            Source::InPlace | Source::Kept(_) => return,
            Source::Hole => {}
            Source::Page(from) => sim.bus_read(from, &mut bytes).unwrap(),
            Source::Device(from) => bytes = peer.unwrap().with_page(from, |bytes| *bytes),
        }
        self.with_page(page, |to| *to = bytes);
    }

    /// Whether a copy to the device fails: because it was told to, or because the seed says so.
    fn slips(&self, sim: &Sim) -> bool {
        let slips = self.slips_out.load(Ordering::Acquire);
        (slips > 0 && sim.random(slips) == 0) || sim.injector().step(Step::CopyToDevmem)
    }

    fn hold(&self, page: DevicePage) -> DevicePage {
        self.state.lock().pages[page.pfn.index()].state = PageState::Held;
        page
    }

    fn let_go_unused(&self, pages: &[DevicePage]) {
        let mut state = self.state.lock();
        for page in pages {
            let page = &mut state.pages[page.pfn.index()];
            if page.state == PageState::Taken {
                page.state = PageState::Free;
            }
        }
    }

    /// Evicts whatever is in a page of its own.
    pub(crate) fn evict(&self, sim: &Sim, pfn: u32) -> Result<(), MmError> {
        let page = DevicePage {
            memory: self.id(),
            pfn: DevicePfn::new(pfn),
        };
        let Some((mut block, at)) = sim.lock_device_page(page) else {
            return Ok(());
        };
        self.bring(sim, &mut block, Span::page_of(at.start()))
    }

    fn bring(&self, sim: &Sim, block: &mut BlockGuard<'_>, span: Span) -> Result<(), MmError> {
        let collected = block.collect_device(span, &mut |_, page| page.memory == self.id())?;
        for Leaving { from, to } in collected.leaving().iter().flatten() {
            let bytes = self.with_page(*from, |bytes| *bytes);
            if sim.injector().step(Step::CopyToRam) {
                return Err(MmError::StuckOnDevice { at: span.start() });
            }
            sim.bus_write(*to, &bytes).unwrap();
        }
        collected.commit()
    }
}

impl DeviceMemoryOps<Sim> for Device {
    fn migrate_to_ram(
        &self,
        mm: &Sim,
        block: &mut BlockGuard<'_>,
        fault: &CpuFault,
    ) -> FaultOutcome {
        let (until, window) = {
            let state = self.state.lock();
            (state.stays_until, state.window)
        };
        let holds = matches!(fault.wanted, Wanted::Touched | Wanted::Device);
        if holds && mm.now() < until {
            return FaultOutcome::NotBefore(until);
        }
        if self.fails.load(Ordering::Acquire) {
            return FaultOutcome::Failed;
        }
        let window = Span::chunk_of(fault.at, window).intersection(block.span());
        match self.bring(mm, block, window.unwrap()) {
            Ok(()) => FaultOutcome::Served,
            Err(_) => FaultOutcome::Failed,
        }
    }

    fn free_pages(&self, run: DeviceRun) {
        let mut state = self.state.lock();
        for page in &mut state.pages[run.first.pfn.index()..][..run.count.as_usize()] {
            assert_eq!(page.state, PageState::Held, "released twice, or never held");
            page.state = PageState::Free;
            page.bytes = [0xdd; PAGE];
        }
    }
}

/// A world with a device and a span of mirrored memory that is watched.
pub(crate) fn world(options: Options, pages: u64) -> (Arc<Sim>, Arc<Device>, Span) {
    let sim = Sim::new(options);
    let device = Device::add(&sim, 1, 1024);
    let span = sim.mmap(PageCount::new(pages), Prot::ReadWrite, Backing::Mirrored);
    sim.arm(span).unwrap();
    (sim, device, span)
}

pub(crate) fn seeded(seed: u64) -> Options {
    Options {
        seed,
        ..Options::default()
    }
}

/// The first word of the i-th page.
pub(crate) fn word(span: Span, i: u64) -> VirtAddr {
    span.start() + PageCount::new(i).bytes()
}

/// Writes `base + i` to the i-th page.
pub(crate) fn fill(sim: &Sim, span: Span, base: u64) {
    for i in 0..span.page_count().get() {
        sim.write_u64(word(span, i), base + i).unwrap();
    }
}

/// Every page has what `fill` wrote.
pub(crate) fn expect(sim: &Sim, span: Span, base: u64) {
    for i in 0..span.page_count().get() {
        assert_eq!(sim.read_u64(word(span, i)), Ok(base + i), "page {i}");
    }
}

/// How many pages of a span live on a device.
pub(crate) fn on_device(sim: &Sim, span: Span) -> usize {
    let away = |page: &PageIndex| matches!(sim.home(*page), Home::Device(_));
    span.pages().filter(away).count()
}

/// A simulated thread.
pub(crate) fn thread(body: impl FnOnce() + Send + 'static) -> Body {
    Box::new(body)
}

/// Nothing is wrong, and the device has as many pages as the world says.
pub(crate) fn check(sim: &Sim, device: &Device) {
    if let Err(wrong) = sim.check() {
        panic!("{wrong}\n{}", sim.trace().join("\n"));
    }
    let known = sim.pages_on(device.id()).as_usize();
    assert_eq!(
        device.held(),
        known,
        "seed {}: device pages leaked",
        sim.seed()
    );
}
