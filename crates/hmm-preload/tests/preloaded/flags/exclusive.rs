//! EXCLUSIVE, and what CHECK_EXCLUSIVE says of it.

use super::is_preloaded;
use crate::kit::{Area, Device, Do, HUGE, PAGE, READ_WRITE, Span, assert_same, pattern, seen};

fn check(device: &Device, pages: Span) -> Result<(), i32> {
    device.run(Do::CheckExclusive, pages, &mut []).map(drop)
}

/// What came by TO_DEV is not exclusive, what came by EXCLUSIVE is, page by page, until the CPU touches it.
#[test]
fn what_is_exclusive_is_what_was_asked_for() {
    if !is_preloaded("flags::exclusive::what_is_exclusive_is_what_was_asked_for") {
        return;
    }
    let device = Device::open();
    let area = Area::aligned(HUGE, false, READ_WRITE);
    area.fill(1);
    let mut data = vec![0; 64 * PAGE];
    let at = |first, pages| area.part(first, pages);
    device.run(Do::MigrateToDev, at(0, 8), &mut data).unwrap();
    assert_eq!(check(&device, at(0, 64)), Ok(()));
    device.run(Do::Read, at(0, 8), &mut data).unwrap();
    device.run(Do::Write, at(0, 8), &mut data).unwrap();
    assert_eq!(check(&device, at(0, 64)), Ok(()));
    let done = device.run(Do::Exclusive, at(6, 4), &mut data).unwrap();
    assert_eq!(done.cpages, 4);
    assert_same(&data[..4 * PAGE], &pattern(1, 6, 4), "exclusive");
    assert_eq!(check(&device, at(0, 64)), Err(libc::EPERM));
    assert_eq!(check(&device, at(9, 1)), Err(libc::EPERM));
    assert_eq!(check(&device, at(0, 6)), Ok(()));
    assert_eq!(check(&device, at(10, 54)), Ok(()));
    // The kernel has no page there for who does not fault. Of the neighbours, some came before, some not.
    let before = [seen::PRIVATE_LOCAL | seen::WRITE; 2];
    let around = [before, [seen::NONE; 2], [seen::NONE; 2], [seen::WRITE; 2]];
    assert_eq!(device.look(at(4, 8)), around.concat());
    // The device reads them as they are.
    let read = device.run(Do::Read, at(6, 4), &mut data).unwrap();
    assert_eq!(read.faults, 0);
    assert_eq!(check(&device, at(6, 4)), Err(libc::EPERM));
    assert!(area.is_filled_in(6, 4, 1));
    assert_eq!(check(&device, at(0, 64)), Ok(()));
    assert!(area.is_filled(1));
}

/// A write of the device is one like any other, for which it faults: afterwards nothing is exclusive.
#[test]
fn a_write_ends_it() {
    if !is_preloaded("flags::exclusive::a_write_ends_it") {
        return;
    }
    let device = Device::open();
    let area = Area::aligned(HUGE, false, READ_WRITE);
    let pages = area.part(0, 8);
    pages.fill(1);
    let mut data = vec![0; 8 * PAGE];
    device.run(Do::Exclusive, pages, &mut data).unwrap();
    data.fill(3);
    let done = device.run(Do::Write, pages.part(2, 2), &mut data).unwrap();
    assert_eq!((done.cpages, done.faults), (2, 1));
    assert_eq!(check(&device, pages.part(2, 2)), Ok(()));
    assert_eq!(check(&device, pages), Err(libc::EPERM));
    assert_eq!(
        device.look(pages.part(1, 3)),
        [seen::NONE, seen::WRITE, seen::WRITE]
    );
    assert_same(&pages.part(2, 2).read(), &[3; 2 * PAGE], "written");
}

/// Memory that is not there, may not be written, or is shared.
#[test]
fn what_cannot_be_exclusive_is_refused() {
    if !is_preloaded("flags::exclusive::what_cannot_be_exclusive_is_refused") {
        return;
    }
    let device = Device::open();
    let mut data = vec![0; 2 * PAGE];
    let area = Area::aligned(HUGE, false, libc::PROT_READ);
    let read_only = area.part(0, 2);
    let mut run = |pages| device.run(Do::Exclusive, pages, &mut data).map(drop);
    assert_eq!(run(read_only), Err(libc::EFAULT));
    // SAFETY: a page of our own.
    let unmapped = unsafe { libc::munmap(read_only.page(1).cast(), PAGE) };
    assert_eq!((unmapped, run(read_only)), (0, Err(libc::EFAULT)));
    let shared = Area::shared(2);
    assert_eq!(run(shared.all()), Err(libc::EBUSY));
}
