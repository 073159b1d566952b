//! What the device counts. Each number is exact when the units are idle, and lags a little else.

use gpusvm_sync::atomic::{AtomicU64, Ordering};

/// What a device has done since it was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Accesses of lanes, tiles counted by the piece.
    pub accesses: u64,
    /// Accesses that found no translation in their unit's TLB.
    pub tlb_misses: u64,
    /// Faults that were reported.
    pub faults: u64,
    /// Launches that were accepted.
    pub launches: u64,
    /// Lanes that ended, in whatever way.
    pub lanes: u64,
    /// Flushes of translations.
    pub flushes: u64,
    /// Bytes that the copy engine moved or cleared.
    pub copied_bytes: u64,
}

impl Counters {
    /// Accesses that found their translation in the TLB.
    pub fn tlb_hits(&self) -> u64 {
        self.accesses.saturating_sub(self.tlb_misses)
    }
}

/// The part of it that one unit counts.
#[derive(Debug, Default)]
pub(crate) struct UnitCounters {
    pub(crate) accesses: AtomicU64,
    pub(crate) misses: AtomicU64,
    pub(crate) faults: AtomicU64,
    pub(crate) lanes: AtomicU64,
}

impl UnitCounters {
    /// Adds what this unit counted to the sum.
    pub(crate) fn add_to(&self, sum: &mut Counters) {
        sum.accesses += self.accesses.load(Ordering::Relaxed);
        sum.tlb_misses += self.misses.load(Ordering::Relaxed);
        sum.faults += self.faults.load(Ordering::Relaxed);
        sum.lanes += self.lanes.load(Ordering::Relaxed);
    }
}

/// Adds to a counter that only one thread writes: no locked instruction is needed.
pub(crate) fn add(counter: &AtomicU64, by: u64) {
    counter.store(
        counter.load(Ordering::Relaxed).wrapping_add(by),
        Ordering::Relaxed,
    );
}
