//! Every way to open and to close.

use crate::kit::{
    Area, DEVICE, READ, SNAPSHOT, close, engine_runs, errno, is_preloaded, open, request,
};
use std::ffi::{c_char, c_int, c_void};

unsafe extern "C" {
    fn __open_2(path: *const c_char, flags: c_int) -> c_int;
    fn __open64_2(path: *const c_char, flags: c_int) -> c_int;
    fn __openat_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    fn __openat64_2(dir: c_int, path: *const c_char, flags: c_int) -> c_int;
    fn closefrom(first: c_int);
    fn dup3(from: c_int, to: c_int, flags: c_int) -> c_int;
}

/// How to close a descriptor.
type Close = fn(c_int);

const WAYS: [(&str, Close); 6] = [
    ("close", |fd| close(fd).unwrap()),
    ("dup2", |fd| {
        // SAFETY: the descriptor is the test's own.
        assert_eq!(unsafe { libc::dup2(0, fd) }, fd);
        assert!(!is_device(fd));
    }),
    ("dup3", |fd| {
        // SAFETY: as above.
        assert_eq!(unsafe { dup3(0, fd, libc::O_CLOEXEC) }, fd);
        assert!(!is_device(fd));
    }),
    ("close_range", |fd| {
        let fd = fd.unsigned_abs();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::close_range(fd, fd, 0) }, 0);
    }),
    ("closefrom", |fd| {
        // SAFETY: nothing else is open above.
        unsafe { closefrom(fd) };
    }),
    ("fclose", |fd| {
        // SAFETY: a descriptor of our own, and a mode.
        let stream = unsafe { libc::fdopen(fd, c"r+".as_ptr()) };
        // SAFETY: a stream that nobody else has.
        assert_eq!(unsafe { libc::fclose(stream) }, 0);
    }),
];

fn is_device(fd: c_int) -> bool {
    Area::new(1).run(fd, SNAPSHOT, &mut [0]).is_ok()
}

/// Whichever call takes the last descriptor: when it returns, all is home and the engine has ended. Until then the
/// device is there.
#[test]
fn whatever_closes_the_last_descriptor_ends_the_device() {
    if !is_preloaded("descriptors::whatever_closes_the_last_descriptor_ends_the_device") {
        return;
    }
    for (first, close_first) in WAYS {
        for (last, close_last) in WAYS {
            let what = format!("{first}, then {last}");
            let twin = open(0);
            // SAFETY: a descriptor of our own.
            let fd = unsafe { libc::fcntl(twin, libc::F_DUPFD, twin + 1) };
            assert_eq!(fd, twin + 1, "{what}");
            let area = Area::new(16);
            area.fill(3);
            area.take(fd);
            close_first(fd);
            assert!(area.is_local(twin), "{what}");
            close_last(twin);
            assert!(!engine_runs(), "{what}");
            assert!(area.is_filled(3), "{what}");
            // What was put in their places.
            for fd in [fd, twin] {
                let _ = close(fd);
            }
        }
    }
}

/// One file of two ends alone, and the other keeps its pages.
#[test]
fn a_range_that_is_closed_ends_the_devices_in_it() {
    if !is_preloaded("descriptors::a_range_that_is_closed_ends_the_devices_in_it") {
        return;
    }
    // SAFETY: a C string.
    let other = unsafe { libc::open(c"/dev/hmm_dmirror1".as_ptr(), libc::O_RDWR) };
    let [first, second] = [200, 201].map(|to| {
        let fd = open(0);
        // SAFETY: a descriptor of our own, to where there is none.
        assert_eq!(unsafe { libc::dup2(fd, to) }, to);
        close(fd).unwrap();
        to
    });
    let (here, there) = (Area::new(4), Area::new(4));
    here.fill(1);
    there.fill(2);
    here.take(second);
    there.take(other);
    let (from, to) = (first.unsigned_abs(), second.unsigned_abs());
    // SAFETY: closes nothing.
    let marked = unsafe { libc::close_range(from, to, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    assert_eq!(marked, 0);
    assert!(here.is_local(second));
    // SAFETY: both are ours.
    assert_eq!(unsafe { libc::close_range(from, to, 0) }, 0);
    assert_eq!(
        (close(first), close(second)),
        (Err(libc::EBADF), Err(libc::EBADF))
    );
    assert!(there.is_local(other) && here.is_filled(1));
    close(other).unwrap();
    assert!(!engine_runs() && there.is_filled(2));
    // SAFETY: refused.
    let refused = unsafe { libc::close_range(9, 8, 0) };
    assert_eq!((refused, errno()), (-1, libc::EINVAL));
}

/// A program that closes all descriptors that it does not know does not close the engine's.
#[test]
fn the_engines_descriptors_are_not_the_programs_to_close() {
    if !is_preloaded("descriptors::the_engines_descriptors_are_not_the_programs_to_close") {
        return;
    }
    /// Above all that the engine has.
    const HIGH: c_int = 300;
    // What this test was started with.
    // SAFETY: nobody here knows of it.
    assert_eq!(unsafe { libc::close_range(3, u32::MAX, 0) }, 0);
    for way in 0..3 {
        let fd = open(0);
        // SAFETY: a descriptor of our own.
        assert_eq!(unsafe { libc::dup2(fd, HIGH) }, HIGH);
        close(fd).unwrap();
        let area = Area::new(600);
        area.fill(way);
        area.take(HIGH);
        match way {
            0 => {
                // SAFETY: nothing of the program's is open there.
                let closed = unsafe { libc::close_range(3, HIGH.unsigned_abs() - 1, 0) };
                assert_eq!(closed, 0);
            }
            1 => (3..HIGH).for_each(|fd| assert_eq!(close(fd), Err(libc::EBADF), "{fd}")),
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
                    .for_each(|fd| close(fd).unwrap());
            }
        }
        assert!(area.is_local(HIGH));
        assert!(area.is_filled(way), "it comes home by a touch");
        area.take(HIGH);
        close(HIGH).unwrap();
        assert!(!engine_runs() && area.is_filled(way));
    }
}

/// All that opens files opens the device. A system call without the C library finds no such file.
#[test]
fn every_open_opens_the_device() {
    if !is_preloaded("descriptors::every_open_opens_the_device") {
        return;
    }
    let (path, flags, here) = (DEVICE.as_ptr(), libc::O_RDWR, libc::AT_FDCWD);
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
    assert!(opened.iter().all(|fd| is_device(*fd)), "{opened:?}");
    for mode in [c"r", c"r+", c"we"] {
        // SAFETY: C strings.
        let stream = unsafe { libc::fopen(path, mode.as_ptr()) };
        assert!(!stream.is_null());
        // SAFETY: a stream.
        let fd = unsafe { libc::fileno(stream) };
        assert!(is_device(fd));
        // SAFETY: a descriptor of our own.
        let exec = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        assert_eq!(exec == libc::FD_CLOEXEC, mode == c"we");
        // SAFETY: a stream that nobody else has.
        assert_eq!(unsafe { libc::fclose(stream) }, 0);
    }
    opened.iter().for_each(|fd| close(*fd).unwrap());
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
    if !is_preloaded("descriptors::what_was_closed_unseen_ends_with_the_next") {
        return;
    }
    let fd = open(0);
    let area = Area::new(4);
    area.fill(5);
    area.take(fd);
    // SAFETY: a descriptor of our own.
    assert_eq!(unsafe { libc::syscall(libc::SYS_close, fd) }, 0);
    assert!(engine_runs());
    let next = open(0);
    let home = area.run(next, SNAPSHOT, &mut [0; 4]);
    assert!(home.is_ok() && !area.is_local(next));
    close(next).unwrap();
    assert!(!engine_runs() && area.is_filled(5));
}

/// A program may have the request in an `int`: what is above its 32 bits is not looked at.
#[test]
fn a_request_has_32_bits() {
    if !is_preloaded("descriptors::a_request_has_32_bits") {
        return;
    }
    let fd = open(0);
    let area = Area::new(1);
    let mut data = [0u8; 4096];
    let mut words = [
        area.at.addr() as u64,
        data.as_mut_ptr().addr() as u64,
        1,
        0,
        0,
    ];
    let request = request(READ) | 0xffff_ffff << 32;
    // SAFETY: a command of this device, with room for the data.
    let done = unsafe { libc::ioctl(fd, request, (&raw mut words).cast::<c_void>()) };
    assert_eq!((done, words[3]), (0, 1));
    close(fd).unwrap();
}
