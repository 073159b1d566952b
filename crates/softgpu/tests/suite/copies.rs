//! The copy engine, and that neither it nor the fault path allocates.

use crate::common::{BASE, Driver, Pages, bind_vram, small_gpu};
use gpusvm_device::{Access, CopyOp, Device, DeviceError, Mapping, Target, Verdict};
use gpusvm_softgpu::{Grid, SoftGpu, SvmPtr};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, Span};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Counts what is allocated where it was asked to count.
struct Counting;

/// Allocations on threads that count.
static COUNTED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static COUNTS: Cell<bool> = const { Cell::new(false) };
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let counts = COUNTS.try_with(Cell::get).unwrap_or(false);
        COUNTED.fetch_add(usize::from(counts), Ordering::Relaxed);
        // SAFETY: the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's.
        unsafe { System.dealloc(pointer, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn dma(at: *mut u8) -> DmaAddr {
    DmaAddr::new(at.expose_provenance() as u64)
}

/// Fills pages with a pattern.
fn fill(ram: &Pages, seed: usize) {
    for i in 0..ram.len {
        // SAFETY: in the pages.
        unsafe {
            ram.base
                .wrapping_add(i)
                .write(((i * 13 + seed) % 251) as u8)
        };
    }
}

fn byte(ram: &Pages, i: usize) -> u8 {
    // SAFETY: in the pages.
    unsafe { ram.base.wrapping_add(i).read() }
}

#[test]
fn bytes_go_there_and_back_in_all_sizes() {
    let (gpu, _) = small_gpu();
    let (source, target) = (Pages::new(80), Pages::new(80));
    fill(&source, 1);
    let engine = gpu.copy_engine();
    let mut last = None;
    for len in [0u64, 1, 63, 64, 4096, 5000, 65_535, 65_536, 65_537, 300_000] {
        for skip in [0u64, 1, 64, 100] {
            fill(&target, 9);
            let (len, at) = (ByteSize::new(len), DevAddr::new(12_288 + skip));
            let from = dma(source.base) + ByteSize::new(skip);
            let batch = [
                CopyOp::ToDevice { from, to: at, len },
                CopyOp::ToRam {
                    from: at,
                    to: dma(target.base),
                    len,
                },
            ];
            let fence = engine.submit(&batch).unwrap();
            engine.wait(fence).unwrap();
            assert!(last < Some(fence), "fences ascend");
            last = Some(fence);
            let len = len.as_usize();
            for i in (0..len).step_by(if len > 1000 { 17 } else { 1 }) {
                assert_eq!(
                    byte(&target, i),
                    byte(&source, i + skip as usize),
                    "{i} of {len}"
                );
            }
            assert_eq!(
                usize::from(byte(&target, len)),
                (len * 13 + 9) % 251,
                "the byte behind"
            );
        }
    }
    assert!(gpu.counters().copied_bytes > 0);
}

#[test]
fn clear_zeroes_what_it_says() {
    let (gpu, _) = small_gpu();
    let ram = Pages::new(4);
    fill(&ram, 1);
    let len = ByteSize::from_usize(ram.len);
    let (page, at) = (ByteSize::kib(4), DevAddr::new(0));
    let batch = [
        CopyOp::ToDevice {
            from: dma(ram.base),
            to: at,
            len,
        },
        CopyOp::Clear {
            to: at + page,
            len: page,
        },
        CopyOp::Clear {
            to: at + ByteSize::new(8200),
            len: ByteSize::new(9),
        },
        CopyOp::ToRam {
            from: at,
            to: dma(ram.base),
            len,
        },
    ];
    gpu.copy_engine().submit(&batch).unwrap();
    for i in 0..ram.len {
        let cleared = (4096..8192).contains(&i) || (8200..8209).contains(&i);
        let want = if cleared { 0 } else { (i * 13 + 1) % 251 };
        assert_eq!(usize::from(byte(&ram, i)), want, "{i}");
    }
}

#[test]
fn copies_out_of_bounds_are_refused() {
    let (gpu, _) = small_gpu();
    let ram = Pages::new(2);
    let vram = gpu.caps().vram;
    let len = ByteSize::kib(8);
    for at in [
        DevAddr::new(vram.get() - 4096),
        DevAddr::new(vram.get()),
        DevAddr::new(u64::MAX),
    ] {
        for op in [
            CopyOp::ToDevice {
                from: dma(ram.base),
                to: at,
                len,
            },
            CopyOp::ToRam {
                from: at,
                to: dma(ram.base),
                len,
            },
            CopyOp::Clear { to: at, len },
        ] {
            let refused = gpu.copy_engine().submit(&[op]);
            assert_eq!(refused, Err(DeviceError::OutsideVram { at, len, vram }));
        }
    }
}

#[test]
fn ram_that_is_not_there_is_unreachable() {
    let (gpu, _) = small_gpu();
    let at = DevAddr::new(0);
    for len in [ByteSize::new(8), ByteSize::kib(8), ByteSize::kib(256)] {
        for bad in [0, 8, 1 << 63, u64::MAX - 15] {
            let bad = DmaAddr::new(bad);
            let refused = Err(DeviceError::RamUnreachable { at: bad, len });
            let from = CopyOp::ToDevice {
                from: bad,
                to: at,
                len,
            };
            assert_eq!(
                gpu.copy_engine().submit(&[from]),
                refused,
                "{len} from {bad}"
            );
            let to = CopyOp::ToRam {
                from: at,
                to: bad,
                len,
            };
            assert_eq!(gpu.copy_engine().submit(&[to]), refused, "{len} to {bad}");
        }
    }
}

/// Copies, binds, splits, zaps, flushes, serving faults, and the unit's side of faulting.
#[test]
fn nothing_on_the_fault_path_allocates() {
    let (gpu, vm) = small_gpu();
    let ram = Pages::new(64);
    let from = dma(ram.base);
    let _driver = Driver::start(&gpu, move |gpu: &SoftGpu, fault| {
        COUNTS.set(true);
        let page = Span::page_of(fault.at);
        let to = DevAddr::new(page.start().offset_from(BASE).get());
        let copy = [
            CopyOp::ToDevice {
                from,
                to,
                len: ByteSize::kib(4),
            },
            CopyOp::ToDevice {
                from,
                to: DevAddr::new(4 << 20),
                len: ByteSize::kib(256),
            },
            CopyOp::Clear {
                to,
                len: ByteSize::kib(4),
            },
        ];
        let fence = gpu.copy_engine().submit(&copy).unwrap();
        gpu.copy_engine().wait(fence).unwrap();
        // A block entry, split by the zap of all but the page. Not writable: nobody stores through it.
        let block = Span::block_of(fault.at);
        bind_vram(gpu, vm, block, 0, false);
        for rest in block.without(page).into_iter().flatten() {
            gpu.page_tables().zap(vm, rest);
        }
        gpu.page_tables().flush(vm, block);
        gpu.page_tables().test_and_clear_accessed(vm, block);
        let mapping = Mapping {
            span: page,
            target: Target::Vram(to),
            allows: Access::Atomic,
        };
        gpu.page_tables().bind(vm, &mapping).unwrap();
        COUNTS.set(false);
        Verdict::Replay
    });
    let base = SvmPtr::<u64>::new(BASE);
    let kernel = move |lane: &mut gpusvm_softgpu::Lane<'_>| {
        COUNTS.set(true);
        let result = lane.store(base.add(lane.id() * 512), 1);
        COUNTS.set(false);
        result
    };
    // SAFETY: only VRAM is mapped.
    let launch = unsafe { gpu.launch(vm, Grid::new(400), kernel) }.unwrap();
    launch.wait().unwrap();
    assert!(gpu.counters().faults >= 400, "one for each page at least");
    assert_eq!(COUNTED.load(Ordering::Relaxed), 0);
    COUNTS.set(true);
    drop(Arc::new(1));
    COUNTS.set(false);
    assert_eq!(COUNTED.load(Ordering::Relaxed), 1, "the counter counts");
}
