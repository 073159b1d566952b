//! The address spaces of the device: created, bound, zapped, flushed.
//!
//! # Locking
//!
//! The list of address spaces is read under a shared lock, for as long as it takes to count a
//! reference up. Everything else is in [`Table`] and in `flush`.

use crate::arena::Arena;
use crate::entry::position;
use crate::flush::{Stamps, Units};
use crate::peers::Whose;
use crate::table::Table;
use gpusvm_device::{Caps, DeviceError, Fabric, Mapping, PageTables, Target, VmId};
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_sync::{Arc, RwLock};
use gpusvm_types::{ByteSize, PAGE_SIZE, PageCount, Span};

/// The most address spaces at a time.
const MOST_VMS: u16 = 1024;

/// One address space.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) table: Table,
    pub(crate) stamps: Stamps,
}

/// All address spaces.
#[derive(Debug)]
pub(crate) struct Mmu {
    vms: RwLock<Vec<Option<Arc<Vm>>>>,
    arena: Arc<Arena>,
    units: Arc<Units>,
    vram: ByteSize,
    coherent: bool,
    fabric: Option<Fabric>,
    pub(crate) flushes: AtomicU64,
}

impl Mmu {
    /// No address space yet, for a device that can do this.
    pub(crate) fn new(arena: Arena, units: Arc<Units>, caps: &Caps) -> Self {
        let vms = RwLock::new(Vec::new());
        Self {
            vms,
            arena: Arc::new(arena),
            units,
            vram: caps.vram,
            coherent: caps.coherent,
            fabric: caps.fabric,
            flushes: AtomicU64::new(0),
        }
    }

    /// Leaves the address spaces as they are, for ever: in a child of fork, the arena's lock may be held by
    /// a thread that is not there.
    pub(crate) fn abandon(&mut self) {
        let vms = std::mem::replace(&mut self.vms, RwLock::new(Vec::new()));
        std::mem::forget(vms);
    }

    /// The address space with this id.
    pub(crate) fn vm(&self, vm: VmId) -> Option<Arc<Vm>> {
        self.vms.read().get(usize::from(vm.0)).cloned().flatten()
    }

    /// Refuses what the table cannot hold, or the device not reach.
    fn check(&self, mapping: &Mapping) -> Result<(), DeviceError> {
        let span = mapping.span;
        let bad = |reason| Err(DeviceError::BadMapping { span, reason });
        if Table::within_reach(span) != Some(span) {
            return bad("addresses have 48 bits");
        }
        if !position(mapping.target).is_multiple_of(PAGE_SIZE.get()) {
            return bad("its target is not page aligned");
        }
        match mapping.target {
            Target::Vram(at) => match at.checked_add(span.len()) {
                Some(end) if end.get() <= self.vram.get() => Ok(()),
                _ => Err(DeviceError::OutsideVram {
                    at,
                    len: span.len(),
                    vram: self.vram,
                }),
            },
            Target::System(_) if !self.coherent => bad("the device cannot reach RAM in place"),
            Target::System(at) | Target::Peer(at) if at.checked_add(span.len()).is_none() => {
                bad("its target reaches past the end of RAM")
            }
            Target::System(at) => match Whose::find(at, span.len()) {
                Whose::Ram => Ok(()),
                Whose::Device(fabric) if self.fabric == Some(fabric) => Ok(()),
                _ => bad("its target reaches into memory of a device out of reach"),
            },
            Target::Peer(at) => match Whose::find(at, span.len()) {
                Whose::Device(fabric) if self.fabric == Some(fabric) => Ok(()),
                _ => bad("its target is not memory of a peer of the same fabric"),
            },
        }
    }
}

impl PageTables for Mmu {
    fn create_vm(&self) -> Result<VmId, DeviceError> {
        let mut vms = self.vms.write();
        let free = vms.iter().position(Option::is_none).unwrap_or(vms.len());
        let id = u16::try_from(free)
            .ok()
            .filter(|id| *id < MOST_VMS)
            .ok_or(DeviceError::NoVm)?;
        let table = Table::new(Arc::clone(&self.arena)).ok_or(DeviceError::NoVm)?;
        let vm = Some(Arc::new(Vm {
            table,
            stamps: Stamps::new(),
        }));
        match vms.get_mut(free) {
            Some(slot) => *slot = vm,
            None => vms.push(vm),
        }
        Ok(VmId(id))
    }

    fn destroy_vm(&self, vm: VmId) {
        let gone = self
            .vms
            .write()
            .get_mut(usize::from(vm.0))
            .and_then(Option::take);
        // A launch that should have ended keeps the table until it does.
        drop(gone);
    }

    fn bind(&self, vm: VmId, mapping: &Mapping) -> Result<(), DeviceError> {
        self.check(mapping)?;
        let vm = self.vm(vm).ok_or(DeviceError::NoVm)?;
        let reason = "no memory left for page tables";
        vm.table.bind(mapping).map_err(|_| DeviceError::BadMapping {
            span: mapping.span,
            reason,
        })
    }

    fn zap(&self, vm: VmId, span: Span) -> PageCount {
        match (self.vm(vm), Table::within_reach(span)) {
            (Some(vm), Some(span)) => vm.table.zap(span),
            _ => PageCount::ZERO,
        }
    }

    fn flush(&self, vm: VmId, span: Span) {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        if let (Some(vm), Some(span)) = (self.vm(vm), Table::within_reach(span)) {
            vm.stamps.renew(span);
            self.units.quiesce(span);
        }
    }

    fn test_and_clear_accessed(&self, vm: VmId, span: Span) -> PageCount {
        match (self.vm(vm), Table::within_reach(span)) {
            (Some(vm), Some(span)) => vm.table.test_and_clear_accessed(span),
            _ => PageCount::ZERO,
        }
    }
}
