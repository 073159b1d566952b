//! Device memories and their owners.

use crate::Sim;
use gpusvm_mm::{DeviceMemoryId, DeviceMemoryOps, DevicePage, DeviceRun, MmError, Rmap};
use gpusvm_sync::Arc;
use gpusvm_types::{OwnerId, PageCount, PageIndex};
use std::sync::OnceLock;

/// How many device memories one process can have.
const MEMORIES: usize = 16;

/// A device's memory, as this process knows it.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) pages: PageCount,
    pub(crate) owner: OwnerId,
    pub(crate) ops: Arc<dyn DeviceMemoryOps<Sim>>,
    pub(crate) rmap: Rmap,
}

/// All of them. Looked up without a lock; never removed.
#[derive(Debug)]
pub(crate) struct Memories([OnceLock<Memory>; MEMORIES]);

impl Memories {
    pub(crate) const fn new() -> Self {
        Self([const { OnceLock::new() }; MEMORIES])
    }

    pub(crate) fn add(
        &self,
        pages: PageCount,
        owner: OwnerId,
        ops: Arc<dyn DeviceMemoryOps<Sim>>,
    ) -> Result<DeviceMemoryId, MmError> {
        let mut memory = Memory {
            pages,
            owner,
            ops,
            rmap: Rmap::new(pages),
        };
        for (id, place) in (0u8..).zip(&self.0) {
            match place.set(memory) {
                Ok(()) => return Ok(DeviceMemoryId(id)),
                Err(taken) => memory = taken,
            }
        }
        Err(MmError::TooManyDevices)
    }

    /// The memory that a page names.
    pub(crate) fn of(&self, page: DevicePage) -> &Memory {
        let memory = self.0[usize::from(page.memory.0)].get();
        memory.expect("a device page names a memory that was added")
    }

    /// A memory, if it was added.
    pub(crate) fn get(&self, id: DeviceMemoryId) -> Option<&Memory> {
        self.0.get(usize::from(id.0))?.get()
    }

    /// Where a device page is mapped.
    pub(crate) fn address_of(&self, page: DevicePage) -> Option<PageIndex> {
        self.get(page.memory)?.rmap.get(page.pfn)
    }

    /// All of them, with their names.
    pub(crate) fn all(&self) -> impl Iterator<Item = (DeviceMemoryId, &Memory)> {
        let ids = (0u8..).map(DeviceMemoryId);
        ids.zip(&self.0)
            .map_while(|(id, memory)| Some((id, memory.get()?)))
    }
}

/// Collects freed device pages into runs, so that they go back in few calls.
#[derive(Debug)]
pub(crate) struct Freed<'a> {
    memories: &'a Memories,
    run: Option<DeviceRun>,
}

impl<'a> Freed<'a> {
    pub(crate) fn new(memories: &'a Memories) -> Self {
        Self {
            memories,
            run: None,
        }
    }

    /// The page stands in for nothing any more.
    pub(crate) fn push(&mut self, page: DevicePage) {
        self.memories.of(page).rmap.clear(page.pfn);
        match &mut self.run {
            Some(run) if run.continues_with(page) => run.count += PageCount::ONE,
            _ => {
                self.flush();
                self.run = Some(DeviceRun {
                    first: page,
                    count: PageCount::ONE,
                });
            }
        }
    }

    fn flush(&mut self) {
        if let Some(run) = self.run.take() {
            self.memories.of(run.first).ops.free_pages(run);
        }
    }
}

impl Drop for Freed<'_> {
    fn drop(&mut self) {
        self.flush();
    }
}
