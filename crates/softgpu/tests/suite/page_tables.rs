//! Bind, zap, split, accessed bits, and what the table refuses.

use crate::common::{BASE, Driver, bind_vram, pages, run, small_gpu};
use gpusvm_device::{
    Access, Device, DeviceError, FaultError, FaultMode, Mapping, PageTables, Target, Verdict, VmId,
};
use gpusvm_softgpu::{LaneError, LaunchError, SoftGpu, SvmPtr};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, PageCount, Span, VirtAddr};
use std::sync::{Arc, Mutex};

const BLOCK: u64 = 2 << 20;

/// Loads a byte of each page in turn. A page is its mark, or absent.
fn read_pages(gpu: &Arc<SoftGpu>, vm: VmId, first: u64, count: usize) -> Vec<Option<u64>> {
    let seen = Arc::new(Mutex::new(vec![None; count]));
    let result = Arc::clone(&seen);
    let base = SvmPtr::<u64>::new(pages(first, 1).start());
    let launch = run(gpu, vm, count, move |lane| {
        match lane.load(base.add(lane.id() * 512)) {
            Ok(mark) => result.lock().unwrap()[lane.id()] = Some(mark),
            Err(LaneError::Fault(FaultError::NotDeclared { .. })) => {}
            Err(other) => return Err(other),
        }
        Ok(())
    });
    launch.unwrap();
    let seen = seen.lock().unwrap();
    seen.clone()
}

/// A device without faults whose VRAM page `n` begins with the number `n + 1`.
fn marked_gpu() -> (Arc<SoftGpu>, VmId) {
    let builder = SoftGpu::builder().vram(ByteSize::mib(16)).units(2);
    let gpu = builder.fault_mode(FaultMode::Declared).build().unwrap();
    let vm = gpu.page_tables().create_vm().unwrap();
    bind_vram(&gpu, vm, pages(0, 4096), 0, true);
    let base = SvmPtr::<u64>::new(BASE);
    run(&gpu, vm, 4096, move |lane| {
        lane.store(base.add(lane.id() * 512), lane.id() as u64 + 1)
    })
    .unwrap();
    unbind(&gpu, vm, pages(0, 4096));
    (gpu, vm)
}

fn unbind(gpu: &SoftGpu, vm: VmId, span: Span) -> PageCount {
    let count = gpu.page_tables().zap(vm, span);
    gpu.page_tables().flush(vm, span);
    count
}

#[test]
fn zap_in_the_middle_of_a_block_entry_splits_it() {
    let (gpu, vm) = marked_gpu();
    bind_vram(&gpu, vm, pages(0, 1024), BLOCK, true);
    assert_eq!(read_pages(&gpu, vm, 0, 1024)[600], Some(512 + 601));
    assert_eq!(unbind(&gpu, vm, pages(100, 7)), PageCount::new(7));
    for (page, mark) in read_pages(&gpu, vm, 0, 1024).into_iter().enumerate() {
        let want = (!(100..107).contains(&page)).then_some(512 + page as u64 + 1);
        assert_eq!(mark, want, "page {page}");
    }
    // A whole entry again, over the table that the split left, and another split.
    bind_vram(&gpu, vm, pages(0, 512), 0, true);
    assert_eq!(read_pages(&gpu, vm, 0, 512)[103], Some(104));
    assert_eq!(unbind(&gpu, vm, pages(511, 2)), PageCount::new(2));
    assert_eq!(
        read_pages(&gpu, vm, 510, 4),
        [Some(511), None, None, Some(512 + 514)]
    );
    assert_eq!(unbind(&gpu, vm, pages(0, 4096)), PageCount::new(1022));
    assert_eq!(unbind(&gpu, vm, pages(0, 4096)), PageCount::ZERO);
}

#[test]
fn a_page_bound_inside_a_larger_entry_replaces_only_itself() {
    let (gpu, vm) = marked_gpu();
    bind_vram(&gpu, vm, pages(0, 512), 0, true);
    bind_vram(&gpu, vm, pages(20, 1), 4096 * 1000, true);
    gpu.page_tables().flush(vm, pages(20, 1));
    assert_eq!(
        read_pages(&gpu, vm, 19, 3),
        [Some(20), Some(1001), Some(22)]
    );
}

/// A flat list of pages against the tree, in random operations over three blocks.
#[test]
fn random_binds_and_zaps_against_a_flat_map() {
    const PAGES: u64 = 1536;
    for seed in 1..=6u64 {
        println!("seed {seed}");
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = move |below: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let (gpu, vm) = marked_gpu();
        let mut flat = vec![None; PAGES as usize];
        for step in 0..60 {
            // Often aligned, so that all sizes of entries come about.
            let align = [1, 1, 16, 512][next(4) as usize];
            let first = next(PAGES) / align * align;
            let count = (next(600) + 1).next_multiple_of(align).min(PAGES - first);
            let (span, range) = (
                pages(first, count),
                first as usize..(first + count) as usize,
            );
            if next(3) == 0 {
                let mapped = flat[range.clone()].iter().flatten().count();
                assert_eq!(
                    unbind(&gpu, vm, span),
                    PageCount::from_usize(mapped),
                    "step {step}"
                );
                flat[range].fill(None);
            } else {
                let place = (next(4096 - count) + first % align) / align * align;
                bind_vram(&gpu, vm, span, place * 4096, true);
                gpu.page_tables().flush(vm, span);
                let marks = (place..).map(|page| Some(page + 1));
                flat[range]
                    .iter_mut()
                    .zip(marks)
                    .for_each(|(page, mark)| *page = mark);
            }
            if step % 6 == 5 {
                assert_eq!(read_pages(&gpu, vm, 0, PAGES as usize), flat, "step {step}");
            }
        }
    }
}

#[test]
fn accessed_pages_are_counted_at_the_resolution_of_entries() {
    let (gpu, vm) = marked_gpu();
    let tables = gpu.page_tables();
    bind_vram(&gpu, vm, pages(0, 512), 0, true);
    // 64 KiB entries: the target is not aligned to a block.
    bind_vram(&gpu, vm, pages(512, 64), BLOCK + (64 << 10), true);
    // 4 KiB entries: it is not aligned to 64 KiB either.
    bind_vram(&gpu, vm, pages(1024, 64), BLOCK + 4096, true);
    let everything = pages(0, 2048);
    let touch = |page: u64| {
        tables.flush(vm, everything);
        assert!(read_pages(&gpu, vm, page, 1)[0].is_some());
    };
    assert_eq!(
        tables.test_and_clear_accessed(vm, everything),
        PageCount::ZERO
    );
    for (page, count) in [(17, 512), (512 + 17, 16), (1024 + 17, 1)] {
        touch(page);
        assert_eq!(
            tables.test_and_clear_accessed(vm, everything),
            PageCount::new(count)
        );
        assert_eq!(
            tables.test_and_clear_accessed(vm, everything),
            PageCount::ZERO
        );
    }
    // Only the part that is asked for counts; a split entry hands its bit down.
    touch(17);
    unbind(&gpu, vm, pages(0, 2));
    assert_eq!(
        tables.test_and_clear_accessed(vm, pages(10, 5)),
        PageCount::new(5)
    );
}

/// Through a mapping for stores, also one that a unit remembers, an atomic operation faults.
#[test]
fn an_atomic_operation_needs_a_mapping_that_allows_it() {
    let (gpu, vm) = small_gpu();
    let wanted = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&wanted);
    let bind = move |gpu: &SoftGpu, allows| {
        let mapping = Mapping {
            span: pages(0, 1),
            target: Target::Vram(DevAddr::new(0)),
            allows,
        };
        gpu.page_tables().bind(vm, &mapping).unwrap();
    };
    bind(&gpu, Access::Write);
    let _driver = Driver::start(&gpu, move |gpu, fault| {
        seen.lock().unwrap().push((fault.at, fault.access));
        bind(gpu, Access::Atomic);
        Verdict::Replay
    });
    let at = SvmPtr::<u64>::new(BASE);
    run(&gpu, vm, 1, move |lane| {
        lane.store(at, 7)?;
        assert_eq!(lane.atomic_add(at, 1)?, 7);
        assert_eq!(lane.atomic_max(at, 99)?, 8);
        assert_eq!(lane.load(at)?, 99);
        Ok(())
    })
    .unwrap();
    let faults = wanted.lock().unwrap().clone();
    assert_eq!(faults, [(at.addr(), Access::Atomic)]);
}

#[test]
fn what_the_table_cannot_hold_is_refused() {
    let (gpu, vm) = small_gpu();
    let tables = gpu.page_tables();
    let vram = |span, at| Mapping {
        span,
        target: Target::Vram(DevAddr::new(at)),
        allows: Access::Atomic,
    };
    let outside = tables.bind(vm, &vram(pages(0, 2), (16 << 20) - 4096));
    assert!(
        matches!(outside, Err(DeviceError::OutsideVram { .. })),
        "{outside:?}"
    );
    let unaligned = tables.bind(vm, &vram(pages(0, 1), 8));
    assert!(
        matches!(unaligned, Err(DeviceError::BadMapping { .. })),
        "{unaligned:?}"
    );
    let high = Span::page_of(VirtAddr::new(1 << 48));
    let far = tables.bind(vm, &vram(high, 0));
    assert!(
        matches!(far, Err(DeviceError::BadMapping { .. })),
        "{far:?}"
    );
    assert_eq!(tables.zap(vm, high), PageCount::ZERO);
    assert_eq!(
        tables.bind(VmId(99), &vram(pages(0, 1), 0)),
        Err(DeviceError::NoVm)
    );
    let everything = Span::new(VirtAddr::new(0), VirtAddr::new(u64::MAX - 4095)).unwrap();
    tables.bind(vm, &vram(pages(0, 3), 0)).unwrap();
    tables.flush(vm, everything);
    assert_eq!(tables.zap(vm, everything), PageCount::new(3));
}

#[test]
fn device_that_is_not_coherent_maps_no_ram() {
    let gpu = SoftGpu::builder()
        .vram(ByteSize::mib(2))
        .coherent(false)
        .build()
        .unwrap();
    assert!(!gpu.caps().coherent && !gpu.caps().atomics_on_ram);
    let vm = gpu.page_tables().create_vm().unwrap();
    let target = Target::System(DmaAddr::new(0x1000));
    let mapping = Mapping {
        span: pages(0, 1),
        target,
        allows: Access::Atomic,
    };
    let refused = gpu.page_tables().bind(vm, &mapping);
    assert!(matches!(refused, Err(DeviceError::BadMapping { .. })));
}

#[test]
fn address_spaces_are_apart_and_come_back() {
    let (gpu, first) = small_gpu();
    let tables: &dyn PageTables = gpu.page_tables();
    let _driver = Driver::start(&gpu, |_, fault| {
        Verdict::Fail(FaultError::Unmapped { at: fault.at })
    });
    let second = tables.create_vm().unwrap();
    bind_vram(&gpu, first, pages(0, 1), 0, true);
    bind_vram(&gpu, second, pages(0, 1), 4096, true);
    let at = SvmPtr::<u32>::new(BASE);
    run(&gpu, first, 1, move |lane| lane.store(at, 1)).unwrap();
    run(&gpu, second, 1, move |lane| lane.store(at, 2)).unwrap();
    let check = |vm, value| {
        run(&gpu, vm, 1, move |lane| {
            assert_eq!(lane.load(at)?, value);
            Ok(())
        })
    };
    check(first, 1).unwrap();
    check(second, 2).unwrap();
    tables.destroy_vm(second);
    // The same id, and nothing of its predecessor, in table or TLB.
    assert_eq!(tables.create_vm(), Ok(second));
    assert!(matches!(check(second, 2), Err(LaunchError::Lanes { .. })));
    tables.destroy_vm(second);
    let mut made = Vec::new();
    while let Ok(vm) = tables.create_vm() {
        made.push(vm);
    }
    assert_eq!(made.len(), 1023);
}
