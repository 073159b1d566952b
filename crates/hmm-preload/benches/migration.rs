//! What migrating costs a program that uses the kernel's device: as `benchmark_thp_migration` of the kernel's
//! newer HMM self-tests measures it, through the same interface. `cargo bench -p gpusvm-hmm-preload`.
//!
//! Memory of several sizes, of huge pages and not, goes to the device and comes home; after a warm-up, the median
//! of five rounds. `TO_DEV` ends with the device reading all of it back, as the kernel's does: a second copy, and
//! to the program a third. `READ` is that part of it alone. Beside them stands a copy of the same memory by the
//! CPU, which takes turns with them, so that what else the machine does falls on all.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::cast_precision_loss,
    reason = "a program that measures"
)]

#[allow(dead_code, unused_imports, reason = "what only tests need of it")]
#[path = "../tests/preloaded/kit/mod.rs"]
mod kit;

use kit::{Area, Device, Do, PAGE, READ_WRITE, library};
use std::process::Command;
use std::time::{Duration, Instant};

/// Set in the program that was started with the library.
const ROLE: &str = "GPUSVM_HMM_BENCH_ROLE";
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const SIZES: [usize; 7] = [
    512 * KIB,
    MIB,
    2 * MIB,
    4 * MIB,
    8 * MIB,
    16 * MIB,
    256 * MIB,
];
const ROUNDS: usize = 5;

fn main() {
    // `cargo test --benches` only wants to know that it runs.
    let is_bench = std::env::args().any(|arg| arg == "--bench");
    if std::env::var_os(ROLE).is_some() {
        return measure(is_bench);
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(is_bench.then_some("--bench"));
    command.env(ROLE, "1").env("LD_PRELOAD", library());
    assert!(command.status().unwrap().success());
}

fn measure(is_bench: bool) {
    let (sizes, rounds) = match is_bench {
        true => (&SIZES[..], ROUNDS),
        false => (&SIZES[..1], 1),
    };
    println!(
        "GB/s, median of {rounds} rounds; in brackets: of what a copy by the CPU does in the same rounds"
    );
    println!(
        "{:>8} {:>5} {:>6} | {:>13} {:>13} {:>13} | faults of the program per MiB: TO_DEV, TO_SYS",
        "size", "huge", "copy", "TO_DEV", "READ", "TO_SYS"
    );
    for &size in sizes {
        for huge in [false, true] {
            let figures = Figures::of(size, huge, rounds);
            println!("{}", figures.row(size, huge));
        }
    }
}

/// How long each step took, round by round.
#[derive(Debug, Default)]
struct Figures {
    copy: Vec<Duration>,
    to_dev: Vec<Duration>,
    read: Vec<Duration>,
    to_sys: Vec<Duration>,
    /// Page faults of the process, in all rounds.
    faults: [u64; 2],
}

impl Figures {
    fn of(size: usize, huge: bool, rounds: usize) -> Self {
        let device = Device::open();
        let memory = Area::aligned(size / PAGE, huge, READ_WRITE);
        let mut data = vec![0u8; size];
        let mut figures = Self::default();
        for (round, seed) in (0..=rounds).zip(0..) {
            memory.fill(seed);
            figures.round(&device, &memory, &mut data);
            assert!(memory.is_filled(seed), "the data of the round");
            if round == 0 {
                // To warm up.
                figures = Self::default();
            }
        }
        figures
    }

    fn round(&mut self, device: &Device, memory: &Area, data: &mut [u8]) {
        let run = |what, data: &mut [u8]| {
            let done = device.run(what, memory.all(), data).unwrap();
            assert_eq!(done.cpages, memory.pages as u64, "all of it");
        };
        timed(&mut self.copy, || memory.copy_to(data));
        let before = page_faults();
        timed(&mut self.to_dev, || run(Do::MigrateToDev, data));
        self.faults[0] += page_faults() - before;
        timed(&mut self.read, || run(Do::Read, data));
        let before = page_faults();
        timed(&mut self.to_sys, || run(Do::MigrateToSys, data));
        self.faults[1] += page_faults() - before;
        timed(&mut self.copy, || memory.copy_to(data));
    }

    fn row(self, size: usize, huge: bool) -> String {
        let rounds = self.to_dev.len();
        let rate = |times| size as f64 / median(times).as_secs_f64() / 1e9;
        let copy = rate(self.copy);
        let [to_dev, read, to_sys] = [self.to_dev, self.read, self.to_sys].map(|times| {
            let rate = rate(times);
            format!("{rate:5.2} ({:4.2})", rate / copy)
        });
        let [out, home] = self
            .faults
            .map(|faults| faults as f64 * MIB as f64 / (size * rounds) as f64);
        let huge = if huge { "yes" } else { "no" };
        let size = match size {
            MIB.. => format!("{} MiB", size / MIB),
            _ => format!("{} KiB", size / KIB),
        };
        format!(
            "{size:>8} {huge:>5} {copy:6.2} | {to_dev:>13} {read:>13} {to_sys:>13} | {out:.0}, {home:.0}"
        )
    }
}

fn timed<T>(times: &mut Vec<Duration>, work: impl FnOnce() -> T) {
    let began = Instant::now();
    work();
    times.push(began.elapsed());
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Of the whole process, with the engine in it.
fn page_faults() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: room for what is told.
    let told = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
    assert_eq!(told, 0);
    // SAFETY: it was told; and all zeroes are a value.
    u64::try_from(unsafe { usage.assume_init() }.ru_minflt).unwrap()
}
