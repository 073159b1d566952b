//! Device memories and their owners.

use crate::process::Process;
use gpusvm_mm::{DeviceMemoryId, DeviceMemoryOps, DevicePage, DeviceRun, MmError, Rmap};
use gpusvm_sync::Arc;
use gpusvm_types::{OwnerId, PageCount, PageIndex};
use std::sync::OnceLock;

/// How many device memories one process can have.
const MEMORIES: usize = 16;

/// A device's memory, as this process knows it.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) owner: OwnerId,
    pub(crate) ops: Arc<dyn DeviceMemoryOps<Process>>,
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
        ops: Arc<dyn DeviceMemoryOps<Process>>,
    ) -> Result<DeviceMemoryId, MmError> {
        let mut memory = Memory {
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

    /// Where a device page is mapped.
    pub(crate) fn address_of(&self, page: DevicePage) -> Option<PageIndex> {
        self.0
            .get(usize::from(page.memory.0))?
            .get()?
            .rmap
            .get(page.pfn)
    }

    /// How many device pages stand in for pages of the process.
    pub(crate) fn pages_in_use(&self) -> PageCount {
        let memories = self.0.iter().filter_map(OnceLock::get);
        memories.fold(PageCount::ZERO, |sum, memory| sum + memory.rmap.in_use())
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
