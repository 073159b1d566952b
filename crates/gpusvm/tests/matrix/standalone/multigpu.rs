//! Two devices, in both orders, on a fabric and without one.
//!
//! ```text
//!   basic      a device touches memory, and it comes
//!   prefetch   it is fetched before
//!   conflict   it is advised to live on one device, and then on the other: the last counts
//! ```
//!
//! # Differences from the suite
//!
//! The preferred location of what a device touches is that device anyway. Where the suite copies with a
//! blitter, a kernel copies here. Advice is kept once for the process, not for each address space.

use super::Test;
use super::words::{self, Words};
use crate::Skip;
use crate::engine::{Engine, Machine, Spec};
use crate::exec;
use gpusvm::{ByteSize, Grid, Preferred};
use std::sync::atomic::Ordering;
use std::time::Instant;

/// What happens before a device touches memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Before {
    Basic,
    Prefetch,
    Conflict,
}

/// The first device, the second, and where they are.
#[derive(Clone, Copy)]
struct Pair<'m> {
    first: Engine<'m>,
    second: Engine<'m>,
    machine: &'m Machine,
    before: Before,
}

type Case = fn(Pair<'_>);

const CASES: &[(&str, Case)] = &[
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
const CONFLICTS: &[&str] = &["atomic-op", "coherency", "pagefault"];

pub(super) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    let mut add = |name: &str, what: &str, case: Case, before: Before| {
        let run = move || pairs(case, before);
        tests.push(Test::quick(format!("mgpu-{name}-{what}"), run));
    };
    for (name, case) in CASES {
        add(name, "basic", *case, Before::Basic);
        add(name, "prefetch", *case, Before::Prefetch);
    }
    for (name, case) in CASES.iter().filter(|(name, _)| CONFLICTS.contains(name)) {
        add(name, "conflict", *case, Before::Conflict);
    }
    tests
}

fn pairs(case: Case, before: Before) -> Result<(), Skip> {
    let _no_fork = exec::no_fork();
    for fabric in [true, false] {
        for (first, second) in [(0, 1), (1, 0)] {
            let machine = Machine::with(Spec {
                devices: 2,
                vms: 2,
                vram: ByteSize::mib(160),
                fabric,
            })?;
            case(Pair {
                first: machine.engine(first),
                second: machine.engine(second),
                machine: &machine,
                before,
            });
            machine.finish(0);
        }
    }
    Ok(())
}

impl Pair<'_> {
    /// A page that one of them works on, and one to copy it to.
    fn two_pages(&self) -> [Words; 2] {
        [(); 2].map(|()| Words::page(self.machine))
    }

    /// What happens to memory before a device touches it.
    fn ready(&self, engine: Engine<'_>, words: &Words) {
        let (at, len) = (words.0.at(), words.0.len());
        match self.before {
            Before::Basic => {}
            Before::Prefetch => {
                let done = engine.prefetch_from_peer(at, len);
                assert_eq!((done.failed, done.in_place, done.invalid), (0, 0, 0));
            }
            Before::Conflict => {
                for other in [self.first, self.second] {
                    let advised = other.prefer(at, len, true);
                    advised.expect("memory that is shared");
                }
                let last = Preferred::Device(self.second.vm().device());
                let svm = self.machine.svm();
                let advised = svm.advice(at.cast_const(), ByteSize::from_usize(len));
                let advised = advised.expect("memory");
                assert!(advised.iter().all(|it| it.attributes.preferred == last));
            }
        }
    }

    fn store(&self, engine: Engine<'_>, to: &Words, value: u32) {
        self.ready(engine, to);
        words::store(engine, to, value);
    }

    fn increment(&self, engine: Engine<'_>, words: &Words) {
        self.ready(engine, words);
        words::increment(engine, words);
    }

    /// Copies a page for each lane.
    fn copy(&self, engine: Engine<'_>, from: &Words, to: &Words, pages: usize) {
        self.ready(engine, from);
        self.ready(engine, to);
        words::copy(engine, from, to, pages);
    }
}

/// One device copies to memory that the other has had.
fn xgpu_access(pair: Pair<'_>) {
    let Pair {
        first,
        second,
        machine,
        ..
    } = pair;
    const LEN: usize = 64 << 20;
    let (from, to) = (Words::new(machine, LEN), Words::new(machine, LEN));
    for i in 0..LEN / 4 {
        from.word(i)
            .store(0x67 + u32::try_from(i).unwrap(), Ordering::Relaxed);
    }
    pair.store(second, &to, 1);
    pair.copy(first, &from, &to, LEN / 4096);
    for i in 0..LEN / 4 {
        assert_eq!(
            to.word(i).load(Ordering::Relaxed),
            0x67 + u32::try_from(i).unwrap()
        );
    }
}

/// An increment on one, copied and incremented on the other, and copied back.
fn atomic_op(pair: Pair<'_>) {
    let Pair { first, second, .. } = pair;
    let [data, there] = pair.two_pages();
    data.set(55);
    pair.increment(first, &data);
    pair.copy(second, &data, &there, 1);
    assert_eq!(there.get(), 56);
    pair.increment(second, &there);
    pair.copy(first, &there, &data, 1);
    assert_eq!(data.get(), 57);
}

/// What one writes the other reads.
fn coherency(pair: Pair<'_>) {
    let Pair { first, second, .. } = pair;
    let [data, there] = pair.two_pages();
    pair.store(first, &data, 60);
    pair.copy(second, &data, &there, 1);
    assert_eq!(there.get(), 60);
}

/// Both write at once: one of them is last, and everybody sees the same.
fn coherency_fail(pair: Pair<'_>) {
    let Pair { first, second, .. } = pair;
    coherency(pair);
    let [data, there] = pair.two_pages();
    data.set(0);
    let at = data.at();
    let write = |engine: Engine<'_>, value: u32| {
        engine.launch(Grid::new(1), move |lane| lane.store(at, value))
    };
    pair.ready(first, &data);
    pair.ready(second, &data);
    let launches = [write(first, 70), write(second, 80)];
    for launch in launches {
        launch.wait().expect("a store");
    }
    pair.copy(second, &data, &there, 1);
    let (found, seen) = (there.get(), data.get());
    assert!(found == 70 || found == 80, "{found}");
    assert_eq!(found, seen);
}

/// How long it takes one device to write a page, and the other to copy it.
fn timed(pair: Pair<'_>, again: bool) {
    let Pair { first, second, .. } = pair;
    let [data, there] = pair.two_pages();
    let began = Instant::now();
    pair.store(first, &data, 60);
    let wrote = began.elapsed();
    if again {
        pair.store(first, &data, 61);
    }
    let began = Instant::now();
    pair.copy(second, &data, &there, 1);
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

/// Each of them faults, but for what was fetched.
fn pagefault(pair: Pair<'_>) {
    let Pair {
        first,
        second,
        machine,
        before,
    } = pair;
    let [data, there] = pair.two_pages();
    let faults = || machine.stats().device_faults;
    let start = faults();
    pair.store(first, &data, 60);
    let between = faults();
    pair.copy(second, &data, &there, 1);
    if before == Before::Prefetch {
        assert_eq!(
            (start, faults()),
            (0, 0),
            "after a prefetch: {:?}",
            machine.stats()
        );
    } else {
        assert!(start < between && between < faults());
    }
    assert_eq!(there.get(), 60);
}

/// 200 increments on each, all on their way at once: not one is lost.
fn concurrent_access(pair: Pair<'_>) {
    let Pair { first, second, .. } = pair;
    const EACH: u32 = 200;
    let [data, there] = pair.two_pages();
    data.set(0);
    let at = data.at();
    let kernel = move |lane: &mut gpusvm::Lane<'_>| lane.atomic_add(at, 1u32).map(drop);
    let launch = |_| [first, second].map(|engine| engine.launch(Grid::new(1), kernel));
    pair.ready(first, &data);
    pair.ready(second, &data);
    let launches: Vec<_> = (0..EACH).flat_map(launch).collect();
    for launch in launches {
        launch.wait().expect("an increment");
    }
    pair.copy(first, &data, &there, 1);
    assert_eq!((there.get(), data.get()), (2 * EACH, 2 * EACH));
}

/// From RAM to one device, to the other, and back to RAM.
fn migration(pair: Pair<'_>) {
    let Pair { first, second, .. } = pair;
    let [data, there] = pair.two_pages();
    data.set(0x1234_5678);
    pair.store(first, &data, 0xdead_beef);
    assert!(pair.machine.stats().pages_on_devices > 0);
    pair.copy(second, &data, &there, 1);
    assert_eq!(there.get(), 0xdead_beef);
    pair.store(second, &there, 0xcafe_babe);
    assert_eq!(there.get(), 0xcafe_babe);
    assert!(pair.machine.stats().to_ram.bytes > 0);
}
