//! What to do about a fault. Mechanism never chooses: this does.

use core::time::Duration;
use gpusvm_device::Access;
use gpusvm_types::VirtAddr;

/// What is known of a fault when a policy is asked.
#[derive(Clone, Copy, Debug)]
pub struct FaultInfo {
    /// Where.
    pub at: VirtAddr,
    /// What the device wanted.
    pub access: Access,
    /// How many passes over this fault came to nothing.
    pub attempt: u32,
    /// How often in a row the CPU took the pages back soon after the device got them.
    pub bounces: u32,
    /// How often in a row the pages were evicted very soon after the device got them.
    pub evictions: u32,
    /// Whether the device reaches RAM in place, coherently.
    pub reaches_ram: bool,
}

/// What to do about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Whether pages that can move to the device shall.
    pub migrate: bool,
    /// How long they stay, whatever the CPU does.
    pub timeslice: Duration,
    /// Whether the device gets copies to read, and the pages stay in RAM: for memory that all read and
    /// nobody writes for a while. For read faults of devices that fault, where the address space sees
    /// all writes; otherwise, and where there is no room, `migrate` decides.
    pub duplicate: bool,
    /// When to ask again, if the device still wants pages that shall not migrate now.
    pub ask_again: Option<Duration>,
}

/// Decides where pages live.
pub trait Policy: Send + Sync + core::fmt::Debug {
    /// A device faulted on a page that is not mapped on it.
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan;
}

/// Migrate on every fault, and let pages stay long enough for the device to use them; but not pages that
/// device memory has no room for, which the device then reaches in place if it can.
#[derive(Clone, Copy, Debug)]
pub struct MigrateOnTouch {
    /// How long pages stay at first. Doubles with every pass that came to nothing, and with every time
    /// that the CPU took them back soon: pages that bounce stay longer, until both sides get some
    /// work done between two migrations.
    pub timeslice: Duration,
}

impl Default for MigrateOnTouch {
    /// Half a millisecond: about what five migrations of 2 MiB take.
    fn default() -> Self {
        Self {
            timeslice: Duration::from_micros(500),
        }
    }
}

impl Policy for MigrateOnTouch {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        gpusvm_sync::walk!("on_device_fault");
        /// Longer, and a person would notice it as a hang.
        const LONGEST: Duration = Duration::from_millis(16);
        /// So many evictions in a row, each after hardly any use, are no accident.
        const THRASHES: u32 = 4;
        /// How long pages that thrash stay where they are.
        const PINNED: Duration = Duration::from_millis(200);
        let doublings = fault.attempt.saturating_add(fault.bounces).min(16);
        let doubled = self.timeslice.saturating_mul(1 << doublings);
        let thrashes = fault.reaches_ram && fault.evictions >= THRASHES;
        Plan {
            migrate: !thrashes,
            duplicate: false,
            timeslice: doubled.min(LONGEST),
            ask_again: thrashes.then_some(PINNED),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeslice_doubles_with_attempts_and_bounces_up_to_a_bound() {
        let policy = MigrateOnTouch::default();
        let after = |attempt, bounces| {
            let (at, access) = (VirtAddr::new(0), Access::Write);
            let info = FaultInfo {
                at,
                access,
                attempt,
                bounces,
                evictions: 0,
                reaches_ram: true,
            };
            policy.on_device_fault(&info).timeslice
        };
        assert_eq!(after(0, 0), Duration::from_micros(500));
        assert_eq!(after(3, 0), Duration::from_millis(4));
        assert_eq!(after(1, 2), Duration::from_millis(4));
        assert_eq!(after(40, u32::MAX), Duration::from_millis(16));
    }

    #[test]
    fn pages_that_thrash_stay_in_ram_where_the_device_reaches_it() {
        let policy = MigrateOnTouch::default();
        let migrates = |evictions, reaches_ram| {
            let (at, access) = (VirtAddr::new(0), Access::Read);
            let info = FaultInfo {
                at,
                access,
                attempt: 0,
                bounces: 0,
                evictions,
                reaches_ram,
            };
            policy.on_device_fault(&info).migrate
        };
        assert!(migrates(3, true));
        assert!(!migrates(4, true));
        assert!(migrates(100, false), "it has no other place");
    }
}
