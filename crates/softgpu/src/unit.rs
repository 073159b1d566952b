//! A compute unit: a thread that takes chunks of lanes and runs them.

use crate::flush::Units;
use crate::launch::LaunchState;
use crate::port::{Board, Port};
use crate::queue::Queue;
use crate::tlb::Tlb;
use gpusvm_guarded::{EngineThread, RegistryFull};
use gpusvm_sync::Arc;
use std::io;
use std::ops::Range;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

/// What a unit works with.
#[derive(Clone, Debug)]
pub(crate) struct Workplace {
    pub(crate) queue: Arc<Queue>,
    pub(crate) units: Arc<Units>,
    pub(crate) board: Arc<Board>,
}

/// Starts unit `index`. It tells through `ready` whether it got on record as an engine thread.
pub(crate) fn start(
    index: usize,
    place: Workplace,
    ready: Sender<Result<(), RegistryFull>>,
) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(format!("gpusvm-unit-{index}"))
        .spawn(move || {
            let record = EngineThread::enter();
            let told = ready.send(record.as_ref().map(drop).map_err(|error| *error));
            drop(ready);
            if record.is_ok() && told.is_ok() {
                Unit {
                    index,
                    place,
                    tlb: Tlb::new(),
                }
                .work();
            }
        })
}

struct Unit {
    index: usize,
    place: Workplace,
    tlb: Box<Tlb>,
}

impl Unit {
    fn work(mut self) {
        let queue = Arc::clone(&self.place.queue);
        while let Some((launch, first)) = queue.take() {
            self.run_chunks(&launch, first, &queue);
        }
    }

    /// Runs chunks of a launch until none is left to take.
    fn run_chunks(&mut self, launch: &Arc<LaunchState>, first: Range<usize>, queue: &Queue) {
        let mut chunk = Some(first);
        while let Some(lanes) = chunk {
            if self.run(launch, lanes) {
                queue.retire(launch);
                launch.finish();
                return;
            }
            chunk = launch.take();
        }
    }

    fn run(&mut self, launch: &LaunchState, lanes: Range<usize>) -> bool {
        let shared = &self.place.units.shared[self.index];
        crate::counters::add(&shared.counters.lanes, lanes.len() as u64);
        let port = Port::new(self.index, shared, &mut self.tlb, launch, &self.place.board);
        launch.run(port, lanes)
    }
}
