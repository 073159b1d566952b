//! Bad input gets a clear error that names what is wrong, and nothing is lost.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Map, engine, engine_with, within};
use gpusvm::{
    ByteSize, Error, FaultError, FaultMode, Grid, LaneError, LaunchError, Resident, SoftGpu, Svm,
    SvmPtr, VirtAddr,
};
use std::time::Duration;

/// The first lane that stopped, and why.
fn first_failure(error: Error) -> (usize, LaneError, u64) {
    match error {
        Error::Launch(LaunchError::Lanes {
            failed,
            first_lane,
            first,
        }) => (first_lane, first, failed),
        other => panic!("not an error of lanes: {other}"),
    }
}

/// One lane of four reads from `at`; the others write what they should.
fn one_lane_reads(svm: &Svm, at: SvmPtr<u64>) -> (usize, LaneError, u64) {
    let mut out = svm.alloc_slice::<u64>(4).unwrap();
    out.fill(7);
    let p = out.device_ptr();
    // SAFETY: nothing of it is touched until the launch has ended.
    let launch = unsafe {
        svm.launch(Grid::new(4), move |lane| {
            if lane.id() == 2 {
                lane.load(at)?;
            }
            lane.store(p.add(lane.id()), lane.id() as u64)
        })
    };
    let failure = first_failure(launch.unwrap().wait().unwrap_err());
    assert_eq!(out[..], [0, 1, 7, 3], "the lane stopped, and only that one");
    failure
}

#[test]
fn a_read_of_an_address_nobody_mapped_names_it() {
    let svm = engine(ByteSize::mib(2));
    for bad in [0x10u64, 0x6666_0000_0000, 0x7fff_ffff_f000 - 8] {
        let at = VirtAddr::new(bad);
        let (lane, error, failed) = one_lane_reads(&svm, SvmPtr::new(at));
        assert_eq!((lane, failed), (2, 1));
        assert_eq!(error, LaneError::Fault(FaultError::Unmapped { at }));
        assert!(error.to_string().contains(&format!("{bad:#x}")), "{error}");
    }
    // The engine goes on.
    let memory = svm.alloc_slice::<u64>(10).unwrap();
    one_lane_reads(&svm, SvmPtr::new(VirtAddr::new(8)));
    assert_eq!(memory[..], [0; 10]);
}

#[test]
fn null_and_misaligned_addresses() {
    let svm = engine(ByteSize::mib(2));
    let null = SvmPtr::<u64>::from(std::ptr::null::<u64>());
    let at = VirtAddr::new(0);
    assert_eq!(
        one_lane_reads(&svm, null).1,
        LaneError::Fault(FaultError::Unmapped { at })
    );
    let memory = svm.alloc_slice::<u64>(2).unwrap();
    let odd = memory.device_ptr().cast::<u8>().add(3).cast::<u64>();
    assert_eq!(
        one_lane_reads(&svm, odd).1,
        LaneError::Misaligned { at: odd.addr() }
    );
}

#[test]
fn a_store_to_read_only_memory_is_not_permitted() {
    static CONSTANT: [u64; 4] = [1, 2, 3, 4];
    let svm = engine(ByteSize::mib(2));
    let at = SvmPtr::from(CONSTANT.as_ptr());
    // SAFETY: a static that nobody can write.
    let launch = unsafe { svm.launch(Grid::new(1), move |lane| lane.store(at, 9u64)) };
    let (_, error, _) = first_failure(launch.unwrap().wait().unwrap_err());
    let access = gpusvm::Access::Write;
    assert_eq!(
        error,
        LaneError::Fault(FaultError::NotPermitted {
            at: at.addr(),
            access
        })
    );
    assert_eq!(CONSTANT, [1, 2, 3, 4]);
}

#[test]
fn closed_memory_is_not_permitted() {
    let svm = engine(ByteSize::mib(2));
    let map = Map::new(2 << 20, false);
    // SAFETY: our own mapping.
    let closed = unsafe { libc::mprotect(map.at.cast(), map.len, libc::PROT_NONE) };
    assert_eq!(closed, 0);
    let at = SvmPtr::from(map.at.cast::<u64>());
    let access = gpusvm::Access::Read;
    let (_, error, _) = one_lane_reads(&svm, at);
    assert_eq!(
        error,
        LaneError::Fault(FaultError::NotPermitted {
            at: at.addr(),
            access
        })
    );
}

/// Memory that nobody mirrors is unmapped behind the device's back, after it has used it.
#[test]
fn memory_unmapped_behind_the_device_is_an_error_not_a_crash() {
    let svm = engine(ByteSize::mib(2));
    // Far from where the kernel puts mappings: other threads must not get the address meanwhile.
    let far = std::ptr::without_provenance_mut::<libc::c_void>(0x2000_0000_0000);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: replaces nothing.
    let map = unsafe { libc::mmap(far, 2 << 20, access, flags, -1, 0) };
    assert_eq!(map, far);
    let at = SvmPtr::from(map.cast::<u64>());
    // SAFETY: our own mapping.
    unsafe { at.as_ptr().write(1) };
    // SAFETY: reads only.
    let launch = unsafe { svm.launch(Grid::new(1), move |lane| lane.load(at).map(drop)) };
    launch.unwrap().wait().unwrap();
    // SAFETY: our own mapping, which nobody uses any more.
    assert_eq!(unsafe { libc::munmap(map, 2 << 20) }, 0);
    let (_, error, _) = one_lane_reads(&svm, at);
    assert_eq!(
        error,
        LaneError::Fault(FaultError::Unmapped { at: at.addr() })
    );
}

/// Past the end of a file the mapping is there, and refuses.
#[test]
fn past_the_end_of_a_file_is_an_error_not_a_crash() {
    let svm = engine(ByteSize::mib(2));
    // SAFETY: a name that ends in a zero.
    let file = unsafe { libc::memfd_create(c"short".as_ptr(), 0) };
    // SAFETY: a file of our own.
    assert_eq!(unsafe { libc::ftruncate(file, 4096) }, 0);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: no address is asked for. Two pages, of which the file has one.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            8192,
            access,
            libc::MAP_SHARED,
            file,
            0,
        )
    };
    assert_ne!(at, libc::MAP_FAILED);
    let beyond = SvmPtr::from(at.cast::<u64>().wrapping_add(512));
    within(Duration::from_secs(20), || {
        let (_, error, _) = one_lane_reads(&svm, beyond);
        assert_eq!(
            error,
            LaneError::Fault(FaultError::Unmapped { at: beyond.addr() })
        );
    });
}

#[test]
fn sizes_of_zero_and_beyond_any_machine() {
    let svm = engine(ByteSize::mib(2));
    assert!(matches!(svm.alloc_slice::<u8>(0), Err(Error::ZeroSized)));
    assert!(matches!(
        svm.alloc_slice::<[u8; 0]>(5),
        Err(Error::ZeroSized)
    ));
    for huge in [usize::MAX, usize::MAX / 8, 1 << 60] {
        let error = svm.alloc_slice::<u64>(huge).unwrap_err();
        assert_eq!(error.errno(), 12, "{error}");
        assert!(error.to_string().contains("no memory for"), "{error}");
    }
    // SAFETY: no lane, no access.
    let nothing = unsafe { svm.launch(Grid::new(0), |_| Ok(())) };
    assert_eq!(nothing.unwrap().wait().unwrap().lanes, 0);
}

#[test]
fn an_engine_without_a_device() {
    assert!(matches!(Svm::builder().build(), Err(Error::NoDevice)));
}

#[test]
fn a_device_that_cannot_be() {
    for vram in [ByteSize::ZERO, ByteSize::new(5), ByteSize::new(1 << 60)] {
        let error = SoftGpu::with_vram(vram).unwrap_err();
        assert!(!error.to_string().is_empty());
    }
}

/// One page of device memory: everything larger is worked on page by page.
#[test]
fn vram_of_one_page() {
    let svm = engine(ByteSize::kib(4));
    let numbers = svm.alloc_slice::<u64>(4 * 512).unwrap();
    let (p, n) = (numbers.device_ptr(), numbers.len());
    within(Duration::from_secs(60), || {
        // SAFETY: not touched until the launch has ended.
        let launch = unsafe {
            svm.launch(Grid::new(n), move |lane| {
                lane.store(p.add(lane.id()), lane.id() as u64)
            })
        };
        launch.unwrap().wait().unwrap();
    });
    assert!(numbers.iter().enumerate().all(|(i, x)| *x == i as u64));
    drop(numbers);
    assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
}

#[test]
fn undeclared_memory_on_a_device_that_cannot_fault() {
    let svm = engine_with(ByteSize::mib(2), FaultMode::Declared);
    let numbers = svm.alloc_slice::<u64>(8).unwrap();
    let p = numbers.device_ptr();
    // SAFETY: not touched until the launch has ended.
    let launch = unsafe { svm.launch(Grid::new(1), move |lane| lane.store(p, 1u64)) };
    let (_, error, _) = first_failure(launch.unwrap().wait().unwrap_err());
    assert_eq!(
        error,
        LaneError::Fault(FaultError::NotDeclared { at: p.addr() })
    );
    assert_eq!(numbers[0], 0);
}

#[test]
fn declared_memory_that_does_not_exist() {
    let svm = engine_with(ByteSize::mib(2), FaultMode::Declared);
    let nowhere = gpusvm::Span::page_of(VirtAddr::new(0x6666_0000_0000));
    let resident = Resident::new().span(nowhere, gpusvm::Access::Read);
    // SAFETY: the launch does not begin.
    let launch = unsafe { svm.launch_resident(0, Grid::new(1), resident, |_| Ok(())) };
    let error = launch.unwrap_err();
    assert!(
        matches!(error, Error::Declared(FaultError::Unmapped { .. })),
        "{error}"
    );
    // SAFETY: as above.
    let launch = unsafe { svm.launch_resident(7, Grid::new(1), Resident::new(), |_| Ok(())) };
    assert!(matches!(launch, Err(Error::NoDevice)));
}
