//! A device refuses a mapping half way through a binding: then all is as it was.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

use gpusvm::driver::{BindError, Devices, Object, Vm, VramRegion};
use gpusvm::{Access, ByteSize, FaultError, MigrateOnTouch, Span, VirtAddr};
use gpusvm_device::{
    Caps, CopyEngine, Device, DeviceError, FaultQueue, Mapping, PageTables, Target, Verdict, VmId,
};
use gpusvm_mm_sim::Sim;
use gpusvm_testkit::dmirror::{Dmirror, Interconnect, Spec};
use gpusvm_testkit::world::{Cpu, Kind, Prot, Simulated, World};
use gpusvm_types::{DevAddr, PageCount, PageIndex};
use std::sync::{Arc, Mutex};

/// Refuses mappings when a test says so.
#[derive(Debug)]
struct Refusing {
    device: Arc<Dmirror>,
    /// How many mappings it still makes, and how many it refuses then.
    refuses: Mutex<(u32, u32)>,
}

impl Device for Refusing {
    fn caps(&self) -> &Caps {
        self.device.caps()
    }

    fn copy_engine(&self) -> &dyn CopyEngine {
        self.device.copy_engine()
    }

    fn page_tables(&self) -> &dyn PageTables {
        self
    }

    fn fault_queue(&self) -> Option<&dyn FaultQueue> {
        None
    }
}

impl PageTables for Refusing {
    fn create_vm(&self) -> Result<VmId, DeviceError> {
        self.device.page_tables().create_vm()
    }

    fn destroy_vm(&self, vm: VmId) {
        self.device.page_tables().destroy_vm(vm);
    }

    fn bind(&self, vm: VmId, mapping: &Mapping) -> Result<(), DeviceError> {
        let mut refuses = self.refuses.lock().unwrap();
        match *refuses {
            (0, 0) => {}
            (0, _) => {
                refuses.1 -= 1;
                return Err(REFUSED);
            }
            _ => refuses.0 -= 1,
        }
        self.device.page_tables().bind(vm, mapping)
    }

    fn zap(&self, vm: VmId, span: Span) -> PageCount {
        self.device.page_tables().zap(vm, span)
    }

    fn flush(&self, vm: VmId, span: Span) {
        self.device.page_tables().flush(vm, span);
    }

    fn test_and_clear_accessed(&self, vm: VmId, span: Span) -> PageCount {
        self.device.page_tables().test_and_clear_accessed(vm, span)
    }
}

const REFUSED: DeviceError = DeviceError::Lost {
    reason: "a test wanted this mapping to fail",
};
/// The next mappings are made as they should be.
const HEALTHY: (u32, u32) = (0, 0);
const PAGES: u64 = 24;

struct Lab {
    vm: Arc<Vm<Sim>>,
    region: Arc<VramRegion<Sim>>,
    device: Arc<Refusing>,
    span: Span,
    // Last: all of it lives there.
    world: Arc<Simulated>,
}

/// What is bound, and what is mapped.
type State = (Vec<Option<DevAddr>>, Vec<(PageIndex, Target, Access)>);

impl Lab {
    /// ```text
    ///   page   0        8       16       24
    ///          | old    | hole  | mirror |       what is bound
    ///               |      new      |            what is to be
    /// ```
    fn new() -> (Self, Object<Sim>) {
        let world = Simulated::start(0).unwrap();
        let spec = Spec {
            vram: ByteSize::kib(256),
            ..Spec::default()
        };
        let device = Arc::new(Refusing {
            device: Dmirror::new(&Interconnect::new(world.bus()), &spec),
            refuses: Mutex::new(HEALTHY),
        });
        let devices = Devices::new(world.mm());
        let region = VramRegion::new(&devices, Arc::clone(&device) as _).unwrap();
        let vm = Vm::new(&region, Arc::new(MigrateOnTouch::default())).unwrap();
        let serves = Arc::downgrade(&vm);
        device.device.set_handler(
            vm.id(),
            Some(Arc::new(move |fault| match serves.upgrade() {
                Some(vm) => vm.serve(fault),
                None => Verdict::Fail(FaultError::Closed { at: fault.at }),
            })),
        );
        let span = world.map(PageCount::new(PAGES), Prot::ReadWrite, Kind::Mirrored);
        let lab = Self {
            vm,
            region,
            device,
            span,
            world,
        };
        // Device memory is in pieces: so the new object has several, and takes several mappings.
        let pieces: Vec<_> = (0..16).map(|_| lab.object(4)).collect();
        let (kept, gone): (Vec<_>, Vec<_>) = (0..).zip(pieces).partition(|(i, _)| i % 2 == 0);
        drop(gone);
        let new = lab.object(16);
        drop(kept);
        let old = lab.object(8);
        lab.vm
            .bind_object(lab.pages(0, 8), &old, ByteSize::ZERO)
            .unwrap();
        lab.vm.unbind(lab.pages(8, 8)).unwrap();
        let words: Vec<_> = lab
            .pages(0, 8)
            .pages()
            .map(|page| (page.start(), page.start().get()))
            .collect();
        lab.device.device.store(lab.vm.id(), &words).unwrap();
        (lab, new)
    }

    fn object(&self, pages: u64) -> Object<Sim> {
        let size = PageCount::new(pages).bytes();
        self.region.create_object(size).unwrap()
    }

    fn pages(&self, first: u64, count: u64) -> Span {
        let first = self.span.first_page() + PageCount::new(first);
        Span::of_pages(first, PageCount::new(count))
    }

    fn new_span(&self) -> Span {
        self.pages(4, 16)
    }

    fn load(&self, at: VirtAddr) -> Result<u64, FaultError> {
        let loaded = self.device.device.load(self.vm.id(), &[at]);
        loaded.map(|words| words[0])
    }

    fn state(&self) -> State {
        let bound = self
            .span
            .pages()
            .map(|page| self.vm.object_at(page.start()));
        // Not whether it was used: that is a hint, and may be forgotten.
        let mapped = self.device.device.mappings().into_iter();
        let mapped = mapped.map(|(_, page, entry)| (page, entry.target, entry.allows));
        (bound.collect(), mapped.collect())
    }

    fn refuse(&self, after: u32, count: u32) {
        *self.device.refuses.lock().unwrap() = (after, count);
    }

    /// The new object is to be bound, which the device refuses.
    fn is_refused(&self, new: &Object<Sim>) {
        let span = self.new_span();
        let refused = self.vm.bind_object(span, new, ByteSize::ZERO);
        let error = REFUSED;
        assert_eq!(refused, Err(BindError::Device { span, error }));
        self.refuse(0, 0);
    }

    /// What the device finds is what it found before.
    fn is_as_before(&self) {
        for page in self.pages(0, 8).pages() {
            assert_eq!(
                self.load(page.start()),
                Ok(page.start().get()),
                "the old object"
            );
        }
        for page in self.pages(8, 8).pages() {
            let at = page.start();
            assert_eq!(self.load(at), Err(FaultError::NotBound { at }), "the hole");
        }
        for page in self.pages(16, 8).pages() {
            let at = page.start();
            self.world.write(at, at.get()).unwrap();
            assert_eq!(self.load(at), Ok(at.get()), "the mirror");
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.vm.close();
    }
}

#[test]
fn a_refused_binding_leaves_all_as_it_was() {
    let mut refused = 0;
    for after in 0.. {
        let (lab, new) = Lab::new();
        let before = lab.state();
        let used = lab.region.used();
        lab.refuse(after, 1);
        let span = lab.new_span();
        if lab.vm.bind_object(span, &new, ByteSize::ZERO).is_ok() {
            break;
        }
        refused += 1;
        assert_eq!(lab.state(), before, "after {after} mappings");
        assert_eq!(lab.region.used(), used, "nobody keeps anything");
        lab.is_as_before();
        assert_eq!(lab.vm.stats().rebound, 0, "nothing had been lost");
        drop(new);
        assert!(lab.region.stats().object_pages < used, "the new one goes");
    }
    assert!(refused > 1, "it takes several mappings");
}

/// The device refuses to go back, too: what was bound is made again by the fault that wants it.
#[test]
fn what_a_refused_binding_cannot_put_back_comes_with_a_fault() {
    let (lab, new) = Lab::new();
    let (bound, _) = lab.state();
    lab.refuse(1, 2);
    lab.is_refused(&new);
    assert_eq!(lab.state().0, bound, "bound as before");
    lab.is_as_before();
    assert_eq!(lab.vm.stats().rebound, 1, "by one fault");
    assert_eq!(
        lab.vm.make_accessible(lab.span.start(), Access::Read),
        Ok(())
    );
}

#[test]
fn what_was_refused_can_be_bound_later() {
    let (lab, new) = Lab::new();
    lab.refuse(1, 1);
    lab.is_refused(&new);
    let span = lab.new_span();
    lab.vm.bind_object(span, &new, ByteSize::ZERO).unwrap();
    for page in span.pages() {
        assert_eq!(lab.load(page.start()), Ok(0), "the new object");
    }
    for page in lab.pages(0, 4).pages() {
        assert_eq!(
            lab.load(page.start()),
            Ok(page.start().get()),
            "the old one"
        );
    }
}
