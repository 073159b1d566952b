//! A device, memory, and programs with and without the library.

use std::ffi::CStr;
use std::path::PathBuf;
use std::process::{Command, Output};

/// Set in the test that was started again: what it is to do.
const ROLE: &str = "GPUSVM_HMM_APPS_ROLE";
pub(crate) const PAGE: usize = 4096;

pub(crate) const DEVICE: &CStr = c"/dev/hmm_dmirror0";
pub(crate) const READ: u64 = 0;
pub(crate) const WRITE: u64 = 1;
pub(crate) const TO_DEV: u64 = 2;
pub(crate) const SNAPSHOT: u64 = 4;
/// What a snapshot says of a page on this device that may be written.
pub(crate) const LOCAL: u8 = 0x22;
/// That it is part of a huge one.
const PMD: u8 = 4;

/// The five words of a command.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Cmd {
    pub(crate) addr: u64,
    pub(crate) ptr: u64,
    pub(crate) npages: u64,
    pub(crate) cpages: u64,
    pub(crate) faults: u64,
}

/// Cargo builds it for these tests, beside them.
pub(crate) fn library() -> PathBuf {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    let library = folder.join("libgpusvm_hmm.so");
    assert!(library.exists(), "{} was not built", library.display());
    library
}

/// This test program, to run `test` alone, as `role`.
pub(crate) fn again(test: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).env("LD_PRELOAD", library());
    command
}

/// What the started one is to do; `None` in the first.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Whether this is the started one; else starts it, and looks whether it succeeded.
pub(crate) fn is_preloaded(test: &str) -> bool {
    if role().is_some() {
        return true;
    }
    if !gpusvm_testkit::require::require_uffd() {
        return false;
    }
    assert_success(&again(test, "1").output().unwrap());
    false
}

pub(crate) fn assert_success(output: &Output) {
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

pub(crate) fn open(flags: i32) -> i32 {
    // SAFETY: a C string.
    let fd = unsafe { libc::open(DEVICE.as_ptr(), libc::O_RDWR | flags) };
    assert!(fd >= 0, "{}", errno());
    fd
}

/// Whether it was closed, or the error number.
pub(crate) fn close(fd: i32) -> Result<(), i32> {
    // SAFETY: a number, whatever is there: tests have nothing open that they did not open themselves.
    match unsafe { libc::close(fd) } {
        0 => Ok(()),
        _ => Err(errno()),
    }
}

/// Memory of the test's own, which nobody refers to. It stays.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    pub(crate) at: *mut u8,
    pub(crate) pages: usize,
}

impl Area {
    pub(crate) fn new(pages: usize) -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let nowhere = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let at = unsafe { libc::mmap(nowhere, pages * PAGE, access, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let at = at.cast();
        Self { at, pages }
    }

    /// Writes a value of its own to each page.
    pub(crate) fn fill(self, seed: usize) {
        (0..self.pages).for_each(|n| self.set(n, value(seed, n)));
    }

    /// Whether each page has that value.
    pub(crate) fn is_filled(self, seed: usize) -> bool {
        (0..self.pages).all(|n| self.get(n) == value(seed, n))
    }

    pub(crate) fn set(self, page: usize, value: u8) {
        // SAFETY: inside the area, whose bytes nobody refers to.
        unsafe { self.at.wrapping_add(page * PAGE).write_volatile(value) };
    }

    pub(crate) fn get(self, page: usize) -> u8 {
        // SAFETY: as above.
        unsafe { self.at.wrapping_add(page * PAGE).read_volatile() }
    }

    /// Moves all of it to the device.
    pub(crate) fn take(self, fd: i32) {
        self.take_with(fd, &mut vec![0; self.pages * PAGE]);
    }

    /// Moves all of it to the device, and puts there what it read.
    pub(crate) fn take_with(self, fd: i32, data: &mut [u8]) {
        let done = self.run(fd, TO_DEV, data).unwrap();
        assert_eq!(done.cpages, self.pages as u64);
    }

    /// Whether all of it is on the device.
    pub(crate) fn is_local(self, fd: i32) -> bool {
        let mut data = vec![0; self.pages];
        self.run(fd, SNAPSHOT, &mut data).unwrap();
        data.iter().all(|seen| seen & !PMD == LOCAL)
    }

    /// Runs a command, and says what came of it, or the error number.
    pub(crate) fn run(self, fd: i32, number: u64, data: &mut [u8]) -> Result<Cmd, i32> {
        let mut cmd = Cmd {
            addr: self.at.addr() as u64,
            ptr: data.as_mut_ptr().addr() as u64,
            npages: self.pages as u64,
            ..Cmd::default()
        };
        // SAFETY: a command of this device, with room for the data.
        match unsafe { libc::ioctl(fd, request(number), &raw mut cmd) } {
            0 => Ok(cmd),
            _ => Err(errno()),
        }
    }
}

pub(crate) fn request(number: u64) -> u64 {
    3 << 30 | 40 << 16 | 0x48 << 8 | number
}

fn value(seed: usize, page: usize) -> u8 {
    u8::try_from((seed * 31 + page * 7) % 255 + 1).unwrap()
}

/// Whether there is an engine in this process: its threads have names.
pub(crate) fn engine_runs() -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let names = threads.filter_map(|thread| {
        // One that has ended meanwhile has none.
        std::fs::read_to_string(thread.ok()?.path().join("comm")).ok()
    });
    names.into_iter().any(|name| name.starts_with("gpusvm-"))
}

/// Waits for a child, and looks whether it succeeded.
pub(crate) fn assert_child(child: i32, what: &str) {
    let mut status = -1;
    // SAFETY: waits for the child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "{what}");
}

/// Forks. The child exits with what `run` says: whether all is right.
pub(crate) fn fork(run: impl FnOnce() -> bool) -> i32 {
    // SAFETY: the child runs a little, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let is_right = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!is_right.unwrap_or(false))) };
    }
    assert!(child > 0, "{}", errno());
    child
}
