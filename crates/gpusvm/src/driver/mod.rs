//! The driver layer: what `xe_svm` is in the kernel.
//!
//! ```text
//!   device fault queue
//!        |
//!   worker --> intake: faults of one block are served together
//!     |
//!     `------> fault: the story of one device fault
//!                |-- policy     migrate? for how long?
//!                |-- populate   device memory, filled by pagemap
//!                |      |-- vram     what is free
//!                |      `-- evict    what goes when nothing is: residents are what lives there
//!                |-- (svm)      where are the pages now?
//!                `-- vm         bind, zap, flush
//!
//!   devices    all of one address space, and who reaches whom
//!   region     a device's memory in it
//!   bind       what an address space has where: the mirror, objects, holes
//!   gpuva      the map of that
//!   object     memory of the device that is nobody's RAM
//!   running    what keeps the number of an address space
//!   duplicate  pages that are only read: copies of them, which go at the first write
//!   revisit    what is mapped in place gets a second look
//!   resident   launches that declare what they touch
//!   stays      what of it stays in RAM meanwhile
//!   reach      what is mapped where it is, and what is mapped at all
//!   prefetch   pages that are wanted before they are touched
//!   report     what became of the last fault
//!   advice     what the program says of its memory beforehand
//!   devmem     copies, counted by cause; clearing
//! ```
//!
//! Everything is generic over the address space and the device: nothing here knows which world it is
//! in. [`Svm`](crate::Svm) is this layer on a live process, with devices in software. Who brings up a
//! device of their own, or tests in another world, begins here:
//!
//! ```
//! use gpusvm::driver::{Devices, MigrateOnTouch, Vm, VmError, VramRegion, worker};
//! use gpusvm_device::Device;
//! use gpusvm_mm::AddressSpace;
//! use std::sync::Arc;
//!
//! fn bring_up<M: AddressSpace>(mm: &Arc<M>, device: Arc<dyn Device>) -> Result<(), VmError> {
//!     let devices = Devices::new(mm);
//!     let region = VramRegion::new(&devices, Arc::clone(&device))?;
//!     let vm = Vm::new(&region, Arc::new(MigrateOnTouch::default()))?;
//!     let workers = worker::start(&region).expect("threads");
//!     // The device may fault in `vm.id()` now. At the end:
//!     vm.refuse_faults();
//!     device.fault_queue().into_iter().for_each(|queue| queue.close());
//!     workers.into_iter().for_each(|worker| worker.join().expect("it does not panic"));
//!     region.unbind().expect("everything comes home");
//!     vm.close();
//!     Ok(())
//! }
//! ```

pub mod worker; // threads that take faults
pub(crate) mod intake; // which fault is served, and which waits for it
pub(crate) mod fault; // the story
pub(crate) mod current; // what is true of a range that is served
pub(crate) mod place; // where pages go
pub(crate) mod stale; // what is in the way
pub(crate) mod policy; // what to do, never how
pub(crate) mod populate; // pages into device memory
pub(crate) mod evict; // and out of it, for others
pub(crate) mod duplicate; // copies for reading
pub(crate) mod revisit; // what is mapped in place gets a second look
pub(crate) mod resident; // declared residency
pub(crate) mod migrate; // pages to the device, and no mapping
pub(crate) mod reach; // mappings, and no page moves
pub(crate) mod prefetch; // wanted before they are touched
pub mod advice; // what the program says beforehand
pub(crate) mod vm; // one device address space
pub(crate) mod bind; // what is bound in it
pub(crate) mod gpuva; // where
pub(crate) mod object; // memory of the device's own
pub(crate) mod running; // what keeps its number
pub(crate) mod region; // device memory in an address space
pub(crate) mod devices; // all of them
pub(crate) mod stays; // pages that stay where they are
pub(crate) mod vram; // what of device memory is free
pub(crate) mod residents; // what lives there
pub(crate) mod devmem; // one allocation of it
pub(crate) mod report; // what became of the last fault
pub(crate) mod counters; // what happened
pub(crate) mod stages; // what it cost, by size and stage

pub use advice::{
    Advice, AdviseError, Advised, AdvisedBy, Atomics, Attributes, DeviceSet, Preferred, Priority,
};
pub use bind::BindError;
pub use counters::{Moved, RegionStats, Times, VmStats, VmTotals};
pub use devices::Devices;
pub use evict::MAX_TRIES;
pub use fault::{MAX_PASSES, MAX_PASSES_IN_PLACE};
pub use intake::MAX_PARKED;
pub use object::{Object, ObjectError};
pub use policy::{Destination, FaultInfo, MigrateOnTouch, Plan, Policy};
pub use prefetch::{
    Location, MAX_PREFETCHES, PREFETCHERS, Prefetch, PrefetchError, PrefetchReason, Prefetched,
};
pub use region::VramRegion;
pub use report::{FaultReport, Served};
pub use resident::{Declared, Lease, MAX_SLIPS};
pub use running::Running;
pub use stages::SizeStats;
pub use vm::{Vm, VmError};
pub use worker::MAX_WORKERS;
