//! What of a range is mapped on a device: `drm_gpusvm_pages`.
//!
//! Apart from the range, because N devices can map one range, each with pages of its own.

use crate::Quiesced;
use alloc::{vec, vec::Vec};
use core::time::Duration;
use gpusvm_mm::{Home, Time};
use gpusvm_sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use gpusvm_types::Span;

/// What a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// Loads.
    Read,
    /// Loads, stores and atomics.
    Write,
}

/// The mapping state of a range on one device.
///
/// Set with the notifier lock held to read, by who serves the range; cleared with it held to write.
#[derive(Debug, Default)]
pub struct Pages {
    mapped: AtomicU8,
    /// When it was mapped last, in nanoseconds of the mm's clock; zero for never.
    mapped_at: AtomicU64,
    /// How often in a row it was gone again soon after it was mapped.
    bounces: AtomicU32,
    /// How often in a row it was evicted very soon after it was mapped.
    evictions: AtomicU32,
    /// Whether it was an eviction that took it last.
    evicted: AtomicBool,
    /// When it was evicted last, in nanoseconds of the mm's clock.
    evicted_at: AtomicU64,
}

/// A mapping that was evicted sooner than this was hardly used: device memory is too small for what
/// is done with it.
const VERY_SOON: Duration = Duration::from_millis(2);
/// Evictions that long ago say nothing about now.
const LONG_AGO: Duration = Duration::from_millis(200);

/// What "soon" is: a mapping that lives shorter than this was hardly used.
const SOON: Duration = Duration::from_millis(20);

const NOT_MAPPED: u8 = 0;
const READ: u8 = 1;
const WRITE: u8 = 2;

impl Pages {
    /// Whether the range is mapped with at least this permission. A hint without the notifier lock:
    /// enough to see that a fault was served meanwhile.
    pub fn allow(&self, wanted: Permission) -> bool {
        let mapped = self.mapped.load(Ordering::Acquire);
        match wanted {
            Permission::Read => mapped != NOT_MAPPED,
            Permission::Write => mapped == WRITE,
        }
    }

    /// Whether anything is mapped.
    pub fn is_mapped(&self) -> bool {
        self.allow(Permission::Read)
    }

    /// How often in a row the mapping was gone again soon after it was made: pages that bounce
    /// between the device and the CPU. Asked once for each fault, by who serves it.
    pub fn count_bounces(&self, now: Time) -> u32 {
        if self.evicted.swap(false, Ordering::Relaxed) {
            return self.bounces.load(Ordering::Relaxed);
        }
        let mapped_at = self.mapped_at.load(Ordering::Relaxed);
        let lived = nanos(now).saturating_sub(mapped_at);
        if mapped_at == 0 || u128::from(lived) > SOON.as_nanos() {
            self.bounces.store(0, Ordering::Relaxed);
            return 0;
        }
        self.bounces
            .fetch_add(1, Ordering::Relaxed)
            .saturating_add(1)
    }

    /// It was evicted, for others.
    pub fn count_eviction(&self, now: Time) {
        self.evicted.store(true, Ordering::Relaxed);
        self.evicted_at.store(nanos(now), Ordering::Relaxed);
        let lived = nanos(now).saturating_sub(self.mapped_at.load(Ordering::Relaxed));
        if u128::from(lived) > VERY_SOON.as_nanos() {
            self.evictions.store(0, Ordering::Relaxed);
        } else {
            self.evictions.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// How often in a row it was evicted very soon after it was mapped, unless that was long ago.
    pub fn evictions(&self, now: Time) -> u32 {
        let since = nanos(now).saturating_sub(self.evicted_at.load(Ordering::Relaxed));
        if u128::from(since) > LONG_AGO.as_nanos() {
            self.evictions.store(0, Ordering::Relaxed);
        }
        self.evictions.load(Ordering::Relaxed)
    }

    pub(crate) fn set_mapped(&self, permission: Permission, now: Time, _proof: &Quiesced<'_>) {
        let mapped = if permission == Permission::Write {
            WRITE
        } else {
            READ
        };
        self.mapped.store(mapped, Ordering::Release);
        self.mapped_at.store(nanos(now), Ordering::Relaxed);
    }

    /// Nothing is mapped any more. Whether anything was.
    pub(crate) fn set_unmapped(&self) -> bool {
        self.mapped.swap(NOT_MAPPED, Ordering::AcqRel) != NOT_MAPPED
    }

    /// Room for the homes of a span's pages.
    pub(crate) fn homes_for(span: Span) -> Vec<Home> {
        vec![Home::System; span.page_count().as_usize()]
    }
}

fn nanos(time: Time) -> u64 {
    u64::try_from(time.as_duration().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounces_count_up_while_mappings_are_short_lived() {
        let pages = Pages::default();
        let at = |millis| Time::START.after(Duration::from_millis(millis));
        assert_eq!(pages.count_bounces(at(1)), 0, "never mapped");
        pages.mapped_at.store(nanos(at(2)), Ordering::Relaxed);
        assert_eq!(pages.count_bounces(at(3)), 1);
        assert_eq!(pages.count_bounces(at(4)), 2);
        assert_eq!(pages.count_bounces(at(30)), 0, "it was mapped for long");
    }

    #[test]
    fn evictions_are_counted_apart_from_bounces() {
        let pages = Pages::default();
        let at = |millis| Time::START.after(Duration::from_millis(millis));
        pages.mapped_at.store(nanos(at(2)), Ordering::Relaxed);
        pages.count_eviction(at(3));
        assert_eq!((pages.evictions(at(3)), pages.count_bounces(at(3))), (1, 0));
        assert_eq!(pages.evictions(at(400)), 0, "that was long ago");
        pages.count_eviction(at(3));
        pages.count_eviction(at(9));
        assert_eq!(pages.evictions(at(9)), 0, "it was mapped for long enough");
    }
}
