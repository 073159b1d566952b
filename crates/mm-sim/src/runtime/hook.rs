//! What the locks of the layers above call when they would wait.

use super::{CURRENT, Runtime};
use gpusvm_sync::Scheduler;
use std::sync::Arc;
use std::time::Duration;

/// The scheduler of every simulated thread: which world it is of, the thread knows.
pub(super) struct Turns;

fn with_world<T>(act: impl FnOnce(&Runtime) -> T) -> T {
    let world = CURRENT.with_borrow(|current| current.as_ref().map(|(world, _)| Arc::clone(world)));
    act(&world.expect("only simulated threads have this scheduler"))
}

impl Scheduler for Turns {
    fn yield_now(&self) {
        with_world(Runtime::yield_now);
    }

    fn sleep(&self, for_: Duration) {
        with_world(|world| world.sleep(for_));
    }

    fn wait_until(
        &self,
        what: &'static str,
        timeout: Option<Duration>,
        is_ready: &mut dyn FnMut() -> bool,
    ) -> bool {
        with_world(|world| world.wait_until(&what, timeout, is_ready))
    }
}
