//! What `/proc/self/pagemap` tells of pages on devices, for who asks for it, and what is left behind by none of them.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{InPlace, Map, can_adopt, two_devices_with, within};
use gpusvm::{Access, ByteSize, PagePlace, RamPage, Rung, Svm};
use std::os::unix::fs::FileExt;
use std::time::Duration;

const PAGE: usize = 4096;
const BLOCK: usize = 2 << 20;

/// Two devices whose faults move nothing.
fn engine(rung: Option<Rung>, show: bool) -> Option<Svm> {
    let svm = two_devices_with(ByteSize::mib(16), false, InPlace(None), |builder| {
        builder.rung(rung).show_in_pagemap(show)
    });
    if !can_adopt(&svm) || (show && !svm.shows_in_pagemap()) {
        eprintln!("skipped: pages cannot be marked here");
        return None;
    }
    Some(svm)
}

/// What the file has of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    Nothing,
    Present,
    Swapped,
}

fn shown(at: *const u8, len: usize) -> Vec<Shown> {
    let file = std::fs::File::open("/proc/self/pagemap").unwrap();
    let mut bytes = vec![0; len / PAGE * 8];
    let offset = (at.addr() / PAGE * 8) as u64;
    file.read_exact_at(&mut bytes, offset).unwrap();
    let entries = bytes.as_chunks::<8>().0.iter();
    let shown = entries.map(|entry| match u64::from_ne_bytes(*entry) >> 62 {
        0 => Shown::Nothing,
        1 => Shown::Swapped,
        _ => Shown::Present,
    });
    shown.collect()
}

fn len(bytes: usize) -> ByteSize {
    ByteSize::from_usize(bytes)
}

fn advise(at: *mut u8, len: usize, advice: i32) {
    // SAFETY: contents of our own memory that we can do without.
    let advised = unsafe { libc::madvise(at.cast(), len, advice) };
    assert_eq!(advised, 0, "{}", std::io::Error::last_os_error());
}

/// Each of the rungs that can.
fn each_rung(test: impl Fn(Option<Rung>)) {
    let rungs = [Rung::Move, Rung::Copy, Rung::UserMode { moves: true }];
    let offered = gpusvm::Capabilities::probe();
    let there = rungs
        .into_iter()
        .filter(|rung| offered.carries(*rung).is_ok());
    there.for_each(|rung| test(Some(rung)));
}

/// Pages that were never touched are not shown, and those on a device are: as swapped out, until they are home.
#[test]
fn pages_on_a_device_show_as_swapped_out() {
    within(Duration::from_secs(120), || {
        each_rung(|rung| {
            for huge in [false, true] {
                let Some(svm) = engine(rung, true) else {
                    return;
                };
                let map = Map::new(2 * BLOCK, huge);
                map.bytes()[..BLOCK + PAGE].fill(3);
                let adopted = svm.adopt_all(map.at, len(map.len)).unwrap();
                let first = map.at;
                svm.vm(0)
                    .unwrap()
                    .migrate(first, len(BLOCK + 2 * PAGE))
                    .unwrap();
                let wanted = vec![Shown::Swapped; BLOCK / PAGE + 2];
                assert_eq!(shown(first, BLOCK + 2 * PAGE), wanted, "{rung:?}");
                if !huge {
                    let behind = map.at.wrapping_add(BLOCK + 2 * PAGE);
                    assert_eq!(shown(behind, PAGE), [Shown::Nothing], "never touched");
                }
                // From one device to the other they stay away.
                svm.vm(1).unwrap().migrate(first, len(BLOCK)).unwrap();
                assert_eq!(shown(first, BLOCK), [Shown::Swapped; BLOCK / PAGE]);
                assert_eq!(map.bytes()[5 * PAGE], 3);
                assert_eq!(map.bytes()[BLOCK + PAGE], 0);
                assert!(map.bytes()[..BLOCK + PAGE].iter().all(|byte| *byte == 3));
                assert_eq!(shown(first, BLOCK), [Shown::Present; BLOCK / PAGE]);
                drop(adopted);
                let stats = svm.shutdown().unwrap();
                assert_eq!(stats.pages_on_devices, 0);
            }
        });
    });
}

/// Nobody pays for what was not asked for.
#[test]
fn pages_are_not_marked_unless_asked() {
    within(Duration::from_secs(60), || {
        let Some(svm) = engine(None, false) else {
            return;
        };
        assert!(!svm.shows_in_pagemap());
        let map = Map::new(BLOCK, false);
        map.bytes().fill(3);
        let _adopted = svm.adopt_all(map.at, len(map.len)).unwrap();
        svm.vm(0).unwrap().migrate(map.at, len(BLOCK)).unwrap();
        assert_eq!(shown(map.at, BLOCK), [Shown::Nothing; BLOCK / PAGE]);
    });
}

/// What the program gives up on the device leaves no mark, or none that is in the way: it is zeroes, is seen as
/// nothing, and goes to the device again.
#[test]
fn what_is_given_up_leaves_no_mark() {
    within(Duration::from_secs(120), || {
        each_rung(|rung| {
            for advice in [libc::MADV_DONTNEED, libc::MADV_FREE] {
                let Some(svm) = engine(rung, true) else {
                    return;
                };
                let map = Map::new(BLOCK, false);
                map.bytes().fill(4);
                let _adopted = svm.adopt_all(map.at, len(map.len)).unwrap();
                let vm = svm.vm(0).unwrap();
                vm.migrate(map.at, len(BLOCK)).unwrap();
                let (at, size) = (map.at.wrapping_add(PAGE), BLOCK / 2);
                advise(at, size, advice);
                let states = vm.snapshot(at, len(size)).unwrap();
                let is_gone = |place| matches!(place, PagePlace::Nowhere);
                assert!(states.iter().all(|state| is_gone(state.place)), "{rung:?}");
                assert_eq!(shown(at, size), vec![Shown::Nothing; size / PAGE]);
                // Some of it is touched, then all of it migrates, with what was never given up.
                assert_eq!(map.bytes()[9 * PAGE], 0);
                map.bytes()[20 * PAGE] = 5;
                vm.migrate(map.at, len(BLOCK)).unwrap();
                let states = vm.snapshot(map.at, len(BLOCK)).unwrap();
                let is_there = |place| place == PagePlace::Device(0);
                assert!(states.iter().all(|state| is_there(state.place)), "{rung:?}");
                let bytes = map.bytes();
                assert!(bytes[..PAGE].iter().all(|byte| *byte == 4));
                assert!(bytes[PAGE + size..].iter().all(|byte| *byte == 4));
                bytes[20 * PAGE] = 0;
                assert!(bytes[PAGE..PAGE + size].iter().all(|byte| *byte == 0));
            }
        });
    });
}

/// Marks go where the program moves pages, and are none of the new place's pages.
#[test]
fn marks_move_with_the_pages() {
    within(Duration::from_secs(120), || {
        each_rung(|rung| {
            let Some(svm) = engine(rung, true) else {
                return;
            };
            let (old, new) = (Map::new(BLOCK, false), Map::new(BLOCK, false));
            old.bytes().fill(6);
            let _adopted = svm.adopt_all(old.at, len(old.len)).unwrap();
            svm.vm(0).unwrap().migrate(old.at, len(BLOCK)).unwrap();
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
            let to = new.at.cast::<libc::c_void>();
            // SAFETY: memory of our own, onto memory of our own.
            let moved = unsafe { libc::mremap(old.at.cast(), BLOCK, BLOCK, flags, to) };
            assert_eq!(moved, to, "{}", std::io::Error::last_os_error());
            let states = svm.vm(0).unwrap().snapshot(new.at, len(BLOCK)).unwrap();
            let is_there = |place| place == PagePlace::Device(0);
            assert!(states.iter().all(|state| is_there(state.place)), "{rung:?}");
            assert_eq!(shown(new.at, BLOCK), [Shown::Swapped; BLOCK / PAGE]);
            assert_eq!(shown(old.at, BLOCK), [Shown::Nothing; BLOCK / PAGE]);
            assert!(new.bytes().iter().all(|byte| *byte == 6));
            assert!(old.bytes().iter().all(|byte| *byte == 0));
        });
    });
}

/// A block that is on the device in one piece is huge there, also to who looks at a part of it, and no more when
/// a page of it has left.
#[test]
fn a_block_in_one_piece_is_huge_on_the_device() {
    within(Duration::from_secs(60), || {
        let Some(svm) = engine(None, false) else {
            return;
        };
        let map = Map::new(2 * BLOCK, false);
        map.bytes().fill(7);
        let _adopted = svm.adopt_all(map.at, len(map.len)).unwrap();
        let vm = svm.vm(0).unwrap();
        let huge = |at: *const u8, size: usize| {
            let states = vm.snapshot(at, len(size)).unwrap();
            states
                .iter()
                .map(|state| state.huge_on_device)
                .collect::<Vec<_>>()
        };
        assert_eq!(huge(map.at, BLOCK), [false; BLOCK / PAGE]);
        vm.migrate(map.at, len(BLOCK)).unwrap();
        vm.migrate(map.at.wrapping_add(BLOCK), len(BLOCK / 2))
            .unwrap();
        assert_eq!(huge(map.at, BLOCK), [true; BLOCK / PAGE]);
        assert_eq!(huge(map.at.wrapping_add(7 * PAGE), PAGE), [true]);
        assert_eq!(
            huge(map.at.wrapping_add(BLOCK), BLOCK),
            [false; BLOCK / PAGE]
        );
        vm.populate(map.at, len(BLOCK), Access::Read).unwrap();
        assert_eq!(huge(map.at, BLOCK), [true; BLOCK / PAGE], "mapped as well");
        vm.migrate_back(map.at.wrapping_add(BLOCK - PAGE), len(PAGE))
            .unwrap();
        let states = vm.snapshot(map.at, len(BLOCK)).unwrap();
        let is_ram = |place| matches!(place, PagePlace::Ram(RamPage { .. }));
        assert!(is_ram(states[BLOCK / PAGE - 1].place));
        assert_eq!(huge(map.at, BLOCK), [false; BLOCK / PAGE]);
    });
}
