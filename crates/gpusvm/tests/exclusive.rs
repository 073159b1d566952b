//! Pages that a device has for itself, and how they differ from those that merely live there.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{InPlace, Map, built, can_adopt, within};
use gpusvm::{ByteSize, Grid, PagePlace, SoftGpu, Svm, SvmPtr};
use std::sync::Arc;
use std::time::Duration;

const PAGE: usize = 4096;

fn bytes(pages: usize) -> ByteSize {
    ByteSize::from_usize(pages * PAGE)
}

/// A device whose atomics work in its own memory only, and whose faults move nothing else.
fn engine() -> Svm {
    let gpu = SoftGpu::builder().vram(ByteSize::mib(8)).units(1);
    let gpu = gpu.atomics_on_ram(false).build().unwrap();
    built(Svm::builder().device(gpu).policy(Arc::new(InPlace(None))))
}

/// Which pages of 512 are exclusive, and which are on the device.
fn seen(svm: &Svm, at: *const u8) -> (Vec<usize>, Vec<usize>) {
    let pages = svm.vm(0).unwrap().snapshot(at, bytes(512)).unwrap();
    let which = |is: &dyn Fn(&gpusvm::PageState) -> bool| {
        let pages = pages.iter().enumerate();
        pages.filter(|(_, page)| is(page)).map(|(n, _)| n).collect()
    };
    let exclusive = which(&|page| page.exclusive);
    let here = which(&|page| page.place == PagePlace::Device(0));
    (exclusive, here)
}

fn atomics(svm: &Svm, at: *mut u64, pages: usize) {
    let p = SvmPtr::<u64>::new(gpusvm::VirtAddr::from(at.cast_const()));
    // SAFETY: nobody else uses the memory until the launch has ended.
    let launch = unsafe {
        svm.launch(Grid::new(1), move |lane| {
            (0..pages).try_for_each(|n| lane.atomic_add(p.add(n * PAGE / 8), 1).map(drop))
        })
    };
    launch.unwrap().wait().unwrap();
}

/// What came by itself is not exclusive; what was asked for is, page by page; and a touch ends it.
#[test]
fn pages_are_exclusive_as_long_as_nobody_else_touches_them() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        let mut slice = svm.alloc_slice::<u8>(512 * PAGE).unwrap();
        slice.fill(1);
        let at = slice.as_ptr();
        let page = |n: usize| at.wrapping_add(n * PAGE);
        let vm = svm.vm(0).unwrap();
        vm.migrate(page(100), bytes(3)).unwrap();
        assert_eq!(seen(&svm, at), (vec![], vec![100, 101, 102]));
        vm.make_exclusive(page(101), bytes(4)).unwrap();
        assert_eq!(seen(&svm, at), ((101..105).collect(), (100..105).collect()));
        // The device uses them for atomics without a fault, where they are.
        let faults = svm.stats().device_faults;
        atomics(&svm, page(101).cast_mut().cast(), 4);
        assert_eq!(svm.stats().device_faults, faults);
        assert_eq!(seen(&svm, at).0, [101, 102, 103, 104]);
        // Others go and come; these stay what they are.
        vm.migrate_back(page(100), bytes(2)).unwrap();
        assert_eq!(seen(&svm, at), ((102..105).collect(), (102..105).collect()));
        assert_eq!(slice[103 * PAGE], 2);
        assert_eq!(slice[102 * PAGE + 9], 1);
        let (exclusive, here) = seen(&svm, at);
        assert!(!exclusive.contains(&103) && !exclusive.contains(&102));
        assert_eq!(exclusive, here);
        vm.migrate(at, bytes(512)).unwrap();
        assert!(!seen(&svm, at).0.contains(&103));
    });
}

/// Memory that cannot be a device's alone is refused, and pages that it may not write.
#[test]
fn what_cannot_be_exclusive_is_refused() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        if !can_adopt(&svm) {
            return;
        }
        let vm = svm.vm(0).unwrap();
        let (eperm, ebusy) = (1, 16);
        let refused = |at: *mut u8| vm.make_exclusive(at, bytes(1)).unwrap_err().errno();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let nowhere = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let shared = unsafe { libc::mmap(nowhere, PAGE, access, flags, -1, 0) };
        assert_ne!(shared, libc::MAP_FAILED);
        assert_eq!(refused(shared.cast()), ebusy);
        // SAFETY: ours, and nobody uses it any more.
        unsafe { libc::munmap(shared, PAGE) };
        let map = Map::new(4 * PAGE, false);
        map.bytes().fill(2);
        let _adopted = svm.adopt(map.at, bytes(4)).unwrap();
        // SAFETY: permissions of our own memory, which nobody refers to.
        let done = unsafe { libc::mprotect(map.at.cast(), PAGE, libc::PROT_READ) };
        assert_eq!(done, 0);
        assert_eq!(refused(map.at), eperm);
        vm.make_exclusive(map.at.wrapping_add(PAGE), bytes(3))
            .unwrap();
        // SAFETY: our own memory.
        assert_eq!(unsafe { map.at.read_volatile() }, 2);
    });
}

/// Why a mapping of device memory allows atomics from the first touch on: or each range would fault twice.
#[test]
fn a_load_and_then_an_atomic_are_one_fault() {
    within(Duration::from_secs(60), || {
        let gpu = SoftGpu::builder().vram(ByteSize::mib(8)).units(1).build();
        let svm = built(Svm::builder().device(gpu.unwrap()));
        let mut slice = svm.alloc_slice::<u64>(512 * PAGE / 8).unwrap();
        slice.fill(1);
        let p = slice.device_ptr();
        // SAFETY: nobody else uses the slice until the launch has ended.
        let launch = unsafe {
            svm.launch(Grid::new(1), move |lane| {
                let value = lane.load(p)?;
                lane.store(p.add(1), value)?;
                lane.atomic_add(p.add(2), value).map(drop)
            })
        };
        launch.unwrap().wait().unwrap();
        assert_eq!(svm.stats().device_faults, 1);
        assert!(
            seen(&svm, slice.as_ptr().cast()).0.is_empty(),
            "nobody asked for that"
        );
        assert_eq!(slice[2], 2);
    });
}
