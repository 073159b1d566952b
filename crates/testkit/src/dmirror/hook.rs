//! Copies that fail, or wait, when a test says so.
//!
//! ```text
//!   test                                       whoever migrates
//!   hold()
//!                                              pass(): stands at the gate
//!   wait_for_copy() --> the copy is under way
//!   ... do something to the memory ...
//!   release()                                  goes on
//! ```

use core::time::Duration;
use gpusvm_sync::{Condvar, Mutex};

/// What decides about copies.
#[derive(Debug, Default)]
pub struct CopyHook {
    plan: Mutex<Plan>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Plan {
    /// How many copies may still succeed, and how many then fail.
    failing: Option<(u64, u64)>,
    failed: u64,
    held: bool,
    /// How many came to the gate since it was closed.
    came: usize,
}

/// How long to wait for a copy that may never come.
const NEVER: Duration = Duration::from_secs(5);

impl CopyHook {
    /// The `count` batches behind the next `after` fail.
    pub fn fail(&self, after: u64, count: u64) {
        self.plan.lock().failing = Some((after, count));
    }

    /// No copy fails any more.
    pub fn heal(&self) {
        self.plan.lock().failing = None;
    }

    /// How many failed.
    pub fn failed(&self) -> u64 {
        self.plan.lock().failed
    }

    /// Copies that come now wait.
    pub fn hold(&self) {
        let mut plan = self.plan.lock();
        plan.held = true;
        plan.came = 0;
    }

    /// Copies go on.
    pub fn release(&self) {
        self.plan.lock().held = false;
        self.changed.notify_all();
    }

    /// Returns when a copy has come to the gate since `hold`. `false` when none did in a long time.
    pub fn wait_for_copy(&self) -> bool {
        let mut plan = self.plan.lock();
        while plan.came == 0 {
            let (again, timed_out) = self.changed.wait_timeout(plan, NEVER);
            plan = again;
            if timed_out && plan.came == 0 {
                return false;
            }
        }
        true
    }

    /// A batch comes. Whether it may succeed.
    pub(super) fn pass(&self) -> bool {
        let mut plan = self.plan.lock();
        plan.came += 1;
        self.changed.notify_all();
        while plan.held {
            plan = self.changed.wait(plan);
        }
        let (after, count) = plan.failing.unwrap_or((u64::MAX, 0));
        if after > 0 || count == 0 {
            plan.failing = plan.failing.map(|_| (after.saturating_sub(1), count));
            return true;
        }
        plan.failing = Some((0, count - 1));
        plan.failed += 1;
        false
    }
}
