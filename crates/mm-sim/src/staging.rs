//! Where pages are between homes: slots of 2 MiB with bus addresses of their own.
//!
//! Frames are moved into a slot and out of it, never copied. A slot that is given back keeps frames
//! whose pages went to a device, and the next pages that come home arrive in them, with the old bytes
//! still there: a device that does not copy is found out.

use crate::frame::{FrameRef, Frames, PAGE_BYTES};
use crate::runtime::Runtime;
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{BLOCK_SHIFT, ByteSize, DmaAddr, PAGE_SHIFT, PAGES_PER_BLOCK, VirtAddr};
use std::collections::BTreeMap;
use std::time::Duration;

/// Above every address of a process.
const BASE: u64 = 1 << 56;
/// How long to wait for a slot.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pool.
#[derive(Debug)]
pub(crate) struct Staging(Mutex<Vec<SlotState>>);

#[derive(Debug, Default)]
struct SlotState {
    held: bool,
    frames: BTreeMap<usize, FrameRef>,
}

/// A slot that somebody holds.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    staging: &'a Staging,
    index: usize,
}

impl Staging {
    pub(crate) fn new(slots: usize) -> Self {
        let slots = (0..slots).map(|_| SlotState::default());
        Self(Mutex::new(slots.collect()))
    }

    /// A slot, waiting for it. `None` when none came back in time.
    pub(crate) fn take(&self, runtime: &Runtime) -> Option<Slot<'_>> {
        let mut taken = None;
        runtime.wait_until(&"a staging slot", Some(PATIENCE), &mut || {
            taken = self.try_take();
            taken.is_some()
        });
        taken
    }

    fn try_take(&self) -> Option<Slot<'_>> {
        let mut slots = self.0.lock();
        let index = slots.iter().position(|slot| !slot.held)?;
        slots[index].held = true;
        Some(Slot {
            staging: self,
            index,
        })
    }

    /// How many slots somebody holds.
    pub(crate) fn in_use(&self) -> usize {
        self.0.lock().iter().filter(|slot| slot.held).count()
    }

    /// How many frames the slots have.
    pub(crate) fn frames(&self) -> usize {
        self.0.lock().iter().map(|slot| slot.frames.len()).sum()
    }

    /// Whether a bus address is in the pool.
    pub(crate) fn has(at: DmaAddr) -> bool {
        at.get() >= BASE
    }

    /// Reads or writes a page of a slot that is held, from `at` to the end of the page at most.
    pub(crate) fn with_page<T>(
        &self,
        at: DmaAddr,
        write: bool,
        act: impl FnOnce(&mut [u8; PAGE_BYTES]) -> T,
    ) -> Option<T> {
        let offset = ByteSize::new(at.get() - BASE);
        let slot = ByteSize::new(offset.get() >> BLOCK_SHIFT).as_usize();
        let page = offset.whole_pages().as_usize() % PAGES_PER_BLOCK;
        let mut slots = self.0.lock();
        let slot = slots.get_mut(slot).filter(|slot| slot.held)?;
        let frame = slot.frames.get_mut(&page)?;
        Some(if write {
            act(Arc::make_mut(frame).bytes_mut())
        } else {
            act(&mut frame.bytes().clone())
        })
    }
}

impl Slot<'_> {
    /// The bus address of the place that a page of a block has in the slot.
    pub(crate) fn dma_of(&self, at: VirtAddr) -> DmaAddr {
        let slot = u64::try_from(self.index).unwrap_or(u64::MAX);
        let place = u64::try_from(place_of(at)).unwrap_or(u64::MAX);
        DmaAddr::new(BASE + (slot << BLOCK_SHIFT) + (place << PAGE_SHIFT))
    }

    /// Moves a frame in.
    pub(crate) fn put(&self, at: VirtAddr, frame: FrameRef) {
        self.with(|frames| drop(frames.insert(place_of(at), frame)));
    }

    /// Moves a frame out.
    pub(crate) fn remove(&self, at: VirtAddr) -> Option<FrameRef> {
        self.with(|frames| frames.remove(&place_of(at)))
    }

    /// The frame for a page that is to arrive: one that is here already, or a new one.
    pub(crate) fn prepare(&self, at: VirtAddr, new: &Frames) {
        self.with(|frames| {
            frames.entry(place_of(at)).or_insert_with(|| new.junk());
        });
    }

    fn with<T>(&self, act: impl FnOnce(&mut BTreeMap<usize, FrameRef>) -> T) -> T {
        act(&mut self.staging.0.lock()[self.index].frames)
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.staging.0.lock()[self.index].held = false;
    }
}

/// Which page of its block.
fn place_of(at: VirtAddr) -> usize {
    at.offset_from(at.block_start()).whole_pages().as_usize()
}
