//! Every way to open and to close.

use crate::kit::{Area, DEVICES, Descriptor, Device, Do, engine_runs, errno, is_preloaded};
use std::ffi::{c_char, c_int};

unsafe extern "C" {
    fn __open_2(path: *const c_char, flags: c_int) -> c_int;
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int;
    fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    fn closefrom(first: c_int);
    fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int;
}

/// How to close a descriptor.
type Close = fn(Descriptor);

const WAYS: [(&str, Close); 6] = [
    ("close", |fd| fd.close().unwrap()),
    ("dup2", |fd| {
        // SAFETY: the descriptor is the test's own.
        assert_eq!(unsafe { libc::dup2(0, fd.0) }, fd.0);
        assert!(!is_device(fd));
    }),
    ("dup3", |fd| {
        // SAFETY: as above.
        assert_eq!(unsafe { dup3(0, fd.0, libc::O_CLOEXEC) }, fd.0);
        assert!(!is_device(fd));
    }),
    ("close_range", |fd| {
        let fd = fd.0.unsigned_abs();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::close_range(fd, fd, 0) }, 0);
    }),
    ("closefrom", |fd| {
        // SAFETY: nothing else is open above.
        unsafe { closefrom(fd.0) };
    }),
    ("fclose", |fd| {
        // SAFETY: a descriptor of our own, and a mode.
        let stream = unsafe { libc::fdopen(fd.0, c"r+".as_ptr()) };
        // SAFETY: a stream that nobody else has.
        assert_eq!(unsafe { libc::fclose(stream) }, 0);
    }),
];

fn is_device(fd: Descriptor) -> bool {
    let area = Area::new(1);
    fd.run(Do::Snapshot, area.all(), &mut [0]).is_ok()
}

/// A descriptor of the first device.
fn open() -> Descriptor {
    Descriptor::open(DEVICES[0], 0).unwrap()
}

/// The same one, at a number where there is nothing.
fn open_at(number: c_int) -> Descriptor {
    let fd = open();
    // SAFETY: a descriptor of our own, to where there is none.
    assert_eq!(unsafe { libc::dup2(fd.0, number) }, number);
    fd.close().unwrap();
    Descriptor(number)
}

/// Whichever call takes the last descriptor: when it returns, all is home and the engine has ended. Until then the
/// device is there.
#[test]
fn whatever_closes_the_last_descriptor_ends_the_device() {
    if !is_preloaded("apps::descriptors::whatever_closes_the_last_descriptor_ends_the_device") {
        return;
    }
    for (first, close_first) in WAYS {
        for (last, close_last) in WAYS {
            let what = format!("{first}, then {last}");
            let twin = open();
            // SAFETY: a descriptor of our own.
            let fd = unsafe { libc::fcntl(twin.0, libc::F_DUPFD, twin.0 + 1) };
            assert_eq!(fd, twin.0 + 1, "{what}");
            let fd = Descriptor(fd);
            let area = Area::new(16);
            area.fill(3);
            fd.take(area.all());
            close_first(fd);
            assert!(twin.has(area.all()), "{what}");
            close_last(twin);
            assert!(!engine_runs(), "{what}");
            assert!(area.is_filled(3), "{what}");
            // What was put in their places.
            for fd in [fd, twin] {
                let _ = fd.close();
            }
        }
    }
}

/// One file of two ends alone, and the other keeps its pages.
#[test]
fn a_range_that_is_closed_ends_the_devices_in_it() {
    if !is_preloaded("apps::descriptors::a_range_that_is_closed_ends_the_devices_in_it") {
        return;
    }
    let other = Device::number(1);
    let (first, second) = (open_at(200), open_at(201));
    let (here, there) = (Area::new(4), Area::new(4));
    here.fill(1);
    there.fill(2);
    second.take(here.all());
    other.take(there.all());
    let (from, to) = (first.0.unsigned_abs(), second.0.unsigned_abs());
    // SAFETY: closes nothing.
    let marked = unsafe { libc::close_range(from, to, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    assert_eq!(marked, 0);
    assert!(second.has(here.all()));
    // SAFETY: both are ours.
    assert_eq!(unsafe { libc::close_range(from, to, 0) }, 0);
    assert_eq!(
        (first.close(), second.close()),
        (Err(libc::EBADF), Err(libc::EBADF))
    );
    assert!(other.has(there.all()) && here.is_filled(1));
    other.close();
    assert!(!engine_runs() && there.is_filled(2));
    // SAFETY: refused.
    let refused = unsafe { libc::close_range(9, 8, 0) };
    assert_eq!((refused, errno()), (-1, libc::EINVAL));
}

/// A program that closes all descriptors that it does not know does not close the engine's.
#[test]
fn the_engines_descriptors_are_not_the_programs_to_close() {
    if !is_preloaded("apps::descriptors::the_engines_descriptors_are_not_the_programs_to_close") {
        return;
    }
    /// Above all that the engine has.
    const HIGH: c_int = 300;
    // What this test was started with.
    // SAFETY: nobody here knows of it.
    assert_eq!(unsafe { libc::close_range(3, u32::MAX, 0) }, 0);
    for way in 0..3 {
        let device = open_at(HIGH);
        let area = Area::new(600);
        area.fill(way);
        device.take(area.all());
        match way {
            0 => {
                // SAFETY: nothing of the program's is open there.
                let closed = unsafe { libc::close_range(3, HIGH.unsigned_abs() - 1, 0) };
                assert_eq!(closed, 0);
            }
            1 => (3..HIGH)
                .for_each(|fd| assert_eq!(Descriptor(fd).close(), Err(libc::EBADF), "{fd}")),
            _ => {
                let is_taken = |fd: &c_int| {
                    // SAFETY: copies a descriptor.
                    let copied = unsafe { libc::dup2(0, *fd) };
                    assert!(copied == *fd || errno() == libc::EBUSY, "{copied}");
                    copied == -1
                };
                let taken: Vec<_> = (3..HIGH).filter(is_taken).collect();
                assert!(!taken.is_empty() && taken.len() < 20, "{taken:?}");
                (3..HIGH)
                    .filter(|fd| !taken.contains(fd))
                    .for_each(|fd| Descriptor(fd).close().unwrap());
            }
        }
        assert!(device.has(area.all()));
        assert!(area.is_filled(way), "it comes home by a touch");
        device.take(area.all());
        device.close().unwrap();
        assert!(!engine_runs() && area.is_filled(way));
    }
}

/// All that opens files opens the device. A system call without the C library finds no such file.
#[test]
fn every_open_opens_the_device() {
    if !is_preloaded("apps::descriptors::every_open_opens_the_device") {
        return;
    }
    let (path, flags, here) = (DEVICES[0].as_ptr(), libc::O_RDWR, libc::AT_FDCWD);
    #[expect(
        clippy::multiple_unsafe_ops_per_block,
        reason = "eight calls of one kind"
    )]
    // SAFETY: a C string, in each.
    let opened = unsafe {
        [
            libc::open(path, flags),
            libc::open64(path, flags),
            libc::openat(here, path, flags),
            libc::openat64(here, path, flags),
            __open_2(path, flags),
            __open64_2(path, flags),
            __openat_2(here, path, flags),
            __openat64_2(here, path, flags),
        ]
    };
    let opened = opened.map(Descriptor);
    assert!(opened.iter().all(|fd| is_device(*fd)), "{opened:?}");
    for mode in [c"r", c"r+", c"we"] {
        // SAFETY: C strings.
        let stream = unsafe { libc::fopen(path, mode.as_ptr()) };
        assert!(!stream.is_null());
        // SAFETY: a stream.
        let fd = unsafe { libc::fileno(stream) };
        assert!(is_device(Descriptor(fd)));
        // SAFETY: a descriptor of our own.
        let exec = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        assert_eq!(exec == libc::FD_CLOEXEC, mode == c"we");
        // SAFETY: a stream that nobody else has.
        assert_eq!(unsafe { libc::fclose(stream) }, 0);
    }
    opened.iter().for_each(|fd| fd.close().unwrap());
    assert!(!engine_runs());
    // SAFETY: a C string.
    let unseen = unsafe { libc::syscall(libc::SYS_openat, here, path, flags) };
    assert_eq!((unseen, errno()), (-1, libc::ENOENT));
    for file in ["/proc/self/maps", "/dev/null"] {
        assert!(std::fs::File::open(file).is_ok());
    }
}

/// A device that was closed unseen ends when the next one is opened or closed, also if there is none of it left to
/// close.
#[test]
fn what_was_closed_unseen_ends_with_the_next() {
    if !is_preloaded("apps::descriptors::what_was_closed_unseen_ends_with_the_next") {
        return;
    }
    let fd = open();
    let area = Area::new(4);
    area.fill(5);
    fd.take(area.all());
    // SAFETY: a descriptor of our own.
    assert_eq!(unsafe { libc::syscall(libc::SYS_close, fd.0) }, 0);
    assert!(engine_runs());
    let next = Device::open();
    assert!(!next.has(area.all()));
    next.close();
    assert!(!engine_runs() && area.is_filled(5));
}
