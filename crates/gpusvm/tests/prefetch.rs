//! Memory that is where it is wanted before a device touches it.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::gated::Gated;
use common::{InPlace, Map, Stay, World, is_so_within, wait_until, within, world, world_with};
use gpusvm::driver::{
    Location, MAX_PREFETCHES, PREFETCHERS, PrefetchError, PrefetchReason, Prefetched, worker,
};
use gpusvm::{ByteSize, Error, FaultError, Grid, SoftGpu, Span, Svm, VirtAddr};
use gpusvm_mm_linux::Allocation;
use gpusvm_pagemap::MigrateError;
use gpusvm_types::{BLOCK_SIZE, PageCount};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const BLOCK: usize = 2 << 20;
const LONG: Duration = Duration::from_secs(120);

fn bytes(world: &World, blocks: usize) -> Allocation<u8> {
    let mut bytes = Allocation::<u8>::new(&world.process, blocks * BLOCK).unwrap();
    bytes.fill(7);
    bytes
}

fn one_gpu() -> World {
    world(&[SoftGpu::with_vram(ByteSize::mib(16)).unwrap()])
}

/// One test at a time, of those that have threads that prefetch: one of them counts threads.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many threads of this name the process has.
fn threads(of: &str) -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|it| std::fs::read_to_string(it.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with(of)).count()
}

fn counts(of: &Prefetched) -> [u64; 6] {
    [
        of.moved,
        of.in_place,
        of.home,
        of.valid,
        of.failed,
        of.invalid,
    ]
}

#[test]
fn what_was_prefetched_is_there_and_is_valid_the_next_time() {
    within(LONG, || {
        let world = one_gpu();
        let vm = &world.vms[0];
        let memory = bytes(&world, 3);
        let spans = [memory.span()];
        let done = vm.prefetch(&spans, Location::Device).wait().unwrap();
        assert_eq!(counts(&done), [3, 0, 0, 0, 0, 0]);
        assert_eq!(world.regions[0].used(), memory.span().page_count());
        let again = vm.prefetch(&spans, Location::Device).wait().unwrap();
        assert_eq!(counts(&again), [0, 0, 0, 3, 0, 0]);
        assert_eq!(vm.stats().faults, 0);
        let home = vm.prefetch(&spans, Location::Ram).wait().unwrap();
        assert_eq!(counts(&home), [0, 0, 3, 0, 0, 0]);
        assert_eq!(world.regions[0].used(), PageCount::ZERO);
        let again = vm.prefetch(&spans, Location::Ram).wait().unwrap();
        assert_eq!(counts(&again), [0, 0, 0, 3, 0, 0]);
        assert!(memory.iter().all(|x| *x == 7));
    });
}

/// One byte of a block was fetched by a CPU: the range is not all there, and is fetched again.
#[test]
fn a_range_that_is_not_all_there_is_not_valid() {
    within(LONG, || {
        let world = one_gpu();
        let vm = &world.vms[0];
        let memory = bytes(&world, 1);
        let spans = [memory.span()];
        world.regions[0]
            .pagemap()
            .set_cpu_fault_window(ByteSize::new(4096));
        let _ = vm.prefetch(&spans, Location::Device).wait().unwrap();
        assert_eq!(memory[0], 7);
        let again = vm.prefetch(&spans, Location::Device).wait().unwrap();
        assert_eq!(counts(&again), [1, 0, 0, 0, 0, 0]);
    });
}

#[test]
fn advised_means_what_a_fault_would_do() {
    within(LONG, || {
        for (moves, wanted) in [(true, [1, 0, 0, 0, 0, 0]), (false, [0, 1, 0, 0, 0, 0])] {
            let gpu = SoftGpu::with_vram(ByteSize::mib(4)).unwrap();
            let world = match moves {
                true => world_with(&[gpu], Stay(Duration::ZERO)),
                false => world_with(&[gpu], InPlace(None)),
            };
            let memory = bytes(&world, 1);
            let vm = &world.vms[0];
            let done = vm.prefetch(&[memory.span()], Location::Advised).wait();
            assert_eq!(counts(&done.unwrap()), wanted);
            let again = vm.prefetch(&[memory.span()], Location::Advised).wait();
            assert_eq!(counts(&again.unwrap()), [0, 0, 0, 1, 0, 0]);
        }
    });
}

/// Holes are skipped, however large; a span of nothing else is counted; memory that cannot migrate is
/// mapped where it is.
#[test]
fn holes_and_memory_that_stays() {
    within(LONG, || {
        let world = one_gpu();
        let vm = &world.vms[0];
        let memory = bytes(&world, 1);
        let plain = Map::new(BLOCK, false);
        plain.bytes().fill(1);
        let in_plain = Span::covering(VirtAddr::from(plain.at.cast_const()), BLOCK_SIZE).unwrap();
        // Below all that is mapped, and larger than could be looked at block by block.
        let hole = Span::new(VirtAddr::new(0x1000), VirtAddr::new(0x8000)).unwrap();
        let vast = Span::new(VirtAddr::new(1 << 57), VirtAddr::new(1 << 62)).unwrap();
        let spans = [hole, in_plain, vast, memory.span()];
        let done = vm.prefetch(&spans, Location::Device).wait().unwrap();
        assert_eq!((done.moved, done.invalid, done.failed), (1, 2, 0));
        assert!(done.in_place >= 1, "{done:?}");
    });
}

#[test]
fn the_first_error_is_told_and_the_rest_goes_on() {
    within(LONG, || {
        let world = one_gpu();
        let vm = &world.vms[0];
        let memory = bytes(&world, 2);
        let closed = Map::new(BLOCK, false);
        // SAFETY: our own mapping.
        unsafe { libc::mprotect(closed.at.cast(), BLOCK, libc::PROT_NONE) };
        let in_closed = Span::covering(VirtAddr::from(closed.at.cast_const()), BLOCK_SIZE).unwrap();
        let prefetch = vm.prefetch(&[in_closed, memory.span()], Location::Device);
        let PrefetchError { span, reason } = prefetch.wait().unwrap_err();
        assert_eq!(span, in_closed);
        assert!(
            matches!(
                reason,
                PrefetchReason::Fault(FaultError::NotPermitted { .. })
            ),
            "{reason:?}"
        );
        assert_eq!(counts(&prefetch.progress()), [2, 0, 0, 0, 1, 0]);
        // SAFETY: our own mapping.
        unsafe { libc::mprotect(closed.at.cast(), BLOCK, libc::PROT_READ) };
    });
}

#[test]
fn memory_that_could_not_move_is_mapped_in_place_and_told() {
    within(LONG, || {
        let world = one_gpu();
        let vm = &world.vms[0];
        let memory = bytes(&world, 1);
        world.regions[0].unbind().unwrap();
        let prefetch = vm.prefetch(&[memory.span()], Location::Device);
        let error = prefetch.wait().unwrap_err();
        assert!(
            matches!(
                error.reason,
                PrefetchReason::Migrate(MigrateError::Unbound { .. })
            ),
            "{error}"
        );
        assert_eq!(counts(&prefetch.progress()), [0, 1, 0, 0, 1, 0]);
        assert!(vm.svm().has_mapping(memory.span()));
    });
}

#[test]
fn nothing_begins_after_a_cancel_and_nothing_is_under_way() {
    let _alone = alone();
    within(LONG, || {
        let gpu = Gated::new(ByteSize::mib(64), 1);
        let world = world(&[Arc::clone(&gpu) as _]);
        let workers = worker::start(&world.regions[0]).unwrap();
        assert_eq!(
            threads("gpusvm-prefetch"),
            0,
            "no thread when there is no work"
        );
        let memory = bytes(&world, 8);
        gpu.hold(u32::MAX);
        let vm = &world.vms[0];
        let prefetch = vm.prefetch(&[memory.span()], Location::Device);
        let many = u32::try_from(PREFETCHERS).unwrap();
        gpu.wait_held(many);
        assert!(!prefetch.is_done());
        std::thread::scope(|scope| {
            let cancels = scope.spawn(|| prefetch.cancel());
            let returned = is_so_within(Duration::from_millis(50), || cancels.is_finished());
            assert!(!returned, "copies are under way");
            gpu.open();
        });
        assert!(prefetch.is_done());
        let done = prefetch.wait().unwrap();
        assert!(done.cancelled);
        assert_eq!(counts(&done), [u64::from(many), 0, 0, 0, 0, 0]);
        let pages = BLOCK_SIZE.whole_pages().get() * u64::from(many);
        assert_eq!(world.regions[0].used(), PageCount::new(pages));
        wait_until("threads without work end", || {
            threads("gpusvm-prefetch") == 0
        });
        gpusvm_device::FaultQueue::close(&*gpu);
        workers.into_iter().for_each(|it| it.join().unwrap());
    });
}

/// A handle that nobody keeps: the prefetch goes on, as long as its address space does.
#[test]
fn a_prefetch_that_is_dropped_goes_on() {
    let _alone = alone();
    within(LONG, || {
        let gpu = SoftGpu::with_vram(ByteSize::mib(16)).unwrap();
        let svm = Svm::builder().device(gpu).build().unwrap();
        let mut memory = svm.alloc_slice::<u64>(4 * BLOCK / 8).unwrap();
        memory.fill(5);
        let len = ByteSize::from_usize(4 * BLOCK);
        drop(svm.prefetch(0, memory.as_ptr(), len).unwrap());
        wait_until("all is there", || svm.stats().vram_used_bytes == len.get());
        let home = svm.prefetch_to_ram(memory.as_ptr(), len).unwrap();
        assert_eq!(home.wait().unwrap().home, 4);
        assert_eq!(svm.stats().vram_used_bytes, 0);
        assert_eq!(svm.last_fault(0).unwrap(), None);
        assert!(matches!(svm.last_fault(1), Err(Error::NoDevice)));
        assert!(matches!(
            svm.prefetch(0, memory.as_ptr(), ByteSize::new(0)),
            Err(Error::ZeroSized)
        ));
        svm.unbind(0).unwrap();
        assert!(matches!(
            svm.prefetch_advised(0, memory.as_ptr(), len),
            Err(Error::Unbound { device: 0 })
        ));
    });
}

/// Each address space of a device has mappings of its own.
#[test]
fn a_prefetch_maps_in_the_address_space_that_asked() {
    within(LONG, || {
        let gpu = SoftGpu::with_vram(ByteSize::mib(16)).unwrap();
        let svm = Svm::builder().device(gpu).build().unwrap();
        let mut memory = svm.alloc_slice::<u64>(BLOCK / 8).unwrap();
        memory.fill(5);
        let (mine, at) = (svm.create_vm(0).unwrap(), memory.device_ptr());
        let len = ByteSize::from_usize(BLOCK);
        let done = mine.prefetch(memory.as_ptr(), len).unwrap().wait();
        assert_eq!(done.unwrap().moved, 1);
        let faults = [&mine, svm.vm(0).unwrap()].map(|vm| {
            // SAFETY: nobody else uses the memory until the launch has ended.
            let launch = unsafe { vm.launch(Grid::new(1), move |lane| lane.store(at, 6)) };
            launch.unwrap().wait().unwrap();
            vm.stats().faults
        });
        assert_eq!(faults, [0, 1]);
        assert!(matches!(
            mine.prefetch(memory.as_ptr(), ByteSize::ZERO),
            Err(Error::ZeroSized)
        ));
        svm.unbind(0).unwrap();
        assert!(matches!(
            mine.prefetch(memory.as_ptr(), len),
            Err(Error::Unbound { device: 0 })
        ));
    });
}

/// So many wait in line; who asks for one more does it before he goes on.
#[test]
fn a_full_queue_makes_who_asks_do_the_work() {
    within(LONG, || {
        // No thread works in the background here.
        let world = one_gpu();
        let vm = &world.vms[0];
        let memory = bytes(&world, 1);
        let ask = || vm.prefetch(&[memory.span()], Location::Device);
        let queued: Vec<_> = (0..MAX_PREFETCHES).map(|_| ask()).collect();
        assert!(queued.iter().all(|it| !it.is_done()));
        assert_eq!(world.regions[0].used(), PageCount::ZERO);
        let one_more = ask();
        assert!(one_more.is_done());
        assert_eq!(one_more.progress().moved, 1);
        assert!(queued.iter().all(|it| !it.is_done()));
        while world.regions[0].work_on_prefetches() {}
        assert!(queued.iter().all(|it| it.progress().valid == 1));
    });
}
