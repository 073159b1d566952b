//! Two devices, in both orders, on a fabric and without one.
//!
//! # Differences from the suite
//!
//! The preferred location of what a device touches is that device anyway. Where the suite copies with a
//! blitter, a kernel copies here.

use super::{ADVISE, PREFETCH, Test};
use crate::Skip;
use crate::buffer::Buffer;
use crate::engine::{Engine, Machine, Spec};
use crate::sections::Flags;
use gpusvm::{ByteSize, Grid, SvmPtr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// The first device, the second, and where they are.
type Pair<'m> = (Engine<'m>, Engine<'m>, &'m Machine);

type Case = fn(Pair<'_>);

const BASIC: &[(&str, Case)] = &[
    ("xgpu-access", xgpu_access),
    ("atomic-op", atomic_op),
    ("coherency", coherency),
    ("coherency-fail", coherency_fail),
    ("latency", latency),
    ("latency-copy", latency_copy),
    ("pagefault", pagefault),
    ("concurrent-access", concurrent_access),
    ("migration", migration),
];

pub(super) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for (name, case) in BASIC {
        tests.push(Test::quick(format!("mgpu-{name}-basic"), move || {
            pairs(*case)
        }));
        tests.push(Test::without(format!("mgpu-{name}-prefetch"), PREFETCH));
    }
    let conflicts = ["atomic-op", "coherency", "pagefault"];
    let conflicts = conflicts.map(|name| format!("mgpu-{name}-conflict"));
    tests.extend(conflicts.map(|name| Test::without(name, ADVISE)));
    tests
}

fn pairs(case: Case) -> Result<(), Skip> {
    for fabric in [true, false] {
        for (first, second) in [(0, 1), (1, 0)] {
            let machine = Machine::with(Spec {
                vms: 2,
                vram: ByteSize::mib(128),
                fabric,
            })?;
            case((machine.engine(first), machine.engine(second), &machine));
            machine.finish(0);
        }
    }
    Ok(())
}

/// Words that both devices and the CPU use.
struct Words(Buffer);

impl Words {
    fn new(machine: &Machine, len: usize) -> Self {
        let buffer = Buffer::malloc(machine.svm(), len, Flags::default());
        Self(buffer)
    }

    fn page(machine: &Machine) -> Self {
        Self::new(machine, 2 << 20)
    }

    fn at(&self) -> SvmPtr<u32> {
        SvmPtr::from(self.0.at().cast::<u32>())
    }

    fn word(&self, i: usize) -> &AtomicU32 {
        assert!(i * 4 < self.0.len());
        // SAFETY: inside the buffer, aligned, and only used by atomics.
        unsafe { AtomicU32::from_ptr(self.0.at().cast::<u32>().wrapping_add(i)) }
    }

    fn get(&self) -> u32 {
        self.word(0).load(Ordering::Acquire)
    }

    fn set(&self, value: u32) {
        self.word(0).store(value, Ordering::Release);
    }
}

fn store(engine: Engine<'_>, to: &Words, value: u32) {
    let at = to.at();
    let launch = engine.launch(Grid::new(1), move |lane| lane.store(at, value));
    launch.wait().expect("a store");
}

fn increment(engine: Engine<'_>, at: &Words) {
    let at = at.at();
    let kernel = move |lane: &mut gpusvm::Lane<'_>| lane.atomic_add(at, 1u32).map(drop);
    engine
        .launch(Grid::new(1), kernel)
        .wait()
        .expect("an increment");
}

/// Copies a page for each lane.
fn copy(engine: Engine<'_>, from: &Words, to: &Words, pages: usize) {
    const WORDS: usize = 1024;
    let (from, to) = (from.at(), to.at());
    let launch = engine.launch(Grid::new(pages), move |lane| {
        let mut page = [0u32; WORDS];
        let by = lane.id() * WORDS;
        lane.load_tile(from.add(by), &mut page)?;
        lane.store_tile(to.add(by), &page)
    });
    launch.wait().expect("a copy");
}

/// One device copies to memory that the other has had.
fn xgpu_access((first, second, machine): Pair<'_>) {
    const LEN: usize = 64 << 20;
    let (from, to) = (Words::new(machine, LEN), Words::new(machine, LEN));
    for i in 0..LEN / 4 {
        from.word(i)
            .store(0x67 + u32::try_from(i).unwrap(), Ordering::Relaxed);
    }
    store(second, &to, 1);
    copy(first, &from, &to, LEN / 4096);
    for i in 0..LEN / 4 {
        assert_eq!(
            to.word(i).load(Ordering::Relaxed),
            0x67 + u32::try_from(i).unwrap()
        );
    }
}

/// An increment on one, copied and incremented on the other, and copied back.
fn atomic_op((first, second, machine): Pair<'_>) {
    let (data, there) = (Words::page(machine), Words::page(machine));
    data.set(55);
    increment(first, &data);
    copy(second, &data, &there, 1);
    assert_eq!(there.get(), 56);
    increment(second, &there);
    copy(first, &there, &data, 1);
    assert_eq!(data.get(), 57);
}

/// What one writes the other reads.
fn coherency((first, second, machine): Pair<'_>) {
    let (data, there) = (Words::page(machine), Words::page(machine));
    store(first, &data, 60);
    copy(second, &data, &there, 1);
    assert_eq!(there.get(), 60);
}

/// Both write at once: one of them is last, and everybody sees the same.
fn coherency_fail(pair: Pair<'_>) {
    coherency(pair);
    let (first, second, machine) = pair;
    let (data, there) = (Words::page(machine), Words::page(machine));
    data.set(0);
    let at = data.at();
    let write = |engine: Engine<'_>, value: u32| {
        engine.launch(Grid::new(1), move |lane| lane.store(at, value))
    };
    let launches = [write(first, 70), write(second, 80)];
    for launch in launches {
        launch.wait().expect("a store");
    }
    copy(second, &data, &there, 1);
    let (found, seen) = (there.get(), data.get());
    assert!(found == 70 || found == 80, "{found}");
    assert_eq!(found, seen);
}

/// How long it takes one device to write a page, and the other to copy it.
fn timed(pair: Pair<'_>, again: bool) {
    let (first, second, machine) = pair;
    let (data, there) = (Words::page(machine), Words::page(machine));
    let began = Instant::now();
    store(first, &data, 60);
    let wrote = began.elapsed();
    if again {
        store(first, &data, 61);
    }
    let began = Instant::now();
    copy(second, &data, &there, 1);
    let copied = began.elapsed();
    assert_eq!(there.get(), if again { 61 } else { 60 });
    println!("write on one device {wrote:?}, copy by the other {copied:?}");
}

fn latency(pair: Pair<'_>) {
    timed(pair, true);
}

fn latency_copy(pair: Pair<'_>) {
    timed(pair, false);
}

/// Each of them faults.
fn pagefault((first, second, machine): Pair<'_>) {
    let (data, there) = (Words::page(machine), Words::page(machine));
    let faults = || machine.stats().device_faults;
    let before = faults();
    store(first, &data, 60);
    let between = faults();
    copy(second, &data, &there, 1);
    assert!(before < between && between < faults());
    assert_eq!(there.get(), 60);
}

/// 200 increments on each, all on their way at once: not one is lost.
fn concurrent_access((first, second, machine): Pair<'_>) {
    const EACH: u32 = 200;
    let (data, there) = (Words::page(machine), Words::page(machine));
    data.set(0);
    let at = data.at();
    let kernel = move |lane: &mut gpusvm::Lane<'_>| lane.atomic_add(at, 1u32).map(drop);
    let launch = |_| [first, second].map(|engine| engine.launch(Grid::new(1), kernel));
    let launches: Vec<_> = (0..EACH).flat_map(launch).collect();
    for launch in launches {
        launch.wait().expect("an increment");
    }
    copy(first, &data, &there, 1);
    assert_eq!((there.get(), data.get()), (2 * EACH, 2 * EACH));
}

/// From RAM to one device, to the other, and back to RAM.
fn migration((first, second, machine): Pair<'_>) {
    let (data, there) = (Words::page(machine), Words::page(machine));
    data.set(0x1234_5678);
    store(first, &data, 0xdead_beef);
    assert!(machine.stats().pages_on_devices > 0);
    copy(second, &data, &there, 1);
    assert_eq!(there.get(), 0xdead_beef);
    store(second, &there, 0xcafe_babe);
    assert_eq!(there.get(), 0xcafe_babe);
    assert!(machine.stats().to_ram.bytes > 0);
}
