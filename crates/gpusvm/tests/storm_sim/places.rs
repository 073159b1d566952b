//! A policy that wants something else each time: in place, copies, here, the other device, RAM.

use gpusvm::driver::Destination;
use gpusvm::{FaultInfo, MigrateOnTouch, Plan, Policy};
use gpusvm_mm_sim::Sim;
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug)]
pub(crate) struct Places(pub(crate) Arc<Sim>);

impl Policy for Places {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        let usual = MigrateOnTouch {
            timeslice: Duration::from_micros(self.0.random(100)),
        };
        let usual = usual.on_device_fault(fault);
        match self.0.random(10) {
            0 => Plan::default(),
            1 => Plan {
                ask_again: Some(Duration::from_micros(self.0.random(2000))),
                ..Plan::default()
            },
            2 | 3 => Plan {
                duplicate: true,
                ..usual
            },
            4 => Plan {
                migrate: true,
                to: Destination::Device(1 - fault.device),
                ..usual
            },
            5 => Plan {
                migrate: true,
                to: Destination::Ram,
                ..usual
            },
            _ => usual,
        }
    }
}
