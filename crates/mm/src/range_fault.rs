//! The one retry loop of `range_fault`, for every world: `hmm_range_fault`.
//!
//! ```text
//!   look ---- Stable -------> done
//!     ^---- BroughtHome ----- so often for each page; the second begins again
//!     ^---- Held ------------ for four seconds in all; the second begins again
//!     `---- Moving ---------- for a second
//! ```
//!
//! # Differences from the kernel
//!
//! There the deadline is absolute, or each attempt has its own. Here a second without progress is too
//! long, and what counts as progress is bounded too.

use crate::{MmError, Time};
use core::time::Duration;
use gpusvm_types::Span;

/// How long pages may keep moving: the kernel's `HMM_RANGE_DEFAULT_TIMEOUT`.
pub const RANGE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a page may be brought home: more, and somebody takes it away again each time.
pub const MAX_HOMECOMINGS: u64 = 8;
/// How long to wait in all for timeslices and leases of others.
pub const HELD_TIMEOUT: Duration = Duration::from_secs(4);

/// What a look at the homes of a span found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Snapshot {
    /// Every page has a home where it may be.
    Stable,
    /// A page is on the move.
    Moving,
    /// A page was where it may not be, and is home now; or was protected, and is not any more.
    BroughtHome,
    /// A page is where it may not be, but could not leave before now.
    Held,
}

/// Looks until a look is stable.
///
/// # Errors
///
/// `Unstable` after the bounds of this module, and what a look failed at.
pub fn until_stable(
    span: Span,
    now: impl Fn() -> Time,
    mut look: impl FnMut() -> Result<Snapshot, MmError>,
) -> Result<(), MmError> {
    let held = now().after(HELD_TIMEOUT);
    let mut deadline = now().after(RANGE_TIMEOUT);
    let mut homecomings = span.page_count().get().saturating_mul(MAX_HOMECOMINGS);
    loop {
        match look()? {
            Snapshot::Stable => return Ok(()),
            Snapshot::BroughtHome if homecomings > 0 => {
                homecomings -= 1;
                deadline = now().after(RANGE_TIMEOUT);
            }
            Snapshot::Held if now() <= held => deadline = now().after(RANGE_TIMEOUT),
            Snapshot::Moving if now() <= deadline => gpusvm_sync::yield_now(),
            _ => return Err(MmError::Unstable { span }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;
    use gpusvm_types::VirtAddr;

    /// How many looks it takes until they are enough, or too many, when each takes so long.
    fn looks(found: Snapshot, each: Duration, stable_after: u64) -> (u64, bool) {
        let (time, count) = (Cell::new(Time::START), Cell::new(0));
        let span = Span::page_of(VirtAddr::new(0x1000));
        let result = until_stable(
            span,
            || time.get(),
            || {
                time.set(time.get().after(each));
                count.set(count.get() + 1);
                let is_stable = count.get() > stable_after;
                Ok(if is_stable { Snapshot::Stable } else { found })
            },
        );
        (count.get(), result.is_ok())
    }

    #[test]
    fn every_wait_has_its_bound() {
        let tenth = Duration::from_millis(100);
        for (found, bound) in [
            (Snapshot::Moving, 10),
            (Snapshot::BroughtHome, MAX_HOMECOMINGS),
            (Snapshot::Held, 40),
        ] {
            assert_eq!(looks(found, tenth, bound), (bound + 1, true), "{found:?}");
            assert_eq!(
                looks(found, tenth, u64::MAX),
                (bound + 1, false),
                "{found:?}"
            );
        }
    }
}
