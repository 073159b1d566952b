//! The threads that serve faults.
//!
//! ```text
//!   handler 1   next ---> serve ......................... next
//!   handler 2          next ---> serve ..... next
//!   handler 3                 next ---> park (the last that does not wait only reads)
//! ```
//!
//! Serving a fault can wait: for a copy, for a device to flush, which can wait for a unit that itself
//! waits for a page. So one handler never serves, it only reads: it answers at once what needs no
//! waiting, and parks the rest for whoever becomes free.
//!
//! Whoever reads takes all that is there, keeps one fault to serve and parks the others; and whoever
//! begins to serve while something waits, parked or for its time, rouses another handler to look.

use crate::fault::{self, Urgency};
use crate::process::Process;
use crate::source::{Arrival, FaultSink};
use crate::stats::Counters;
use crate::sys::futex;
use crate::sys::uffd::Event;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Time};
use gpusvm_sync::atomic::{AtomicUsize, Ordering};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{Span, VirtAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

/// How many handlers there are: two that serve, and one that reads.
pub(crate) const HANDLERS: usize = 3;
/// How many faults can be parked. One more is woken, and faults again.
const PARKED: usize = 64;

/// What the handlers share.
#[derive(Debug)]
pub(crate) struct Crew {
    serving: AtomicUsize,
    parked: Mutex<Parked>,
}

#[derive(Debug)]
struct Parked {
    faults: [Arrival; PARKED],
    len: usize,
}

const NOTHING: Arrival = Arrival {
    at: VirtAddr::new(0),
    protected: false,
    tid: None,
    told: 0,
};

impl Crew {
    pub(crate) const fn new() -> Self {
        let parked = Parked {
            faults: [NOTHING; PARKED],
            len: 0,
        };
        Self {
            serving: AtomicUsize::new(0),
            parked: Mutex::new(parked),
        }
    }

    /// Begins to serve, unless that would leave nobody to read.
    fn begin(&self) -> Option<Serving<'_>> {
        gpusvm_sync::walk!("begin");
        let more = |serving| (serving + 1 < HANDLERS).then_some(serving + 1);
        let begun = self
            .serving
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        begun.ok().map(|_| Serving(self))
    }

    /// Whether nobody else could begin to serve.
    fn is_busy(&self) -> bool {
        self.serving.load(Ordering::Acquire) + 1 >= HANDLERS
    }

    fn park(&self, arrival: Arrival) -> bool {
        gpusvm_sync::walk!("park");
        let mut parked = self.parked.lock();
        let len = parked.len;
        if len == PARKED {
            return false;
        }
        parked.faults[len] = arrival;
        parked.len += 1;
        true
    }

    /// The one that waits the longest.
    fn unpark(&self) -> Option<Arrival> {
        let mut parked = self.parked.lock();
        parked.len = parked.len.checked_sub(1)?;
        let (first, len) = (parked.faults[0], parked.len);
        parked.faults.copy_within(1..=len, 0);
        Some(first)
    }

    fn has_parked(&self) -> bool {
        self.count_parked() > 0
    }

    fn count_parked(&self) -> usize {
        self.parked.lock().len
    }
}

/// A handler that may wait.
struct Serving<'a>(&'a Crew);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.serving.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Starts the handlers.
///
/// # Errors
///
/// Those of starting a thread.
pub(crate) fn start(process: &Arc<Process>) -> std::io::Result<Vec<JoinHandle<()>>> {
    let spawn = |i| {
        let process = Arc::clone(process);
        let thread = std::thread::Builder::new().name(format!("gpusvm-fault-{i}"));
        thread.spawn(move || run(&process))
    };
    (0..HANDLERS).map(spawn).collect()
}

fn run(process: &Process) {
    process.handler_started(futex::gettid());
    while !process.is_stopping() {
        let timeout = process
            .delays
            .next_due()
            .map(|due| due.since(process.now()));
        let mut sink = Sink {
            process,
            told: process.events_told(),
            parked: false,
        };
        let told = sink.told;
        let arrival = process.source.next(timeout, &mut sink);
        if sink.parked {
            process.source.rouse();
        }
        if let Some(arrival) = arrival {
            take(process, Arrival { told, ..arrival });
        }
        serve_waiting(process);
    }
}

/// Where what is read goes, but for the first fault.
struct Sink<'a> {
    process: &'a Process,
    told: u64,
    parked: bool,
}

impl FaultSink for Sink<'_> {
    fn event(&mut self, event: Event) {
        self.process.events.arrive(self.process, event);
    }

    fn reads_one_by_one(&self) -> bool {
        self.process.is_discarding()
    }

    fn look(&mut self) {
        self.process.look_at_discard();
    }

    fn more(&mut self, arrival: Arrival) {
        let told = self.told;
        let arrival = Arrival { told, ..arrival };
        if self.process.crew.park(arrival) {
            self.parked = true;
        } else {
            fault::wake(self.process, arrival.at);
        }
    }
}

fn take(process: &Process, arrival: Arrival) {
    gpusvm_sync::walk!("take");
    let began = process.now();
    if at_once(process, &arrival) {
        return;
    }
    match process.crew.begin() {
        Some(_serving) => {
            look_after_the_rest(process);
            serve(process, &arrival, began);
        }
        None => {
            if !process.crew.park(arrival) {
                fault::wake(process, arrival.at);
            }
        }
    }
}

/// Whoever begins to serve may be long: others look after what waits.
fn look_after_the_rest(process: &Process) {
    if process.crew.has_parked() || process.delays.next_due().is_some() {
        process.source.rouse();
    }
}

fn at_once(process: &Process, arrival: &Arrival) -> bool {
    guard(process, arrival.at, || {
        fault::serve_at_once(process, arrival)
    })
}

/// Serves what was parked, and what has slept long enough.
fn serve_waiting(process: &Process) {
    loop {
        let began = process.now();
        // Who slept so long is woken, and faults again if it still wants the page: it may have been
        // woken before, and the address be another mapping's by now, which userfaultfd would fill
        // without asking whose it is.
        // Before those that are parked, which may find no room among the delays, and be parked again.
        let serving = process.crew.begin();
        let is_busy = serving.is_none();
        if let Some(serving) = serving {
            if let Some(at) = process.delays.pop_due(began) {
                look_after_the_rest(process);
                let late = Arrival { at, ..NOTHING };
                let sleeps_on = process.regions.find(at).is_some() && !serve(process, &late, began);
                if !sleeps_on {
                    // Others of its block sleep behind it, whatever became of this one.
                    process.mover.wake(Span::block_of(at));
                }
                continue;
            }
            drop(serving);
        }
        if let Some(arrival) = process.crew.unpark() {
            if at_once(process, &arrival) {
                continue;
            }
            let Some(_serving) = process.crew.begin() else {
                // Room was made a moment ago, or it faults again.
                if !process.crew.park(arrival) {
                    fault::wake(process, arrival.at);
                }
                // Those that serve may wait for one of those that are parked.
                answer_parked(process);
                // They look again when they are done; but who was done a moment ago looked when these
                // were not parked.
                if process.crew.is_busy() {
                    return;
                }
                continue;
            };
            look_after_the_rest(process);
            serve(process, &arrival, began);
            continue;
        }
        // Those that are busy look at what is due when they are done.
        let is_due = || process.delays.next_due().is_some_and(|due| due <= began);
        if !process.crew.has_parked() && (is_busy || !is_due()) {
            return;
        }
    }
}

/// Answers at once what can be answered of the faults that are parked, each of them.
fn answer_parked(process: &Process) {
    for _ in 0..process.crew.count_parked() {
        let Some(arrival) = process.crew.unpark() else {
            return;
        };
        if !at_once(process, &arrival) && !process.crew.park(arrival) {
            fault::wake(process, arrival.at);
        }
    }
}

/// Whether that was all; else it sleeps.
fn serve(process: &Process, arrival: &Arrival, began: Time) -> bool {
    let at = arrival.at;
    let mut sleeps = false;
    let served = guard(process, at, || {
        match fault::serve(process, arrival) {
            Urgency::Done => {}
            Urgency::Later(due) => {
                Counters::count(&process.counters.delayed_faults);
                sleeps = process.delays.push(due, at);
                if !sleeps {
                    // No room to sleep: a short sleep here, and the fault comes again.
                    std::thread::sleep(Duration::from_micros(100));
                    fault::wake(process, at);
                }
                return false;
            }
        }
        true
    });
    if served {
        process.counters.record(process.now().since(began));
    }
    !sleeps
}

/// A handler that panics poisons the page, wakes who waits for it, and goes on.
fn guard(process: &Process, at: VirtAddr, act: impl FnOnce() -> bool) -> bool {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_| {
        Counters::count(&process.counters.panics);
        fault::give_up(process, at, "a fault handler panicked");
        true
    })
}
