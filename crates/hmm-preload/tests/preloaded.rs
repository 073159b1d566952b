//! Programs with the library preloaded: this test itself, started again, and programs of the system.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

use std::ffi::CStr;
use std::path::PathBuf;
use std::process::{Command, Output};

/// What the started test is to do.
const ROLE: &str = "GPUSVM_HMM_TEST_ROLE";
const PAGE: usize = 4096;

/// The five words of a command.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Cmd {
    addr: u64,
    ptr: u64,
    npages: u64,
    cpages: u64,
    faults: u64,
}

const READ: u64 = 0;
const WRITE: u64 = 1;
const TO_DEV: u64 = 2;
const TO_SYS: u64 = 3;
const SNAPSHOT: u64 = 4;
const EXCLUSIVE: u64 = 5;
const CHECK_EXCLUSIVE: u64 = 6;
const RELEASE: u64 = 7;

/// Cargo builds it for these tests, beside them.
fn library() -> PathBuf {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    let library = folder.join("libgpusvm_hmm.so");
    assert!(library.exists(), "{} was not built", library.display());
    library
}

/// Runs a test of this file again, with the library, as `role`.
fn preloaded(test: &str, role: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).env("LD_PRELOAD", library());
    command.output().unwrap()
}

/// Whether this is the started one; else starts it, and looks whether it succeeded.
fn is_role(test: &str) -> bool {
    if std::env::var_os(ROLE).is_some() {
        return true;
    }
    if !gpusvm_testkit::require::require_uffd() {
        return false;
    }
    let output = preloaded(test, "1");
    assert!(
        output.status.success(),
        "{}\n{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    false
}

fn open(path: &CStr) -> i32 {
    // SAFETY: a C string.
    unsafe { libc::open(path.as_ptr(), libc::O_RDWR) }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

/// Memory of `pages` pages that nobody refers to.
fn map(pages: usize, flags: i32) -> *mut u8 {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = flags | libc::MAP_ANONYMOUS;
    let nowhere = std::ptr::null_mut();
    // SAFETY: no address is asked for.
    let at = unsafe { libc::mmap(nowhere, pages * PAGE, access, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.cast()
}

fn set(at: *mut u8, value: u8) {
    // SAFETY: memory of the test's own, which nobody refers to.
    unsafe { at.write_volatile(value) };
}

fn get(at: *mut u8) -> u8 {
    // SAFETY: as above.
    unsafe { at.read_volatile() }
}

/// Runs a command, and says what came of it, or the error number.
fn ioctl(fd: i32, number: u64, (at, pages): (*mut u8, usize), data: &mut [u8]) -> Result<Cmd, i32> {
    let mut cmd = Cmd {
        addr: at.addr() as u64,
        ptr: data.as_mut_ptr().addr() as u64,
        npages: pages as u64,
        cpages: 99,
        faults: 99,
    };
    let request = 3 << 30 | 40 << 16 | 0x48 << 8 | number;
    // SAFETY: a command of this device, with room for the data.
    match unsafe { libc::ioctl(fd, request, &raw mut cmd) } {
        0 => Ok(cmd),
        _ => Err(errno()),
    }
}

/// The way of a page: read where it is, to the device, seen there, home by a touch, exclusive, released.
#[test]
fn commands_mean_what_the_kernels_device_means() {
    if !is_role("commands_mean_what_the_kernels_device_means") {
        return;
    }
    let fd = open(c"/dev/hmm_dmirror0");
    assert!(fd >= 0, "{}", errno());
    let other = open(c"/dev/hmm_dmirror1");
    let at = map(8, libc::MAP_PRIVATE);
    let page = |n: usize| at.wrapping_add(n * PAGE);
    (0..8u8).for_each(|n| set(page(usize::from(n)), n));
    let mut data = vec![0u8; 8 * PAGE];
    let all = (at, 8);
    // One fault for all of it, then none.
    let done = ioctl(fd, READ, all, &mut data).unwrap();
    assert_eq!((done.cpages, done.faults), (8, 1));
    assert_eq!(data[5 * PAGE], 5);
    assert_eq!(ioctl(fd, READ, all, &mut data).unwrap().faults, 0);
    assert_eq!(
        ioctl(fd, TO_DEV, (page(0), 4), &mut data).unwrap().cpages,
        4
    );
    assert_eq!(
        ioctl(other, TO_DEV, (page(4), 2), &mut data)
            .unwrap()
            .cpages,
        2
    );
    // What is on another device stays there.
    assert_eq!(
        ioctl(fd, TO_DEV, (page(4), 1), &mut data).unwrap_err(),
        libc::ENOENT
    );
    let look = |data: &mut [u8]| {
        assert_eq!(ioctl(fd, SNAPSHOT, all, data).unwrap().cpages, 8);
        data[..8].to_vec()
    };
    assert_eq!(look(&mut data), [0x22, 0x22, 0x22, 0x22, 0, 0, 2, 2]);
    assert_eq!(ioctl(fd, TO_SYS, all, &mut data).unwrap().cpages, 4);
    assert_eq!(look(&mut data), [2, 2, 2, 2, 0, 0, 2, 2]);
    assert_eq!(get(page(5)), 5);
    // Exclusive until the CPU touches it.
    ioctl(fd, EXCLUSIVE, all, &mut data).unwrap();
    assert_eq!(
        ioctl(fd, CHECK_EXCLUSIVE, all, &mut data).unwrap_err(),
        libc::EPERM
    );
    (0..8).for_each(|n| set(page(n), get(page(n)) + 1));
    ioctl(fd, CHECK_EXCLUSIVE, all, &mut data).unwrap();
    data.fill(7);
    assert_eq!(ioctl(fd, WRITE, all, &mut data).unwrap().cpages, 8);
    assert_eq!(get(page(3)), 7);
    ioctl(fd, TO_DEV, all, &mut data).unwrap();
    ioctl(fd, RELEASE, (at, 1), &mut data).unwrap();
    assert_eq!(look(&mut data), [2; 8]);
    // SAFETY: descriptors of our own.
    assert_eq!(unsafe { libc::close(fd) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::close(other) }, 0);
}

/// Devices 2 and 3: the CPU uses their pages in place, and only commands move them.
#[test]
fn coherent_devices_share_their_pages_with_the_cpu() {
    if !is_role("coherent_devices_share_their_pages_with_the_cpu") {
        return;
    }
    let (fd, other) = (open(c"/dev/hmm_dmirror2"), open(c"/dev/hmm_dmirror3"));
    assert!(fd >= 0 && other >= 0, "{}", errno());
    let at = map(8, libc::MAP_PRIVATE);
    let page = |n: usize| at.wrapping_add(n * PAGE);
    (0..6u8).for_each(|n| set(page(usize::from(n)), n));
    let mut data = vec![0u8; 8 * PAGE];
    let all = (at, 8);
    let look = |fd, data: &mut [u8]| {
        assert_eq!(ioctl(fd, SNAPSHOT, all, data).unwrap().cpages, 8);
        data[..8].to_vec()
    };
    for (fd, first, count) in [(fd, 0, 3), (other, 3, 2), (fd, 6, 2)] {
        let done = ioctl(fd, TO_DEV, (page(first), count), &mut data);
        assert_eq!(done.unwrap().cpages, count as u64);
    }
    let seen = [0x42, 0x42, 0x42, 0x52, 0x52, 2, 0x42, 0x42];
    assert_eq!(look(fd, &mut data), seen);
    // What is on another device stays there, and is read there; and what the CPU writes is seen.
    let refused = ioctl(fd, TO_DEV, (page(3), 1), &mut data);
    assert_eq!(refused.unwrap_err(), libc::ENOENT);
    (0..8).for_each(|n| set(page(n), get(page(n)) + 1));
    let done = ioctl(fd, READ, all, &mut data).unwrap();
    assert_eq!((done.cpages, done.faults), (8, 1));
    let read: Vec<u8> = data.iter().step_by(PAGE).copied().collect();
    assert_eq!(read, [1, 2, 3, 4, 5, 6, 1, 1]);
    data.fill(9);
    ioctl(fd, WRITE, all, &mut data).unwrap();
    assert_eq!(get(page(3)), 9);
    assert_eq!(look(fd, &mut data), seen);
    assert_eq!(ioctl(fd, TO_SYS, all, &mut data).unwrap().cpages, 5);
    assert_eq!(look(fd, &mut data), [2, 2, 2, 0x52, 0x52, 2, 2, 2]);
    // Exclusive access takes pages from the CPU here too.
    ioctl(other, EXCLUSIVE, (page(2), 3), &mut data).unwrap();
    let held = ioctl(other, CHECK_EXCLUSIVE, all, &mut data);
    assert_eq!(held.unwrap_err(), libc::EPERM);
    (2..5).for_each(|n| set(page(n), get(page(n)) + 1));
    ioctl(other, CHECK_EXCLUSIVE, all, &mut data).unwrap();
    assert_eq!(get(page(4)), 10);
    ioctl(other, TO_DEV, all, &mut data).unwrap();
    assert_eq!(look(fd, &mut data), [0x52; 8]);
    ioctl(other, RELEASE, (at, 1), &mut data).unwrap();
    assert_eq!(look(fd, &mut data), [2; 8]);
    // SAFETY: descriptors of our own.
    assert_eq!(unsafe { libc::close(fd) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { libc::close(other) }, 0);
}

/// What is wrong is refused with the kernel's numbers, and leaves the command as it was.
#[test]
fn what_is_wrong_is_refused() {
    if !is_role("what_is_wrong_is_refused") {
        return;
    }
    let fd = open(c"/dev/hmm_dmirror0");
    let at = map(4, libc::MAP_PRIVATE);
    let shared = map(1, libc::MAP_SHARED);
    let mut data = vec![1u8; 4 * PAGE];
    let einval = Err(libc::EINVAL);
    let mut run = |number, at, pages| {
        let done = ioctl(fd, number, (at, pages), &mut data);
        done.map(|done| done.cpages)
    };
    assert_eq!(run(READ, at.wrapping_add(1), 1), einval);
    assert_eq!(run(READ, at, 0), einval);
    assert_eq!(run(READ, at, usize::MAX / PAGE), einval);
    assert_eq!(run(77, at, 1), einval);
    assert_eq!(run(TO_DEV, shared, 1), Err(libc::ENOENT));
    assert_eq!(run(WRITE, shared, 1), Ok(1));
    // SAFETY: pages of our own.
    let done = unsafe { libc::mprotect(at.cast(), PAGE, libc::PROT_READ) };
    assert_eq!(done, 0);
    assert_eq!(run(READ, at, 1), Ok(1));
    assert_eq!(run(WRITE, at, 1), Err(libc::EPERM));
    // SAFETY: as above.
    let done = unsafe { libc::mprotect(at.cast(), PAGE, libc::PROT_NONE) };
    assert_eq!(done, 0);
    assert_eq!(run(READ, at, 1), Err(libc::EFAULT));
    assert_eq!(run(WRITE, at, 1), Err(libc::EFAULT));
    assert_eq!(run(TO_DEV, at, 1), einval);
    // SAFETY: as above.
    let done = unsafe { libc::munmap(at.wrapping_add(PAGE).cast(), PAGE) };
    assert_eq!(done, 0);
    assert_eq!(run(READ, at.wrapping_add(PAGE), 2), Err(libc::EFAULT));
    let mut nowhere = Cmd {
        addr: shared.addr() as u64,
        npages: 1,
        ptr: 8,
        ..Cmd::default()
    };
    // SAFETY: a command whose data is nowhere: it is refused.
    let refused = unsafe { libc::ioctl(fd, 3 << 30 | 40 << 16 | 0x48 << 8, &raw mut nowhere) };
    assert_eq!((refused, errno()), (-1, libc::EFAULT));
    for path in [c"/dev/hmm_dmirror4", c"/dev/hmm_dmirror9"] {
        assert_eq!((open(path), errno()), (-1, libc::ENOENT), "{path:?}");
    }
}

/// A descriptor is one like any other: `dup` keeps the device, `close` of the last ends it, and memory is home.
#[test]
fn the_last_descriptor_ends_the_device() {
    if !is_role("the_last_descriptor_ends_the_device") {
        return;
    }
    for _ in 0..3 {
        let fd = open(c"/dev/hmm_dmirror1");
        // SAFETY: a descriptor of our own.
        let twin = unsafe { libc::dup(fd) };
        let at = map(2, libc::MAP_PRIVATE);
        set(at, 9);
        let mut data = vec![0u8; 2 * PAGE];
        ioctl(fd, TO_DEV, (at, 2), &mut data).unwrap();
        // SAFETY: as above.
        assert_eq!(unsafe { libc::close(fd) }, 0);
        ioctl(twin, SNAPSHOT, (at, 2), &mut data).unwrap();
        assert_eq!(data[..2], [0x22, 0x22]);
        assert!(threads() > 2, "the engine runs");
        // SAFETY: as above.
        assert_eq!(unsafe { libc::close(twin) }, 0);
        assert_eq!(get(at), 9);
        assert_eq!(
            ioctl(twin, SNAPSHOT, (at, 2), &mut data).unwrap_err(),
            libc::EBADF
        );
        assert!(threads() <= 2, "the engine has ended");
    }
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// The program's heap on the device: it grows, moves, is forked and freed as ever, and what is in it stays.
#[test]
fn a_heap_on_the_device_is_a_heap() {
    if !is_role("a_heap_on_the_device_is_a_heap") {
        return;
    }
    let fd = open(c"/dev/hmm_dmirror0");
    let mut data = vec![0u8; 1024 * PAGE];
    let is_right = |numbers: &[u64]| numbers.iter().zip(0..).all(|(number, n)| *number == n);
    for round in 0..5u64 {
        let mut numbers: Vec<u64> = (0..(1 << 18) + round * 512).collect();
        for _ in 0..3 {
            let at = numbers.as_mut_ptr().cast::<u8>();
            let skip = at.align_offset(PAGE);
            let at = at.wrapping_add(skip);
            let pages = ((numbers.len() * 8 - skip) / PAGE).min(1024);
            ioctl(fd, TO_DEV, (at, pages), &mut data).unwrap();
            // It grows, and with it moves, while pages of it are on the device.
            let len = numbers.len() as u64;
            numbers.extend(len..len * 2);
            assert!(is_right(&numbers));
        }
        let at = numbers.as_mut_ptr().cast::<u8>();
        let at = at.wrapping_add(at.align_offset(PAGE));
        ioctl(fd, TO_DEV, (at, 512), &mut data).unwrap();
        // SAFETY: the child looks at its memory, makes a little, and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let copy = numbers.clone();
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!is_right(&numbers) || !is_right(&copy))) };
        }
        let mut status = -1;
        // SAFETY: waits for the child.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0, "round {round}");
        assert!(Command::new("true").status().unwrap().success());
    }
    // SAFETY: a descriptor of our own.
    assert_eq!(unsafe { libc::close(fd) }, 0);
}

/// A program that opens no device does what it does without the library.
#[test]
fn a_program_without_a_device_is_not_disturbed() {
    let script = "import os,hashlib\n\
        d=[str(i)*50 for i in range(100000)]\n\
        r,w=os.pipe()\n\
        if os.fork()==0:\n os.write(w,hashlib.md5(''.join(d).encode()).hexdigest().encode()); os._exit(0)\n\
        os.wait(); print(os.read(r,99)); os.execvp('sh',['sh','-c','seq 200000 | sort -r | cksum'])\n";
    let run = |library: Option<PathBuf>| {
        let mut command = Command::new("python3");
        command.args(["-c", script]);
        library.map(|library| command.env("LD_PRELOAD", library));
        command.output()
    };
    let Ok(without) = run(None) else {
        println!("skipped: no python3 here");
        return;
    };
    let with = run(Some(library())).unwrap();
    assert!(without.status.success());
    assert_eq!(with, without);
}
