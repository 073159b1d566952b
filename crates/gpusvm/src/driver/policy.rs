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
    /// How long pages stay at first. Doubles with every pass that came to nothing.
    pub timeslice: Duration,
}

impl Default for MigrateOnTouch {
    /// Half a millisecond: about what five migrations of 2 MiB take.
    fn default() -> Self {
        Self { timeslice: Duration::from_micros(500) }
    }
}

impl Policy for MigrateOnTouch {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        /// A timeslice that the CPU would notice as a hang.
        const LONGEST: Duration = Duration::from_millis(100);
        let doubled = self.timeslice.saturating_mul(1 << fault.attempt.min(16));
        Plan { migrate: true, timeslice: doubled.min(LONGEST) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeslice_doubles_with_every_attempt_up_to_a_bound() {
        let policy = MigrateOnTouch::default();
        let at = |attempt| {
            let access = Access::Write;
            let info = FaultInfo { at: VirtAddr::new(0), access, attempt, reaches_ram: true };
            policy.on_device_fault(&info).timeslice
        };
        assert_eq!(at(0), Duration::from_micros(500));
        assert_eq!(at(3), Duration::from_millis(4));
        assert_eq!(at(40), Duration::from_millis(100));
    }
}
