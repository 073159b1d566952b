//! Devices that reach each other's memory: copies, mappings, and what is refused.

use crate::common::{BASE, Pages, bind_vram, most, pages, run};
use gpusvm_device::{
    Access, CopyOp, Device, DeviceError, Fabric, FaultError, FaultMode, Mapping, Target, VmId,
};
use gpusvm_softgpu::{Builder, Grid, LaneError, LaunchError, SoftGpu, SvmPtr};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, PageCount, Span};
use std::sync::Arc;

const VRAM: ByteSize = ByteSize::mib(8);
const WHERE: DevAddr = DevAddr::new(4 << 20);

/// A device of `Fabric(fabric)` that must reach its peers by the fabric, not as it reaches RAM.
fn builder(fabric: u32) -> Builder {
    let gpu = SoftGpu::builder().vram(VRAM).units(2).coherent(false);
    gpu.fabric(Fabric(fabric))
}

fn pair() -> (Arc<SoftGpu>, Arc<SoftGpu>) {
    (builder(1).build().unwrap(), builder(1).build().unwrap())
}

/// Where `at` of a device's memory is for its peers.
fn bus(gpu: &SoftGpu, at: DevAddr) -> DmaAddr {
    gpu.aperture().unwrap() + at.offset_from(DevAddr::new(0))
}

fn dma(ram: &Pages) -> DmaAddr {
    DmaAddr::new(ram.base.expose_provenance() as u64)
}

fn to_device(gpu: &SoftGpu, from: DmaAddr, to: DevAddr, len: ByteSize) -> Result<(), DeviceError> {
    let op = CopyOp::ToDevice { from, to, len };
    gpu.copy_engine().submit(&[op]).map(drop)
}

fn to_bus(gpu: &SoftGpu, from: DevAddr, to: DmaAddr, len: ByteSize) -> Result<(), DeviceError> {
    let op = CopyOp::ToRam { from, to, len };
    gpu.copy_engine().submit(&[op]).map(drop)
}

fn word(gpu: &SoftGpu, at: DevAddr) -> u64 {
    let ram = Pages::new(1);
    to_bus(gpu, at, dma(&ram), ByteSize::new(8)).unwrap();
    // SAFETY: in the page.
    unsafe { ram.base.cast::<u64>().read() }
}

fn bytes(ram: &Pages) -> &[u8] {
    // SAFETY: nobody writes to the pages while a test compares them.
    unsafe { std::slice::from_raw_parts(ram.base, ram.len) }
}

/// Pages in which no two neighbours are alike.
fn patterned(count: usize, seed: usize) -> Pages {
    let ram = Pages::new(count);
    for i in 0..ram.len {
        let value = ((i * 13 + i / 4096 + seed) % 251) as u8;
        // SAFETY: in the pages.
        unsafe { ram.base.wrapping_add(i).write(value) };
    }
    ram
}

fn bind_peer(
    gpu: &SoftGpu,
    vm: VmId,
    span: Span,
    at: DmaAddr,
    writable: bool,
) -> Result<(), DeviceError> {
    let target = Target::Peer(at);
    let mapping = Mapping {
        span,
        target,
        allows: most(writable),
    };
    gpu.page_tables().bind(vm, &mapping)
}

#[test]
fn copies_go_from_device_to_device() {
    let (a, b) = pair();
    let (source, target) = (patterned(520, 1), Pages::new(520));
    let whole = ByteSize::from_usize(source.len);
    to_device(&a, dma(&source), DevAddr::new(0), whole).unwrap();
    for len in [8u64, 100, 4096, 5000, 65_536, 65_537, 2 << 20] {
        for (skip, pull) in [(0, false), (64, false), (100, true), (4096, true)] {
            let (len, from) = (ByteSize::new(len), DevAddr::new(skip));
            let clear = CopyOp::Clear {
                to: WHERE,
                len: whole,
            };
            b.copy_engine().submit(&[clear]).unwrap();
            if pull {
                to_device(&b, bus(&a, from), WHERE, len).unwrap();
            } else {
                to_bus(&a, from, bus(&b, WHERE), len).unwrap();
            }
            to_bus(&b, WHERE, dma(&target), whole).unwrap();
            let (skip, len) = (skip as usize, len.as_usize());
            let (moved, rest) = bytes(&target).split_at(len);
            assert!(moved == &bytes(&source)[skip..skip + len], "{len}, {pull}");
            assert!(rest.iter().all(|&byte| byte == 0), "behind {len}, {pull}");
        }
    }
}

#[test]
fn copies_past_the_end_of_a_peer_are_refused() {
    let (a, b) = pair();
    let start = bus(&b, DevAddr::new(0));
    let before = DmaAddr::new(start.get() - 4096);
    let (len, from) = (ByteSize::kib(8), DevAddr::new(0));
    let end = start + VRAM;
    for at in [before, DmaAddr::new(end.get() - 4096)] {
        let refused = Err(DeviceError::RamUnreachable { at, len });
        assert_eq!(to_bus(&a, from, at, len), refused);
        assert_eq!(to_device(&a, at, from, len), refused);
    }
    // As before, the engine's own side is looked at too.
    let at = DevAddr::new(VRAM.get() - 4096);
    let vram = VRAM;
    let refused = Err(DeviceError::OutsideVram { at, len, vram });
    assert_eq!(to_bus(&a, at, start, len), refused);
    // The last bytes are in reach.
    let last = DevAddr::new(VRAM.get() - len.get());
    to_bus(&a, from, bus(&b, last), len).unwrap();
}

#[test]
fn devices_of_another_fabric_are_out_of_reach() {
    let b = builder(2).build().unwrap();
    let without = SoftGpu::builder().vram(VRAM).units(1).build().unwrap();
    assert_eq!((without.aperture(), without.caps().fabric), (None, None));
    assert_eq!(b.caps().fabric, Some(Fabric(2)));
    let (len, at) = (ByteSize::kib(4), bus(&b, WHERE));
    for a in [without, builder(3).build().unwrap()] {
        let vm = a.page_tables().create_vm().unwrap();
        for copied in [to_bus(&a, WHERE, at, len), to_device(&a, at, WHERE, len)] {
            assert!(matches!(copied, Err(DeviceError::Unsupported { .. })));
        }
        for target in [Target::Peer(at), Target::System(at)] {
            let mapping = Mapping {
                span: pages(0, 1),
                target,
                allows: Access::Read,
            };
            let bound = a.page_tables().bind(vm, &mapping);
            assert!(matches!(bound, Err(DeviceError::BadMapping { .. })));
        }
        assert_eq!(a.page_tables().zap(vm, pages(0, 1)), PageCount::ZERO);
    }
}

#[test]
fn mappings_of_what_no_peer_has_are_refused() {
    // Of no other test: none of their devices may turn up where one is gone.
    let (a, b) = [(); 2].map(|()| builder(4).build().unwrap()).into();
    let vm = a.page_tables().create_vm().unwrap();
    let (ram, span) = (Pages::new(2), pages(0, 2));
    let last = bus(&b, DevAddr::new(VRAM.get() - 4096));
    let odd = bus(&b, DevAddr::new(8));
    for at in [dma(&ram), last, odd, DmaAddr::new(u64::MAX << 12)] {
        let bound = bind_peer(&a, vm, span, at, true);
        assert!(
            matches!(bound, Err(DeviceError::BadMapping { .. })),
            "{at:?}"
        );
    }
    let gone = bus(&b, WHERE);
    bind_peer(&a, vm, span, gone, true).unwrap();
    assert_eq!(a.page_tables().zap(vm, span), PageCount::new(2));
    a.page_tables().flush(vm, span);
    drop(b);
    let bound = bind_peer(&a, vm, span, gone, true);
    assert!(matches!(bound, Err(DeviceError::BadMapping { .. })));
}

/// Spans that take entries of 4 KiB, 64 KiB and 2 MiB, each with where it lies in the peer.
fn of_all_sizes() -> [(Span, DevAddr); 3] {
    let far = Span::block_of(BASE + ByteSize::mib(4));
    [
        (pages(1, 7), DevAddr::new(4096 * 3)),
        (pages(16, 32), DevAddr::new(65_536)),
        (far, WHERE),
    ]
}

#[test]
fn lanes_work_on_a_peer_through_all_page_sizes() {
    let (a, b) = pair();
    let vm = a.page_tables().create_vm().unwrap();
    for (span, at) in of_all_sizes() {
        bind_peer(&a, vm, span, bus(&b, at), true).unwrap();
        let words = span.len().as_usize() / 8;
        let base = SvmPtr::<u64>::new(span.start());
        let report = run(&a, vm, words, move |lane| {
            let (here, id) = (base.add(lane.id()), lane.id() as u64);
            lane.store(here, id)?;
            assert_eq!(lane.atomic_add(here, 1)?, id);
            assert_eq!(lane.atomic_max(here, 3)?, id + 1);
            assert_eq!(lane.load(here)?, (id + 1).max(3));
            Ok(())
        });
        assert_eq!(report.unwrap().lanes, words);
        for i in [0, 1, 511, 512, words as u64 - 1] {
            assert_eq!(word(&b, at + ByteSize::new(i * 8)), (i + 1).max(3), "{i}");
        }
        run(&a, vm, 1, move |lane| {
            let mut tile = [0u64; 3000];
            lane.load_tile(base, &mut tile)?;
            assert!(tile.iter().zip(1u64..).all(|(word, i)| *word == i.max(3)));
            lane.store_tile(base, &[7u64; 3000])
        })
        .unwrap();
        assert_eq!(word(&b, at), 7);
        let seen = a.page_tables().test_and_clear_accessed(vm, span);
        assert_eq!(seen, span.page_count());
    }
    assert_eq!(word(&b, DevAddr::new(0)), 0, "nothing beside");
    // Splits the large entries, and takes away no more than it says.
    for (span, at) in of_all_sizes() {
        let hole = Span::page_of(span.start() + ByteSize::kib(4));
        assert_eq!(a.page_tables().zap(vm, hole), PageCount::new(1));
        a.page_tables().flush(vm, hole);
        let behind = ByteSize::kib(8);
        let from = SvmPtr::<u64>::new(span.start() + behind);
        let want = word(&b, at + behind);
        run(&a, vm, 1, move |lane| {
            assert_eq!(lane.load(from)?, want);
            Ok(())
        })
        .unwrap();
        assert_eq!(a.page_tables().zap(vm, span), {
            span.page_count() - PageCount::new(1)
        });
    }
}

#[test]
fn both_devices_add_to_one_word_and_lose_nothing() {
    const LANES: usize = 50_000;
    let (a, b) = pair();
    let (vm_a, vm_b) = (
        a.page_tables().create_vm().unwrap(),
        b.page_tables().create_vm().unwrap(),
    );
    bind_peer(&a, vm_a, pages(0, 1), bus(&b, WHERE), true).unwrap();
    bind_vram(&b, vm_b, pages(0, 1), WHERE.get(), true);
    let whole = SvmPtr::<u64>::new(BASE);
    let half = SvmPtr::<u32>::new(BASE + ByteSize::new(8));
    let float = SvmPtr::<f64>::new(BASE + ByteSize::new(16));
    let launches = [(&a, vm_a), (&b, vm_b)].map(|(gpu, vm)| {
        let kernel = move |lane: &mut gpusvm_softgpu::Lane<'_>| {
            lane.atomic_add(whole, 3)?;
            lane.atomic_add(half, 1)?;
            lane.atomic_add(float, 0.5)?;
            Ok(())
        };
        // SAFETY: the memory of a device that outlives the launch, and of nobody else.
        unsafe { gpu.launch(vm, Grid::new(LANES), kernel) }.unwrap()
    });
    for launch in launches {
        launch.wait().unwrap();
    }
    let lanes = 2 * LANES as u64;
    assert_eq!(word(&b, WHERE), 3 * lanes);
    assert_eq!(word(&b, WHERE + ByteSize::new(8)), lanes);
    let float = f64::from_bits(word(&b, WHERE + ByteSize::new(16)));
    assert_eq!(float, LANES as f64);
}

#[test]
fn a_peer_that_is_bound_read_only_is_not_written() {
    let b = builder(1).build().unwrap();
    let a = builder(1).fault_mode(FaultMode::Declared).build().unwrap();
    let vm = a.page_tables().create_vm().unwrap();
    bind_peer(&a, vm, pages(0, 1), bus(&b, WHERE), false).unwrap();
    let at = SvmPtr::<u64>::new(BASE);
    run(&a, vm, 1, move |lane| lane.load(at).map(drop)).unwrap();
    for atomic in [false, true] {
        let stored = run(&a, vm, 1, move |lane| match atomic {
            true => lane.atomic_add(at, 1).map(drop),
            false => lane.store(at, 1),
        });
        assert!(matches!(
            first_error(stored),
            LaneError::Fault(FaultError::NotPermitted { .. })
        ));
    }
    assert_eq!(word(&b, WHERE), 0);
}

fn first_error<R: std::fmt::Debug>(ended: Result<R, LaunchError>) -> LaneError {
    match ended {
        Err(LaunchError::Lanes { first, .. }) => first,
        other => panic!("lanes that fail: {other:?}"),
    }
}

/// A driver that forgets to unbind: the peer's memory is gone behind the mapping.
#[test]
fn a_peer_that_is_gone_is_an_error_and_no_fault() {
    use rustix::mm::{MprotectFlags, mprotect};
    let (a, b) = pair();
    let vm = a.page_tables().create_vm().unwrap();
    bind_peer(&a, vm, pages(0, 1), bus(&b, WHERE), true).unwrap();
    // Taken away in place, so that no other test gets the addresses.
    let memory = std::ptr::with_exposed_provenance_mut(bus(&b, WHERE).get() as usize);
    // SAFETY: memory of a device that does nothing.
    unsafe { mprotect(memory, 4096, MprotectFlags::empty()) }.unwrap();
    for access in 0..5 {
        let at = SvmPtr::<u64>::new(BASE);
        let ended = run(&a, vm, 1, move |lane| match access {
            0 => lane.load(at).map(drop),
            1 => lane.store(at, 1),
            2 => lane.atomic_add(at, 1).map(drop),
            3 => lane.load_tile(at, &mut [0; 64]),
            _ => lane.store_tile(at, &[0; 64]),
        });
        let lost = FaultError::PeerLost { at: BASE };
        assert_eq!(first_error(ended), LaneError::Fault(lost), "{access}");
    }
    assert_eq!(a.counters().faults, 0, "the driver is not asked");
    let (at, len) = (bus(&b, WHERE), ByteSize::kib(4));
    let refused = Err(DeviceError::RamUnreachable { at, len });
    assert_eq!(to_bus(&a, WHERE, at, len), refused);
}
