//! What serving faults cost, by the size of the range and by stage: what `xe` counts as `svm_2M_pagefault_us`
//! and its siblings.
//!
//! A stage is timed by a guard that reports when it is dropped, so that the story of a fault stays one.

use core::time::Duration;
use gpusvm_mm::{AddressSpace, Time};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{ByteSize, PAGES_PER_BLOCK, Span};

/// Ranges are a power of two of pages, from one page to a block.
const SIZES: usize = PAGES_PER_BLOCK.ilog2() as usize + 1;

/// A part of serving a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// All of one pass, from the range on.
    Pass,
    /// To device memory: collect, copy, commit, and eviction if that is full.
    Migrate,
    /// Where are the pages, and how does the device reach them?
    GetPages,
    /// Page table entries, under the notifier lock.
    Bind,
}

const STAGES: usize = 4;

/// What faults in ranges of one size cost. Times are summed over threads.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SizeStats {
    /// How large the ranges are.
    pub size: ByteSize,
    /// Passes that got as far as a range of this size.
    pub passes: u64,
    /// Of them, those that found it mapped: another fault had been faster.
    pub coalesced: u64,
    /// Moves to device memory that were tried.
    pub migrations: u64,
    /// How long passes took.
    pub pass_time: Duration,
    /// Of it, moving to device memory.
    pub migrate_time: Duration,
    /// Of it, finding out where pages are.
    pub get_pages_time: Duration,
    /// Of it, entering them in page tables.
    pub bind_time: Duration,
}

impl SizeStats {
    /// Adds what another device address space did to a list of sizes, descending.
    pub(crate) fn add_to(sums: &mut Vec<Self>, others: &[Self]) {
        for other in others {
            let at = sums.partition_point(|sum| sum.size > other.size);
            match sums.get_mut(at).filter(|sum| sum.size == other.size) {
                Some(sum) => sum.add(other),
                None => sums.insert(at, other.clone()),
            }
        }
    }

    fn add(&mut self, other: &Self) {
        self.passes += other.passes;
        self.coalesced += other.coalesced;
        self.migrations += other.migrations;
        self.pass_time += other.pass_time;
        self.migrate_time += other.migrate_time;
        self.get_pages_time += other.get_pages_time;
        self.bind_time += other.bind_time;
    }
}

/// The counters of all sizes.
#[derive(Debug, Default)]
pub(crate) struct Stages([Counters; SIZES]);

#[derive(Debug, Default)]
struct Counters {
    entered: [AtomicU64; STAGES],
    nanos: [AtomicU64; STAGES],
    coalesced: AtomicU64,
}

/// Counts the time of a stage until it is dropped.
#[derive(Debug)]
#[must_use = "it counts until it is dropped"]
pub(crate) struct Timed<'a, M: AddressSpace> {
    mm: &'a Arc<M>,
    began: Time,
    nanos: &'a AtomicU64,
}

impl<M: AddressSpace> Drop for Timed<'_, M> {
    fn drop(&mut self) {
        let took = self.mm.now().since(self.began).as_nanos();
        let took = u64::try_from(took).unwrap_or(u64::MAX);
        self.nanos.fetch_add(took, Ordering::Relaxed);
    }
}

impl Stages {
    /// A stage of serving the range `span` begins.
    pub(crate) fn time<'a, M: AddressSpace>(
        &'a self,
        mm: &'a Arc<M>,
        span: Span,
        stage: Stage,
    ) -> Timed<'a, M> {
        let counters = self.of(span);
        let stage = stage as usize;
        counters.entered[stage].fetch_add(1, Ordering::Relaxed);
        Timed {
            mm,
            began: mm.now(),
            nanos: &counters.nanos[stage],
        }
    }

    /// A pass found the range `span` mapped.
    pub(crate) fn count_coalesced(&self, span: Span) {
        self.of(span).coalesced.fetch_add(1, Ordering::Relaxed);
    }

    /// The sizes that there were, descending.
    pub(crate) fn snapshot(&self) -> Vec<SizeStats> {
        let sizes = self.0.iter().enumerate().rev();
        let stats = sizes.map(|(order, counters)| counters.snapshot(order));
        stats.filter(|stats| stats.passes > 0).collect()
    }

    fn of(&self, span: Span) -> &Counters {
        let order = span.page_count().as_usize().ilog2();
        &self.0[(order as usize).min(SIZES - 1)]
    }
}

impl Counters {
    fn snapshot(&self, order: usize) -> SizeStats {
        let entered = |stage: Stage| self.entered[stage as usize].load(Ordering::Relaxed);
        let time =
            |stage: Stage| Duration::from_nanos(self.nanos[stage as usize].load(Ordering::Relaxed));
        SizeStats {
            size: ByteSize::kib(4 << order),
            passes: entered(Stage::Pass),
            coalesced: self.coalesced.load(Ordering::Relaxed),
            migrations: entered(Stage::Migrate),
            pass_time: time(Stage::Pass),
            migrate_time: time(Stage::Migrate),
            get_pages_time: time(Stage::GetPages),
            bind_time: time(Stage::Bind),
        }
    }
}
