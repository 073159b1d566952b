//! A GPU in software: device memory, page tables, TLBs, compute units, replayable faults.
//!
//! ```text
//!   SoftGpu ---- launch(kernel) --> queue --> unit 0 .. unit N-1   threads: chunks of lanes
//!      |                                        |
//!      |                            lane.load(p): in flight -> TLB -> walk -> access -> done
//!      |                                        |               |        |
//!      +-- Engine      CopyEngine  <-- driver   |       miss: Vm, Table  +-> VRAM, or RAM in place
//!      +-- Mmu         PageTables  <-- driver --+---- flush waits for what is in flight
//!      +-- FaultBuffer FaultQueue  <-- driver --+---- fault: the lane waits, and tries again
//!      +-- Aperture    its VRAM, for peers of its fabric: reached as RAM in place is
//! ```
//!
//! It is the embedded default device, and the reference of the contract in `gpusvm-device`: VRAM is
//! memory of its own, to which data is copied; an access that finds no translation is reported,
//! waits, and is replayed. Kernels are closures over a [`Lane`], and reach memory through it only,
//! by plain addresses ([`SvmPtr`]). Devices that are built with the same
//! [`Fabric`](gpusvm_device::Fabric) reach each other's VRAM, in copies and in place.
//!
//! # Locking
//!
//! The access path takes no lock and pays no fence; `flush` explains why that is enough. Inside the
//! device, each of these is a leaf: the fault buffer, the launch queue, the outcome of a launch, and
//! the lock of the table arena, which is taken under the edit lock of a page table or under that of
//! the list of address spaces. No other two are held together.
//!
//! # Invariants
//!
//! - A translation is used only while the page is on record as in flight, and was current then.
//! - Bytes of VRAM are never behind a Rust reference.
//! - A unit has at most one outstanding fault: the buffer cannot overflow.
//! - Nothing on the path of an access, a fault, a copy, `bind` or `zap` allocates on the heap.
//!
//! # Differences from hardware
//!
//! A unit that waits for a fault does nothing else meanwhile. Lanes of a launch run one after the
//! other on a unit, in no order that a kernel may rely on.
//!
//! # Examples
//!
//! ```
//! use gpusvm_device::{Access, Device, FaultMode, Mapping, Target};
//! use gpusvm_softgpu::{Grid, SoftGpu, SvmPtr};
//! use gpusvm_types::{ByteSize, DevAddr, Span, VirtAddr};
//!
//! let gpu = SoftGpu::builder().vram(ByteSize::mib(4)).fault_mode(FaultMode::Declared).build()?;
//! let vm = gpu.page_tables().create_vm()?;
//! let span = Span::from_len(VirtAddr::new(0x40_0000), ByteSize::kib(64))?;
//! let target = Target::Vram(DevAddr::new(0));
//! gpu.page_tables().bind(vm, &Mapping { span, target, allows: Access::Atomic })?;
//!
//! let counter = SvmPtr::<u32>::new(span.start());
//! // Sound: nothing else is in the device's memory.
//! let launch = unsafe { gpu.launch(vm, Grid::new(1000), move |lane| {
//!     lane.atomic_add(counter, 1)?;
//!     Ok(())
//! })? };
//! assert_eq!(launch.wait()?.lanes, 1000);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod builder; // what a device is made of, and what cannot be made
mod gpu; // the device as a whole
mod launch; // a kernel on its way: wait, cancel, outcome
mod queue; // launches that units take chunks of
mod unit; // the threads
mod lane; // what a kernel sees
mod atomics; // read-modify-write of a lane
mod ptr; // addresses in kernels
mod word; // what one access can load and store
mod port; // the access path
mod tlb; // translations a unit remembers
mod fault; // the fault buffer
mod mmu; // address spaces: bind, zap, flush
mod flush; // how a flush knows that nothing is in flight
mod table; // the radix table
mod edit; // changes of the radix table
mod entry; // one entry of it
mod arena; // memory for page tables
mod copy; // the copy engine
mod region; // memory of the device's own
mod peers; // which bus addresses are memory of a device
mod counters; // what is counted

pub use atomics::{AtomicAdd, AtomicInt};
pub use builder::{Builder, SoftGpuError};
pub use counters::Counters;
pub use gpu::SoftGpu;
pub use lane::{Lane, LaneError};
pub use launch::{Grid, Launch, LaunchError, LaunchReport};
pub use ptr::SvmPtr;
pub use word::Word;
