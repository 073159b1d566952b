//! What happened, counted.

use gpusvm_sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What happened in a simulated world so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct SimStats {
            $($(#[$doc])* pub $name: u64,)*
        }

        /// The counters themselves.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: AtomicU64,)*
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> SimStats {
                SimStats { $($name: self.$name.load(Ordering::Acquire),)* }
            }
        }
    };
}

counters! {
    /// Touches of pages on a device that brought the page home.
    cpu_faults,
    /// Times that a thread slept because a page may not leave its device yet.
    delayed_faults,
    /// Touches that found their block busy, and waited for it.
    busy_faults,
    /// Touches that cost a page.
    failed_faults,
    /// Touches of pages that are nowhere yet, of blocks that are watched.
    zero_fills,
    /// Migrations to devices that began.
    collects,
    /// Migrations to devices that ended on a device.
    commits,
    /// Migrations to devices that put everything back.
    aborts,
    /// Times that pages were write-protected, to be copied.
    protections,
    /// Writes of protected pages.
    write_faults,
    /// Migrations home that began.
    device_collects,
    /// Migrations home that ended in RAM.
    device_commits,
    /// Migrations home that left everything on the device.
    device_aborts,
    /// Blocks that were unlocked: who waited for one looks again.
    wakeups,
    /// Frames shared with a child of fork that had to be copied to be taken.
    unshared,
    /// System calls of the program that the engine heard of.
    events,
}

impl Counters {
    pub(crate) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}
