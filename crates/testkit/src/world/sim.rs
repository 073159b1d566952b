//! A simulated process as a world: one seed, one history.
//!
//! Odd seeds hear of unmappings a little later, as through userfaultfd, the others before, as with the
//! kernel's notifiers. Of both, every second one has huge pages.

use super::{Bus, Cpu, Feature, Kind, NoAnswer, Prot, Signal, Thread, World};
use core::time::Duration;
use gpusvm_mm_sim::{Backing, Child, Options, Sim};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{BLOCK_SIZE, DmaAddr, PageCount, Span, VirtAddr};

/// A simulated process.
#[derive(Debug)]
pub struct Simulated {
    sim: Arc<Sim>,
    /// Where the next mapping goes.
    next: Mutex<VirtAddr>,
}

/// Where the program maps: apart from what the simulator chooses itself.
const BASE: VirtAddr = VirtAddr::new(1 << 46);
/// How long others get in a pause.
const PAUSE: Duration = Duration::from_millis(2);

impl World for Simulated {
    type Mm = Sim;
    const NAME: &'static str = "sim";

    fn start(seed: u64) -> Option<Arc<Self>> {
        let sim = Sim::new(Options {
            seed,
            huge: seed & 2 == 0,
            late_events: seed % 2 == 1,
            ..Options::default()
        });
        let next = Mutex::new(BASE);
        Some(Arc::new(Self { sim, next }))
    }

    fn rounds() -> u64 {
        32
    }

    fn rounds_of_plain_cases() -> u64 {
        4
    }

    fn mm(&self) -> &Arc<Sim> {
        &self.sim
    }

    fn bus(&self) -> Arc<dyn Bus> {
        Arc::new(SimBus(Arc::clone(&self.sim)))
    }

    fn supports(&self, feature: Feature) -> Result<(), &'static str> {
        match feature {
            Feature::FileContents => Err("a simulated file has no contents of its own"),
            Feature::SharedWithChild => Err("a simulated child shares nothing"),
            _ => Ok(()),
        }
    }

    fn map(&self, pages: PageCount, prot: Prot, kind: Kind) -> Span {
        let span = self.fresh(pages);
        self.map_again(span, prot, kind);
        span
    }

    fn map_again(&self, span: Span, prot: Prot, kind: Kind) {
        let backing = match kind {
            Kind::Mirrored | Kind::Huge => Backing::Mirrored,
            Kind::Plain => Backing::Private,
            Kind::Shared | Kind::FileShared | Kind::FilePrivate => Backing::Shared,
        };
        self.sim.mmap_fixed(span, of_sim(prot), backing);
    }

    fn unmap(&self, span: Span) {
        self.sim.munmap(span);
        self.hear();
    }

    fn protect(&self, span: Span, prot: Prot) {
        self.sim.mprotect(span, of_sim(prot));
        self.sim.settle_events();
    }

    fn drop_contents(&self, span: Span) {
        self.sim.madvise_dontneed(span);
        self.hear();
    }

    fn remap(&self, span: Span, dontunmap: bool) -> Span {
        let to = self.sim.mremap(span, dontunmap);
        self.hear();
        to
    }

    fn fork(&self, child: &mut dyn FnMut(&dyn Cpu) -> bool) -> bool {
        child(&ChildCpu(Mutex::new(self.sim.fork())))
    }

    fn exit(&self) {
        self.sim.exit();
    }

    fn behind(&self, _at: VirtAddr) -> Option<u64> {
        None
    }

    fn settle(&self) {
        self.sim.settle_events();
    }

    fn run(&self, threads: Vec<Thread>) {
        self.sim.run(threads);
    }

    fn pause(&self) {
        self.sim.sleep(PAUSE);
    }

    fn check(&self) -> Result<(), String> {
        self.sim.check()
    }

    fn story(&self) -> String {
        let trace = self.sim.trace();
        let last = trace.len().saturating_sub(80);
        format!("{:?}\n{}", self.sim.stats(), trace[last..].join("\n"))
    }
}

impl Simulated {
    /// Events are late as long as threads are simulated; outside nobody else would handle them.
    fn hear(&self) {
        if gpusvm_sync::scheduler().is_none() {
            self.sim.settle_events();
        }
    }

    /// Addresses that were never used, from a multiple of 2 MiB on, with a gap behind.
    fn fresh(&self, pages: PageCount) -> Span {
        let mut next = self.next.lock();
        let span = Span::covering(*next, pages.bytes()).expect("pages");
        let end = (span.end() + BLOCK_SIZE).align_up(BLOCK_SIZE);
        *next = end.expect("an address");
        span
    }
}

impl Cpu for Simulated {
    fn read(&self, at: VirtAddr) -> Result<u64, Signal> {
        self.sim.read_u64(at).map_err(|_| Signal { at })
    }

    fn write(&self, at: VirtAddr, value: u64) -> Result<(), Signal> {
        self.sim.write_u64(at, value).map_err(|_| Signal { at })
    }

    fn fetch_add(&self, at: VirtAddr, by: u64) -> Result<u64, Signal> {
        self.sim.fetch_add_u64(at, by).map_err(|_| Signal { at })
    }
}

/// A child, which has one thread.
struct ChildCpu(Mutex<Child>);

impl Cpu for ChildCpu {
    fn read(&self, at: VirtAddr) -> Result<u64, Signal> {
        self.0.lock().read_u64(at).map_err(|_| Signal { at })
    }

    fn write(&self, at: VirtAddr, value: u64) -> Result<(), Signal> {
        let mut child = self.0.lock();
        child.write_u64(at, value).map_err(|_| Signal { at })
    }

    fn fetch_add(&self, at: VirtAddr, by: u64) -> Result<u64, Signal> {
        let before = self.read(at)?;
        self.write(at, before.wrapping_add(by)).map(|()| before)
    }
}

/// RAM of a simulated process.
#[derive(Debug)]
struct SimBus(Arc<Sim>);

impl Bus for SimBus {
    fn read(&self, at: DmaAddr, into: &mut [u8]) -> Result<(), NoAnswer> {
        self.0.bus_read(at, into).map_err(|_| NoAnswer)
    }

    fn write(&self, at: DmaAddr, from: &[u8]) -> Result<(), NoAnswer> {
        self.0.bus_write(at, from).map_err(|_| NoAnswer)
    }

    fn fetch_add(&self, at: DmaAddr, by: u64) -> Result<u64, NoAnswer> {
        self.0.bus_fetch_add_u64(at, by).map_err(|_| NoAnswer)
    }

    fn as_device(&self, work: &mut dyn FnMut()) {
        work();
    }
}

const fn of_sim(prot: Prot) -> gpusvm_mm_sim::Prot {
    match prot {
        Prot::None => gpusvm_mm_sim::Prot::None,
        Prot::Read => gpusvm_mm_sim::Prot::Read,
        Prot::ReadWrite => gpusvm_mm_sim::Prot::ReadWrite,
    }
}
