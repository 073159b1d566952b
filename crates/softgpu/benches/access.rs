//! What accesses, tiles, copies and flushes cost. Prints a table; ratios of one run count.
#![expect(clippy::disallowed_methods, reason = "a benchmark has a clock")]
#![expect(clippy::unwrap_used, reason = "a benchmark that fails says where")]

use gpusvm_device::{Access, CopyOp, Device, Fabric, FaultMode, Mapping, Target, VmId};
use gpusvm_softgpu::{Grid, Lane, LaneError, SoftGpu, SvmPtr};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, Span, VirtAddr};
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

const SIZE: ByteSize = ByteSize::mib(64);
const BASE: VirtAddr = VirtAddr::new(0x10_0000_0000);

fn main() {
    // Tests build it, and need no figures.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let of_fabric = SoftGpu::builder()
        .vram(SIZE)
        .units(1)
        .fault_mode(FaultMode::Declared)
        .fabric(Fabric(0));
    let peer = of_fabric.clone().build().unwrap();
    let gpu = of_fabric.build().unwrap();
    let mut ram = vec![1u8; SIZE.as_usize() + (2 << 20)];
    let skip = ram.as_mut_ptr().align_offset(2 << 20);
    let ram = ram[skip..].as_mut_ptr().expose_provenance() as u64;
    let places = [
        ("VRAM, 2 MiB entries", Target::Vram(DevAddr::new(0)), SIZE),
        (
            "VRAM, 4 KiB entries",
            Target::Vram(DevAddr::new(0)),
            ByteSize::kib(4),
        ),
        (
            "RAM, 2 MiB entries",
            Target::System(DmaAddr::new(ram)),
            SIZE,
        ),
        (
            "peer, 2 MiB entries",
            Target::Peer(peer.aperture().unwrap()),
            SIZE,
        ),
    ];
    warm(&gpu, ram);
    warm(&peer, ram);
    for (name, target, piece) in places {
        let vm = gpu.page_tables().create_vm().unwrap();
        bind(&gpu, vm, target, piece);
        scalars(&gpu, vm, name);
        tiles(&gpu, vm, name);
    }
    copies(&gpu, ram);
    flushes(&gpu);
    faults();
}

fn bind(gpu: &SoftGpu, vm: VmId, target: Target, piece: ByteSize) {
    let whole = Span::from_len(BASE, SIZE).unwrap();
    for block in whole.blocks().flat_map(|b| split(b, piece)) {
        let by = block.start().offset_from(BASE);
        let target = match target {
            Target::Vram(at) => Target::Vram(at + by),
            Target::System(at) => Target::System(at + by),
            Target::Peer(at) => Target::Peer(at + by),
        };
        gpu.page_tables()
            .bind(
                vm,
                &Mapping {
                    span: block,
                    target,
                    allows: Access::Atomic,
                },
            )
            .unwrap();
    }
}

fn split(block: Span, piece: ByteSize) -> Vec<Span> {
    if piece >= block.len() {
        vec![block]
    } else {
        block.pages().map(|p| Span::page_of(p.start())).collect()
    }
}

fn warm(gpu: &SoftGpu, ram: u64) {
    let (from, to) = (DmaAddr::new(ram), DevAddr::new(0));
    gpu.copy_engine()
        .submit(&[CopyOp::ToDevice {
            from,
            to,
            len: SIZE,
        }])
        .unwrap();
}

/// The time of a launch of one lane, in nanoseconds.
fn time(
    gpu: &Arc<SoftGpu>,
    vm: VmId,
    lanes: usize,
    kernel: impl Fn(&mut Lane<'_>) -> Result<(), LaneError> + Send + Sync + Clone + 'static,
) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..5 {
        let start = Instant::now();
        // SAFETY: the kernels of this benchmark write to VRAM, and to RAM of nobody else.
        let launch = unsafe { gpu.launch(vm, Grid::new(lanes), kernel.clone()) };
        launch.unwrap().wait().unwrap();
        best = best.min(start.elapsed().as_secs_f64() * 1e9);
    }
    best
}

fn scalars(gpu: &Arc<SoftGpu>, vm: VmId, name: &str) {
    const COUNT: usize = 4 << 20;
    let base = SvmPtr::<u64>::new(BASE);
    let per = |total: f64| total / COUNT as f64;
    let in_loop = time(gpu, vm, 1, move |lane| {
        let mut sum = 0u64;
        for i in 0..COUNT {
            sum = sum.wrapping_add(lane.load(base.add(i & 0x3ff))?);
        }
        black_box(sum);
        Ok(())
    });
    let lanes = time(gpu, vm, COUNT, move |lane| {
        black_box(lane.load(base.add(lane.id() & 0x3ff))?);
        Ok(())
    });
    let stride = time(gpu, vm, COUNT, move |lane| {
        black_box(lane.load(base.add(lane.id()))?);
        Ok(())
    });
    let store = time(gpu, vm, COUNT, move |lane| {
        lane.store(base.add(lane.id() & 0x3ff), 1)
    });
    let atomic = time(gpu, vm, COUNT, move |lane| {
        lane.atomic_add(base, 1).map(drop)
    });
    println!(
        "{name:22} load {:.2} ns (loop), {:.2} (lane), {:.2} (stream); store {:.2}; atomic {:.2}",
        per(in_loop),
        per(lanes),
        per(stride),
        per(store),
        per(atomic)
    );
}

fn tiles(gpu: &Arc<SoftGpu>, vm: VmId, name: &str) {
    for len in [4usize << 10, 64 << 10, 1 << 20] {
        let lanes = (32 << 20) / len;
        let base = SvmPtr::<u8>::new(BASE);
        let load = time(gpu, vm, 1, move |lane| {
            let mut tile = vec![0u8; len];
            for i in 0..lanes {
                lane.load_tile(base.add(i * len), &mut tile)?;
            }
            Ok(())
        });
        let store = time(gpu, vm, 1, move |lane| {
            let tile = vec![1u8; len];
            for i in 0..lanes {
                lane.store_tile(base.add(i * len), &tile)?;
            }
            Ok(())
        });
        let rate = |ns: f64| (lanes * len) as f64 / ns;
        let size = ByteSize::from_usize(len);
        println!(
            "{name:22} tile {size}: load {:.1} GB/s, store {:.1} GB/s",
            rate(load),
            rate(store)
        );
    }
}

fn copies(gpu: &SoftGpu, ram: u64) {
    let mut plain = vec![0u8; SIZE.as_usize()];
    plain.fill(2);
    for len in [
        4u64 << 10,
        16 << 10,
        32 << 10,
        64 << 10,
        128 << 10,
        256 << 10,
        2 << 20,
    ] {
        let count = SIZE.get() / len;
        let rate = |start: Instant| SIZE.get() as f64 / start.elapsed().as_secs_f64() / 1e9;
        let len_bytes = ByteSize::new(len);
        let mut best = [0f64; 3];
        for _ in 0..5 {
            let start = Instant::now();
            for i in 0..count {
                let (from, to) = (DmaAddr::new(ram + i * len), DevAddr::new(i * len));
                gpu.copy_engine()
                    .submit(&[CopyOp::ToDevice {
                        from,
                        to,
                        len: len_bytes,
                    }])
                    .unwrap();
            }
            best[0] = best[0].max(rate(start));
            let start = Instant::now();
            for i in 0..count {
                let (from, to) = (DevAddr::new(i * len), DmaAddr::new(ram + i * len));
                gpu.copy_engine()
                    .submit(&[CopyOp::ToRam {
                        from,
                        to,
                        len: len_bytes,
                    }])
                    .unwrap();
            }
            best[1] = best[1].max(rate(start));
            let from: *const u8 = std::ptr::with_exposed_provenance(usize::try_from(ram).unwrap());
            let start = Instant::now();
            for i in 0..usize::try_from(count).unwrap() {
                let (at, len) = (i * len_bytes.as_usize(), len_bytes.as_usize());
                // SAFETY: both are 64 MiB.
                unsafe {
                    std::ptr::copy_nonoverlapping(
                        from.wrapping_add(at),
                        plain.as_mut_ptr().wrapping_add(at),
                        len,
                    );
                }
            }
            black_box(&mut plain);
            best[2] = best[2].max(rate(start));
        }
        println!(
            "copy {len_bytes}: to device {:.1}, to RAM {:.1}, memcpy {:.1} GB/s",
            best[0], best[1], best[2]
        );
    }
}

fn flushes(gpu: &Arc<SoftGpu>) {
    let vm = gpu.page_tables().create_vm().unwrap();
    bind(gpu, vm, Target::Vram(DevAddr::new(0)), SIZE);
    let block = Span::block_of(BASE);
    let base = SvmPtr::<u64>::new(BASE);
    let per = |f: &dyn Fn()| {
        let start = Instant::now();
        (0..20_000).for_each(|_| f());
        start.elapsed().as_secs_f64() / 20_000.0 * 1e9
    };
    let idle = per(&|| gpu.page_tables().flush(vm, block));
    // SAFETY: only VRAM is mapped.
    let spin = unsafe {
        gpu.launch(vm, Grid::new(1), move |lane| {
            loop {
                lane.load(base)?;
            }
        })
    };
    let busy = per(&|| gpu.page_tables().flush(vm, block));
    let zap = per(&|| {
        let target = Target::Vram(DevAddr::new(0));
        gpu.page_tables()
            .bind(
                vm,
                &Mapping {
                    span: block,
                    target,
                    allows: Access::Atomic,
                },
            )
            .unwrap();
    });
    let launch = spin.unwrap();
    launch.cancel();
    let _ = launch.wait();
    println!("flush {idle:.0} ns idle, {busy:.0} ns with a unit hammering; bind 2 MiB {zap:.0} ns");
}

fn faults() {
    let gpu = SoftGpu::builder().vram(SIZE).units(1).build().unwrap();
    let vm = gpu.page_tables().create_vm().unwrap();
    let server = Arc::clone(&gpu);
    let thread = std::thread::spawn(move || {
        let queue = server.fault_queue().unwrap();
        let at = VirtAddr::new(0);
        let access = gpusvm_device::Access::Read;
        let none = gpusvm_device::DeviceFault {
            id: gpusvm_device::FaultId(0),
            vm,
            at,
            access,
            stale: false,
        };
        let mut out = [none; 8];
        while !queue.is_closed() {
            let count = queue.take(&mut out, std::time::Duration::from_millis(100));
            for fault in &out[..count] {
                let span = Span::page_of(fault.at);
                let target = Target::Vram(DevAddr::new(0) + span.start().offset_from(BASE));
                server
                    .page_tables()
                    .bind(
                        vm,
                        &Mapping {
                            span,
                            target,
                            allows: Access::Atomic,
                        },
                    )
                    .unwrap();
                queue.resolve(fault, gpusvm_device::Verdict::Replay);
            }
        }
    });
    let base = SvmPtr::<u8>::new(BASE);
    let start = Instant::now();
    // SAFETY: only VRAM is mapped.
    let launch = unsafe {
        gpu.launch(vm, Grid::new(4096), move |lane| {
            lane.store(base.add(lane.id() * 4096), 1)
        })
    };
    launch.unwrap().wait().unwrap();
    println!(
        "fault, bind and replay {:.0} ns",
        start.elapsed().as_secs_f64() / 4096.0 * 1e9
    );
    gpu.fault_queue().unwrap().close();
    thread.join().unwrap();
}
