//! What runs in a device address space keeps its number from going to another.
//!
//! ```text
//!   Vm ------------.
//!                   >---> Number: the device forgets the address space when nobody has it any more
//!   launches ------'
//! ```
//!
//! A fault says in which address space it is by number. So a launch that outlives its address space must
//! not find another behind the same number: its faults would be served there, and it would try again for
//! ever. It finds none, and ends with `Closed`.

use gpusvm_device::{Device, VmId};
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_sync::{Arc, Weak};

/// Something runs in a device address space. As long as this lives, its number goes to no other. It
/// keeps neither the address space nor the device alive.
#[derive(Clone, Debug)]
#[must_use = "the number can go to another as soon as it is dropped"]
pub struct Running(Arc<Number>);

#[derive(Debug)]
struct Number {
    device: Weak<dyn Device>,
    id: VmId,
    is_given_back: AtomicBool,
}

impl Running {
    /// The device made an address space of this number.
    pub(crate) fn new(device: &Arc<dyn Device>, id: VmId) -> Self {
        Self(Arc::new(Number {
            device: Arc::downgrade(device),
            id,
            is_given_back: AtomicBool::new(false),
        }))
    }

    /// Nothing runs in it any more, whatever others hold: the number is free.
    pub(crate) fn end(&self) {
        self.0.give_back();
    }
}

impl Number {
    fn give_back(&self) {
        if !self.is_given_back.swap(true, Ordering::AcqRel)
            && let Some(device) = self.device.upgrade()
        {
            device.page_tables().destroy_vm(self.id);
        }
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        self.give_back();
    }
}
