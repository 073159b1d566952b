//! A flush returns only when no access that began before is in flight.
//!
//! One thread takes a page away from the units: zap, flush; then it writes the poison to the backing
//! page, gives it a moment, and looks for anything but poison: a store that came late. Units that
//! load meanwhile must never see poison: a load that came late.

use crate::common::{BASE, Driver, Pages, bind_ram, bind_vram, pages};
use gpusvm_device::{CopyOp, Device, Verdict};
use gpusvm_softgpu::{Grid, LaneError, SoftGpu, SvmPtr};
use gpusvm_types::{ByteSize, DevAddr, DmaAddr, Span};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const POISON: u64 = 0xdead_dead_dead_dead;
const WORDS: usize = 8;
const ROUNDS: usize = if cfg!(debug_assertions) {
    3_000
} else {
    20_000
};

/// Where the page is now: the fault handler maps it there. `None` while it is away.
struct Home {
    taken: AtomicBool,
    place: AtomicU64,
}

/// Takes the page through VRAM places (or RAM places), `ROUNDS` times.
fn stress(span: Span, in_ram: bool) {
    let gpu = SoftGpu::builder()
        .vram(ByteSize::mib(16))
        .units(3)
        .build()
        .unwrap();
    let vm = gpu.page_tables().create_vm().unwrap();
    let len = span.len().get();
    let ram = Pages::new(2 * span.page_count().as_usize());
    let ram_base = ram.base.expose_provenance();
    let home = Arc::new(Home {
        taken: AtomicBool::new(false),
        place: AtomicU64::new(0),
    });
    let bind = move |gpu: &SoftGpu, place: u64| {
        if in_ram {
            let at = std::ptr::with_exposed_provenance_mut(ram_base + place as usize);
            bind_ram(gpu, vm, span, at, true);
        } else {
            bind_vram(gpu, vm, span, place, true);
        }
    };
    let (seen, served) = (Arc::new(AtomicU64::new(0)), Arc::clone(&home));
    let _driver = Driver::start(&gpu, move |gpu, _| {
        // As a driver does under its notifier lock: bind only what is current.
        while served.taken.swap(true, Ordering::AcqRel) {
            std::thread::yield_now();
        }
        bind(gpu, served.place.load(Ordering::Relaxed));
        served.taken.store(false, Ordering::Release);
        Verdict::Replay
    });
    let loads = Arc::clone(&seen);
    let base = SvmPtr::<u64>::new(span.start());
    let kernel = move |lane: &mut gpusvm_softgpu::Lane<'_>| -> Result<(), LaneError> {
        let mut tile = [0u64; WORDS];
        let step = || loads.fetch_add(1, Ordering::Relaxed);
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
    };
    // SAFETY: VRAM, or pages that only this test touches.
    let launch = unsafe { gpu.launch(vm, Grid::new(2), kernel) }.unwrap();
    let backing = Backing {
        gpu: &gpu,
        ram: in_ram.then_some(ram_base),
    };
    for round in 0..ROUNDS {
        let old = home.place.load(Ordering::Relaxed);
        let new = len - old;
        while home.taken.swap(true, Ordering::AcqRel) {
            std::thread::yield_now();
        }
        gpu.page_tables().zap(vm, span);
        gpu.page_tables().flush(vm, span);
        backing.write(old, POISON);
        if round % 64 == 0 {
            std::thread::yield_now();
        }
        assert_eq!(
            backing.read(old),
            [POISON; WORDS],
            "a stale store in round {round}"
        );
        backing.write(new, round as u64);
        home.place.store(new, Ordering::Relaxed);
        home.taken.store(false, Ordering::Release);
        // The next round begins when units are at it again, at some moment or other.
        let before = seen.load(Ordering::Relaxed);
        let mut turns = 0u32;
        while seen.load(Ordering::Relaxed) == before && !launch.is_done() {
            turns += 1;
            if turns.is_multiple_of(2_000) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        (0..round * 7919 % 1500).for_each(|_| std::hint::spin_loop());
    }
    launch.cancel();
    let ended = launch.wait();
    let cancelled = LaneError::Cancelled;
    assert!(
        matches!(ended, Err(gpusvm_softgpu::LaunchError::Lanes { failed: 2, first, .. })
            if first == cancelled),
        "{ended:?}"
    );
    println!(
        "{} accesses in {ROUNDS} rounds",
        seen.load(Ordering::Relaxed)
    );
}

/// The backing pages, behind the device's back.
struct Backing<'a> {
    gpu: &'a SoftGpu,
    ram: Option<usize>,
}

impl Backing<'_> {
    fn write(&self, place: u64, value: u64) {
        let words = [value; WORDS];
        match self.ram {
            None => self.copy(
                &|local| CopyOp::ToDevice {
                    from: local,
                    to: DevAddr::new(place),
                    len: ByteSize::new(64),
                },
                words.as_ptr().cast_mut(),
            ),
            Some(base) => {
                let to = std::ptr::with_exposed_provenance_mut::<u64>(base + place as usize);
                for word in 0..WORDS {
                    // SAFETY: in the pages of this test.
                    unsafe { AtomicU64::from_ptr(to.add(word)) }.store(value, Ordering::Relaxed);
                }
            }
        }
    }

    fn read(&self, place: u64) -> [u64; WORDS] {
        let mut words = [0u64; WORDS];
        match self.ram {
            None => self.copy(
                &|local| CopyOp::ToRam {
                    from: DevAddr::new(place),
                    to: local,
                    len: ByteSize::new(64),
                },
                words.as_mut_ptr(),
            ),
            Some(base) => {
                let from = std::ptr::with_exposed_provenance_mut::<u64>(base + place as usize);
                for (index, word) in words.iter_mut().enumerate() {
                    // SAFETY: in the pages of this test.
                    *word = unsafe { AtomicU64::from_ptr(from.add(index)) }.load(Ordering::Relaxed);
                }
            }
        }
        words
    }

    fn copy(&self, op: &dyn Fn(DmaAddr) -> CopyOp, local: *mut u64) {
        let local = DmaAddr::new(local.expose_provenance() as u64);
        self.gpu.copy_engine().submit(&[op(local)]).unwrap();
    }
}

#[test]
fn no_stale_access_through_page_entries_to_vram() {
    stress(pages(0, 1), false);
}

#[test]
fn no_stale_access_through_block_entries_to_vram() {
    stress(Span::block_of(BASE), false);
}

#[test]
fn no_stale_access_to_ram() {
    stress(pages(3, 2), true);
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
    let kernel = move |lane: &mut gpusvm_softgpu::Lane<'_>| -> Result<(), LaneError> {
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
