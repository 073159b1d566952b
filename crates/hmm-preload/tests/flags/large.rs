//! A large allocation fails: migrations take the way of many small steps, and nobody else notices.

use crate::device::{BLOCK, Device, Do, Memory, PAGE, is_filled, preloaded};

/// The next large allocation fails.
const FAIL_ALLOC: usize = 1;
const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// In a snapshot: part of a huge page.
const PMD: u8 = 4;

/// There and back with a failure each way, as the kernel's test of this name.
#[test]
fn migrate_anon_huge_err() {
    preloaded("large::migrate_anon_huge_err", || {
        let device = Device::open();
        let mut data = vec![0; BLOCK];
        {
            let memory = Memory::huge(READ_WRITE);
            memory.fill(512);
            device.set_flags(FAIL_ALLOC);
            let done = device.run(Do::ToDev, (memory.at, 512), &mut data).unwrap();
            assert_eq!(done.cpages, 512);
            assert!(is_filled(&data));
            assert!(
                device
                    .snapshot(memory.at, 512)
                    .iter()
                    .all(|page| *page == 0x22)
            );
            assert_eq!(memory.word(2048), 2048);
            assert!(memory.is_filled(512));
        }
        let memory = Memory::huge(READ_WRITE);
        memory.fill(512);
        let was_huge = device.snapshot(memory.at, 512)[0] & PMD != 0;
        let is_huge = || device.snapshot(memory.at, 512)[0] & PMD != 0;
        let mut there_and_back = |flags| {
            let done = device.run(Do::ToDev, (memory.at, 512), &mut data).unwrap();
            assert_eq!(done.cpages, 512);
            device.set_flags(flags);
            let done = device.run(Do::ToSys, (memory.at, 512), &mut data).unwrap();
            assert_eq!(done.cpages, 512);
            assert!(memory.is_filled(512));
        };
        // Home as one, where the system has huge pages at all; else in base pages, once.
        there_and_back(0);
        assert_eq!(is_huge(), was_huge);
        there_and_back(FAIL_ALLOC);
        assert!(!is_huge());
    });
}

/// Memory that nobody touched, and memory that is zero, in which a huge page can be for everybody.
#[test]
fn migrate_anon_huge_zero_err() {
    preloaded("large::migrate_anon_huge_zero_err", || {
        let device = Device::open();
        for is_read_before in [false, true] {
            let mut data = vec![1; BLOCK];
            let memory = Memory::huge(libc::PROT_READ);
            if is_read_before {
                assert_eq!(memory.word(0), 0);
            }
            device.set_flags(FAIL_ALLOC);
            let done = device.run(Do::ToDev, (memory.at, 512), &mut data).unwrap();
            assert_eq!(done.cpages, 512);
            assert!(data.iter().all(|byte| *byte == 0));
            assert_eq!(memory.word(2048), 0);
            assert!((0..BLOCK / 8).all(|n| memory.word(n) == 0));
            // And what was not asked for any more does not fail on the way home.
            let done = device.run(Do::ToDev, (memory.at, 512), &mut data).unwrap();
            assert_eq!(done.cpages, 512);
            let done = device.run(Do::ToSys, (memory.at, 512), &mut data).unwrap();
            assert_eq!(done.cpages, 512);
            assert!((0..BLOCK / 8).all(|n| memory.word(n) == 0));
        }
    });
}

/// Flags are about no memory, small steps leave them as they are, and the last that were set count.
#[test]
fn flags_are_for_the_next_large_step() {
    preloaded("large::flags_are_for_the_next_large_step", || {
        let device = Device::open();
        let mut data = vec![0; BLOCK];
        let memory = Memory::huge(READ_WRITE);
        memory.fill(512);
        let was_huge = device.snapshot(memory.at, 512)[0] & PMD != 0;
        let pages = |n: usize| data[..n * PAGE].to_vec();
        let (mut one, mut all) = (pages(1), pages(512));
        let is_huge = || device.snapshot(memory.at, 512)[0] & PMD != 0;
        device.run(Do::ToDev, (memory.at, 512), &mut data).unwrap();
        device.set_flags(FAIL_ALLOC);
        device.set_flags(0);
        device.run(Do::ToSys, (memory.at, 512), &mut all).unwrap();
        assert_eq!(is_huge(), was_huge);
        // A page is no large step, there or back: so the next one, home, fails.
        let other = Memory::new(1, READ_WRITE);
        other.fill(1);
        device.run(Do::ToDev, (memory.at, 512), &mut all).unwrap();
        device.set_flags(FAIL_ALLOC);
        device.run(Do::ToDev, (other.at, 1), &mut one).unwrap();
        device.run(Do::ToSys, (other.at, 1), &mut one).unwrap();
        assert!(other.is_filled(1));
        device.run(Do::ToSys, (memory.at, 512), &mut all).unwrap();
        assert!(!is_huge());
        assert!(memory.is_filled(512));
    });
}
