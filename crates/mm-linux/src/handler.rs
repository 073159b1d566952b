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

use crate::fault::{self, Urgency};
use crate::process::Process;
use crate::source::Arrival;
use crate::stats::Counters;
use crate::sys::futex;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Time};
use gpusvm_sync::atomic::{AtomicUsize, Ordering};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::VirtAddr;
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
    faults: [VirtAddr; PARKED],
    len: usize,
}

impl Crew {
    pub(crate) const fn new() -> Self {
        let parked = Parked {
            faults: [VirtAddr::new(0); PARKED],
            len: 0,
        };
        Self {
            serving: AtomicUsize::new(0),
            parked: Mutex::new(parked),
        }
    }

    /// Begins to serve, unless that would leave nobody to read.
    fn begin(&self) -> Option<Serving<'_>> {
        let more = |serving| (serving + 1 < HANDLERS).then_some(serving + 1);
        let begun = self
            .serving
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, more);
        begun.is_ok().then_some(Serving(self))
    }

    fn park(&self, at: VirtAddr) -> bool {
        let mut parked = self.parked.lock();
        let len = parked.len;
        if len == PARKED {
            return false;
        }
        parked.faults[len] = at;
        parked.len += 1;
        true
    }

    fn unpark(&self) -> Option<VirtAddr> {
        let mut parked = self.parked.lock();
        parked.len = parked.len.checked_sub(1)?;
        Some(parked.faults[parked.len])
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
        let arrival = process
            .source
            .next(timeout, &mut |event| process.events.arrive(process, event));
        if let Some(arrival) = arrival {
            take(process, arrival);
        }
        serve_waiting(process);
    }
}

fn take(process: &Process, arrival: Arrival) {
    let began = process.now();
    if guard(process, arrival.at, || {
        fault::serve_at_once(process, &arrival)
    }) {
        return;
    }
    match process.crew.begin() {
        Some(_serving) => serve(process, arrival.at, began),
        None => {
            if !process.crew.park(arrival.at) {
                fault::wake(process, arrival.at);
            }
        }
    }
}

/// Serves what was parked, and what has slept long enough.
fn serve_waiting(process: &Process) {
    loop {
        let Some(serving) = process.crew.begin() else {
            return;
        };
        let now = process.now();
        let waiting = process
            .crew
            .unpark()
            .or_else(|| process.delays.pop_due(now));
        let Some(at) = waiting else {
            drop(serving);
            return;
        };
        serve(process, at, now);
    }
}

fn serve(process: &Process, at: VirtAddr, began: Time) {
    let served = guard(process, at, || {
        match fault::serve(process, at) {
            Urgency::Done => {}
            Urgency::Later(due) => {
                Counters::count(&process.counters.delayed_faults);
                if !process.delays.push(due, at) {
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
}

/// A handler that panics poisons the page, wakes who waits for it, and goes on.
fn guard(process: &Process, at: VirtAddr, act: impl FnOnce() -> bool) -> bool {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|_| {
        Counters::count(&process.counters.panics);
        fault::give_up(process, at, "a fault handler panicked");
        true
    })
}
