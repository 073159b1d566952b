//! Devices whose memory the CPU uses in place.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Map, Stay, add_one, built, can_adopt, within};
use gpusvm::{
    Access, ByteSize, FaultMode, PagePlace, Resident, Rung, SoftGpu, SoftGpuError, Svm, SvmPtr,
};
use gpusvm_testkit::require::unavailable;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const PAGE: usize = 4096;
const LIMIT: Duration = Duration::from_secs(120);
/// Words in a page.
const WORDS: usize = PAGE / 8;

fn coherent(vram: ByteSize, faults: FaultMode) -> Arc<SoftGpu> {
    let gpu = SoftGpu::builder().vram(vram).units(2).fault_mode(faults);
    gpu.coherent_memory(true).build().unwrap()
}

/// An engine with one such device, on every rung that there is here.
fn on_every_rung(vram: ByteSize, test: impl Fn(&Svm)) {
    for rung in [
        Rung::Move,
        Rung::Copy,
        Rung::UserMode { moves: true },
        Rung::UserMode { moves: false },
        Rung::Signals,
    ] {
        let builder = Svm::builder().device(coherent(vram, FaultMode::Replayable));
        let builder = builder.policy(Arc::new(Stay(Duration::ZERO)));
        match builder.rung(Some(rung)).build() {
            Ok(svm) => test(&svm),
            Err(error) => unavailable(&error.to_string()),
        }
    }
}

fn places(svm: &Svm, device: usize, at: *const u64, pages: usize) -> Vec<PagePlace> {
    let len = ByteSize::from_usize(pages * PAGE);
    let states = svm.vm(device).unwrap().snapshot(at, len).unwrap();
    states.iter().map(|state| state.place).collect()
}

/// How many pages of the device's are used in place.
fn coherent_pages(svm: &Svm, device: usize, at: *const u64, pages: usize) -> usize {
    let places = places(svm, device, at, pages);
    let here = |place: &&PagePlace| **place == PagePlace::Coherent(device);
    places.iter().filter(here).count()
}

/// They come on a fault of the device or on command, count as its own, and go home on command only: until
/// then both work on them where they are, and nobody faults.
#[test]
fn the_cpu_uses_coherent_memory_where_it_is() {
    const PAGES: usize = 600;
    within(LIMIT, || {
        on_every_rung(ByteSize::mib(8), |svm| {
            let mut xs = svm.alloc_slice::<u64>(PAGES * WORDS).unwrap();
            xs[..300 * WORDS].fill(5);
            let (first, len) = (xs.as_ptr(), ByteSize::from_usize(PAGES * PAGE));
            let p = (xs.device_ptr(), xs.len());
            add_one(svm, 0, p);
            assert_eq!(coherent_pages(svm, 0, first, PAGES), PAGES);
            let stats = svm.stats();
            let bytes = PAGES as u64 * PAGE as u64;
            assert_eq!(stats.pages_on_devices, PAGES as u64);
            assert_eq!(stats.vram_used_bytes, bytes);
            assert_eq!(stats.to_coherent.bytes, bytes);
            assert_eq!((stats.to_device.bytes, stats.to_ram.bytes), (0, 0));
            for round in 1..4 {
                assert!(xs[..300 * WORDS].iter().all(|x| *x == 4 + 2 * round));
                assert!(xs[300 * WORDS..].iter().all(|x| *x == 2 * round - 1));
                xs.iter_mut().for_each(|x| *x += 1);
                add_one(svm, 0, p);
            }
            let after = svm.stats();
            assert_eq!(after.device_faults, stats.device_faults, "{:?}", svm.rung());
            assert_eq!(after.cpu_faults, stats.cpu_faults, "{:?}", svm.rung());
            assert_eq!(coherent_pages(svm, 0, first, PAGES), PAGES);
            // Each way home.
            let vm = svm.vm(0).unwrap();
            assert_eq!(vm.migrate_back(first, len).unwrap(), PAGES as u64);
            assert_eq!(svm.stats().vram_used_bytes, 0);
            vm.migrate(first, len).unwrap();
            assert_eq!(coherent_pages(svm, 0, first, PAGES), PAGES);
            svm.evict(0).unwrap();
            assert_eq!(coherent_pages(svm, 0, first, PAGES), 0);
            svm.prefetch(0, first, len).unwrap().wait().unwrap();
            assert_eq!(coherent_pages(svm, 0, first, PAGES), PAGES);
            svm.prefetch_to_ram(first, len).unwrap().wait().unwrap();
            assert_eq!(svm.stats().pages_on_devices, 0);
            vm.migrate(first, len).unwrap();
            svm.unbind(0).unwrap();
            assert_eq!(svm.stats().vram_used_bytes, 0);
            let stats = svm.stats();
            assert_eq!(stats.from_coherent.bytes, stats.to_coherent.bytes);
            svm.rebind(0).unwrap();
            add_one(svm, 0, p);
            assert_eq!(coherent_pages(svm, 0, first, PAGES), PAGES);
            assert!(xs[..300 * WORDS].iter().all(|x| *x == 13));
            assert!(xs[300 * WORDS..].iter().all(|x| *x == 8));
            drop(xs);
            svm.settle();
            assert_eq!(svm.stats().vram_used_bytes, 0);
        });
    });
}

/// Threads of the program and lanes add to the same words, while pages come, go and are evicted.
#[test]
fn no_addition_is_lost_while_coherent_pages_come_and_go() {
    const PAGES: usize = 64;
    const ROUNDS: u64 = 40;
    within(LIMIT, || {
        on_every_rung(ByteSize::mib(8), |svm| {
            let xs = svm.alloc_slice::<u64>(PAGES * WORDS).unwrap();
            let (first, len) = (xs.as_ptr(), ByteSize::from_usize(PAGES * PAGE));
            let (p, n): (SvmPtr<u64>, usize) = (xs.device_ptr(), xs.len());
            // SAFETY: words that are used by atomics only, for as long as the slice lives.
            let words = unsafe { std::slice::from_raw_parts(first.cast::<AtomicU64>(), n) };
            std::thread::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| {
                        for _ in 0..ROUNDS {
                            for word in words {
                                word.fetch_add(1, Ordering::Relaxed);
                            }
                        }
                    });
                }
                let device = scope.spawn(|| (0..ROUNDS).for_each(|_| add_one(svm, 0, (p, n))));
                let vm = svm.vm(0).unwrap();
                let at = words.as_ptr();
                while !device.is_finished() {
                    // What the device is about to take comes again.
                    let _ = vm.migrate(at, len);
                    let _ = vm.migrate_back(at, len);
                    let _ = vm.migrate(at, len);
                    let _ = svm.evict(0);
                }
            });
            let wrong = words
                .iter()
                .filter(|word| word.load(Ordering::Relaxed) != 3 * ROUNDS);
            assert_eq!(wrong.count(), 0, "{:?}", svm.rung());
        });
    });
}

/// More than the device's memory holds goes home for others, and stays in reach.
#[test]
fn coherent_pages_are_evicted_for_others() {
    const WORDS_IN_ALL: usize = (12 << 20) / 8;
    within(LIMIT, || {
        on_every_rung(ByteSize::mib(4), |svm| {
            let mut xs = svm.alloc_slice::<u64>(WORDS_IN_ALL).unwrap();
            xs.fill(1);
            add_one(svm, 0, (xs.device_ptr(), xs.len()));
            let stats = svm.stats();
            assert!(
                stats.vram_used_bytes <= 4 << 20,
                "{}",
                stats.vram_used_bytes
            );
            assert!(stats.evictions > 0 && stats.pages_on_devices > 0);
            assert!(xs.iter().all(|x| *x == 2));
        });
    });
}

/// What the kernel does with pages by itself, and what the program does to its mapping: given up, made one
/// huge page, moved, protected, shared with a child behind our back.
#[test]
fn coherent_pages_of_the_programs_own_go_with_its_calls() {
    const PAGES: usize = 512;
    within(LIMIT, || {
        on_every_rung(ByteSize::mib(8), |svm| {
            if !can_adopt(svm) {
                return;
            }
            let map = Map::new(PAGES * PAGE, true);
            let words = map.at.cast::<u64>();
            let at = |page: usize| map.at.wrapping_add(page * PAGE).cast::<u64>();
            // SAFETY: our own memory, of which nobody holds a reference.
            let get = |page: usize| unsafe { at(page).read_volatile() };
            // SAFETY: as above.
            let set = |page: usize, value| unsafe { at(page).write_volatile(value) };
            let seen = |page: usize| {
                let mut bytes = [0; 8];
                let vm = svm.vm(0).unwrap();
                // SAFETY: as above.
                unsafe { vm.read(at(page).cast(), &mut bytes) }.unwrap();
                u64::from_ne_bytes(bytes)
            };
            // Every second page, so that nothing is huge yet.
            (0..PAGES)
                .step_by(2)
                .for_each(|page| set(page, page as u64 + 1));
            let len = ByteSize::from_usize(PAGES * PAGE);
            let _adopted = svm.adopt(map.at, len).unwrap();
            svm.vm(0).unwrap().migrate(map.at, len).unwrap();
            assert_eq!(coherent_pages(svm, 0, words, PAGES), PAGES);

            // SAFETY: one mapping of our own. Refused where the kernel has no memory for it, or no such call.
            let _ = unsafe { libc::madvise(map.at.cast(), PAGES * PAGE, libc::MADV_COLLAPSE) };
            for page in 0..PAGES {
                let wanted = if page % 2 == 0 { page as u64 + 1 } else { 0 };
                assert_eq!((get(page), seen(page)), (wanted, wanted), "page {page}");
            }

            // SAFETY: a range of our own mapping.
            let gone = unsafe { libc::madvise(at(10).cast(), 20 * PAGE, libc::MADV_DONTNEED) };
            assert_eq!(gone, 0);
            svm.settle();
            assert_eq!(coherent_pages(svm, 0, words, PAGES), PAGES - 20);
            assert_eq!((get(12), seen(12)), (0, 0));
            set(14, 77);
            assert_eq!(seen(14), 77);

            // SAFETY: as above.
            let protected = unsafe { libc::mprotect(at(40).cast(), PAGE, libc::PROT_READ) };
            assert_eq!(protected, 0);
            svm.was_protected(at(40), ByteSize::from_usize(PAGE))
                .unwrap();
            // SAFETY: as above.
            let refused = unsafe { svm.vm(0).unwrap().write(at(40).cast(), &[1; 8]) };
            assert!(refused.is_err(), "{refused:?}");
            assert_eq!((get(40), seen(40)), (41, 41));

            behind_our_back(|| {
                set(50, 500);
                assert_eq!(seen(50), 500);
                svm.vm(0).unwrap().write_word(at(52), 520);
                assert_eq!(get(52), 520);
            });
            assert_eq!((get(50), seen(52)), (500, 520));
            svm.evict(0).unwrap();
            assert_eq!(svm.stats().vram_used_bytes, 0);
            assert_eq!((get(50), get(52), get(54)), (500, 520, 55));
        });
    });
}

trait WriteWord {
    fn write_word(&self, at: *mut u64, value: u64);
}

impl WriteWord for gpusvm::DeviceVm {
    fn write_word(&self, at: *mut u64, value: u64) {
        // SAFETY: memory of the test's own, of which nobody holds a reference.
        unsafe { self.write(at.cast(), &value.to_ne_bytes()) }.unwrap();
    }
}

/// Runs `act` while a child of a raw `clone` shares all pages, which no handler of fork has seen.
fn behind_our_back(act: impl FnOnce()) {
    let mut pipe = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: as fork, without its handlers; the child makes system calls only.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        let mut byte = 0u8;
        // SAFETY: a descriptor of its own.
        unsafe { libc::close(pipe[1]) };
        // SAFETY: room for a byte; ends when the parent closes the pipe.
        unsafe { libc::read(pipe[0], (&raw mut byte).cast(), 1) };
        // SAFETY: it never returns.
        unsafe { libc::_exit(0) };
    }
    assert!(child > 0);
    act();
    for end in pipe {
        // SAFETY: a descriptor of our own.
        unsafe { libc::close(end) };
    }
    // SAFETY: a child of our own.
    unsafe { libc::waitpid(i32::try_from(child).unwrap(), std::ptr::null_mut(), 0) };
}

/// Two devices: who has it is told, and who has it not reaches it all the same.
#[test]
fn coherent_pages_of_another_device_are_reached_where_they_are() {
    const PAGES: usize = 64;
    within(LIMIT, || {
        let gpu = || coherent(ByteSize::mib(8), FaultMode::Replayable);
        let private = SoftGpu::with_vram(ByteSize::mib(8)).unwrap();
        let builder = Svm::builder().device(gpu()).device(gpu()).device(private);
        let svm = built(builder.policy(Arc::new(common::InPlace(None))));
        let mut xs = svm.alloc_slice::<u64>(PAGES * WORDS).unwrap();
        xs.fill(1);
        let (first, len) = (xs.as_ptr(), ByteSize::from_usize(PAGES * PAGE));
        svm.vm(1).unwrap().migrate(first, len).unwrap();
        for device in [0, 1, 2] {
            add_one(&svm, device, (xs.device_ptr(), xs.len()));
            let here = places(&svm, device, first, PAGES);
            assert!(
                here.iter().all(|place| *place == PagePlace::Coherent(1)),
                "{here:?}"
            );
        }
        assert!(xs.iter().all(|x| *x == 4));
        for device in [0, 2, 1, 2, 0] {
            svm.vm(device).unwrap().migrate(first, len).unwrap();
            let place = match device {
                2 => PagePlace::Device(2),
                _ => PagePlace::Coherent(device),
            };
            let here = places(&svm, device, first, PAGES);
            assert!(here.iter().all(|it| *it == place), "{here:?}");
            assert_eq!(svm.stats().vram_used_bytes, len.get());
        }
        assert!(xs.iter().all(|x| *x == 4));
    });
}

/// Story: a device that does not reach RAM wanted pages in the timeslice of another, that the CPU uses in
/// place. Nobody waited for it, and the device gave up.
#[test]
fn a_device_that_does_not_reach_ram_waits_for_coherent_pages() {
    within(LIMIT, || {
        let private = SoftGpu::builder().vram(ByteSize::mib(8)).units(2);
        let private = private.coherent(false).build().unwrap();
        let builder = Svm::builder().device(coherent(ByteSize::mib(8), FaultMode::Replayable));
        let timeslice = Duration::from_millis(2500);
        let svm = built(builder.device(private).policy(Arc::new(Stay(timeslice))));
        let mut xs = svm.alloc_slice::<u64>(WORDS).unwrap();
        xs.fill(1);
        add_one(&svm, 0, (xs.device_ptr(), xs.len()));
        assert_eq!(coherent_pages(&svm, 0, xs.as_ptr(), 1), 1);
        add_one(&svm, 1, (xs.device_ptr(), xs.len()));
        assert_eq!(places(&svm, 1, xs.as_ptr(), 1), [PagePlace::Device(1)]);
        assert!(xs.iter().all(|x| *x == 3));
    });
}

/// A device that cannot fault works on what is declared; the CPU need not wait for it, and it is not evicted
/// meanwhile.
#[test]
fn declared_coherent_memory_is_used_by_both() {
    const PAGES: usize = 64;
    within(LIMIT, || {
        let gpu = coherent(ByteSize::mib(8), FaultMode::Declared);
        let svm = built(Svm::builder().device(gpu));
        let xs = svm.alloc_slice::<u64>(PAGES * WORDS).unwrap();
        let (p, n) = (xs.device_ptr(), xs.len());
        // SAFETY: words that are used by atomics only, for as long as the slice lives.
        let words = unsafe { std::slice::from_raw_parts(xs.as_ptr().cast::<AtomicU64>(), n) };
        let resident = Resident::new().span(xs.span(), Access::Atomic);
        // SAFETY: as above.
        let launch = unsafe {
            svm.launch_resident(0, gpusvm::Grid::new(1), resident, move |lane| {
                // Until the CPU has answered.
                lane.atomic_add(p, 1u64)?;
                while lane.atomic_add(p.add(1), 0u64)? == 0 {}
                lane.atomic_add(p.add(n - 1), 1u64).map(drop)
            })
        };
        let launch = launch.unwrap();
        common::wait_until("the lane began", || words[0].load(Ordering::Acquire) == 1);
        assert_eq!(coherent_pages(&svm, 0, xs.as_ptr(), PAGES), PAGES);
        assert!(svm.evict(0).is_err(), "a launch needs it");
        words[1].store(1, Ordering::Release);
        launch.wait().unwrap();
        assert_eq!(words[n - 1].load(Ordering::Acquire), 1);
        svm.evict(0).unwrap();
        assert_eq!(svm.stats().vram_used_bytes, 0);
    });
}

/// Such a device must reach RAM: it has no other way to its own memory.
#[test]
fn coherent_memory_needs_a_device_that_reaches_ram() {
    let gpu = SoftGpu::builder().coherent(false).coherent_memory(true);
    let refused = gpu.build();
    assert!(
        matches!(refused, Err(SoftGpuError::NotCoherent)),
        "{refused:?}"
    );
}
