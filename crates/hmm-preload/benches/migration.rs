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

use std::process::Command;
use std::time::{Duration, Instant};

/// Set in the program that was started with the library.
const ROLE: &str = "GPUSVM_HMM_BENCH_ROLE";
const PAGE: usize = 4096;
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

const READ: u64 = 0;
const TO_DEV: u64 = 2;
const TO_SYS: u64 = 3;

fn main() {
    // `cargo test --benches` only wants to know that it runs.
    let is_bench = std::env::args().any(|arg| arg == "--bench");
    if std::env::var_os(ROLE).is_some() {
        return measure(is_bench);
    }
    let this = std::env::current_exe().unwrap();
    let library = this.with_file_name("libgpusvm_hmm.so");
    assert!(library.exists(), "{} was not built", library.display());
    let mut command = Command::new(this);
    command.args(is_bench.then_some("--bench"));
    command.env(ROLE, "1").env("LD_PRELOAD", library);
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
        let memory = Memory::new(size, huge);
        let mut data = vec![0u8; size];
        let mut figures = Self::default();
        for round in 0..=rounds {
            let byte = u8::try_from(round + 1).unwrap();
            memory.fill(byte);
            figures.round(&device, &memory, &mut data);
            assert!(data.iter().all(|it| *it == byte), "the data of the round");
            if round == 0 {
                // To warm up.
                figures = Self::default();
            }
        }
        figures
    }

    fn round(&mut self, device: &Device, memory: &Memory, data: &mut [u8]) {
        timed(&mut self.copy, || memory.copy_to(data));
        let before = page_faults();
        timed(&mut self.to_dev, || device.run(TO_DEV, memory, data));
        self.faults[0] += page_faults() - before;
        timed(&mut self.read, || device.run(READ, memory, data));
        let before = page_faults();
        timed(&mut self.to_sys, || device.run(TO_SYS, memory, data));
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

/// A device that is open.
struct Device(i32);

impl Device {
    fn open() -> Self {
        // SAFETY: a C string.
        let fd = unsafe { libc::open(c"/dev/hmm_dmirror0".as_ptr(), libc::O_RDWR) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        Self(fd)
    }

    /// Runs a command on all of it.
    fn run(&self, number: u64, memory: &Memory, data: &mut [u8]) {
        let pages = (memory.len / PAGE) as u64;
        let (at, to) = (memory.at.addr() as u64, data.as_mut_ptr().addr() as u64);
        let mut command: [u64; 5] = [at, to, pages, 0, 0];
        let request = 3 << 30 | 40 << 16 | 0x48 << 8 | number;
        // SAFETY: a command of this device, with room for the data.
        let done = unsafe { libc::ioctl(self.0, request, command.as_mut_ptr()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        assert_eq!(command[3], pages, "all of it");
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: a descriptor of our own.
        assert_eq!(unsafe { libc::close(self.0) }, 0);
    }
}

/// Memory of the program's own.
struct Memory {
    all: *mut u8,
    at: *mut u8,
    len: usize,
}

const HUGE: usize = 2 * MIB;

impl Memory {
    fn new(len: usize, huge: bool) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let nowhere = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let all = unsafe { libc::mmap(nowhere, len + HUGE, access, flags, -1, 0) };
        assert_ne!(all, libc::MAP_FAILED);
        let all = all.cast::<u8>();
        let advice = match huge {
            true => libc::MADV_HUGEPAGE,
            false => libc::MADV_NOHUGEPAGE,
        };
        // Where the system has no such advice, it has no huge pages either.
        // SAFETY: pages of our own, which nobody has touched.
        unsafe { libc::madvise(all.cast(), len + HUGE, advice) };
        let at = all.wrapping_add(all.align_offset(HUGE));
        Self { all, at, len }
    }

    fn fill(&self, byte: u8) {
        // SAFETY: memory of our own, which nobody refers to.
        unsafe { self.at.write_bytes(byte, self.len) };
    }

    fn copy_to(&self, data: &mut [u8]) {
        assert_eq!(data.len(), self.len);
        // SAFETY: as above, and of the same length.
        unsafe { self.at.copy_to_nonoverlapping(data.as_mut_ptr(), self.len) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: all of it is our own, and nobody refers to it.
        unsafe { libc::munmap(self.all.cast(), self.len + HUGE) };
    }
}
