//! Pages that a userfaultfd of the program keeps back: a read that may wait gets what its handler puts there.

use super::is_preloaded;
use crate::kit::{Area, Device, Do, HUGE, PAGE, READ_WRITE, Span, errno};
use gpusvm_testkit::own_uffd::OwnUffd;
use std::sync::mpsc;
use std::time::Duration;

const PAGES: usize = 4;
/// How long a handler waits for what must come.
const LONG: i32 = 20_000;

fn opened() -> (Device, Area, OwnUffd) {
    let area = Area::aligned(HUGE, false, READ_WRITE);
    let uffd = OwnUffd::open().unwrap();
    uffd.register(area.page(8), PAGES).unwrap();
    (Device::open(), area, uffd)
}

/// Reads what is kept back, in a thread of its own; what came of it comes through the channel.
fn reading<'s>(
    scope: &'s std::thread::Scope<'s, '_>,
    device: &'s Device,
    pages: Span,
) -> mpsc::Receiver<Result<Vec<u8>, i32>> {
    let (done, result) = mpsc::channel();
    scope.spawn(move || {
        let mut data = vec![0; pages.len()];
        let read = device.run(Do::ReadUnlocked, pages, &mut data);
        done.send(read.map(|_| data)).unwrap();
    });
    result
}

/// As the kernel's test of this name: a handler of the program's own fills each page.
#[test]
fn userfaultfd_read() {
    if !is_preloaded("flags::unlocked::userfaultfd_read") {
        return;
    }
    let (device, area, uffd) = opened();
    std::thread::scope(|scope| {
        let read = reading(scope, &device, area.part(8, PAGES));
        for n in 0..PAGES {
            let at = uffd.next_fault(LONG).unwrap();
            assert_eq!(at, area.page(8 + n), "one after the other");
            uffd.fill(at, 0xab).unwrap();
        }
        let data = read.recv().unwrap().unwrap();
        assert!(data.iter().all(|byte| *byte == 0xab));
    });
    // Once more, and without waiting: they are there.
    let mut data = vec![0; PAGES * PAGE];
    let around = area.part(8, PAGES);
    let done = device.run(Do::ReadUnlocked, around, &mut data).unwrap();
    assert_eq!((done.cpages, done.faults), (4, 0));
    device.run(Do::Read, around, &mut data).unwrap();
    assert_eq!(uffd.next_fault(0), None);
    // It is still the program's: nothing else was registered there.
    uffd.unregister(area.page(8), PAGES).unwrap();
    uffd.register(area.page(0), 16).unwrap();
}

/// A handler may do all that a program does meanwhile, also what devices are told of.
#[test]
fn nobody_waits_for_a_handler_but_who_asked() {
    if !is_preloaded("flags::unlocked::nobody_waits_for_a_handler_but_who_asked") {
        return;
    }
    let (device, area, uffd) = opened();
    let other = Device::open();
    let second = Area::aligned(HUGE, false, READ_WRITE);
    let elsewhere = second.part(0, 64);
    elsewhere.fill(1);
    std::thread::scope(|scope| {
        let read = reading(scope, &device, area.part(8, PAGES));
        for _ in 0..PAGES {
            let at = uffd.next_fault(LONG).unwrap();
            let mut data = vec![0; 64 * PAGE];
            other.run(Do::MigrateToDev, elsewhere, &mut data).unwrap();
            assert!(elsewhere.is_filled(1));
            // SAFETY: a page of our own that nobody uses.
            let unmapped = unsafe { libc::munmap(area.page(30).cast(), PAGE) };
            assert_eq!(unmapped, 0, "{}", errno());
            uffd.fill(at, 0xab).unwrap();
        }
        assert!(read.recv().unwrap().is_ok());
    });
}

/// Who does not wait is refused at once, and disturbs nobody: no handler hears of it. Nothing migrates.
#[test]
fn a_page_that_is_kept_back_is_refused() {
    if !is_preloaded("flags::unlocked::a_page_that_is_kept_back_is_refused") {
        return;
    }
    let (device, area, uffd) = opened();
    let mut data = vec![0; 64 * PAGE];
    // What is before it, in the same range, is read as ever.
    let before = device.run(Do::Read, area.part(0, 8), &mut data).unwrap();
    assert_eq!((before.cpages, before.faults), (8, 1));
    for pages in [area.part(8, PAGES), area.part(0, 64)] {
        let read = device.run(Do::Read, pages, &mut data);
        assert_eq!(read.unwrap_err(), libc::EFAULT);
    }
    let moved = device.run(Do::MigrateToDev, area.part(8, PAGES), &mut data);
    assert_eq!(moved.unwrap_err(), libc::ENOENT);
    assert_eq!(uffd.next_fault(0), None);
    uffd.fill(area.page(8), 7).unwrap();
    device.run(Do::Read, area.part(8, 1), &mut data).unwrap();
    assert!(data[..PAGE].iter().all(|byte| *byte == 7));
}

/// Unmapped under who waits: an error, and no wait. Also when other memory is there by then.
#[test]
fn who_waits_for_memory_that_goes_is_told() {
    if !is_preloaded("flags::unlocked::who_waits_for_memory_that_goes_is_told") {
        return;
    }
    for is_replaced in [false, true] {
        let (device, area, uffd) = opened();
        std::thread::scope(|scope| {
            let read = reading(scope, &device, area.part(8, PAGES));
            assert!(uffd.next_fault(LONG).is_some());
            let at = area.page(8).cast();
            let (flags, len) = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, PAGES * PAGE);
            match is_replaced {
                // SAFETY: pages of our own that nobody uses but who waits for them.
                false => assert_eq!(unsafe { libc::munmap(at, len) }, 0),
                true => {
                    let flags = flags | libc::MAP_FIXED;
                    // SAFETY: as above.
                    let new = unsafe { libc::mmap(at, len, READ_WRITE, flags, -1, 0) };
                    assert_eq!(new, at);
                }
            }
            let read = read.recv_timeout(Duration::from_secs(30)).unwrap();
            match is_replaced {
                false => assert_eq!(read.unwrap_err(), libc::EFAULT),
                true => assert!(read.unwrap().iter().all(|byte| *byte == 0)),
            }
        });
    }
}

/// Let go of, or closed, under who waits: the pages are ordinary ones by then, as the kernel has it.
#[test]
fn who_waits_for_a_handler_that_goes_reads_zeroes() {
    if !is_preloaded("flags::unlocked::who_waits_for_a_handler_that_goes_reads_zeroes") {
        return;
    }
    for is_closed in [false, true] {
        let (device, area, uffd) = opened();
        std::thread::scope(|scope| {
            let read = reading(scope, &device, area.part(8, PAGES));
            assert!(uffd.next_fault(LONG).is_some());
            match is_closed {
                false => uffd.unregister(area.page(8), PAGES).unwrap(),
                true => drop(uffd),
            }
            let read = read.recv_timeout(Duration::from_secs(30)).unwrap();
            assert!(read.unwrap().iter().all(|byte| *byte == 0));
        });
    }
}
