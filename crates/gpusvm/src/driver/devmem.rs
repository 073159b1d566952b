//! One allocation of device memory: which pages, and how they are copied, and cleared.
//!
//! # Scrubbing
//!
//! ```text
//!   release: submit Clear ---> free, idle after its fence ---> allocated: the first copy waits for it
//! ```
//!
//! `release` may not wait. So memory that is to be cleared is free before it is clear, and whoever
//! gets it waits: a copy by the device's own engine would come after the clear anyway, but one by the
//! engine of a peer would not. Memory that the engine does not take for clearing is lost: it is never
//! used again, and counted. A clear that fails later fails the migration that waits for it, which
//! gives the memory back, to be cleared again.

use crate::driver::region::Memory;
use core::cell::Cell;
use gpusvm_device::{BlockRun, CopyOp, DeviceError, Fence};
use gpusvm_mm::AddressSpace;
use gpusvm_pagemap::{
    Cause, Devmem, DevmemError, DevmemOps, PagemapAddr, PreMigrateFence, ToDevmem, ToRam, Way,
};
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, DevicePfn, DmaAddr, PageCount};
use std::time::Duration;

/// What the driver keeps of one allocation.
#[derive(Debug)]
pub(crate) struct Bo<M: AddressSpace> {
    memory: Arc<Memory<M>>,
    /// Where it is: one run unless device memory is in pieces.
    runs: Box<[BlockRun]>,
}

/// How many copies are handed to the engine at once.
const BATCH: usize = 32;

/// An allocation of `count` pages, if so many are free.
pub(crate) fn allocate<M: AddressSpace>(
    memory: &Arc<Memory<M>>,
    count: PageCount,
) -> Option<Devmem> {
    let allocated = memory.vram.allocate(count)?;
    let memory = Arc::clone(memory);
    let fence = allocated.idle_after.map(|fence| {
        let memory = Arc::clone(&memory);
        Arc::new(Cleared { memory, fence })
    });
    let runs = allocated.runs;
    let bo = Box::new(Bo { memory, runs });
    Some(match fence {
        Some(fence) => Devmem::idle_after(count, bo, fence),
        None => Devmem::new(count, bo),
    })
}

/// As `allocate`, for who keeps it itself, and clears it.
pub(crate) fn allocate_bo<M: AddressSpace>(
    memory: &Arc<Memory<M>>,
    count: PageCount,
) -> Option<Bo<M>> {
    let runs = memory.vram.allocate(count)?.runs;
    let memory = Arc::clone(memory);
    Some(Bo { memory, runs })
}

/// Memory that somebody had before is cleared.
#[derive(Debug)]
struct Cleared<M: AddressSpace> {
    memory: Arc<Memory<M>>,
    fence: Fence,
}

impl<M: AddressSpace> PreMigrateFence for Cleared<M> {
    fn wait(&self) -> Result<(), DevmemError> {
        let engine = self.memory.device.copy_engine();
        engine.wait(self.fence).map_err(failed)?;
        self.memory.vram.is_idle(self.fence);
        Ok(())
    }
}

impl<M: AddressSpace> Bo<M> {
    pub(crate) fn memory(&self) -> &Arc<Memory<M>> {
        &self.memory
    }

    /// Where it is, in order.
    pub(crate) fn runs(&self) -> &[BlockRun] {
        &self.runs
    }

    /// Hands `ops` to the copy engine and waits for them. Says how many bytes they were, and how long
    /// they took.
    pub(crate) fn copy(
        &self,
        ops: &mut dyn Iterator<Item = CopyOp>,
        after: Option<&dyn PreMigrateFence>,
    ) -> Result<(ByteSize, Duration), DevmemError> {
        let began = self.memory.now();
        if let Some(fence) = after {
            fence.wait()?;
        }
        let engine = self.memory.device.copy_engine();
        let mut bytes = ByteSize::ZERO;
        let mut each = |batch: &[CopyOp]| {
            bytes += batch.iter().map(length).fold(ByteSize::ZERO, |a, b| a + b);
            let fence = engine.submit(batch)?;
            engine.wait(fence)
        };
        in_batches(ops, &mut each).map_err(failed)?;
        Ok((bytes, self.memory.now().since(began)))
    }

    /// Hands all of it to the engine, to be cleared.
    pub(crate) fn clear(&self) -> Result<Option<Fence>, DeviceError> {
        let engine = self.memory.device.copy_engine();
        let mut last = None;
        let mut ops = self.runs.iter().map(|run| CopyOp::Clear {
            to: run.first.dev_addr(),
            len: run.count.bytes(),
        });
        in_batches(&mut ops, &mut |batch| {
            last = last.max(Some(engine.submit(batch)?));
            Ok(())
        })?;
        Ok(last)
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
        after: Option<&dyn PreMigrateFence>,
        cause: Cause,
    ) -> Result<(), DevmemError> {
        gpusvm_sync::walk!("copy_to_devmem");
        let mut ops = pieces.map(|piece| match piece {
            ToDevmem::Copy { from, to, len } => CopyOp::ToDevice { from, to, len },
            ToDevmem::Clear { to, len } => CopyOp::Clear { to, len },
        });
        let (bytes, took) = self.copy(&mut ops, after)?;
        self.memory.traffic.to_device.count(cause, bytes, took);
        Ok(())
    }

    fn copy_to_ram(
        &self,
        pieces: &mut dyn Iterator<Item = ToRam>,
        after: Option<&dyn PreMigrateFence>,
        cause: Cause,
    ) -> Result<(), DevmemError> {
        gpusvm_sync::walk!("copy_to_ram");
        let to_peers = Cell::new(ByteSize::ZERO);
        let is_lost = Cell::new(false);
        let mut ops = pieces.map_while(|ToRam { from, to, len }| {
            let to = bus_address(to);
            is_lost.set(to.is_none());
            let (to, is_peer) = to?;
            if is_peer {
                to_peers.set(to_peers.get() + len);
            }
            Some(CopyOp::ToRam { from, to, len })
        });
        let (bytes, took) = self.copy(&mut ops, after)?;
        let to_peers = to_peers.get();
        if is_lost.get() {
            return Err(DevmemError::Unsupported {
                what: "a copy from device memory to itself",
            });
        }
        let traffic = &self.memory.traffic;
        // All of a migration goes one way.
        if to_peers > ByteSize::ZERO {
            traffic.to_peer.count(cause, to_peers, took);
        }
        if bytes > to_peers {
            traffic.to_ram.count(cause, bytes - to_peers, took);
        }
        Ok(())
    }

    fn moved_in_place(&self, way: Way, pages: PageCount, cause: Cause) {
        let traffic = &self.memory.traffic;
        let direction = match way {
            Way::ToDevice => &traffic.to_coherent,
            Way::ToRam => &traffic.from_coherent,
        };
        direction.count(cause, pages.bytes(), Duration::ZERO);
    }

    fn release(&self) {
        let vram = &self.memory.vram;
        if !self.memory.scrubs() {
            return vram.free(&self.runs, None);
        }
        match self.clear() {
            Ok(fence) => vram.free(&self.runs, fence),
            Err(_) => vram.lose(&self.runs),
        }
    }
}

/// Calls `each` with as many of `ops` at a time as one submission takes. Allocates nothing.
fn in_batches(
    mut ops: &mut dyn Iterator<Item = CopyOp>,
    each: &mut dyn FnMut(&[CopyOp]) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let nothing = CopyOp::Clear {
        to: DevicePfn::new(0).dev_addr(),
        len: ByteSize::ZERO,
    };
    let mut batch = [nothing; BATCH];
    loop {
        let mut len = 0;
        for (place, op) in batch.iter_mut().zip(&mut ops) {
            *place = op;
            len += 1;
        }
        if len > 0 {
            each(&batch[..len])?;
        }
        if len < BATCH {
            return Ok(());
        }
    }
}

/// Where on the bus that is, and whether it is a peer's. A device's own memory is not on the bus.
const fn bus_address(to: PagemapAddr) -> Option<(DmaAddr, bool)> {
    match to {
        PagemapAddr::System(at) => Some((at, false)),
        PagemapAddr::Peer(at) => Some((at, true)),
        PagemapAddr::Vram(_) => None,
    }
}

fn length(op: &CopyOp) -> ByteSize {
    match op {
        CopyOp::ToDevice { len, .. } | CopyOp::ToRam { len, .. } | CopyOp::Clear { len, .. } => {
            *len
        }
    }
}

/// What a copy that failed means for a migration.
pub(crate) fn failed(error: DeviceError) -> DevmemError {
    let reason = match error {
        DeviceError::Unsupported { what } => return DevmemError::Unsupported { what },
        DeviceError::OutsideVram { .. } => "a copy left the device's memory",
        DeviceError::RamUnreachable { .. } => "the device could not reach RAM",
        DeviceError::Lost { reason } => reason,
        _ => "the copy engine refused",
    };
    DevmemError::Copy { reason }
}
