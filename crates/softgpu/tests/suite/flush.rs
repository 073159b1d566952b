//! A flush returns only when no access that began before is in flight.
//!
//! One thread takes a page away from the units: zap, flush. Then it writes the poison to the backing
//! page, and looks for anything but poison: a store that came late. Units that load meanwhile must
//! never see poison: a load that came late. Then the page comes back in another place.
//!
//! Without the barrier, without the wait, or without the stamps, this fails within a second.

use crate::common::{BASE, Driver, Pages, bind_ram, bind_vram, pages};
use gpusvm_device::{Access, CopyOp, Device, Fabric, Mapping, Target, Verdict, VmId};
use gpusvm_softgpu::{Grid, Lane, LaneError, LaunchError, SoftGpu, SvmPtr};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, Span};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const POISON: u64 = 0xdead_dead_dead_dead;
const WORDS: usize = 8;
const ROUNDS: u64 = if cfg!(debug_assertions) { 2_000 } else { 5_000 };

/// What a span lives in.
enum Memory {
    Vram,
    Ram(Pages),
    Peer(Arc<SoftGpu>),
}

/// A span that lives in one of two places of a memory.
struct Stage {
    vm: VmId,
    span: Span,
    memory: Memory,
    // As a driver's notifier lock: who holds it binds, or moves the span.
    taken: AtomicBool,
    place: AtomicU64,
    accesses: AtomicU64,
}

// SAFETY: the pages are only accessed by copies of the copy engine and of `guarded`, and by units.
unsafe impl Send for Stage {}
// SAFETY: as above.
unsafe impl Sync for Stage {}

impl Stage {
    fn locked<R>(&self, run: impl FnOnce() -> R) -> R {
        while self.taken.swap(true, Ordering::AcqRel) {
            std::thread::yield_now();
        }
        let result = run();
        self.taken.store(false, Ordering::Release);
        result
    }

    /// Serves a fault: maps the span where it is.
    fn bind(&self, gpu: &SoftGpu) {
        let place = self.place.load(Ordering::Relaxed);
        match &self.memory {
            Memory::Ram(ram) => bind_ram(gpu, self.vm, self.span, at(ram, place), true),
            Memory::Vram => bind_vram(gpu, self.vm, self.span, place, true),
            Memory::Peer(peer) => {
                let mapping = Mapping {
                    span: self.span,
                    target: Target::Peer(peer.aperture().unwrap() + ByteSize::new(place)),
                    allows: Access::Atomic,
                };
                gpu.page_tables().bind(self.vm, &mapping).unwrap();
            }
        }
    }

    /// Moves the span to its other place. What its old place holds a moment later.
    fn shift(&self, gpu: &SoftGpu, round: u64) -> [u64; WORDS] {
        let old = self.place.load(Ordering::Relaxed);
        let new = self.span.len().get() - old;
        gpu.page_tables().zap(self.vm, self.span);
        gpu.page_tables().flush(self.vm, self.span);
        self.write(gpu, old, POISON);
        if round.is_multiple_of(64) {
            std::thread::yield_now();
        }
        let late = self.read(gpu, old);
        self.write(gpu, new, round);
        self.place.store(new, Ordering::Relaxed);
        late
    }

    /// Waits until a unit is at it again, and then for some moment or other.
    fn wait_for_units(&self, round: u64, ended: impl Fn() -> bool) {
        let before = self.accesses.load(Ordering::Relaxed);
        let mut turns = 0u32;
        while self.accesses.load(Ordering::Relaxed) == before && !ended() {
            turns += 1;
            if turns.is_multiple_of(2_000) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        (0..round * 7919 % 1500).for_each(|_| std::hint::spin_loop());
    }

    fn write(&self, gpu: &SoftGpu, place: u64, value: u64) {
        let words = [value; WORDS];
        if let Memory::Ram(ram) = &self.memory {
            let from = words.as_ptr().cast();
            // SAFETY: in the pages; units are not there, or the test is about to fail.
            unsafe { gpusvm_guarded::copy(at(ram, place), from, 64) }.unwrap();
        } else {
            let from = DmaAddr::new(words.as_ptr().expose_provenance() as u64);
            let (to, len) = (DevAddr::new(place), ByteSize::new(64));
            self.home(gpu)
                .copy_engine()
                .submit(&[CopyOp::ToDevice { from, to, len }])
                .unwrap();
        }
    }

    fn read(&self, gpu: &SoftGpu, place: u64) -> [u64; WORDS] {
        let mut words = [0; WORDS];
        let to = words.as_mut_ptr();
        if let Memory::Ram(ram) = &self.memory {
            // SAFETY: as in `write`.
            unsafe { gpusvm_guarded::copy(to.cast(), at(ram, place), 64) }.unwrap();
        } else {
            let to = DmaAddr::new(to.expose_provenance() as u64);
            let (from, len) = (DevAddr::new(place), ByteSize::new(64));
            self.home(gpu)
                .copy_engine()
                .submit(&[CopyOp::ToRam { from, to, len }])
                .unwrap();
        }
        words
    }

    /// Whose VRAM it is.
    fn home<'a>(&'a self, gpu: &'a SoftGpu) -> &'a SoftGpu {
        match &self.memory {
            Memory::Peer(peer) => peer,
            Memory::Vram | Memory::Ram(_) => gpu,
        }
    }

    /// What a unit does until it is cancelled.
    fn hammer(&self, lane: &mut Lane<'_>) -> Result<(), LaneError> {
        let base = SvmPtr::<u64>::new(self.span.start());
        let mut tile = [0u64; WORDS];
        let step = || self.accesses.fetch_add(1, Ordering::Relaxed);
        for i in 0usize.. {
            let at = base.add(i % WORDS);
            assert_ne!(lane.load(at)?, POISON, "a stale load");
            step();
            lane.store(at, i as u64)?;
            step();
            assert_ne!(lane.atomic_add(at, 1)?, POISON, "a stale addition");
            step();
            lane.load_tile(base, &mut tile)?;
            assert!(!tile.contains(&POISON), "a stale tile");
            step();
            lane.store_tile(base, &[i as u64; WORDS])?;
            step();
        }
        Ok(())
    }
}

fn at(ram: &Pages, place: u64) -> *mut u8 {
    ram.base.wrapping_add(place as usize)
}

fn gpu_of_fabric() -> Arc<SoftGpu> {
    SoftGpu::builder()
        .vram(ByteSize::mib(16))
        .units(2)
        .fabric(Fabric(10))
        .build()
        .unwrap()
}

/// Takes the span to and fro, `ROUNDS` times.
fn stress(span: Span, memory: Memory) {
    let gpu = gpu_of_fabric();
    let vm = gpu.page_tables().create_vm().unwrap();
    let (taken, place, accesses) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let stage = Arc::new(Stage {
        vm,
        span,
        memory,
        taken,
        place,
        accesses,
    });
    let served = Arc::clone(&stage);
    let _driver = Driver::start(&gpu, move |gpu, _| {
        served.locked(|| served.bind(gpu));
        Verdict::Replay
    });
    let hammered = Arc::clone(&stage);
    let kernel = move |lane: &mut Lane<'_>| hammered.hammer(lane);
    // SAFETY: VRAM, or pages that only this test touches.
    let launch = unsafe { gpu.launch(vm, Grid::new(2), kernel) }.unwrap();
    for round in 0..ROUNDS {
        let late = stage.locked(|| stage.shift(&gpu, round));
        assert_eq!(late, [POISON; WORDS], "a stale store in round {round}");
        stage.wait_for_units(round, || launch.is_done());
    }
    launch.cancel();
    // A lane that saw poison has panicked instead.
    let first = LaneError::Cancelled;
    assert_eq!(
        launch.wait(),
        Err(LaunchError::Lanes {
            failed: 2,
            first_lane: 0,
            first
        })
    );
    println!(
        "{} accesses in {ROUNDS} rounds",
        stage.accesses.load(Ordering::Relaxed)
    );
}

#[test]
fn no_stale_access_through_page_entries_to_vram() {
    stress(pages(0, 1), Memory::Vram);
}

#[test]
fn no_stale_access_through_block_entries_to_vram() {
    stress(Span::block_of(BASE), Memory::Vram);
}

#[test]
fn no_stale_access_to_ram() {
    stress(pages(3, 2), Memory::Ram(Pages::new(4)));
}

#[test]
fn no_stale_access_through_page_entries_to_a_peer() {
    stress(pages(0, 1), Memory::Peer(gpu_of_fabric()));
}

#[test]
fn no_stale_access_through_block_entries_to_a_peer() {
    stress(Span::block_of(BASE), Memory::Peer(gpu_of_fabric()));
}

/// Units hammer one page that stays mapped: a flush ends all the same.
#[test]
fn flush_ends_while_units_hammer_the_page() {
    let gpu = SoftGpu::builder()
        .vram(ByteSize::mib(2))
        .units(3)
        .build()
        .unwrap();
    let vm = gpu.page_tables().create_vm().unwrap();
    bind_vram(&gpu, vm, pages(0, 1), 0, true);
    let at = SvmPtr::<u64>::new(BASE);
    let kernel = move |lane: &mut Lane<'_>| -> Result<(), LaneError> {
        loop {
            lane.atomic_add(at, 1)?;
        }
    };
    // SAFETY: VRAM only.
    let launch = unsafe { gpu.launch(vm, Grid::new(3), kernel) }.unwrap();
    for _ in 0..5_000 {
        gpu.page_tables().flush(vm, pages(0, 1));
    }
    assert_eq!(gpu.counters().flushes, 5_000);
    launch.cancel();
    assert!(launch.wait().is_err());
}
