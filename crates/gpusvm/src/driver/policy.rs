//! What to do about a fault. Mechanism never chooses: this does.

use crate::driver::advice::{Atomics, Attributes, DeviceSet, Preferred};
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
    /// Whether atomic operations of the device work on RAM.
    pub atomics_on_ram: bool,
    /// The number of the device.
    pub device: usize,
    /// The devices whose memory it reaches, itself among them.
    pub reaches: DeviceSet,
    /// What is advised of the pages.
    pub advice: Attributes,
}

/// Where pages move to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Destination {
    /// The memory of the device that faulted.
    #[default]
    Here,
    /// The memory of another device. If they cannot go there: here.
    Device(usize),
    /// RAM.
    Ram,
}

/// What to do about a fault.
///
/// The default leaves pages where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Whether pages that can move shall.
    pub migrate: bool,
    /// Where to. Where only device memory will do, RAM is none.
    pub to: Destination,
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

/// Follow advice; without any, migrate on every fault, and let pages stay long enough for the device to use them; but not pages that
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
        let (migrate, to, ask_again) = match advised(fault) {
            Advised::Go(to) => (true, to, None),
            Advised::Stay => (false, Destination::Here, None),
            Advised::Nothing => {
                let thrashes = fault.reaches_ram && fault.evictions >= THRASHES;
                (!thrashes, Destination::Here, thrashes.then_some(PINNED))
            }
        };
        let doublings = fault.attempt.saturating_add(fault.bounces).min(16);
        let doubled = self.timeslice.saturating_mul(1 << doublings);
        Plan {
            migrate,
            to,
            duplicate: fault.advice.read_mostly && fault.access == Access::Read,
            timeslice: doubled.min(LONGEST),
            ask_again,
        }
    }
}

/// What advice says about a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Advised {
    Go(Destination),
    Stay,
    Nothing,
}

/// The rule of [`advice`](crate::driver::advice), in its order.
fn advised(fault: &FaultInfo) -> Advised {
    let advice = &fault.advice;
    let is_atomic = fault.access == Access::Atomic;
    match advice.preferred {
        Preferred::Device(device) if device == fault.device => Advised::Go(Destination::Here),
        Preferred::Device(device) if fault.reaches.contains(device) => {
            Advised::Go(Destination::Device(device))
        }
        Preferred::Ram if fault.reaches_ram => Advised::Go(Destination::Ram),
        // Out of reach: as if no place were preferred.
        Preferred::Device(_) | Preferred::Ram | Preferred::Anywhere => {
            if is_atomic && advice.atomics == Atomics::Global && fault.atomics_on_ram {
                Advised::Go(Destination::Ram)
            } else if advice.accessed_by.contains(fault.device) && fault.reaches_ram {
                Advised::Stay
            } else {
                Advised::Nothing
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::advice::Advice;

    const FAULT: FaultInfo = FaultInfo {
        at: VirtAddr::new(0),
        access: Access::Write,
        attempt: 0,
        bounces: 0,
        evictions: 0,
        reaches_ram: true,
        atomics_on_ram: true,
        device: 0,
        reaches: DeviceSet::NONE,
        advice: Attributes::NONE,
    };

    fn plan(fault: FaultInfo) -> Plan {
        MigrateOnTouch::default().on_device_fault(&fault)
    }

    #[test]
    fn a_timeslice_doubles_with_attempts_and_bounces_up_to_a_bound() {
        let after = |attempt, bounces| {
            let fault = FaultInfo {
                attempt,
                bounces,
                ..FAULT
            };
            plan(fault).timeslice
        };
        assert_eq!(after(0, 0), Duration::from_micros(500));
        assert_eq!(after(3, 0), Duration::from_millis(4));
        assert_eq!(after(1, 2), Duration::from_millis(4));
        assert_eq!(after(40, u32::MAX), Duration::from_millis(16));
    }

    #[test]
    fn pages_that_thrash_stay_in_ram_where_the_device_reaches_it() {
        let migrates = |evictions, reaches_ram| {
            let fault = FaultInfo {
                access: Access::Read,
                evictions,
                reaches_ram,
                ..FAULT
            };
            plan(fault).migrate
        };
        assert!(migrates(3, true));
        assert!(!migrates(4, true));
        assert!(migrates(100, false), "it has no other place");
    }

    /// Device 0 faults; device 1 is in reach, device 2 is not.
    #[test]
    fn advice_is_followed_as_far_as_the_device_reaches() {
        let (here, ram) = (Destination::Here, Destination::Ram);
        let by = |device| Advice::AccessedBy { device, on: true };
        let at = |device| Advice::PreferredLocation(Preferred::Device(device));
        let in_ram = Advice::PreferredLocation(Preferred::Ram);
        let global = Advice::Atomics(Atomics::Global);
        for (advice, access, reaches_ram, migrate, to) in [
            (vec![], Access::Write, true, true, here),
            (vec![at(0)], Access::Write, true, true, here),
            (
                vec![at(1)],
                Access::Write,
                true,
                true,
                Destination::Device(1),
            ),
            (vec![at(2)], Access::Write, true, true, here),
            (vec![in_ram], Access::Write, true, true, ram),
            (vec![in_ram], Access::Write, false, true, here),
            (vec![by(0)], Access::Write, true, false, here),
            (vec![by(0)], Access::Write, false, true, here),
            (vec![by(1)], Access::Write, true, true, here),
            (
                vec![by(0), at(1)],
                Access::Read,
                true,
                true,
                Destination::Device(1),
            ),
            (vec![by(0), at(2)], Access::Read, true, false, here),
            (vec![global], Access::Atomic, true, true, ram),
            (vec![global], Access::Write, true, true, here),
            (vec![global, at(0)], Access::Atomic, true, true, here),
        ] {
            let attributes = advice.iter().fold(FAULT.advice, |it, one| it.with(*one));
            let reaches = DeviceSet::NONE.with(0, true).with(1, true);
            let made = plan(FaultInfo {
                access,
                reaches_ram,
                atomics_on_ram: reaches_ram,
                reaches,
                advice: attributes,
                ..FAULT
            });
            assert_eq!(
                (made.migrate, made.to),
                (migrate, to),
                "{advice:?} {access:?}"
            );
            assert_eq!(made.ask_again, None);
        }
    }

    #[test]
    fn only_reads_of_what_is_mostly_read_are_served_with_copies() {
        let advice = Attributes::NONE.with(Advice::ReadMostly(true));
        for (access, copies) in [
            (Access::Read, true),
            (Access::Write, false),
            (Access::Atomic, false),
        ] {
            let fault = FaultInfo {
                access,
                advice,
                ..FAULT
            };
            assert_eq!(plan(fault).duplicate, copies);
        }
    }
}
