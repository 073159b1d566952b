//! How long the mappings of a range lived: what tells pages that bounce, or thrash, from others.

use core::time::Duration;
use gpusvm_mm::Time;
use gpusvm_sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// A mapping that was evicted sooner than this was hardly used: device memory is too small for what
/// is done with it.
const VERY_SOON: Duration = Duration::from_millis(2);
/// Evictions that long ago say nothing about now.
const LONG_AGO: Duration = Duration::from_millis(200);

/// What "soon" is: a mapping that lives shorter than this was hardly used.
const SOON: Duration = Duration::from_millis(20);

/// How long the mappings of a range lived.
#[derive(Debug, Default)]
pub struct History {
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

impl History {
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

    /// It is mapped.
    pub(crate) fn count_mapping(&self, now: Time) {
        self.mapped_at.store(nanos(now), Ordering::Relaxed);
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
        let history = History::default();
        let at = |millis| Time::START.after(Duration::from_millis(millis));
        assert_eq!(history.count_bounces(at(1)), 0, "never mapped");
        history.mapped_at.store(nanos(at(2)), Ordering::Relaxed);
        assert_eq!(history.count_bounces(at(3)), 1);
        assert_eq!(history.count_bounces(at(4)), 2);
        assert_eq!(history.count_bounces(at(30)), 0, "it was mapped for long");
    }

    #[test]
    fn evictions_are_counted_apart_from_bounces() {
        let history = History::default();
        let at = |millis| Time::START.after(Duration::from_millis(millis));
        history.mapped_at.store(nanos(at(2)), Ordering::Relaxed);
        history.count_eviction(at(3));
        assert_eq!(
            (history.evictions(at(3)), history.count_bounces(at(3))),
            (1, 0)
        );
        assert_eq!(history.evictions(at(400)), 0, "that was long ago");
        history.count_eviction(at(3));
        history.count_eviction(at(9));
        assert_eq!(history.evictions(at(9)), 0, "it was mapped for long enough");
    }
}
