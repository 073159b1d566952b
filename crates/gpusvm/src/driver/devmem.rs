//! One allocation of device memory: which pages, and how they are copied.

use crate::driver::counters::{Counters, Direction};
use crate::driver::vram::Vram;
use gpusvm_device::{BlockRun, CopyOp, Device, DeviceError};
use gpusvm_mm::{AddressSpace, Time};
use gpusvm_pagemap::{Cause, DevmemError, DevmemOps, ToDevmem, ToRam};
use gpusvm_sync::{Arc, Weak};
use gpusvm_types::{ByteSize, DevicePfn, PageCount};

/// What the driver keeps of one allocation.
#[derive(Debug)]
pub(crate) struct Bo<M: AddressSpace> {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) vram: Arc<Vram>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) mm: Weak<M>,
    /// Where it is: one run unless device memory is in pieces.
    pub(crate) runs: Box<[BlockRun]>,
}

/// How many copies are handed to the engine at once.
const BATCH: usize = 32;

impl<M: AddressSpace> Bo<M> {
    /// Hands `ops` to the copy engine, waits for them, and counts them.
    fn copy(
        &self,
        mut ops: &mut dyn Iterator<Item = CopyOp>,
        direction: &Direction,
        cause: Cause,
    ) -> Result<(), DevmemError> {
        let began = self.now();
        let engine = self.device.copy_engine();
        let mut bytes = ByteSize::ZERO;
        let mut batch = [CopyOp::Clear {
            to: DevicePfn::new(0).dev_addr(),
            len: ByteSize::ZERO,
        }; BATCH];
        loop {
            let mut len = 0;
            for (place, op) in batch.iter_mut().zip(&mut ops) {
                bytes += length(&op);
                *place = op;
                len += 1;
            }
            if len == 0 {
                break;
            }
            let fence = engine.submit(&batch[..len]).map_err(failed)?;
            engine.wait(fence).map_err(failed)?;
            if len < BATCH {
                break;
            }
        }
        direction.count(cause, bytes, self.now().since(began));
        Ok(())
    }

    fn now(&self) -> Time {
        self.mm.upgrade().map_or(Time::START, |mm| mm.now())
    }
}

impl<M: AddressSpace> DevmemOps for Bo<M> {
    fn populate_pfn(&self, pfns: &mut [DevicePfn]) -> Result<(), DevmemError> {
        let pages = self
            .runs
            .iter()
            .flat_map(|run| (0..run.count.get()).map(|i| run.first.offset(PageCount::new(i))));
        let filled = pfns
            .iter_mut()
            .zip(pages)
            .map(|(place, pfn)| *place = pfn)
            .count();
        if filled == pfns.len() {
            Ok(())
        } else {
            Err(DevmemError::Pages)
        }
    }

    fn copy_to_devmem(
        &self,
        pieces: &mut dyn Iterator<Item = ToDevmem>,
        cause: Cause,
    ) -> Result<(), DevmemError> {
        let mut ops = pieces.map(|piece| match piece {
            ToDevmem::Copy { from, to, len } => CopyOp::ToDevice { from, to, len },
            ToDevmem::Clear { to, len } => CopyOp::Clear { to, len },
        });
        self.copy(&mut ops, &self.counters.to_device, cause)
    }

    fn copy_to_ram(
        &self,
        pieces: &mut dyn Iterator<Item = ToRam>,
        cause: Cause,
    ) -> Result<(), DevmemError> {
        let mut ops = pieces.map(|ToRam { from, to, len }| CopyOp::ToRam { from, to, len });
        self.copy(&mut ops, &self.counters.to_ram, cause)
    }

    fn release(&self) {
        self.vram.free(&self.runs);
    }
}

fn length(op: &CopyOp) -> ByteSize {
    match op {
        CopyOp::ToDevice { len, .. } | CopyOp::ToRam { len, .. } | CopyOp::Clear { len, .. } => {
            *len
        }
    }
}

fn failed(error: DeviceError) -> DevmemError {
    let reason = match error {
        DeviceError::OutsideVram { .. } => "a copy left the device's memory",
        DeviceError::RamUnreachable { .. } => "the device could not reach RAM",
        DeviceError::Lost { reason } => reason,
        _ => "the copy engine refused",
    };
    DevmemError::Copy { reason }
}
