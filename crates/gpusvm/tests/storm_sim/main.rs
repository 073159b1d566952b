//! The storm in the simulated world: threads of the CPU and lanes in several address spaces of two devices
//! touch everything, while one thread unmaps, maps, moves, drops, protects, forks, advises, prefetches and
//! evicts as it likes, and things fail. Not one wrong word, no hang, nothing left behind.
//!
//! ```text
//!   CPU, CPU     device 0: VM, VM     device 1: VM     mutator     one who tends and prefetches
//!       `---------------+------------------+--------------'--------------'
//!                  simulated threads: one runs, the seed says which
//! ```
//!
//! One seed is one history: `GPUSVM_SEED` replays it, whatever it found. `GPUSVM_STORM_SEEDS` says how many
//! seeds are tried, and `GPUSVM_STORM_ACTIONS` how long each lasts: a night of it is a few thousand seeds.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test may panic, also outside of its test function, and has threads and clocks"
)]

mod actions; // what the mutator does
mod end; // what must be as before
mod model; // what every word is to hold
mod mutator; // the thread that changes mappings
mod places; // where pages go
mod touch; // who touches

use actions::ACTIONS;
use gpusvm::driver::{Devices, Policy};
use gpusvm::{Access, ByteSize, Fabric, FaultError, FaultMode, Span};
use gpusvm_mm_sim::Sim;
use gpusvm_testkit::Watchdog;
use gpusvm_testkit::dmirror::{Dmirror, Interconnect, Spec};
use gpusvm_testkit::mirror::Mirror;
use gpusvm_testkit::world::{Simulated, Thread, World};
use model::{Held, Model};
use mutator::Mutator;
use places::Places;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use touch::{Refused, Side};

const PAGES: usize = 160;
const CPU_THREADS: usize = 2;
/// The address spaces: two of the first device, one of the second.
const VMS: usize = 3;
/// How many seeds, and how many things the mutator does in each.
const SEEDS: u64 = 34;
const LENGTH: u64 = 60;
/// How often others touch something between two things that the mutator does, before they take it easy.
const TOUCHES: u64 = 60;

/// What may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failures {
    None,
    /// What leaves every page where it was.
    Harmless,
    /// Also what loses pages: who touches them is told, and finds nothing wrong there.
    Any,
}

/// What the mutator did, and where.
type Decision = (&'static str, [Option<Span>; 2]);

/// What everybody knows.
#[derive(Debug)]
struct Storm {
    seed: u64,
    failures: Failures,
    model: Model,
    counts: Mutex<Counts>,
    values: AtomicU64,
    /// Whether a device was taken out of use at times.
    unbinds: AtomicBool,
    over: AtomicBool,
    /// How often anybody touched something since the mutator did something.
    touched: AtomicU64,
    log: Mutex<Vec<Decision>>,
    // Before the world, which they work in: fields go in this order.
    mirrors: Mutex<Vec<Arc<Mirror<Sim>>>>,
    world: Arc<Simulated>,
}

#[derive(Clone, Debug, Default)]
struct Counts {
    writes: u64,
    adds: u64,
    reads: u64,
    peeks: u64,
    peeks_for_nothing: u64,
    leases: u64,
    /// Touches that were refused for a reason.
    excused: u64,
    faults: u64,
    migrated: u64,
    evictions: u64,
    actions: [u64; ACTIONS.len()],
}

impl Storm {
    fn new(seed: u64, failures: Failures) -> Arc<Self> {
        let world = Simulated::start(seed).unwrap();
        let (devices, bus) = (Devices::new(world.mm()), Interconnect::new(world.bus()));
        let sim = world.mm();
        let policy = || Arc::new(Places(Arc::clone(sim))) as Arc<dyn Policy>;
        let join = |spec: Spec| {
            let gpu = Dmirror::new(&bus, &spec);
            Mirror::new(&devices, Arc::new(gpu), policy())
        };
        let vram = [ByteSize::kib(256), ByteSize::kib(512), ByteSize::mib(4)];
        let vram = || vram[usize::try_from(sim.random(3)).unwrap()];
        // A page that is lost costs each touch all its passes: there, of one kind of memory is enough.
        let may_be_coherent = failures != Failures::Any;
        let first = join(Spec {
            vram: vram(),
            fabric: Some(Fabric(1)),
            coherent_memory: may_be_coherent && sim.random(3) == 0,
            ..Spec::default()
        });
        let kind = sim.random(4);
        let second = join(Spec {
            vram: vram(),
            fabric: (kind == 0).then_some(Fabric(1)),
            faults: if kind == 1 {
                FaultMode::Declared
            } else {
                FaultMode::Replayable
            },
            coherent: kind != 2,
            coherent_memory: may_be_coherent && kind != 2 && sim.random(3) == 0,
            atomics_on_ram: kind == 0,
            ..Spec::default()
        });
        let beside = first.beside(policy());
        let mirrors = [first, beside, second].map(Arc::new);
        Arc::new(Self {
            seed,
            failures,
            model: Model::new(PAGES),
            counts: Mutex::default(),
            values: AtomicU64::new(1),
            unbinds: AtomicBool::new(false),
            over: AtomicBool::new(false),
            touched: AtomicU64::new(0),
            log: Mutex::default(),
            mirrors: Mutex::new(mirrors.into()),
            world,
        })
    }

    fn below(&self, end: usize) -> usize {
        usize::try_from(self.world.mm().random(end as u64)).unwrap()
    }

    /// Says which cell, and is never there twice.
    fn next_value(&self, cell: usize) -> u64 {
        ((cell as u64) << 48) | (self.values.fetch_add(1, Ordering::Relaxed) << 8)
    }

    fn mirror(&self, slot: usize) -> Arc<Mirror<Sim>> {
        Arc::clone(&self.mirrors.lock().unwrap()[slot])
    }

    fn replace_mirror(&self, slot: usize, mirror: Mirror<Sim>) {
        self.mirrors.lock().unwrap()[slot] = Arc::new(mirror);
    }

    fn a_mirror(&self) -> Arc<Mirror<Sim>> {
        self.mirror(self.below(VMS))
    }

    fn a_side(&self) -> Side {
        match self.below(2) {
            0 => Side::Cpu,
            _ => Side::Device(self.a_mirror()),
        }
    }

    fn policy(&self) -> Arc<dyn Policy> {
        Arc::new(Places(Arc::clone(self.world.mm())))
    }

    fn count(&self, add: impl FnOnce(&mut Counts)) {
        add(&mut self.counts.lock().unwrap());
    }

    fn log(&self, decision: Decision) {
        self.log.lock().unwrap().push(decision);
    }

    /// What was done where a cell is.
    fn history(&self, held: Held) -> String {
        let log = self.log.lock().unwrap();
        let concerns = |decision: &&Decision| {
            let mut spans = decision.1.iter().flatten();
            spans.any(|span| span.contains(held.at))
        };
        log.iter()
            .filter(concerns)
            .map(|it| format!("  {it:?}\n"))
            .collect()
    }

    /// Whether a touch of a cell that is there may be refused.
    fn excuses(&self, side: &Side, held: Held, access: Access, refused: &Refused) -> bool {
        let (Side::Device(mirror), Refused::Fault(error)) = (side, refused) else {
            return self.failures == Failures::Any;
        };
        let caps = mirror.gpu.device().caps().clone();
        let is_atomic = access == Access::Atomic;
        match error {
            // Its address space has ended meanwhile.
            FaultError::Closed { .. } => mirror.vm.is_closed(),
            // Advised to be the CPU's.
            FaultError::NotPermitted { .. } => is_atomic,
            // Nobody brings it to a device that needs it there.
            FaultError::OutOfReach { .. } => held.plain && (!caps.coherent || is_atomic),
            // Only device memory will do, and there was none.
            FaultError::Gave { .. } if is_atomic && self.unbinds.load(Ordering::Relaxed) => true,
            _ => self.failures == Failures::Any,
        }
    }
}

/// Touches until the storm is over.
fn touches(storm: &Arc<Storm>, slot: Option<usize>) -> Thread {
    let storm = Arc::clone(storm);
    Box::new(move || {
        while !storm.over.load(Ordering::Relaxed) {
            let side = slot.map_or(Side::Cpu, |slot| Side::Device(storm.mirror(slot)));
            touch::touch_some(&storm, &side);
            let touched = storm.touched.fetch_add(1, Ordering::Relaxed);
            // The mutator waits for something that takes long: nothing new is to be seen meanwhile.
            let most = if touched < TOUCHES { 60 } else { 10_000 };
            let wait = storm.world.mm().random(most);
            storm.world.mm().sleep(Duration::from_micros(wait));
        }
    })
}

/// What threads in the background do.
fn tends(storm: &Arc<Storm>) -> Thread {
    let storm = Arc::clone(storm);
    Box::new(move || {
        while !storm.over.load(Ordering::Relaxed) {
            let mirror = storm.a_mirror();
            mirror.region.work_on_prefetches();
            mirror.vm.tend();
            let wait = storm.world.mm().random(200);
            storm.world.mm().sleep(Duration::from_micros(wait));
        }
    })
}

/// One storm. What happened.
fn rage(seed: u64, failures: Failures, actions: u64) -> (Counts, Vec<String>) {
    let storm = Storm::new(seed, failures);
    let teller = Teller(Arc::clone(&storm));
    let mutator = Arc::new(Mutex::new(Mutator::new(&storm)));
    let mutates: Thread = {
        let (storm, mutator) = (Arc::clone(&storm), Arc::clone(&mutator));
        Box::new(move || {
            // Nobody else wants it before the end.
            mutator
                .lock()
                .unwrap()
                .run(usize::try_from(actions).unwrap());
            storm.over.store(true, Ordering::Relaxed);
        })
    };
    let cpus = (0..CPU_THREADS).map(|_| touches(&storm, None));
    let lanes = (0..VMS).map(|slot| touches(&storm, Some(slot)));
    let others = [mutates, tends(&storm)];
    storm.world.run(cpus.chain(lanes).chain(others).collect());
    let trace = storm.world.mm().trace();
    let mutator = Arc::into_inner(mutator).unwrap().into_inner().unwrap();
    mutator.end();
    drop(teller);
    let counts = storm.counts.lock().unwrap().clone();
    (counts, trace)
}

/// Tells how to see it again when a storm fails.
struct Teller(Arc<Storm>);

impl Drop for Teller {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Storm { seed, failures, .. } = *self.0;
            eprintln!("again with GPUSVM_SEED={seed}, failures: {failures:?}");
            eprintln!("{}", self.0.world.story());
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn storms(failures: Failures) {
    let seeds = number("GPUSVM_STORM_SEEDS").unwrap_or(SEEDS);
    let seeds = number("GPUSVM_SEED").map_or(0..seeds, |seed| seed..seed + 1);
    let actions = number("GPUSVM_STORM_ACTIONS").unwrap_or(LENGTH);
    let current = Arc::new(AtomicU64::new(0));
    let mut sum = Counts::default();
    for seed in seeds {
        current.store(seed, Ordering::Relaxed);
        let at = Arc::clone(&current);
        let state = move || format!("GPUSVM_SEED={}, {failures:?}", at.load(Ordering::Relaxed));
        let _watchdog = Watchdog::start(Duration::from_secs(300), state);
        sum.add(&rage(seed, failures, actions).0);
    }
    println!("{failures:?}: {sum}");
}

#[test]
fn everything_at_once() {
    storms(Failures::None);
}

#[test]
fn everything_at_once_and_things_fail() {
    storms(Failures::Harmless);
}

#[test]
fn everything_at_once_and_pages_are_lost() {
    storms(Failures::Any);
}

#[test]
fn one_seed_is_one_history() {
    for failures in [Failures::None, Failures::Any] {
        for seed in 0..4 {
            let [one, other] = [(); 2].map(|()| rage(seed, failures, 30).1);
            assert!(one == other, "seed {seed}");
        }
    }
}
