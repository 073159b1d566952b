//! Pages that a userfaultfd of the program keeps back: a read that may wait gets what its handler puts there.

use crate::device::{Device, Do, Memory, PAGE, errno, preloaded};
use gpusvm_testkit::own_uffd::OwnUffd;
use std::sync::mpsc;
use std::time::Duration;

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PAGES: usize = 4;
/// How long a handler waits for what must come.
const LONG: i32 = 20_000;

fn opened() -> (Device, Memory, OwnUffd) {
    let memory = Memory::new(64, READ_WRITE);
    let uffd = OwnUffd::open().unwrap();
    uffd.register(memory.page(8), PAGES).unwrap();
    (Device::open(), memory, uffd)
}

/// Reads what is kept back, in a thread of its own; what came of it comes through the channel.
fn reading<'s>(
    scope: &'s std::thread::Scope<'s, '_>,
    device: &'s Device,
    at: *mut u8,
) -> mpsc::Receiver<Result<Vec<u8>, i32>> {
    let (done, result) = mpsc::channel();
    let at = at.expose_provenance();
    scope.spawn(move || {
        let at = std::ptr::with_exposed_provenance_mut(at);
        let mut data = vec![0; PAGES * PAGE];
        let read = device.run(Do::ReadUnlocked, (at, PAGES), &mut data);
        done.send(read.map(|_| data)).unwrap();
    });
    result
}

/// As the kernel's test of this name: a handler of the program's own fills each page.
#[test]
fn userfaultfd_read() {
    preloaded("unlocked::userfaultfd_read", || {
        let (device, memory, uffd) = opened();
        std::thread::scope(|scope| {
            let read = reading(scope, &device, memory.page(8));
            for n in 0..PAGES {
                let at = uffd.next_fault(LONG).unwrap();
                assert_eq!(at, memory.page(8 + n), "one after the other");
                uffd.fill(at, 0xab).unwrap();
            }
            let data = read.recv().unwrap().unwrap();
            assert!(data.iter().all(|byte| *byte == 0xab));
        });
        // Once more, and without waiting: they are there.
        let mut data = vec![0; PAGES * PAGE];
        let around = (memory.page(8), PAGES);
        let done = device.run(Do::ReadUnlocked, around, &mut data).unwrap();
        assert_eq!((done.cpages, done.faults), (4, 0));
        device.run(Do::Read, around, &mut data).unwrap();
        assert_eq!(uffd.next_fault(0), None);
        // It is still the program's: nothing else was registered there.
        uffd.unregister(memory.page(8), PAGES).unwrap();
        uffd.register(memory.page(0), 16).unwrap();
    });
}

/// A handler may do all that a program does meanwhile, also what devices are told of.
#[test]
fn nobody_waits_for_a_handler_but_who_asked() {
    preloaded("unlocked::nobody_waits_for_a_handler_but_who_asked", || {
        let (device, memory, uffd) = opened();
        let other = Device::open();
        let elsewhere = Memory::new(64, READ_WRITE);
        elsewhere.fill(64);
        std::thread::scope(|scope| {
            let read = reading(scope, &device, memory.page(8));
            for _ in 0..PAGES {
                let at = uffd.next_fault(LONG).unwrap();
                let mut data = vec![0; 64 * PAGE];
                other.run(Do::ToDev, (elsewhere.at, 64), &mut data).unwrap();
                assert!(elsewhere.is_filled(64));
                // SAFETY: a page of our own that nobody uses.
                let unmapped = unsafe { libc::munmap(memory.page(30).cast(), PAGE) };
                assert_eq!(unmapped, 0, "{}", errno());
                uffd.fill(at, 0xab).unwrap();
            }
            assert!(read.recv().unwrap().is_ok());
        });
    });
}

/// Who does not wait is refused at once, and disturbs nobody: no handler hears of it. Nothing migrates.
#[test]
fn a_page_that_is_kept_back_is_refused() {
    preloaded("unlocked::a_page_that_is_kept_back_is_refused", || {
        let (device, memory, uffd) = opened();
        let mut data = vec![0; 64 * PAGE];
        // What is before it, in the same range, is read as ever.
        let before = device
            .run(Do::Read, (memory.page(0), 8), &mut data)
            .unwrap();
        assert_eq!((before.cpages, before.faults), (8, 1));
        for (at, pages) in [(memory.page(8), PAGES), (memory.page(0), 64)] {
            let read = device.run(Do::Read, (at, pages), &mut data);
            assert_eq!(read.unwrap_err(), libc::EFAULT);
        }
        let moved = device.run(Do::ToDev, (memory.page(8), PAGES), &mut data);
        assert_eq!(moved.unwrap_err(), libc::ENOENT);
        assert_eq!(uffd.next_fault(0), None);
        uffd.fill(memory.page(8), 7).unwrap();
        device
            .run(Do::Read, (memory.page(8), 1), &mut data)
            .unwrap();
        assert!(data[..PAGE].iter().all(|byte| *byte == 7));
    });
}

/// Unmapped under who waits: an error, and no wait. Also when other memory is there by then.
#[test]
fn who_waits_for_memory_that_goes_is_told() {
    preloaded("unlocked::who_waits_for_memory_that_goes_is_told", || {
        for is_replaced in [false, true] {
            let (device, memory, uffd) = opened();
            std::thread::scope(|scope| {
                let read = reading(scope, &device, memory.page(8));
                assert!(uffd.next_fault(LONG).is_some());
                let at = memory.page(8).cast();
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
    });
}

/// Let go of, or closed, under who waits: the pages are ordinary ones by then, as the kernel has it.
#[test]
fn who_waits_for_a_handler_that_goes_reads_zeroes() {
    preloaded(
        "unlocked::who_waits_for_a_handler_that_goes_reads_zeroes",
        || {
            for is_closed in [false, true] {
                let (device, memory, uffd) = opened();
                std::thread::scope(|scope| {
                    let read = reading(scope, &device, memory.page(8));
                    assert!(uffd.next_fault(LONG).is_some());
                    match is_closed {
                        false => uffd.unregister(memory.page(8), PAGES).unwrap(),
                        true => drop(uffd),
                    }
                    let read = read.recv_timeout(Duration::from_secs(30)).unwrap();
                    assert!(read.unwrap().iter().all(|byte| *byte == 0));
                });
            }
        },
    );
}
