//! A kernel on its way: what is left to start, what has ended, and how.
//!
//! ```text
//!   lanes  0 ............ next ................ total
//!          [ taken by units |  left to take      )       take: next += chunk
//!   ended  counted up by each unit behind each chunk     total: finish, callbacks, waiters
//! ```
//!
//! # Locking
//!
//! The outcome has a lock, a leaf. Callbacks run without it.

use crate::mmu::Vm;
use crate::port::{Board, Port};
use crate::{Lane, LaneError};
use gpusvm_device::VmId;
use gpusvm_sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use gpusvm_sync::{Arc, Condvar, Mutex};
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How many lanes a launch has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    lanes: usize,
}

impl Grid {
    /// `lanes` lanes, numbered from zero.
    pub const fn new(lanes: usize) -> Self {
        Self { lanes }
    }

    /// How many lanes.
    pub const fn lanes(self) -> usize {
        self.lanes
    }
}

/// A launch whose lanes all succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LaunchReport {
    /// How many lanes ran.
    pub lanes: usize,
}

/// A launch of which lanes stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// Some lanes stopped; the others ran to their end.
    #[error("{failed} lanes stopped, lane {first_lane} first: {first}")]
    Lanes {
        /// How many.
        failed: u64,
        /// The lowest of them.
        first_lane: usize,
        /// Why that one stopped.
        first: LaneError,
    },
    /// A launch of the process that forked this one.
    #[error("the launch belongs to the process that forked this one")]
    Forked,
}

/// A launch on its way. Dropping it leaves the launch running.
///
/// In a child of fork, no lane of it ever runs: there it is done, and nothing is known of how.
#[derive(Debug)]
#[must_use = "a launch ends some time; `wait` says when, and how"]
pub struct Launch {
    pub(crate) state: Arc<LaunchState>,
    pub(crate) board: Arc<Board>,
    /// The process that launched it.
    pub(crate) owner: u32,
}

impl Launch {
    /// Waits until every lane has ended, and every callback has returned.
    ///
    /// # Errors
    ///
    /// `Lanes` when some stopped; `Forked` in a child of the process that launched it.
    pub fn wait(self) -> Result<LaunchReport, LaunchError> {
        if self.is_inherited() {
            return Err(LaunchError::Forked);
        }
        let mut outcome = self.state.outcome.lock();
        while !outcome.finished {
            outcome = self.state.changed.wait(outcome);
        }
        match outcome.first {
            None => Ok(LaunchReport {
                lanes: self.state.grid.lanes,
            }),
            Some((first_lane, first)) => Err(LaunchError::Lanes {
                failed: outcome.failed,
                first_lane,
                first,
            }),
        }
    }

    /// Whether every lane has ended.
    pub fn is_done(&self) -> bool {
        self.is_inherited() || self.state.outcome.lock().finished
    }

    /// Stops the launch: lanes that have not begun do not, lanes that run, or wait in a fault, stop
    /// at their next access with `Cancelled`. Returns at once.
    pub fn cancel(&self) {
        if self.is_inherited() {
            return;
        }
        self.state.cancel();
        if let Some(faults) = &self.board.faults {
            faults.wake_units();
        }
    }

    /// Runs `callback` when every lane has ended: on the unit of the last one, or here and now when
    /// that has been already. It must not wait for anything that a unit does. In a child of fork it is dropped.
    pub fn on_done(&self, callback: impl FnOnce() + Send + 'static) {
        if self.is_inherited() {
            return;
        }
        let mut outcome = self.state.outcome.lock();
        if outcome.finished {
            drop(outcome);
            callback();
        } else {
            outcome.callbacks.push(Box::new(callback));
        }
    }

    fn is_inherited(&self) -> bool {
        self.owner != std::process::id()
    }
}

impl Drop for Launch {
    fn drop(&mut self) {
        // The last to go would give page tables back, under a lock that nobody may be there to let go.
        if self.is_inherited() {
            std::mem::forget(Arc::clone(&self.state));
        }
    }
}

/// What a unit runs: a kernel, for the lanes of a chunk.
pub(crate) trait Work: Send + Sync {
    /// Calls the kernel for each lane, and `failed` for each that stops.
    fn run(
        &self,
        lane: &mut Lane<'_>,
        lanes: Range<usize>,
        failed: &mut dyn FnMut(usize, LaneError),
    );
}

impl<F> Work for F
where
    F: Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync,
{
    fn run(
        &self,
        lane: &mut Lane<'_>,
        lanes: Range<usize>,
        failed: &mut dyn FnMut(usize, LaneError),
    ) {
        lane.id = lanes.start;
        while lane.id < lanes.end {
            // The lane is left in a state in which the next can use it, and the kernel's captures
            // are the business of who wrote it.
            let caught = catch_unwind(AssertUnwindSafe(|| {
                while lane.id < lanes.end {
                    if let Err(error) = self(lane) {
                        failed(lane.id, error);
                    }
                    lane.id += 1;
                }
            }));
            if caught.is_err() {
                lane.port.end();
                failed(lane.id, LaneError::Panicked);
                lane.id += 1;
            }
        }
    }
}

type Callback = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Outcome {
    finished: bool,
    failed: u64,
    first: Option<(usize, LaneError)>,
    callbacks: Vec<Callback>,
}

/// A launch, as units and the one who launched share it.
pub(crate) struct LaunchState {
    pub(crate) vm_id: VmId,
    pub(crate) vm: Arc<Vm>,
    pub(crate) grid: Grid,
    /// Gone when every lane has ended: before who waits goes on, who may want back what it captured.
    kernel: Mutex<Option<Arc<dyn Work>>>,
    chunk: usize,
    next: AtomicUsize,
    ended: AtomicUsize,
    cancelled: AtomicBool,
    outcome: Mutex<Outcome>,
    changed: Condvar,
}

/// Chunks per unit: enough that no unit is left with much when the others are done.
const CHUNKS_PER_UNIT: usize = 16;
/// The most lanes in a chunk.
const MOST_LANES: usize = 4096;

impl LaunchState {
    /// A launch of `kernel` that no unit has seen yet.
    pub(crate) fn new(
        vm_id: VmId,
        vm: Arc<Vm>,
        grid: Grid,
        units: usize,
        kernel: Arc<dyn Work>,
    ) -> Self {
        Self {
            vm_id,
            vm,
            grid,
            kernel: Mutex::new(Some(kernel)),
            chunk: (grid.lanes / (units * CHUNKS_PER_UNIT)).clamp(1, MOST_LANES),
            next: AtomicUsize::new(0),
            ended: AtomicUsize::new(0),
            cancelled: AtomicBool::new(false),
            outcome: Mutex::new(Outcome::default()),
            changed: Condvar::new(),
        }
    }

    /// The next lanes to run. `None` when all are taken.
    pub(crate) fn take(&self) -> Option<Range<usize>> {
        // Once cancelled, all that is left ends at once.
        let chunk = if self.is_cancelled() {
            self.grid.lanes
        } else {
            self.chunk
        };
        let take = |next| (next < self.grid.lanes).then(|| self.end_of(next, chunk));
        let start = self
            .next
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .ok()?;
        Some(start..self.end_of(start, chunk))
    }

    fn end_of(&self, start: usize, chunk: usize) -> usize {
        start.saturating_add(chunk).min(self.grid.lanes)
    }

    /// Whether lanes are left to take.
    pub(crate) fn has_more(&self) -> bool {
        self.next.load(Ordering::Acquire) < self.grid.lanes
    }

    /// Whether it was cancelled.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Marks it as cancelled. With new stamps, each of its lanes misses at its next access, and
    /// sees the mark there: the access path itself need not look.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.vm.stamps.renew_all();
    }

    /// Runs a chunk on a unit. Whether that was the last one to end.
    pub(crate) fn run(&self, port: Port<'_>, lanes: Range<usize>) -> bool {
        let count = lanes.len();
        let kernel = self.kernel.lock().clone();
        if let (Some(kernel), false) = (kernel, self.is_cancelled()) {
            let mut lane = Lane {
                port,
                id: lanes.start,
            };
            kernel.run(&mut lane, lanes, &mut |lane, error| {
                self.fail(lane, error, 1)
            });
            lane.port.publish_counters();
        } else {
            self.fail(lanes.start, LaneError::Cancelled, count as u64);
        }
        self.ended.fetch_add(count, Ordering::AcqRel) + count == self.grid.lanes
    }

    /// Records that `count` lanes from `lane` on stopped.
    fn fail(&self, lane: usize, error: LaneError, count: u64) {
        let mut outcome = self.outcome.lock();
        outcome.failed += count;
        if outcome.first.is_none_or(|(first, _)| lane < first) {
            outcome.first = Some((lane, error));
        }
    }

    /// Every lane has ended: lets go of the kernel, runs the callbacks, then wakes who waits.
    pub(crate) fn finish(&self) {
        let kernel = self.kernel.lock().take();
        // What it captured may panic when it is dropped: units live on.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(kernel)));
        loop {
            let mut outcome = self.outcome.lock();
            let callbacks = std::mem::take(&mut outcome.callbacks);
            if callbacks.is_empty() {
                outcome.finished = true;
                self.changed.notify_all();
                return;
            }
            drop(outcome);
            for callback in callbacks {
                // Its panic was reported by the panic hook; units and waiters live on.
                let _ = catch_unwind(AssertUnwindSafe(callback));
            }
        }
    }
}

impl fmt::Debug for LaunchState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaunchState")
            .field("vm", &self.vm_id)
            .field("grid", &self.grid)
            .field("next", &self.next)
            .field("ended", &self.ended)
            .field("cancelled", &self.cancelled)
            .finish_non_exhaustive()
    }
}
