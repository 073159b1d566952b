//! The engine, as long as a device is open.
//!
//! # Locking
//!
//! The list of what is shared has a lock, held while memory is shared.

use crate::descriptor;
use core::ffi::c_int;
use gpusvm::{Adopted, ByteSize, Error, FaultInfo, Plan, Policy, SoftGpu, Svm};
use std::sync::{Arc, Mutex, Once, PoisonError};

/// How many devices have memory that the CPU does not reach: 0 and 1.
pub(crate) const PRIVATE: usize = 2;
/// How many have memory that the CPU uses in place: 2 and 3.
pub(crate) const COHERENT: usize = 2;
/// The memory of each device, which takes up RAM when it is used: the kernel's grows in pieces of 256 MiB.
const MEMORY: ByteSize = ByteSize::mib(512);

/// The engine, and what of the program's memory it shares.
#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) svm: Svm,
    /// What it has open, ascending. Each is closed by exec.
    pub(crate) descriptors: Arc<[c_int]>,
    adopted: Mutex<Vec<Adopted>>,
    /// Why there are no devices with coherent memory, if there are none.
    not_coherent: Option<Error>,
}

/// Faults of a device move nothing: in this interface, migrating is a command.
#[derive(Debug)]
struct OnCommand;

impl Policy for OnCommand {
    fn on_device_fault(&self, _: &FaultInfo) -> Plan {
        Plan::default()
    }
}

impl Engine {
    /// Starts it.
    pub(crate) fn start() -> Result<Self, Error> {
        let before = descriptor::closed_by_exec();
        let mut builder = Svm::builder().policy(Arc::new(OnCommand));
        // As the kernel shows pages of a device.
        builder = builder.show_in_pagemap(shows_in_pagemap());
        // One unit, since a command has one lane. Its atomics take pages to itself, as exclusive access does.
        let gpu = || {
            let gpu = SoftGpu::builder().vram(MEMORY).units(1);
            gpu.atomics_on_ram(false)
        };
        for _ in 0..PRIVATE {
            builder = builder.device(gpu().build()?);
        }
        let coherent = || gpu().coherent_memory(true).build();
        let coherent: Result<Vec<_>, _> = (0..COHERENT).map(|_| coherent()).collect();
        let (coherent, not_coherent) = match coherent {
            Ok(devices) => (devices, None),
            Err(error) => (Vec::new(), Some(error.into())),
        };
        for device in coherent {
            builder = builder.device(device);
        }
        let svm = builder.build()?;
        let descriptors = match (before, descriptor::closed_by_exec()) {
            // One that another thread of the program opened meanwhile is taken for one of them.
            (Ok(before), Ok(now)) => now.into_iter().filter(|fd| !before.contains(fd)).collect(),
            // Nothing is known, and nothing is protected.
            _ => Arc::from([]),
        };
        Ok(Self {
            svm,
            descriptors,
            adopted: Mutex::default(),
            not_coherent,
        })
    }

    /// Whether it has that device. If it has not, the reason is said once.
    pub(crate) fn has(&self, device: usize) -> bool {
        static SAID: Once = Once::new();
        let missing = self.not_coherent.as_ref().filter(|_| device >= PRIVATE);
        if let Some(error) = missing {
            SAID.call_once(|| eprintln!("gpusvm-hmm: no device with coherent memory: {error}"));
        }
        missing.is_none()
    }

    /// Shares what of that memory can be shared.
    pub(crate) fn share(&self, at: *const u8, len: ByteSize) -> Result<(), Error> {
        let mut adopted = self.adopted.lock().unwrap_or_else(PoisonError::into_inner);
        let new = self.svm.adopt_all(at, len)?;
        // What the program has unmapped since is of no use any more.
        adopted.retain(Adopted::is_current);
        adopted.extend(new);
        Ok(())
    }

    /// Ends it. Everything is home by then, and no device memory is in use; else it says so.
    pub(crate) fn end(mut self: Arc<Self>) -> Result<(), Error> {
        // Who tells it of a change of mappings has it for as long as that takes. Nobody gets it any more.
        let Self { svm, adopted, .. } = loop {
            match Arc::try_unwrap(self) {
                Ok(engine) => break engine,
                Err(engine) => self = engine,
            }
            std::thread::yield_now();
        };
        drop(adopted);
        let stats = svm.shutdown()?;
        if stats.vram_used_bytes != 0 || stats.pages_on_devices != 0 {
            let (bytes, pages) = (stats.vram_used_bytes, stats.pages_on_devices);
            eprintln!(
                "gpusvm-hmm: {bytes} bytes of device memory and {pages} pages were left behind"
            );
            return Err(Error::NoDevice);
        }
        Ok(())
    }
}

/// Unless the environment says otherwise: it costs, and some do without.
fn shows_in_pagemap() -> bool {
    std::env::var_os("GPUSVM_HMM_PAGEMAP").is_none_or(|value| value != "0")
}
