//! A device, memory, and a program with the library.

use std::path::PathBuf;
use std::process::Command;

/// Set in the program that was started.
const ROLE: &str = "GPUSVM_HMM_TEST_ROLE";
pub(crate) const PAGE: usize = 4096;
/// A huge page.
pub(crate) const HUGE: usize = 2 << 20;

/// What a page is in a snapshot.
pub(crate) mod seen {
    pub(crate) const ERROR: u8 = 0xff;
    pub(crate) const NONE: u8 = 0;
    pub(crate) const READ: u8 = 1;
    pub(crate) const WRITE: u8 = 2;
    pub(crate) const PMD: u8 = 4;
    pub(crate) const ZERO: u8 = 0x10;
    pub(crate) const LOCAL: u8 = 0x20;
}

/// The commands that are used here, by number.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Run {
    Write = 1,
    ToDev = 2,
    ToSys = 3,
    Snapshot = 4,
}

/// The five words of a command.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Cmd {
    addr: u64,
    ptr: u64,
    npages: u64,
    pub(crate) cpages: u64,
    pub(crate) faults: u64,
}

/// Whether this is the program with the library; else starts it as `test`, and looks whether it succeeded.
pub(crate) fn is_preloaded(test: &str) -> bool {
    if std::env::var_os(ROLE).is_some() {
        return true;
    }
    if !gpusvm_testkit::require::require_uffd() {
        return false;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.env(ROLE, "1").env("LD_PRELOAD", library());
    let output = command.output().unwrap();
    let said = [&output.stdout, &output.stderr].map(|said| String::from_utf8_lossy(said));
    assert!(output.status.success(), "{}\n{}", said[0], said[1]);
    // It has run what it was asked for, and not nothing.
    assert!(said[0].contains("1 passed"), "{}", said[0]);
    print!("{}", said[1]);
    false
}

/// Cargo builds it for these tests, beside them.
fn library() -> PathBuf {
    let mut folder = std::env::current_exe().unwrap();
    folder.pop();
    let library = folder.join("libgpusvm_hmm.so");
    assert!(library.exists(), "{} was not built", library.display());
    library
}

/// A device that is open.
#[derive(Debug)]
pub(crate) struct Device(i32);

impl Device {
    /// The first one.
    pub(crate) fn open() -> Self {
        // SAFETY: a C string.
        let fd = unsafe { libc::open(c"/dev/hmm_dmirror0".as_ptr(), libc::O_RDWR) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        Self(fd)
    }

    /// Closes it. Nothing is left on it.
    pub(crate) fn close(self) {
        // SAFETY: a descriptor of our own.
        assert_eq!(unsafe { libc::close(self.0) }, 0, "something was left");
    }

    /// Runs a command on the pages of `len` bytes at `at`, and says what came of it, or the error number.
    pub(crate) fn run(
        &self,
        run: Run,
        (at, len): (*mut u8, usize),
        data: &mut [u8],
    ) -> Result<Cmd, i32> {
        let needed = match run {
            Run::Snapshot => len / PAGE,
            Run::ToSys => 0,
            _ => len,
        };
        assert!(data.len() >= needed, "room for what the command gives");
        let mut cmd = Cmd {
            addr: at.addr() as u64,
            ptr: data.as_mut_ptr().addr() as u64,
            npages: (len / PAGE) as u64,
            ..Cmd::default()
        };
        let request = 3 << 30 | 40 << 16 | 0x48 << 8 | run as u64;
        // SAFETY: a command of this device, with room for the data.
        match unsafe { libc::ioctl(self.0, request, &raw mut cmd) } {
            0 => Ok(cmd),
            _ => Err(std::io::Error::last_os_error().raw_os_error().unwrap()),
        }
    }

    /// Moves all of it to the device, and says what the device reads there.
    pub(crate) fn take(&self, (at, len): (*mut u8, usize)) -> Vec<u8> {
        let mut data = vec![0xa5; len];
        let done = self.run(Run::ToDev, (at, len), &mut data).unwrap();
        assert_eq!(done.cpages, (len / PAGE) as u64);
        data
    }

    /// What each page is.
    pub(crate) fn look(&self, (at, len): (*mut u8, usize)) -> Vec<u8> {
        let mut data = vec![0x77; len / PAGE];
        self.run(Run::Snapshot, (at, len), &mut data).unwrap();
        data
    }
}

/// Memory of the program's own, in the middle of more address space that is its own too, which goes with it.
#[derive(Debug)]
pub(crate) struct Area {
    room: (*mut u8, usize),
    /// Its first byte, at the beginning of a huge page.
    pub(crate) at: *mut u8,
    pub(crate) len: usize,
}

impl Area {
    /// So many bytes that nobody has touched, with huge pages or without, and as much room before and behind.
    pub(crate) fn new(len: usize, huge: bool) -> Self {
        Self::allowing(len, huge, libc::PROT_READ | libc::PROT_WRITE)
    }

    /// As `new`, with this protection.
    pub(crate) fn allowing(len: usize, huge: bool, protection: i32) -> Self {
        let size = 3 * len + HUGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no address is asked for.
        let room = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(room, libc::MAP_FAILED);
        let room = room.cast::<u8>();
        let middle = room.wrapping_add(len);
        let at = middle.wrapping_add(middle.align_offset(HUGE));
        // SAFETY: pages of our own, which nobody has touched.
        assert_eq!(unsafe { libc::mprotect(at.cast(), len, protection) }, 0);
        let advice = match huge {
            true => libc::MADV_HUGEPAGE,
            false => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: as above.
        let advised = unsafe { libc::madvise(at.cast(), len, advice) };
        assert!(
            advised == 0 || !huge_pages(),
            "{}",
            std::io::Error::last_os_error()
        );
        let room = (room, size);
        Self { room, at, len }
    }

    /// Where it is.
    pub(crate) fn all(&self) -> (*mut u8, usize) {
        (self.at, self.len)
    }

    /// The address space behind it.
    pub(crate) fn behind(&self) -> *mut u8 {
        self.at.wrapping_add(self.len)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: all of it is the test's own, and nobody refers to it.
        unsafe { libc::munmap(self.room.0.cast(), self.room.1) };
    }
}

/// Whether the system makes huge pages where a program asks for them.
pub(crate) fn huge_pages() -> bool {
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    enabled.is_ok_and(|enabled| !enabled.contains("[never]"))
}

/// The bytes that belong at `offset` of the memory number `seed`.
pub(crate) fn pattern(seed: u32, offset: usize, len: usize) -> Vec<u8> {
    let word = |n: usize| u32::try_from(n).unwrap().wrapping_mul(0x9e37_79b1) ^ seed;
    let words = offset / 4..(offset + len) / 4;
    words.flat_map(|n| word(n).to_ne_bytes()).collect()
}

/// Writes what belongs there.
pub(crate) fn fill(seed: u32, (at, len): (*mut u8, usize)) {
    let bytes = pattern(seed, 0, len);
    // SAFETY: memory of the test's own, which nobody refers to.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, len) };
}

/// What the CPU reads there.
pub(crate) fn read((at, len): (*mut u8, usize)) -> Vec<u8> {
    let mut bytes = vec![0x5a; len];
    // SAFETY: as above.
    unsafe { std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), len) };
    bytes
}

/// Of long data that is not as wanted, only where it begins to differ.
#[track_caller]
pub(crate) fn assert_same(found: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b);
    assert_eq!(
        differs, None,
        "{what}: the first byte that is not as wanted"
    );
}
