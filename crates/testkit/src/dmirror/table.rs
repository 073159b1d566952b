//! Page tables: one entry a page, so that a checker can look at each.

use super::access::Handler;
use gpusvm_device::{Access, Caps, DeviceError, Mapping, PageTables, Target, VmId};
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_sync::{Arc, Mutex, RwLock};
use gpusvm_types::{ByteSize, PAGE_SIZE, PageCount, PageIndex, Span, VirtAddr};
use std::collections::BTreeMap;

/// Where a page leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The page's place.
    pub target: Target,
    /// The most that is allowed.
    pub allows: Access,
    accessed: bool,
}

/// One address space of the device.
#[derive(Default)]
pub(super) struct Vm {
    entries: Mutex<BTreeMap<PageIndex, Entry>>,
    /// Held to read by an access, to write by a flush.
    pub(super) flight: RwLock<()>,
    pub(super) handler: Mutex<Option<Handler>>,
    pub(super) faults: AtomicU64,
}

/// Why there is no way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Miss {
    Unmapped,
    NotPermitted,
}

impl Vm {
    pub(super) fn translate(&self, at: VirtAddr, access: Access) -> Result<Target, Miss> {
        let mut entries = self.entries.lock();
        let entry = entries.get_mut(&at.page()).ok_or(Miss::Unmapped)?;
        if access > entry.allows {
            return Err(Miss::NotPermitted);
        }
        entry.accessed = true;
        Ok(offset(entry.target, at.page_offset()))
    }
}

impl core::fmt::Debug for Vm {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (pages, faults) = (self.entries.lock().len(), &self.faults);
        write!(f, "Vm({pages} pages, {faults:?} faults)")
    }
}

/// All address spaces of a device.
#[derive(Debug)]
pub(super) struct Tables {
    vms: RwLock<Vec<Option<Arc<Vm>>>>,
    vram: ByteSize,
    coherent: bool,
    atomics_on_ram: bool,
    has_fabric: bool,
}

impl Tables {
    pub(super) fn new(caps: &Caps) -> Self {
        Self {
            vms: RwLock::new(Vec::new()),
            vram: caps.vram,
            coherent: caps.coherent,
            atomics_on_ram: caps.atomics_on_ram,
            has_fabric: caps.fabric.is_some(),
        }
    }

    pub(super) fn vm(&self, vm: VmId) -> Option<Arc<Vm>> {
        self.vms.read().get(usize::from(vm.0)).cloned().flatten()
    }

    /// Every mapping of every address space.
    pub(super) fn mappings(&self) -> Vec<(VmId, PageIndex, Entry)> {
        let vms = self.vms.read().clone();
        let mut all = Vec::new();
        for (id, vm) in (0..).map(VmId).zip(&vms) {
            let Some(vm) = vm else { continue };
            let entries = vm.entries.lock();
            all.extend(entries.iter().map(|(page, entry)| (id, *page, *entry)));
        }
        all
    }

    fn check(&self, mapping: &Mapping) -> Result<(), DeviceError> {
        let span = mapping.span;
        let bad = |reason| Err(DeviceError::BadMapping { span, reason });
        match mapping.target {
            Target::Vram(at) if !at.is_aligned(PAGE_SIZE) => bad("not a page"),
            Target::Vram(at) => match at.checked_add(span.len()) {
                Some(end) if end.get() <= self.vram.get() => Ok(()),
                _ => Err(DeviceError::OutsideVram {
                    at,
                    len: span.len(),
                    vram: self.vram,
                }),
            },
            Target::System(_) if !self.coherent => bad("the device cannot reach RAM in place"),
            Target::System(_) if mapping.allows == Access::Atomic && !self.atomics_on_ram => {
                bad("atomics on RAM are none")
            }
            Target::Peer(_) if !self.has_fabric => bad("the device has no fabric"),
            Target::System(_) | Target::Peer(_) => Ok(()),
        }
    }
}

impl PageTables for Tables {
    fn create_vm(&self) -> Result<VmId, DeviceError> {
        let mut vms = self.vms.write();
        let id = u16::try_from(vms.len()).map_err(|_| DeviceError::NoVm)?;
        vms.push(Some(Arc::default()));
        Ok(VmId(id))
    }

    fn destroy_vm(&self, vm: VmId) {
        let gone = self
            .vms
            .write()
            .get_mut(usize::from(vm.0))
            .and_then(Option::take);
        if let Some(gone) = gone {
            // Its handler may keep who keeps the device.
            let handler = gone.handler.lock().take();
            drop(handler);
            let left = gone.entries.lock().len();
            assert_eq!(left, 0, "an address space ends without mappings");
        }
    }

    fn bind(&self, vm: VmId, mapping: &Mapping) -> Result<(), DeviceError> {
        self.check(mapping)?;
        let vm = self.vm(vm).ok_or(DeviceError::NoVm)?;
        let mut entries = vm.entries.lock();
        for (i, page) in (0..).zip(mapping.span.pages()) {
            let entry = Entry {
                target: offset(mapping.target, PageCount::new(i).bytes()),
                allows: mapping.allows,
                accessed: false,
            };
            entries.insert(page, entry);
        }
        Ok(())
    }

    fn zap(&self, vm: VmId, span: Span) -> PageCount {
        let Some(vm) = self.vm(vm) else {
            return PageCount::ZERO;
        };
        let mut entries = vm.entries.lock();
        let mapped = span.pages().filter(|page| entries.remove(page).is_some());
        PageCount::from_usize(mapped.count())
    }

    fn flush(&self, vm: VmId, span: Span) {
        let Some(vm) = self.vm(vm) else { return };
        // An access that began before holds it: from here on none is in flight.
        drop(vm.flight.write());
        let _ = span;
    }

    fn test_and_clear_accessed(&self, vm: VmId, span: Span) -> PageCount {
        let Some(vm) = self.vm(vm) else {
            return PageCount::ZERO;
        };
        let mut entries = vm.entries.lock();
        let inside = entries.range_mut(span.first_page()..span.first_page() + span.page_count());
        let accessed =
            inside.filter_map(|(_, entry)| core::mem::take(&mut entry.accessed).then_some(()));
        PageCount::from_usize(accessed.count())
    }
}

/// So much further on.
fn offset(target: Target, by: ByteSize) -> Target {
    match target {
        Target::Vram(at) => Target::Vram(at + by),
        Target::System(at) => Target::System(at + by),
        Target::Peer(at) => Target::Peer(at + by),
    }
}

/// How many faults an address space had.
pub(super) fn faults(vm: &Vm) -> u64 {
    vm.faults.load(Ordering::Acquire)
}
