//! Page tables of the device: what its accesses translate to.

use crate::{Access, DeviceError};
use gpusvm_types::{DevAddr, DmaAddr, PageCount, Span};

/// One address space of the device (the hardware's ASID or PASID).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub u16);

/// Where a mapping leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The device's own memory.
    Vram(DevAddr),
    /// RAM, in place; or the memory of a peer, for a driver that need not tell them apart.
    System(DmaAddr),
    /// The memory of a peer of the same fabric, in place, at a bus address in its aperture.
    ///
    /// As `System`, with these differences. It takes a fabric, not coherent access to RAM. It does
    /// not go out of date behind the driver's back, as RAM does: no access through it is a `stale`
    /// fault, and one that the peer no longer answers is `PeerLost`. Atomic operations are allowed.
    Peer(DmaAddr),
}

/// A contiguous mapping: `span` translates to as many bytes at `target`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// What is mapped.
    pub span: Span,
    /// Where its first page leads; the others follow.
    pub target: Target,
    /// The most that is allowed: what needs less is, too. Atomic operations on RAM only where
    /// [`Caps::atomics_on_ram`](crate::Caps) says that they are.
    pub allows: Access,
}

/// The page tables of a device.
///
/// # Locking
///
/// Called under the driver's notifier lock; takes its own locks inside and calls nothing back.
pub trait PageTables: Send + Sync {
    /// A new, empty address space.
    ///
    /// # Errors
    ///
    /// `NoVm` when the device has no room for another.
    fn create_vm(&self) -> Result<VmId, DeviceError>;

    /// Forgets an address space. Nothing may run in it any more.
    fn destroy_vm(&self, vm: VmId);

    /// Enters a mapping, with the largest entries that alignment on both sides allows. What was
    /// mapped there before is replaced; to allow more needs no flush.
    ///
    /// # Errors
    ///
    /// `BadMapping`, also for a peer out of reach; `OutsideVram`, `NoVm`.
    fn bind(&self, vm: VmId, mapping: &Mapping) -> Result<(), DeviceError>;

    /// Clears every entry in `span`; a larger entry that reaches out of it is split first. Says how
    /// many pages were mapped. Accesses that began before may still be in flight: `flush` them.
    fn zap(&self, vm: VmId, span: Span) -> PageCount;

    /// Invalidates cached translations of `span` and returns only when no access to it that began
    /// before is in flight.
    fn flush(&self, vm: VmId, span: Span);

    /// Says how many pages of `span` were accessed since last asked, at the resolution of the
    /// entries, and begins anew. An estimate: cached translations may hide accesses.
    fn test_and_clear_accessed(&self, vm: VmId, span: Span) -> PageCount;
}
