//! What happened, counted.

use core::time::Duration;
use gpusvm_sync::Mutex;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use hdrhistogram::Histogram;

/// What happened in an address space since it was started.
#[derive(Clone, Debug)]
pub struct MmStats {
    /// CPU faults on pages of devices that were served.
    pub cpu_faults: u64,
    /// CPU faults on armed memory that was never touched: filled with zeroes.
    pub zero_fills: u64,
    /// Times that pages were write-protected, to be read in copies.
    pub protections: u64,
    /// CPU faults that ended that: writes.
    pub write_faults: u64,
    /// CPU faults that slept until a page could leave.
    pub delayed_faults: u64,
    /// CPU faults that ended in a bus error.
    pub failed_faults: u64,
    /// How long serving took, from the message to the wake-up, in nanoseconds.
    pub cpu_fault_time: Histogram<u64>,
    /// Unmaps, removes and remaps of mirrored memory.
    pub events: u64,
    /// Panics of handlers.
    pub panics: u64,
}

#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) cpu_faults: AtomicU64,
    pub(crate) zero_fills: AtomicU64,
    pub(crate) protections: AtomicU64,
    pub(crate) write_faults: AtomicU64,
    pub(crate) delayed_faults: AtomicU64,
    pub(crate) failed_faults: AtomicU64,
    pub(crate) events: AtomicU64,
    pub(crate) panics: AtomicU64,
    // Of a fixed size: recording allocates nothing.
    times: Mutex<Histogram<u64>>,
}

impl Counters {
    pub(crate) fn new() -> Self {
        Self {
            cpu_faults: AtomicU64::new(0),
            zero_fills: AtomicU64::new(0),
            protections: AtomicU64::new(0),
            write_faults: AtomicU64::new(0),
            delayed_faults: AtomicU64::new(0),
            failed_faults: AtomicU64::new(0),
            events: AtomicU64::new(0),
            panics: AtomicU64::new(0),
            times: Mutex::new(no_times()),
        }
    }

    pub(crate) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn record(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.times.lock().saturating_record(nanos);
    }

    /// Of an engine that is `inherited`, a thread that is not there may have the histogram: then it is
    /// empty.
    pub(crate) fn snapshot(&self, inherited: bool) -> MmStats {
        let times = match inherited {
            true => self.times.try_lock(),
            false => Some(self.times.lock()),
        };
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        MmStats {
            cpu_faults: get(&self.cpu_faults),
            zero_fills: get(&self.zero_fills),
            protections: get(&self.protections),
            write_faults: get(&self.write_faults),
            delayed_faults: get(&self.delayed_faults),
            failed_faults: get(&self.failed_faults),
            cpu_fault_time: times.map_or_else(no_times, |times| times.clone()),
            events: get(&self.events),
            panics: get(&self.panics),
        }
    }
}

fn no_times() -> Histogram<u64> {
    /// One nanosecond to one minute, to a percent.
    const HIGHEST: u64 = 60_000_000_000;
    Histogram::new_with_bounds(1, HIGHEST, 2).expect("bounds that are in order")
}
