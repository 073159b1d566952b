//! EXCLUSIVE, and what CHECK_EXCLUSIVE says of it.

use crate::device::{Device, Do, Memory, PAGE, preloaded};

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

fn check(device: &Device, pages: (*mut u8, usize)) -> Result<(), i32> {
    device.run(Do::CheckExclusive, pages, &mut []).map(drop)
}

/// What came by TO_DEV is not exclusive, what came by EXCLUSIVE is, page by page, until the CPU touches it.
#[test]
fn what_is_exclusive_is_what_was_asked_for() {
    preloaded("exclusive::what_is_exclusive_is_what_was_asked_for", || {
        let device = Device::open();
        let memory = Memory::new(64, READ_WRITE);
        memory.fill(64);
        let mut data = vec![0; 64 * PAGE];
        let at = |first, pages| (memory.page(first), pages);
        device.run(Do::ToDev, at(0, 8), &mut data).unwrap();
        assert_eq!(check(&device, at(0, 64)), Ok(()));
        device.run(Do::Read, at(0, 8), &mut data).unwrap();
        device.run(Do::Write, at(0, 8), &mut data).unwrap();
        assert_eq!(check(&device, at(0, 64)), Ok(()));
        let done = device.run(Do::Exclusive, at(6, 4), &mut data).unwrap();
        assert_eq!(done.cpages, 4);
        assert_eq!(data[..8], (6 * PAGE as u64 / 8).to_ne_bytes());
        assert_eq!(check(&device, at(0, 64)), Err(libc::EPERM));
        assert_eq!(check(&device, at(9, 1)), Err(libc::EPERM));
        assert_eq!(check(&device, at(0, 6)), Ok(()));
        assert_eq!(check(&device, at(10, 54)), Ok(()));
        // The kernel has no page there for who does not fault. Of the neighbours, some came before, some not.
        let seen = device.snapshot(memory.page(4), 8);
        assert_eq!(seen, [0x22, 0x22, 0, 0, 0, 0, 2, 2]);
        // The device reads them as they are.
        let read = device.run(Do::Read, at(6, 4), &mut data).unwrap();
        assert_eq!(read.faults, 0);
        assert_eq!(check(&device, at(6, 4)), Err(libc::EPERM));
        (6..10).for_each(|n| assert_eq!(memory.word(n * PAGE / 8), (n * PAGE / 8) as u64));
        assert_eq!(check(&device, at(0, 64)), Ok(()));
        assert!(memory.is_filled(64));
    });
}

/// A write of the device is one like any other, for which it faults: afterwards nothing is exclusive.
#[test]
fn a_write_ends_it() {
    preloaded("exclusive::a_write_ends_it", || {
        let device = Device::open();
        let memory = Memory::new(8, READ_WRITE);
        memory.fill(8);
        let mut data = vec![0; 8 * PAGE];
        device
            .run(Do::Exclusive, (memory.at, 8), &mut data)
            .unwrap();
        data.fill(3);
        let done = device
            .run(Do::Write, (memory.page(2), 2), &mut data)
            .unwrap();
        assert_eq!((done.cpages, done.faults), (2, 1));
        assert_eq!(check(&device, (memory.page(2), 2)), Ok(()));
        assert_eq!(check(&device, (memory.at, 8)), Err(libc::EPERM));
        assert_eq!(device.snapshot(memory.page(1), 3), [0, 2, 2]);
        assert_eq!(memory.word(2 * PAGE / 8), u64::from_ne_bytes([3; 8]));
    });
}

/// Memory that is not there, may not be written, or is shared.
#[test]
fn what_cannot_be_exclusive_is_refused() {
    preloaded("exclusive::what_cannot_be_exclusive_is_refused", || {
        let device = Device::open();
        let mut data = vec![0; 2 * PAGE];
        let read_only = Memory::new(2, libc::PROT_READ);
        let mut run = |at| device.run(Do::Exclusive, (at, 2), &mut data).map(drop);
        assert_eq!(run(read_only.at), Err(libc::EFAULT));
        // SAFETY: a page of our own.
        let unmapped = unsafe { libc::munmap(read_only.page(1).cast(), PAGE) };
        assert_eq!((unmapped, run(read_only.at)), (0, Err(libc::EFAULT)));
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let nowhere = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let shared = unsafe { libc::mmap(nowhere, 2 * PAGE, READ_WRITE, flags, -1, 0) };
        assert_eq!(run(shared.cast()), Err(libc::EBUSY));
    });
}
