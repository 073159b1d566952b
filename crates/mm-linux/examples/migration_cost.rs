//! What a migration costs over the copy in it.
//!
//! ```text
//!   cargo run --release -p gpusvm-mm-linux --example migration_cost [rung]
//! ```
//!
//! Prints, for huge and for base pages, the median of one 2 MiB migration each way next to that of one
//! bare copy with the same instructions, the two taken turn by turn over many blocks, so that both
//! find the caches as the other left them; and how long a thread waits for a page, from the touch to
//! the next instruction, by the window that comes home. At the end: what a first touch by the CPU costs in
//! memory that was adopted as one, next to one that the kernel serves alone.

#![expect(
    clippy::disallowed_methods,
    reason = "it measures, with the clock of the machine"
)]

#[path = "../tests/common/device.rs"]
#[expect(
    dead_code,
    clippy::unwrap_used,
    reason = "the device of the tests, as far as it is needed"
)]
mod device;

use device::FakeDevice;
use gpusvm_mm::{AddressSpace, Block, Inbound, Outbound};
use gpusvm_mm_linux::{Options, Process, Rung};
use gpusvm_types::{
    BLOCK_SIZE, ByteSize, DevicePfn, DmaAddr, OwnerId, PAGE_SIZE, PAGES_PER_BLOCK, PageCount, Span,
    VirtAddr,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

const BLOCKS: u64 = 64;
const ROUNDS: usize = 30;
const OWNER: OwnerId = OwnerId(1);

struct Bench {
    process: Arc<Process>,
    device: Arc<FakeDevice>,
    memory: Span,
    /// Memory of the same kind that stays: what the bare copies read and write.
    still: Span,
    /// Device memory that no migration touches.
    bare: DevicePfn,
}

/// The steps of a migration.
#[derive(Default)]
struct Times {
    whole: Vec<Duration>,
    collect: Vec<Duration>,
    copy: Vec<Duration>,
    commit: Vec<Duration>,
    bare: Vec<Duration>,
}

fn main() {
    let number = std::env::args().nth(1).and_then(|arg| arg.parse().ok());
    let rung = number.and_then(Rung::from_number);
    let process = Process::start(Options {
        rung,
        ..Options::default()
    })
    .expect("an engine");
    println!("{}", process.rung());
    let pages = PageCount::new(3 * BLOCKS * PAGES_PER_BLOCK as u64);
    let device = FakeDevice::new(pages);
    let ops = Arc::clone(&device);
    device.is_added_as(process.add_device_memory(pages, OWNER, ops).expect("room"));
    for huge in [true, false] {
        let bench = Bench::new(&process, &device, huge);
        let pages = if huge { "2 MiB pages" } else { "4 KiB pages" };
        bench.migrations(pages, 4);
        bench.faults();
        bench.end();
    }
    first_touches(&process);
    process.stop();
}

/// 64 KiB at a time, page by page, of memory that nobody has touched: adopted as one and watched, and
/// nobody's, turn by turn.
fn first_touches(process: &Arc<Process>) {
    const LEN: ByteSize = ByteSize::mib(16);
    const CHUNK: ByteSize = ByteSize::kib(64);
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let [watched, plain] = [(); 2].map(|()| map(LEN));
        let adopted = process.adopt_as_one(watched.start(), LEN);
        let adopted = adopted.expect("memory of ours");
        process.watch(adopted).expect("watched");
        let nth = |span: Span, n: u64| span.start() + ByteSize::new(n * CHUNK.get());
        for n in 0..LEN.get() / CHUNK.get() {
            for (times, span) in times.iter_mut().zip([watched, plain]) {
                let began = Instant::now();
                let chunk = Span::from_len(nth(span, n), CHUNK).expect("a chunk");
                chunk.pages().for_each(|page| write(page.start()));
                times.push(began.elapsed());
            }
        }
        process.unadopt(adopted).expect("adopted above");
        [watched, plain].into_iter().for_each(unmap);
    }
    let [watched, plain] = times.each_mut().map(|times| percentile(times, 50));
    let ratio = watched.as_secs_f64() / plain.as_secs_f64();
    println!(
        "first touches of 64 KiB, page by page: adopted as one and watched {watched:.1?}, plain {plain:.1?}: \
         {ratio:.1} x"
    );
}

/// Memory of base pages.
fn map(len: ByteSize) -> Span {
    let (access, how) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    );
    // SAFETY: no address is asked for.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len.as_usize(), access, how, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    // SAFETY: changes no byte.
    unsafe { libc::madvise(at, len.as_usize(), libc::MADV_NOHUGEPAGE) };
    Span::covering(VirtAddr::from(at.cast_const()), len).expect("memory")
}

fn unmap(span: Span) {
    // SAFETY: mapped here, and nobody uses it any more.
    unsafe { libc::munmap(pointer(span.start()).cast(), span.len().as_usize()) };
}

impl Bench {
    fn new(process: &Arc<Process>, device: &Arc<FakeDevice>, huge: bool) -> Self {
        let len = ByteSize::new(BLOCK_SIZE.get() * BLOCKS);
        let [memory, still] = [(); 2].map(|()| {
            let span = process.allocate(len).expect("memory");
            if !huge {
                let at = pointer(span.start()).cast();
                // SAFETY: changes no byte.
                unsafe { libc::madvise(at, len.as_usize(), libc::MADV_NOHUGEPAGE) };
            }
            span.pages().for_each(|page| write(page.start()));
            span
        });
        process.arm(memory).expect("armed");
        Self {
            process: Arc::clone(process),
            device: Arc::clone(device),
            memory,
            still,
            bare: device.take(len.pages()),
        }
    }

    /// Blocks go out, and come home `lag` blocks later: with a short lag they arrive in the pages that
    /// others left behind, as in steady state; with a long one the kernel makes new pages.
    fn migrations(&self, name: &str, lag: usize) {
        let (mut out, mut home) = (Times::default(), Times::default());
        let blocks: Vec<_> = self.memory.blocks().zip(self.still.blocks()).collect();
        let nth = |i: usize| (blocks[i % blocks.len()], i % blocks.len());
        for i in 0..ROUNDS * blocks.len() + lag {
            let keep = i >= blocks.len();
            if i < ROUNDS * blocks.len() {
                let ((block, still), n) = nth(i);
                let bare = self.bare(still, n, true);
                let times = self.out(block);
                keep.then(|| out.push(times, bare));
            }
            if let Some(i) = i.checked_sub(lag) {
                let ((block, still), n) = nth(i);
                let bare = self.bare(still, n, false);
                let times = self.home(block);
                keep.then(|| home.push(times, bare));
            }
        }
        println!("{name}: one 2 MiB migration, median of {}", out.whole.len());
        out.print("  to the device");
        home.print("  home         ");
    }

    /// Copies between memory and device memory that no migration touches.
    fn bare(&self, still: Span, n: usize, out: bool) -> Duration {
        let began = Instant::now();
        let first = self.bare.offset(PageCount::from_usize(n * PAGES_PER_BLOCK));
        let (ram, device) = (DmaAddr::new(still.start().get()), self.device.dma(first));
        let (to, from) = if out { (device, ram) } else { (ram, device) };
        assert!(device::copy(to, from, BLOCK_SIZE));
        began.elapsed()
    }

    fn out(&self, block: Span) -> [Duration; 4] {
        let first = self.device.take(block.page_count());
        let began = Instant::now();
        let mut guard = self.process.lock_block(block).expect("a block");
        let collected = guard
            .collect(block, OWNER, &mut |_, _| false)
            .expect("its pages");
        let collect = began.elapsed();
        assert!(self.device.copy_from(first, collected.sources()));
        let copied = began.elapsed();
        collected.commit(&mut |i| self.device.hold(first, i));
        drop(guard);
        let done = began.elapsed();
        [done, collect, copied - collect, done - copied]
    }

    fn home(&self, block: Span) -> [Duration; 4] {
        let began = Instant::now();
        let mut guard = self.process.lock_block(block).expect("a block");
        let collected = guard.collect_device(block, &mut |_, _| true).expect("RAM");
        let collect = began.elapsed();
        self.device.copy_to(collected.leaving());
        let copied = began.elapsed();
        collected.commit().expect("home");
        drop(guard);
        let done = began.elapsed();
        [done, collect, copied - collect, done - copied]
    }

    /// One block is out at a time, and comes home window by window.
    fn faults(&self) {
        for window in [PAGE_SIZE, ByteSize::kib(64), BLOCK_SIZE] {
            self.device.set_window(window);
            let mut times = Vec::new();
            let before = self.process.stats().cpu_fault_time;
            for _ in 0..ROUNDS {
                for block in self.memory.blocks().step_by(4) {
                    self.out(block);
                    let touches = (BLOCK_SIZE.get() / window.get()).min(8);
                    for touch in 0..touches {
                        let offset = ByteSize::new(touch * (BLOCK_SIZE.get() / touches));
                        let began = Instant::now();
                        write(block.start() + offset);
                        times.push(began.elapsed());
                    }
                    self.home(block);
                }
            }
            let mut served = self.process.stats().cpu_fault_time;
            served.subtract(&before).expect("counted before");
            let served = Duration::from_nanos(served.value_at_quantile(0.5));
            let (median, worst) = (percentile(&mut times, 50), percentile(&mut times, 99));
            println!(
                "  CPU fault, window {window:>6}: p50 {median:>8.1?}, p99 {worst:>8.1?}; \
                 in the handler {served:.1?}"
            );
        }
    }

    fn end(self) {
        self.process.bring_home(self.memory).expect("home");
        self.process.free(self.memory);
        self.process.free(self.still);
        self.device
            .let_go_unused(self.bare, self.still.page_count());
    }
}

impl Times {
    fn push(&mut self, [whole, collect, copy, commit]: [Duration; 4], bare: Duration) {
        self.whole.push(whole);
        self.collect.push(collect);
        self.copy.push(copy);
        self.commit.push(commit);
        self.bare.push(bare);
    }

    fn print(&mut self, name: &str) {
        let all = [
            &mut self.whole,
            &mut self.bare,
            &mut self.collect,
            &mut self.copy,
            &mut self.commit,
        ];
        let [whole, bare, collect, copy, commit] = all.map(|times| percentile(times, 50));
        let ratio = whole.as_secs_f64() / bare.as_secs_f64();
        println!(
            "{name} {whole:>8.1?} = {ratio:.2} x a bare copy ({bare:.1?}); \
             collect {collect:.1?}, copy {copy:.1?}, commit {commit:.1?}"
        );
    }
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * percent / 100]
}

fn pointer(at: VirtAddr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(ByteSize::new(at.get()).as_usize())
}

fn write(at: VirtAddr) {
    // SAFETY: memory that was allocated here.
    unsafe { pointer(at).write_volatile(1) };
}
