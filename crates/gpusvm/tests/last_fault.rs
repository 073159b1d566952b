//! What is to be known of the last fault of a device.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{InPlace, Stay, world, world_with};
use gpusvm::driver::Served;
use gpusvm::{Access, ByteSize, FaultError, Policy, SoftGpu, VirtAddr};
use gpusvm_device::{DeviceFault, FaultId, Verdict};
use gpusvm_mm_linux::Allocation;
use std::time::Duration;

fn fault(vm: &gpusvm::driver::Vm<gpusvm_mm_linux::Process>, at: VirtAddr) -> DeviceFault {
    DeviceFault {
        id: FaultId(0),
        vm: vm.id(),
        at,
        access: Access::Write,
        stale: false,
    }
}

fn served_by(policy: impl Policy + 'static) -> (Served, u32) {
    let gpu = SoftGpu::with_vram(ByteSize::mib(4)).unwrap();
    let world = world_with(&[gpu], policy);
    let bytes = Allocation::<u8>::new(&world.process, 2 << 20).unwrap();
    let vm = &world.vms[0];
    let before = gpusvm_mm::AddressSpace::now(&*world.process);
    let at = bytes.span().start() + ByteSize::new(4096);
    assert_eq!(vm.serve(&fault(vm, at)), Verdict::Replay);
    let report = vm.last_fault().unwrap();
    assert_eq!((report.at, report.access), (at, Access::Write));
    assert!(report.when.since(before) >= report.took);
    (report.outcome.unwrap(), report.passes)
}

#[test]
fn it_says_where_the_pages_were_mapped() {
    assert_eq!(served_by(Stay(Duration::ZERO)), (Served::InDeviceMemory, 1));
    assert_eq!(served_by(InPlace(None)), (Served::InPlace, 1));
}

#[test]
fn it_says_why_a_fault_was_not_served() {
    let world = world(&[SoftGpu::with_vram(ByteSize::mib(4)).unwrap()]);
    let vm = &world.vms[0];
    assert_eq!(vm.last_fault(), None);
    let at = VirtAddr::new(0x1000);
    let error = FaultError::Unmapped { at };
    assert_eq!(vm.serve(&fault(vm, at)), Verdict::Fail(error));
    let report = vm.last_fault().unwrap();
    assert_eq!((report.outcome, report.passes), (Err(error), 1));
    vm.close();
    assert_eq!(
        vm.serve(&fault(vm, at)),
        Verdict::Fail(FaultError::Closed { at })
    );
    let report = vm.last_fault().unwrap();
    assert_eq!(report.outcome, Err(FaultError::Closed { at }));
}
