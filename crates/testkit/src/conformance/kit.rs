//! Which device a case runs on, and in how many worlds.

use super::{Bench, Setup};
use crate::world::World;
use gpusvm_device::FaultMode;
use gpusvm_sync::Arc;

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Model {
    /// The test device.
    Dmirror,
    /// The software GPU, for worlds of the real kind.
    Soft,
}

/// What makes benches for a case.
#[derive(Clone, Copy, Debug)]
pub struct Kit {
    /// Which device.
    pub model: Model,
    /// What it does about a page that is not mapped.
    pub faults: FaultMode,
    /// Whether the CPU uses the memory of every device in place, whatever the setup says.
    pub coherent: bool,
}

/// The variable that names the one seed to run.
const SEED: &str = "GPUSVM_SEED";

impl Kit {
    /// With private memory, where the setup does not say otherwise.
    pub const fn new(model: Model, faults: FaultMode) -> Self {
        Self {
            model,
            faults,
            coherent: false,
        }
    }

    /// The same with coherent memory.
    pub const fn coherent(self) -> Self {
        Self {
            coherent: true,
            ..self
        }
    }

    /// Runs a case without a race, once for each kind of world that there is.
    pub fn once<W: World>(&self, setup: &Setup, case: impl Fn(&Arc<Bench<W>>)) {
        self.rounds(setup, W::rounds_of_plain_cases(), case);
    }

    /// Runs a race, in as many worlds as are worth it.
    pub fn race<W: World>(&self, setup: &Setup, case: impl Fn(&Arc<Bench<W>>)) {
        self.rounds(setup, W::rounds(), case);
    }

    fn rounds<W: World>(&self, setup: &Setup, rounds: u64, case: impl Fn(&Arc<Bench<W>>)) {
        let only = std::env::var(SEED).ok().and_then(|seed| seed.parse().ok());
        let seeds = only.map_or(0..rounds, |seed| seed..seed + 1);
        for seed in seeds {
            let Some(bench) = Bench::start(self, setup, seed) else {
                return;
            };
            let bench = Arc::new(bench);
            let teller = Teller(&bench);
            case(&bench);
            bench.finish();
            drop(teller);
        }
    }
}

/// Tells how to see it again when a case fails.
struct Teller<'a, W: World>(&'a Arc<Bench<W>>);

impl<W: World> Drop for Teller<'_, W> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let (seed, story) = (self.0.seed(), self.0.world().story());
            eprintln!("{}: again with {SEED}={seed}\n{story}", W::NAME);
        }
    }
}
