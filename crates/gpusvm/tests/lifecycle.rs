//! Beginnings and ends: of engines, slices, launches and processes.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Map, can_adopt, engine, within};
use gpusvm::{ByteSize, Error, Grid, SvmPtr};
use std::time::Duration;

#[test]
fn a_slice_outlives_its_engine_as_plain_memory() {
    let svm = engine(ByteSize::mib(4));
    let numbers = svm.alloc_slice::<u64>(1 << 18).unwrap();
    let (p, n) = (numbers.device_ptr(), numbers.len());
    // SAFETY: not touched until the launch has ended.
    let launch = unsafe {
        svm.launch(Grid::new(n), move |lane| {
            lane.store(p.add(lane.id()), lane.id() as u64 + 1)
        })
    };
    launch.unwrap().wait().unwrap();
    let stats = svm.shutdown().unwrap();
    assert_eq!(
        (
            stats.vram_used_bytes,
            stats.ranges_live,
            stats.pages_on_devices
        ),
        (0, 0, 0)
    );
    assert!(numbers.iter().enumerate().all(|(i, x)| *x == i as u64 + 1));
}

#[test]
fn an_engine_ends_while_a_launch_works() {
    within(Duration::from_secs(30), || {
        for _ in 0..10 {
            let svm = engine(ByteSize::mib(2));
            let numbers = svm.alloc_slice::<u64>(1 << 20).unwrap();
            let (p, n) = (numbers.device_ptr(), numbers.len());
            // SAFETY: not touched until the engine has ended, and the launch with it.
            let launch = unsafe {
                svm.launch(Grid::new(n), move |lane| {
                    lane.atomic_add(p.add(lane.id()), 1u64)?;
                    Ok(())
                })
            };
            let launch = launch.unwrap();
            std::thread::sleep(Duration::from_millis(2));
            drop(svm);
            let _ = launch.wait();
            assert!(numbers.iter().all(|x| *x <= 1));
        }
    });
}

#[test]
fn engines_come_and_go_and_live_beside_each_other() {
    within(Duration::from_secs(60), || {
        let other = engine(ByteSize::mib(2));
        if other.rung().number() == 4 {
            println!("skipped: one engine at a time on the rung of signals");
            return;
        }
        let kept = other.alloc_slice::<u32>(1000).unwrap();
        for round in 0..10u32 {
            let svm = engine(ByteSize::mib(2));
            for svm in [&svm, &other] {
                let numbers = svm.alloc_slice::<u32>(1 << 20).unwrap();
                let (p, k) = (numbers.device_ptr(), kept.device_ptr());
                // SAFETY: not touched until the launch has ended.
                let launch = unsafe {
                    svm.launch(Grid::new(1000), move |lane| {
                        lane.store(p.add(lane.id() * 1000), round)?;
                        lane.atomic_add(k.add(lane.id()), 1u32)?;
                        Ok(())
                    })
                };
                launch.unwrap().wait().unwrap();
                assert!(numbers.iter().step_by(1000).take(1000).all(|x| *x == round));
            }
        }
        assert!(kept.iter().all(|x| *x == 20));
    });
}

/// What a child of fork finds: the data, and an engine that says it is gone.
#[test]
fn a_child_of_fork_has_the_data_and_no_engine() {
    let svm = engine(ByteSize::mib(4));
    let numbers = svm.alloc_slice::<u64>(1 << 19).unwrap();
    let (p, n) = (numbers.device_ptr(), numbers.len());
    let fill = || {
        // SAFETY: not touched until the launch has ended.
        let launch = unsafe {
            svm.launch(Grid::new(n), move |lane| {
                let x = p.add(lane.id());
                let old = lane.load(x)?;
                lane.store(x, old + lane.id() as u64)
            })
        };
        launch.unwrap().wait().unwrap();
    };
    fill();
    // SAFETY: the child reads memory, asks the engine, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let data = numbers.iter().enumerate().all(|(i, x)| *x == i as u64);
        let gone = matches!(svm.alloc_slice::<u8>(1), Err(Error::Memory(_)));
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(if data && gone { 0 } else { 1 }) };
    }
    fill();
    let mut status = 0;
    // SAFETY: our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    assert!(
        numbers.iter().enumerate().all(|(i, x)| *x == 2 * i as u64),
        "the parent went on"
    );
}

/// MADV_DONTNEED gives contents up, wherever they are.
#[test]
fn dropped_contents_are_zeroes_on_both_sides() {
    let svm = engine(ByteSize::mib(4));
    if !can_adopt(&svm) {
        return;
    }
    let map = Map::new(2 << 20, true);
    let _adopted = svm.adopt(map.at, ByteSize::from_usize(map.len)).unwrap();
    let p = SvmPtr::from(map.at.cast::<u64>());
    for _ in 0..50 {
        // SAFETY: not touched until the launch has ended.
        let launch = unsafe {
            svm.launch(Grid::new(512), move |lane| {
                lane.store(p.add(lane.id() * 512), 5u64)
            })
        };
        launch.unwrap().wait().unwrap();
        let half = map.len / 2;
        // SAFETY: our own mapping.
        let dropped = unsafe { libc::madvise(map.at.cast(), half, libc::MADV_DONTNEED) };
        assert_eq!(dropped, 0);
        for page in 0..512 {
            let at = map.at.cast::<u64>().wrapping_add(page * 512);
            // SAFETY: in our own mapping.
            let found = unsafe { at.read_volatile() };
            assert_eq!(found, if page < 256 { 0 } else { 5 }, "page {page}");
        }
    }
}

/// mremap moves the data, also what of it is on the device.
#[test]
fn moved_memory_keeps_its_contents() {
    let svm = engine(ByteSize::mib(8));
    if !can_adopt(&svm) {
        return;
    }
    const LEN: usize = 4 << 20;
    within(Duration::from_secs(30), || {
        for round in 0..10u64 {
            let map = std::mem::ManuallyDrop::new(Map::new(LEN, round % 2 == 0));
            let adopted = svm.adopt(map.at, ByteSize::from_usize(map.len)).unwrap();
            let p = SvmPtr::from(map.at.cast::<u64>());
            // SAFETY: not touched until the launch has ended.
            let launch = unsafe {
                svm.launch(Grid::new(1024), move |lane| {
                    lane.store(p.add(lane.id() * 512), lane.id() as u64 + round)
                })
            };
            launch.unwrap().wait().unwrap();
            let target = std::mem::ManuallyDrop::new(Map::new(LEN, true));
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: both mappings are our own; the target is replaced.
            let moved = unsafe {
                libc::mremap(
                    map.at.cast(),
                    LEN,
                    LEN,
                    flags,
                    target.at.cast::<libc::c_void>(),
                )
            };
            assert_eq!(moved, target.at.cast());
            for page in 0..1024u64 {
                let at = target
                    .at
                    .cast::<u64>()
                    .wrapping_add(usize::try_from(page).unwrap() * 512);
                // SAFETY: in the mapping that was moved here.
                assert_eq!(unsafe { at.read_volatile() }, page + round);
            }
            // SAFETY: our own mapping.
            unsafe { libc::munmap(target.at.cast(), LEN) };
            drop(adopted);
        }
    });
    assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
}
