//! Device memories and their owners: what every world keeps of them.
//!
//! # Locking
//!
//! None: a memory is added once, looked up without a lock, and never removed. What changes in it, the
//! back-references, are atomics, under the locks that [`rmap`](crate::rmap) names.

use crate::{AddressSpace, DeviceMemoryId, DeviceMemoryOps, DevicePage, DeviceRun, MmError, Rmap};
use gpusvm_sync::{Arc, OnceLock};
use gpusvm_types::{OwnerId, PageCount, PageIndex};

/// How many device memories one process can have.
const MEMORIES: usize = 16;

/// A device's memory, as this process knows it.
#[derive(Debug)]
pub struct Memory<M: AddressSpace> {
    /// How many pages it has.
    pub pages: PageCount,
    /// Who may map its pages in place.
    pub owner: OwnerId,
    /// Whom to ask for its pages.
    pub ops: Arc<dyn DeviceMemoryOps<M>>,
    /// Which pages of the process its pages stand in for.
    pub rmap: Rmap,
}

/// All of them. Looked up without a lock; never removed.
#[derive(Debug)]
pub struct Memories<M: AddressSpace>([OnceLock<Memory<M>>; MEMORIES]);

impl<M: AddressSpace> Default for Memories<M> {
    fn default() -> Self {
        Self([const { OnceLock::new() }; MEMORIES])
    }
}

impl<M: AddressSpace> Memories<M> {
    /// Adds a memory, nothing of it in use.
    ///
    /// # Errors
    ///
    /// `TooManyDevices`.
    pub fn add(
        &self,
        pages: PageCount,
        owner: OwnerId,
        ops: Arc<dyn DeviceMemoryOps<M>>,
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
    ///
    /// # Panics
    ///
    /// When it was not added.
    pub fn of(&self, page: DevicePage) -> &Memory<M> {
        let memory = self.0[usize::from(page.memory.0)].get();
        memory.expect("a device page names a memory that was added")
    }

    /// A memory, if it was added.
    pub fn get(&self, id: DeviceMemoryId) -> Option<&Memory<M>> {
        self.0.get(usize::from(id.0))?.get()
    }

    /// Where a device page is mapped.
    pub fn address_of(&self, page: DevicePage) -> Option<PageIndex> {
        self.get(page.memory)?.rmap.get(page.pfn)
    }

    /// How many device pages stand in for pages of the process.
    pub fn pages_in_use(&self) -> PageCount {
        let in_use = |sum, (_, memory): (_, &Memory<M>)| sum + memory.rmap.in_use();
        self.all().fold(PageCount::ZERO, in_use)
    }

    /// All of them, with their names.
    pub fn all(&self) -> impl Iterator<Item = (DeviceMemoryId, &Memory<M>)> {
        let ids = (0u8..).map(DeviceMemoryId);
        ids.zip(&self.0)
            .map_while(|(id, memory)| Some((id, memory.get()?)))
    }
}

/// Collects freed device pages into runs, so that they go back in few calls; the last when it is
/// dropped. Allocates nothing.
#[derive(Debug)]
pub struct Freed<'a, M: AddressSpace> {
    memories: &'a Memories<M>,
    run: Option<DeviceRun>,
}

impl<'a, M: AddressSpace> Freed<'a, M> {
    /// None yet.
    pub fn new(memories: &'a Memories<M>) -> Self {
        Self {
            memories,
            run: None,
        }
    }

    /// The page stands in for nothing any more.
    pub fn push(&mut self, page: DevicePage) {
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

impl<M: AddressSpace> Drop for Freed<'_, M> {
    fn drop(&mut self) {
        self.flush();
    }
}
