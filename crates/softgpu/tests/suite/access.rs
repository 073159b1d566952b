//! Loads, stores, atomics and tiles of lanes.

use crate::common::{BASE, Driver, Pages, bind_ram, bind_vram, pages, run, small_gpu};
use gpusvm_device::{Access, Device, FaultError, FaultMode, Mapping, Target, Verdict, VmId};
use gpusvm_softgpu::{Lane, LaneError, LaunchError, SoftGpu, SvmPtr, Word};
use gpusvm_types::{ByteSize, DevAddr, Span, VirtAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs a test body on VRAM and on RAM in place.
fn on_both_memories(body: impl Fn(&Arc<SoftGpu>, VmId)) {
    let (gpu, vm) = small_gpu();
    bind_vram(&gpu, vm, pages(0, 64), 0, true);
    body(&gpu, vm);
    let ram = Pages::new(64);
    let (gpu, vm) = small_gpu();
    bind_ram(&gpu, vm, pages(0, 64), ram.base, true);
    body(&gpu, vm);
}

/// Runs one lane, which must not fail.
fn lane(
    gpu: &Arc<SoftGpu>,
    vm: VmId,
    kernel: impl Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + 'static,
) {
    assert_eq!(run(gpu, vm, 1, kernel).unwrap().lanes, 1);
}

fn round_trip<T: Word + PartialEq + std::fmt::Debug + Send + Sync>(values: &[T]) {
    let values = values.to_vec();
    on_both_memories(|gpu, vm| {
        let values = values.clone();
        lane(gpu, vm, move |lane| {
            let base = SvmPtr::<T>::new(BASE);
            for (i, value) in values.iter().enumerate() {
                lane.store(base.add(i), *value)?;
            }
            for (i, value) in values.iter().enumerate() {
                assert_eq!(lane.load(base.add(i))?, *value);
            }
            Ok(())
        });
    });
}

#[test]
fn every_word_goes_there_and_back() {
    round_trip(&[0u8, 1, 255]);
    round_trip(&[0u16, 1, 0xfffe]);
    round_trip(&[0u32, 1, 0xffff_fffe]);
    round_trip(&[0u64, 1, u64::MAX - 1]);
    round_trip(&[0usize, 1, usize::MAX - 1]);
    round_trip(&[0i8, -1, i8::MIN]);
    round_trip(&[0i16, -1, i16::MIN]);
    round_trip(&[0i32, -1, i32::MIN]);
    round_trip(&[0i64, -1, i64::MIN]);
    round_trip(&[0isize, -1, isize::MIN]);
    round_trip(&[0.5f32, -1.25, f32::INFINITY]);
    round_trip(&[0.5f64, -1.25, f64::MIN_POSITIVE]);
    round_trip(&[SvmPtr::<u32>::new(BASE), SvmPtr::new(VirtAddr::new(8))]);
}

#[test]
fn linked_list_of_raw_pointers_is_walked() {
    let ram = Pages::new(1);
    let first = ram.base.cast::<*const u8>();
    // SAFETY: the page holds 512 pointers.
    let second = unsafe { first.add(100) };
    // SAFETY: in the page.
    unsafe { first.write(second.cast()) };
    // SAFETY: in the page.
    unsafe { second.write(std::ptr::null()) };
    let (gpu, vm) = small_gpu();
    bind_ram(&gpu, vm, ram.span(), ram.base, false);
    let start = SvmPtr::from(first);
    lane(&gpu, vm, move |lane| {
        let next: *const u8 = lane.load(start)?;
        let last: *const u8 = lane.load(SvmPtr::from(next.cast::<*const u8>()))?;
        assert!(last.is_null());
        Ok(())
    });
}

macro_rules! atomics_of {
    ($name:ident, $word:ty) => {
        #[test]
        fn $name() {
            on_both_memories(|gpu, vm| {
                lane(gpu, vm, |lane| {
                    let at = SvmPtr::<$word>::new(BASE);
                    lane.store(at, 10)?;
                    assert_eq!(lane.atomic_add(at, 5)?, 10);
                    assert_eq!(lane.atomic_sub(at, 3)?, 15);
                    assert_eq!(lane.atomic_min(at, 7)?, 12);
                    assert_eq!(lane.atomic_max(at, 9)?, 7);
                    assert_eq!(lane.atomic_and(at, 0b1100)?, 9);
                    assert_eq!(lane.atomic_or(at, 0b0011)?, 8);
                    assert_eq!(lane.atomic_xor(at, 0b0001)?, 11);
                    assert_eq!(lane.atomic_exchange(at, 42)?, 10);
                    assert_eq!(lane.atomic_compare_exchange(at, 41, 1)?, 42);
                    assert_eq!(lane.atomic_compare_exchange(at, 42, 43)?, 42);
                    assert_eq!(lane.atomic_add(at, <$word>::MAX)?, 43);
                    assert_eq!(lane.load(at)?, (43 as $word).wrapping_add(<$word>::MAX));
                    Ok(())
                });
            });
        }
    };
}
atomics_of!(atomics_u32, u32);
atomics_of!(atomics_i32, i32);
atomics_of!(atomics_u64, u64);
atomics_of!(atomics_i64, i64);
atomics_of!(atomics_usize, usize);

#[test]
fn concurrent_atomics_lose_nothing() {
    on_both_memories(|gpu, vm| {
        let whole = SvmPtr::<u32>::new(BASE);
        let float = SvmPtr::<f64>::new(BASE).add(1);
        let top = SvmPtr::<i64>::new(BASE).add(2);
        let report = run(gpu, vm, 20_000, move |lane| {
            lane.atomic_add(whole, 3)?;
            lane.atomic_add(float, 0.5)?;
            lane.atomic_max(top, i64::try_from(lane.id()).unwrap())?;
            Ok(())
        });
        assert_eq!(report.unwrap().lanes, 20_000);
        lane(gpu, vm, move |lane| {
            assert_eq!(lane.load(whole)?, 60_000);
            assert_eq!(lane.load(float)?, 10_000.0);
            assert_eq!(lane.load(top)?, 19_999);
            Ok(())
        });
    });
}

#[test]
fn atomics_in_ram_agree_with_the_cpu() {
    let ram = Pages::new(1);
    let (gpu, vm) = small_gpu();
    bind_ram(&gpu, vm, ram.span(), ram.base, true);
    let counter = SvmPtr::from(ram.base.cast::<u64>());
    let kernel = move |lane: &mut Lane<'_>| lane.atomic_add(counter, 1).map(drop);
    // SAFETY: the word is accessed by atomics only.
    let launch = unsafe { gpu.launch(vm, gpusvm_softgpu::Grid::new(100_000), kernel) }.unwrap();
    // SAFETY: as above; the page is there, and aligned.
    let word = unsafe { AtomicU64::from_ptr(ram.base.cast()) };
    for _ in 0..100_000 {
        word.fetch_add(1, Ordering::Relaxed);
    }
    launch.wait().unwrap();
    assert_eq!(word.load(Ordering::Relaxed), 200_000);
}

#[test]
fn misaligned_scalars_are_refused() {
    let (gpu, vm) = small_gpu();
    bind_vram(&gpu, vm, pages(0, 2), 0, true);
    let at = VirtAddr::new(BASE.get() + 4094);
    let wanted = LaneError::Misaligned { at };
    lane(&gpu, vm, move |lane| {
        assert_eq!(lane.load(SvmPtr::<u32>::new(at)), Err(wanted));
        assert_eq!(lane.store(SvmPtr::<u64>::new(at), 1), Err(wanted));
        assert_eq!(lane.atomic_add(SvmPtr::<i32>::new(at), 1), Err(wanted));
        assert_eq!(
            lane.load_tile(SvmPtr::<u32>::new(at), &mut [0; 4]),
            Err(wanted)
        );
        assert_eq!(lane.load(SvmPtr::<u16>::new(at)), Ok(0));
        Ok(())
    });
}

/// Tiles over pages in scattered, mixed places, of which each faults on its own.
#[test]
fn tiles_cross_pages_entries_and_faults() {
    const PAGES: u64 = 40;
    let (gpu, vm) = small_gpu();
    let ram = Pages::new(64);
    let ram_at = ram.base.expose_provenance();
    let _driver = Driver::start(&gpu, move |gpu, fault| {
        let index = fault.at.page().get() - BASE.page().get();
        // Odd pages in RAM, even ones in VRAM, in reverse order.
        let place = (63 - index) * 4096;
        let target = match index % 2 {
            0 => Target::Vram(DevAddr::new(place)),
            _ => Target::System(gpusvm_types::DmaAddr::new(ram_at as u64 + place)),
        };
        let span = Span::page_of(fault.at);
        gpu.page_tables()
            .bind(
                vm,
                &Mapping {
                    span,
                    target,
                    allows: Access::Atomic,
                },
            )
            .unwrap();
        Verdict::Replay
    });
    lane(&gpu, vm, |lane| {
        for (start, count) in [(3, 5), (0, 600), (500, 1200), (1023, 9000), (7, 20_000)] {
            let sent: Vec<u32> = (0..count).map(|i| i * 7 + start).collect();
            let at = SvmPtr::<u32>::new(BASE).add(usize::try_from(start).unwrap());
            lane.store_tile(at, &sent)?;
            let mut got = vec![0; sent.len()];
            lane.load_tile(at, &mut got)?;
            assert_eq!(got, sent);
            assert_eq!(lane.load(at.add(4))?, sent[4]);
        }
        lane.load_tile(SvmPtr::<u32>::new(BASE), &mut [])
    });
    assert!(gpu.counters().faults < 2 * PAGES);
}

#[test]
fn faults_are_replayed_once_per_page() {
    let (gpu, vm) = small_gpu();
    let served = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&served);
    let _driver = Driver::start(&gpu, move |gpu, fault| {
        counted.fetch_add(1, Ordering::Relaxed);
        assert!(!fault.stale);
        let offset = fault.at.page().start().offset_from(BASE);
        bind_vram(gpu, fault.vm, Span::page_of(fault.at), offset.get(), true);
        Verdict::Replay
    });
    let base = SvmPtr::<u64>::new(BASE);
    let store = run(&gpu, vm, 100_000, move |lane| {
        lane.store(base.add(lane.id()), 3)
    });
    store.unwrap();
    let pages = (100_000u64 * 8).div_ceil(4096);
    let first = served.load(Ordering::Relaxed);
    assert!(
        (pages..=2 * pages).contains(&first),
        "{first} faults for {pages} pages"
    );
    let load = run(&gpu, vm, 100_000, move |lane| {
        assert_eq!(lane.load(base.add(lane.id()))?, 3);
        Ok(())
    });
    load.unwrap();
    assert_eq!(served.load(Ordering::Relaxed), first);
    let counters = gpu.counters();
    assert_eq!(
        (counters.faults, counters.lanes, counters.launches),
        (first, 200_000, 2)
    );
    assert!(counters.tlb_hits() > 190_000 && counters.tlb_misses >= 2 * pages);
}

#[test]
fn write_to_read_only_faults_and_is_upgraded_without_flush() {
    let (gpu, vm) = small_gpu();
    bind_vram(&gpu, vm, pages(0, 1), 0, false);
    let _driver = Driver::start(&gpu, move |gpu, fault| {
        assert!(fault.access.is_write());
        bind_vram(gpu, vm, pages(0, 1), 0, true);
        Verdict::Replay
    });
    lane(&gpu, vm, |lane| {
        let at = SvmPtr::<u32>::new(BASE);
        assert_eq!(lane.load(at)?, 0);
        lane.store(at, 9)?;
        assert_eq!(lane.atomic_add(at, 1)?, 9);
        assert_eq!(lane.load(at)?, 10);
        Ok(())
    });
    assert_eq!(gpu.counters().faults, 1);
}

#[test]
fn failed_fault_stops_only_its_lane() {
    let (gpu, vm) = small_gpu();
    bind_vram(&gpu, vm, pages(0, 1), 0, true);
    let _driver = Driver::start(&gpu, |_, fault| {
        Verdict::Fail(FaultError::Unmapped { at: fault.at })
    });
    let base = SvmPtr::<u32>::new(BASE);
    let result = run(&gpu, vm, 100, move |lane| {
        let page = usize::from(lane.id() % 10 == 7);
        lane.atomic_add(base.add(1024 * page), 1).map(drop)
    });
    let at = pages(1, 1).start();
    let first = LaneError::Fault(FaultError::Unmapped { at });
    assert_eq!(
        result,
        Err(LaunchError::Lanes {
            failed: 10,
            first_lane: 7,
            first
        })
    );
    lane(&gpu, vm, move |lane| {
        assert_eq!(lane.load(base)?, 90);
        Ok(())
    });
}

#[test]
fn ram_that_went_away_is_a_stale_fault() {
    let (gpu, vm) = small_gpu();
    let ram = Pages::new(2);
    bind_ram(&gpu, vm, ram.span(), ram.base, true);
    // SAFETY: the page is ours, and nobody has a reference into it.
    unsafe { rustix::mm::mprotect(ram.base.cast(), 4096, rustix::mm::MprotectFlags::empty()) }
        .unwrap();
    let (start, seen) = (ram.span().start(), Arc::new(AtomicU64::new(0)));
    let counted = Arc::clone(&seen);
    let _driver = Driver::start(&gpu, move |gpu, fault| {
        assert!(fault.stale);
        let page = Span::page_of(fault.at);
        if counted.fetch_add(1, Ordering::Relaxed) == 0 {
            return Verdict::Replay; // nothing changed: it must be reported again
        }
        gpu.page_tables().zap(vm, page);
        gpu.page_tables().flush(vm, page);
        bind_vram(gpu, vm, page, 0, true);
        Verdict::Replay
    });
    lane(&gpu, vm, move |lane| {
        let at = SvmPtr::<u64>::new(start);
        assert_eq!(lane.atomic_add(at, 5)?, 0);
        assert_eq!(lane.load(at)?, 5);
        // A tile that begins in VRAM and ends in RAM.
        lane.store_tile(at.add(510), &[1, 2, 3, 4])?;
        let mut tile = [0; 4];
        lane.load_tile(at.add(510), &mut tile)?;
        assert_eq!(tile, [1, 2, 3, 4]);
        Ok(())
    });
    assert_eq!(seen.load(Ordering::Relaxed), 2);
}

/// One entry of 2 MiB, one page of it gone: the fault names that page, not where the tile began.
#[test]
fn stale_fault_of_a_tile_names_the_page_that_refused() {
    let (gpu, vm) = small_gpu();
    let ram = Pages::new(1024);
    let block = ram.base.wrapping_add(ram.base.align_offset(2 << 20));
    let span = Span::from_len(VirtAddr::from(block), ByteSize::mib(2)).unwrap();
    bind_ram(&gpu, vm, span, block, true);
    let hole = block.wrapping_add(5 * 4096);
    // SAFETY: the page is ours, and nobody has a reference into it.
    unsafe { rustix::mm::mprotect(hole.cast(), 4096, rustix::mm::MprotectFlags::empty()) }.unwrap();
    let wanted = VirtAddr::from(hole);
    let _driver = Driver::start(&gpu, move |gpu, fault| {
        assert_eq!((fault.at, fault.stale), (wanted, true));
        let page = Span::page_of(fault.at);
        gpu.page_tables().zap(vm, page);
        gpu.page_tables().flush(vm, page);
        bind_vram(gpu, vm, page, 0, true);
        Verdict::Replay
    });
    let from = SvmPtr::from(block.cast::<u32>());
    lane(&gpu, vm, move |lane| {
        let sent: Vec<u32> = (0..8192).collect();
        lane.store_tile(from.add(700), &sent)?;
        let mut got = vec![0; sent.len()];
        lane.load_tile(from.add(700), &mut got)?;
        assert_eq!(got, sent);
        Ok(())
    });
    assert_eq!(gpu.counters().faults, 1);
}

#[test]
fn declared_residency_has_no_faults() {
    let gpu = SoftGpu::builder()
        .vram(ByteSize::mib(2))
        .fault_mode(FaultMode::Declared)
        .build()
        .unwrap();
    assert!(gpu.fault_queue().is_none());
    let vm = gpu.page_tables().create_vm().unwrap();
    bind_vram(&gpu, vm, pages(0, 1), 0, false);
    lane(&gpu, vm, |lane| {
        let at = SvmPtr::<u8>::new(BASE);
        assert_eq!(lane.load(at)?, 0);
        let denied = lane.store(at, 1);
        assert!(matches!(
            denied,
            Err(LaneError::Fault(FaultError::NotPermitted { .. }))
        ));
        let absent = lane.load(at.add(4096));
        assert!(matches!(
            absent,
            Err(LaneError::Fault(FaultError::NotDeclared { .. }))
        ));
        Ok(())
    });
}

#[test]
fn addresses_out_of_reach_are_unmapped() {
    let (gpu, vm) = small_gpu();
    lane(&gpu, vm, |lane| {
        for at in [1 << 48, 1 << 60, u64::MAX - 7] {
            let at = VirtAddr::new(at);
            let error = LaneError::Fault(FaultError::Unmapped { at });
            assert_eq!(lane.load(SvmPtr::<u64>::new(at)), Err(error));
        }
        let mut tile = [0u64; 4];
        let end = SvmPtr::<u64>::new(VirtAddr::new(u64::MAX - 7));
        assert!(lane.load_tile(end, &mut tile).is_err());
        Ok(())
    });
    assert_eq!(gpu.counters().faults, 0);
}
