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
}

/// Decides where pages live.
pub trait Policy: Send + Sync + core::fmt::Debug {
    /// A device faulted on a page that is not mapped on it.
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan;
}

/// Migrate on every fault, and let pages stay long enough for the device to use them.
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
        /// Longer, and a person would notice it as a hang.
        const LONGEST: Duration = Duration::from_millis(16);
        let doublings = fault.attempt.saturating_add(fault.bounces).min(16);
        let doubled = self.timeslice.saturating_mul(1 << doublings);
        Plan {
            migrate: true,
            timeslice: doubled.min(LONGEST),
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
                reaches_ram: true,
            };
            policy.on_device_fault(&info).timeslice
        };
        assert_eq!(after(0, 0), Duration::from_micros(500));
        assert_eq!(after(3, 0), Duration::from_millis(4));
        assert_eq!(after(1, 2), Duration::from_millis(4));
        assert_eq!(after(40, u32::MAX), Duration::from_millis(16));
    }
}
