//! What the driver did, counted by cause.

use crate::driver::stages::{SizeStats, Stages};
use crate::driver::vram::Vram;
use core::time::Duration;
use gpusvm_pagemap::Cause;
use gpusvm_sync::Mutex;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{ByteSize, PageCount};
use hdrhistogram::Histogram;

/// Bytes that moved one way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// All of them, cleared ones included.
    pub bytes: u64,
    /// By why they moved, in the order of [`Cause::ALL`]; causes that moved nothing are left out.
    pub by_cause: Vec<(&'static str, u64)>,
    /// How long copying took, summed over threads.
    pub elapsed: Duration,
}

impl Moved {
    /// Adds what another device moved.
    pub(crate) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.elapsed += other.elapsed;
        for (cause, bytes) in other.by_cause {
            match self.by_cause.iter_mut().find(|(known, _)| *known == cause) {
                Some((_, sum)) => *sum += bytes,
                None => self.by_cause.push((cause, bytes)),
            }
        }
    }

    /// Bytes for each second of copying; zero when nothing moved.
    pub fn bandwidth(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        #[expect(clippy::cast_precision_loss, reason = "a rate to look at")]
        if seconds > 0.0 {
            self.bytes as f64 / seconds
        } else {
            0.0
        }
    }
}

/// A distribution of durations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// How many.
    pub count: u64,
    /// Half took at most this.
    pub p50: Duration,
    /// All but one of a hundred took at most this.
    pub p99: Duration,
    /// The longest.
    pub max: Duration,
}

impl Times {
    pub(crate) fn of(nanos: &Histogram<u64>) -> Self {
        if nanos.is_empty() {
            return Self::default();
        }
        let at = |quantile| Duration::from_nanos(nanos.value_at_quantile(quantile));
        Self {
            count: nanos.len(),
            p50: at(0.5),
            p99: at(0.99),
            max: Duration::from_nanos(nanos.max()),
        }
    }
}

/// What one device address space did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmStats {
    /// Faults of the device.
    pub faults: u64,
    /// Of them, those that found their range served by another.
    pub coalesced: u64,
    /// Of them, those that ended in an error.
    pub failed: u64,
    /// Passes over faults that had to start again.
    pub stale_passes: u64,
    /// Of them, those that found pages in two device memories, or out of reach, and brought them home.
    pub gathered: u64,
    /// Faults that pages were not moved for any more, after too many passes.
    pub last_resorts: u64,
    /// Times that a declared range was taken away again before it was leased.
    pub slips: u64,
    /// Ranges that went because what is advised of them changed.
    pub reconsidered: u64,
    /// Ranges that should have moved to the device and could not.
    pub not_migrated: u64,
    /// Ranges that were mapped with copies for reading.
    pub duplicated: u64,
    /// Times that the policy wanted copies, and there were none: the device cannot fault, writes are not
    /// seen, there was no room, or pages had to stay.
    pub not_duplicated: u64,
    /// Copies of ranges that were given back after a write, or because their pages went.
    pub duplicates_invalidated: u64,
    /// Copies of ranges that went for others, or because the device was unbound.
    pub duplicates_dropped: u64,
    /// How long faults took to serve.
    pub fault_time: Times,
    /// What faults cost, by the size of ranges, descending; sizes without a fault are left out.
    pub by_size: Vec<SizeStats>,
    /// Invalidations that it took part in: each is one flush.
    pub flushes: u64,
    /// Faults in an object whose binding was lost, and made again.
    pub rebound: u64,
    /// Ranges that it has now.
    pub ranges_live: u64,
}

/// What several device address spaces did, those that are gone included.
#[derive(Clone, Debug)]
pub struct VmTotals {
    counts: VmStats,
    fault_time: Histogram<u64>,
}

impl Default for VmTotals {
    fn default() -> Self {
        Self {
            counts: VmStats::default(),
            fault_time: times(),
        }
    }
}

impl VmTotals {
    /// The sums.
    pub fn stats(&self) -> VmStats {
        VmStats {
            fault_time: Times::of(&self.fault_time),
            ..self.counts.clone()
        }
    }

    /// Adds others.
    pub fn append(&mut self, other: &Self) {
        self.counts.add(&other.counts);
        let added = self.fault_time.add(&other.fault_time);
        debug_assert!(added.is_ok(), "of the same bounds");
    }

    /// Adds one.
    pub(crate) fn add(&mut self, counts: &VmStats, counters: &Counters) {
        self.counts.add(counts);
        let added = self.fault_time.add(&*counters.fault_time.lock());
        debug_assert!(added.is_ok(), "of the same bounds");
    }
}

impl VmStats {
    /// Adds all but the times, which are no sums.
    fn add(&mut self, other: &Self) {
        self.faults += other.faults;
        self.coalesced += other.coalesced;
        self.failed += other.failed;
        self.stale_passes += other.stale_passes;
        self.gathered += other.gathered;
        self.last_resorts += other.last_resorts;
        self.slips += other.slips;
        self.not_migrated += other.not_migrated;
        self.duplicated += other.duplicated;
        self.not_duplicated += other.not_duplicated;
        self.duplicates_invalidated += other.duplicates_invalidated;
        self.duplicates_dropped += other.duplicates_dropped;
        self.reconsidered += other.reconsidered;
        self.rebound += other.rebound;
        self.flushes += other.flushes;
        SizeStats::add_to(&mut self.by_size, &other.by_size);
        self.ranges_live += other.ranges_live;
    }
}

/// What happened to the memory of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RegionStats {
    /// What its engine brought here, from RAM.
    pub to_device: Moved,
    /// What its engine brought home.
    pub to_ram: Moved,
    /// What its engine brought to other devices.
    pub to_peer: Moved,
    /// What became coherent in it, and was not copied.
    pub to_coherent: Moved,
    /// What of that is RAM's again.
    pub from_coherent: Moved,
    /// Allocations that went for others.
    pub evictions: u64,
    /// How much there is.
    pub total: PageCount,
    /// How much of it is allocated, or lost.
    pub used: PageCount,
    /// How much of it was lost, because it could not be cleared.
    pub lost: PageCount,
    /// Objects that live in it.
    pub objects: u64,
    /// How much of it they take.
    pub object_pages: PageCount,
}

/// The counters of one device address space.
#[derive(Debug)]
pub(crate) struct Counters {
    pub(crate) faults: AtomicU64,
    pub(crate) coalesced: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) stale_passes: AtomicU64,
    pub(crate) gathered: AtomicU64,
    pub(crate) last_resorts: AtomicU64,
    pub(crate) slips: AtomicU64,
    pub(crate) reconsidered: AtomicU64,
    pub(crate) not_migrated: AtomicU64,
    pub(crate) stages: Stages,
    pub(crate) rebound: AtomicU64,
    pub(crate) duplicated: AtomicU64,
    pub(crate) not_duplicated: AtomicU64,
    pub(crate) duplicates_invalidated: AtomicU64,
    pub(crate) duplicates_dropped: AtomicU64,
    fault_time: Mutex<Histogram<u64>>,
}

/// The counters of one device's memory.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) to_device: Direction,
    pub(crate) to_ram: Direction,
    pub(crate) to_peer: Direction,
    pub(crate) to_coherent: Direction,
    pub(crate) from_coherent: Direction,
    pub(crate) evictions: AtomicU64,
    objects: AtomicU64,
    object_pages: AtomicU64,
}

/// One way that bytes move.
#[derive(Debug, Default)]
pub(crate) struct Direction {
    bytes: [AtomicU64; Cause::ALL.len()],
    nanos: AtomicU64,
}

impl Direction {
    /// Counts a copy. Allocates nothing.
    pub(crate) fn count(&self, cause: Cause, bytes: ByteSize, took: Duration) {
        self.bytes[cause.index()].fetch_add(bytes.get(), Ordering::Relaxed);
        self.nanos.fetch_add(nanos(took), Ordering::Relaxed);
    }

    pub(crate) fn snapshot(&self) -> Moved {
        let each = Cause::ALL.into_iter().zip(&self.bytes);
        let by_cause = each.map(|(cause, bytes)| (cause.name(), bytes.load(Ordering::Relaxed)));
        let by_cause: Vec<_> = by_cause.filter(|(_, bytes)| *bytes > 0).collect();
        Moved {
            bytes: by_cause.iter().map(|(_, bytes)| bytes).sum(),
            by_cause,
            elapsed: Duration::from_nanos(self.nanos.load(Ordering::Relaxed)),
        }
    }
}

impl Traffic {
    pub(crate) fn snapshot(&self, vram: &Vram) -> RegionStats {
        RegionStats {
            to_device: self.to_device.snapshot(),
            to_ram: self.to_ram.snapshot(),
            to_peer: self.to_peer.snapshot(),
            to_coherent: self.to_coherent.snapshot(),
            from_coherent: self.from_coherent.snapshot(),
            evictions: self.evictions.load(Ordering::Relaxed),
            total: vram.total(),
            used: vram.used(),
            lost: vram.lost(),
            objects: self.objects.load(Ordering::Relaxed),
            object_pages: self.object_pages(),
        }
    }

    /// How much of the memory objects take.
    pub(crate) fn object_pages(&self) -> PageCount {
        PageCount::new(self.object_pages.load(Ordering::Acquire))
    }

    /// One more object.
    pub(crate) fn add_object(&self, pages: PageCount) {
        self.objects.fetch_add(1, Ordering::Relaxed);
        self.object_pages.fetch_add(pages.get(), Ordering::AcqRel);
    }

    /// One less.
    pub(crate) fn remove_object(&self, pages: PageCount) {
        self.objects.fetch_sub(1, Ordering::Relaxed);
        self.object_pages.fetch_sub(pages.get(), Ordering::AcqRel);
    }
}

impl Counters {
    pub(crate) fn new() -> Self {
        Self {
            faults: AtomicU64::new(0),
            coalesced: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            stale_passes: AtomicU64::new(0),
            gathered: AtomicU64::new(0),
            last_resorts: AtomicU64::new(0),
            slips: AtomicU64::new(0),
            reconsidered: AtomicU64::new(0),
            not_migrated: AtomicU64::new(0),
            duplicated: AtomicU64::new(0),
            not_duplicated: AtomicU64::new(0),
            duplicates_invalidated: AtomicU64::new(0),
            duplicates_dropped: AtomicU64::new(0),
            stages: Stages::default(),
            rebound: AtomicU64::new(0),
            fault_time: Mutex::new(times()),
        }
    }

    pub(crate) fn record_fault(&self, took: Duration) {
        self.fault_time.lock().saturating_record(nanos(took));
    }

    pub(crate) fn snapshot(&self, ranges: usize, flushes: u64) -> VmStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VmStats {
            faults: get(&self.faults),
            coalesced: get(&self.coalesced),
            failed: get(&self.failed),
            stale_passes: get(&self.stale_passes),
            gathered: get(&self.gathered),
            last_resorts: get(&self.last_resorts),
            slips: get(&self.slips),
            reconsidered: get(&self.reconsidered),
            not_migrated: get(&self.not_migrated),
            rebound: get(&self.rebound),
            duplicated: get(&self.duplicated),
            not_duplicated: get(&self.not_duplicated),
            duplicates_invalidated: get(&self.duplicates_invalidated),
            duplicates_dropped: get(&self.duplicates_dropped),
            fault_time: Times::of(&self.fault_time.lock()),
            by_size: self.stages.snapshot(),
            flushes,
            ranges_live: u64::try_from(ranges).unwrap_or(u64::MAX),
        }
    }
}

/// No durations yet: one nanosecond to one minute, to a percent.
fn times() -> Histogram<u64> {
    const HIGHEST: u64 = 60_000_000_000;
    Histogram::new_with_bounds(1, HIGHEST, 2).expect("bounds that are in order")
}

/// One more.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
