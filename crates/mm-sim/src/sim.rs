//! The simulated world: one process, its threads, its clock.

use crate::fork::Gate;
use crate::injector::Injector;
use crate::kernel::Kernel;
use crate::runtime::{Body, Runtime, ThreadTimes};
use crate::staging::Staging;
use crate::stats::{Counters, SimStats};
use core::fmt;
use gpusvm_mm::{DeviceMemoryId, Home, Memories, Mirror, Notifiers, Time};
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{PageCount, PageIndex, Span, VirtAddr};
use std::time::Duration;

/// How a world is.
#[derive(Clone, Debug)]
pub struct Options {
    /// Everything that could be one way or the other goes as the seed says.
    pub seed: u64,
    /// How many migrations have room at once.
    pub staging_blocks: usize,
    /// Whether the first write to an empty aligned block makes it one huge page.
    pub huge: bool,
    /// Whether the engine hears of unmappings and the like a little later, as through userfaultfd:
    /// the page words are marked at once, the rest waits for the seed. Otherwise system calls
    /// return when all is done, as with the kernel's notifiers.
    pub late_events: bool,
    /// How many events [`Sim::trace`] remembers.
    pub trace: usize,
    /// A run of simulated threads with more steps than this has no end.
    pub most_steps: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            seed: 0,
            staging_blocks: 8,
            huge: false,
            late_events: false,
            trace: 4096,
            most_steps: 20_000_000,
        }
    }
}

/// A simulated process address space, with the program that lives in it.
///
/// It is an [`AddressSpace`](gpusvm_mm::AddressSpace) for the layers above, a kernel for the program
/// (`mmap`, `read_u64`, `fork`, ...), and a bus for devices (`bus_read`, ...).
#[derive(Debug)]
pub struct Sim {
    pub(crate) runtime: Arc<Runtime>,
    // guarded by: nothing else; held for a step, never across a yield.
    pub(crate) kernel: Mutex<Kernel>,
    pub(crate) staging: Staging,
    pub(crate) notifiers: Notifiers,
    pub(crate) memories: Memories<Self>,
    pub(crate) gate: Gate,
    pub(crate) injector: Arc<Injector>,
    pub(crate) counters: Counters,
    pub(crate) late_events: bool,
    /// One system call that changes mappings at a time: the kernel's `mmap_lock`.
    pub(crate) in_call: AtomicBool,
    pub(crate) gone: AtomicBool,
}

impl Sim {
    /// An empty process.
    pub fn new(options: Options) -> Arc<Self> {
        Arc::new(Self {
            runtime: Runtime::new(options.seed, options.trace, options.most_steps),
            kernel: Mutex::new(Kernel::new(options.huge)),
            staging: Staging::new(options.staging_blocks),
            notifiers: Notifiers::default(),
            memories: Memories::default(),
            gate: Gate::default(),
            injector: Injector::new(),
            counters: Counters::default(),
            late_events: options.late_events,
            in_call: AtomicBool::new(false),
            gone: AtomicBool::new(false),
        })
    }

    /// The seed that everything follows from.
    pub fn seed(&self) -> u64 {
        self.runtime.seed()
    }

    /// Runs simulated threads to the end, one at a time; the seed chooses who goes on at every yield
    /// point.
    ///
    /// # Panics
    ///
    /// As the first thread that panics, with the seed in the message; and when everybody waits, with
    /// what for.
    pub fn run(self: &Arc<Self>, threads: Vec<Body>) {
        let mut servants = Vec::new();
        if self.late_events {
            let sim = Arc::clone(self);
            servants.push(Box::new(move || sim.serve_events()) as Body);
        }
        self.runtime.run(threads, servants);
    }

    /// What the threads of the last run did with their time, in their order.
    pub fn thread_times(&self) -> Vec<ThreadTimes> {
        self.runtime.thread_times()
    }

    /// A yield point: another simulated thread may run now. Costs a step.
    pub fn yield_now(&self) {
        self.runtime.yield_now();
    }

    /// Does nothing for so long, in simulated time.
    pub fn sleep(&self, for_: Duration) {
        self.runtime.sleep(for_);
    }

    /// A number below `end` that the seed chooses: for programs, devices and policies in the world.
    pub fn random(&self, end: u64) -> u64 {
        self.runtime.random(end)
    }

    /// Which steps fail. Simulated devices ask it too.
    pub fn injector(&self) -> &Arc<Injector> {
        &self.injector
    }

    /// What happened so far.
    pub fn stats(&self) -> SimStats {
        self.counters.snapshot()
    }

    /// What happened last, with the time and the thread.
    pub fn trace(&self) -> Vec<String> {
        self.runtime.traced()
    }

    /// Adds a line to the trace: for devices and tests. No yield point.
    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.runtime.trace(what);
    }

    /// Where a page lives. Memory that is not mirrored lives in RAM as long as it is mapped.
    pub fn home(&self, page: PageIndex) -> Home {
        let kernel = self.kernel.lock();
        if let Some(part) = kernel.parts.find(page.start()) {
            return part.region.word(page).get().home();
        }
        match kernel.mapping(page.start()) {
            Some(_) => Home::System,
            None => Home::Unmapped,
        }
    }

    /// How many pages live on a device, by its own account.
    pub fn pages_on(&self, memory: DeviceMemoryId) -> PageCount {
        let memory = self.memories.get(memory);
        memory.map_or(PageCount::ZERO, |memory| memory.rmap.in_use())
    }

    /// What is mirrored, ascending.
    pub fn mirrored_spans(&self) -> Vec<Span> {
        let kernel = self.kernel.lock();
        kernel.parts.all().iter().map(|part| part.span).collect()
    }

    /// Whether the block of `at` is one huge page of RAM.
    pub fn is_huge(&self, at: VirtAddr) -> bool {
        self.kernel.lock().huge.contains(&at.block_start())
    }

    /// Pages of `span` cannot be taken from now on, as if somebody's DMA had pinned them.
    pub fn pin(&self, span: Span) {
        self.kernel.lock().pinned.extend(span.pages());
    }

    /// Ends `pin`.
    pub fn unpin(&self, span: Span) {
        let mut kernel = self.kernel.lock();
        for page in span.pages() {
            kernel.pinned.remove(&page);
        }
    }

    /// How many staging slots migrations hold right now.
    pub fn staging_in_use(&self) -> usize {
        self.staging.in_use()
    }

    /// A step is made: it is told, and others may run.
    pub(crate) fn step(&self, what: fmt::Arguments<'_>) {
        self.runtime.trace(what);
        self.runtime.yield_now();
    }

    pub(crate) fn sleep_until(&self, due: Time) {
        self.runtime.sleep(due.since(self.time()));
    }

    pub(crate) fn time(&self) -> Time {
        Time::since_start(self.runtime.now())
    }

    /// Whether calls still make sense.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    pub(crate) fn mirror_of(&self, at: VirtAddr) -> Mirror {
        self.kernel.lock().parts.mirror(at)
    }
}
