//! A test that runs under the library, and the device there.

use std::process::Command;

pub(crate) const PAGE: usize = 4096;
pub(crate) const BLOCK: usize = 512 * PAGE;
/// What the started test is to do.
const ROLE: &str = "GPUSVM_HMM_TEST_ROLE";

/// Runs `body` as the test of that name, in a process of its own with the library.
pub(crate) fn preloaded(test: &str, body: impl FnOnce()) {
    if std::env::var_os(ROLE).is_some() {
        return body();
    }
    if !gpusvm_testkit::require::require_uffd() {
        return;
    }
    let this = std::env::current_exe().unwrap();
    let library = this.parent().unwrap().join("libgpusvm_hmm.so");
    assert!(library.exists(), "{} was not built", library.display());
    let mut command = Command::new(this);
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.env(ROLE, "1").env("LD_PRELOAD", library);
    // Pages that show in the page map come home one by one: nothing large is left to fail.
    let output = command.env("GPUSVM_HMM_PAGEMAP", "0").output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && told.contains("1 passed"),
        "{told}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The number of a command.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
pub(crate) enum Do {
    Read = 0,
    Write = 1,
    ToDev = 2,
    ToSys = 3,
    Snapshot = 4,
    Exclusive = 5,
    CheckExclusive = 6,
    Flags = 8,
    ReadUnlocked = 9,
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

/// A device that is open.
#[derive(Debug)]
pub(crate) struct Device(i32);

impl Device {
    pub(crate) fn open() -> Self {
        // SAFETY: a C string.
        let fd = unsafe { libc::open(c"/dev/hmm_dmirror0".as_ptr(), libc::O_RDWR) };
        assert!(fd >= 0, "{}", errno());
        Self(fd)
    }

    /// Runs a command on pages, and says what came of it, or the error number.
    pub(crate) fn run(
        &self,
        what: Do,
        (at, pages): (*mut u8, usize),
        data: &mut [u8],
    ) -> Result<Cmd, i32> {
        let mut cmd = Cmd {
            addr: at.addr() as u64,
            ptr: data.as_mut_ptr().addr() as u64,
            npages: pages as u64,
            cpages: 99,
            faults: 99,
        };
        let request = 3 << 30 | 40 << 16 | 0x48 << 8 | what as u64;
        // SAFETY: a command of this device, with room for the data.
        match unsafe { libc::ioctl(self.0, request, &raw mut cmd) } {
            0 => Ok(cmd),
            _ => Err(errno()),
        }
    }

    /// One byte for each page.
    pub(crate) fn snapshot(&self, at: *mut u8, pages: usize) -> Vec<u8> {
        let mut bytes = vec![0; pages];
        let done = self.run(Do::Snapshot, (at, pages), &mut bytes).unwrap();
        assert_eq!(done.cpages, pages as u64);
        bytes
    }

    /// The flags of its commands.
    pub(crate) fn set_flags(&self, flags: usize) {
        let nowhere = std::ptr::null_mut();
        self.run(Do::Flags, (nowhere, flags), &mut []).unwrap();
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: a descriptor of our own. An engine that left something behind says so here.
        let closed = unsafe { libc::close(self.0) };
        assert!(closed == 0 || std::thread::panicking(), "{}", errno());
    }
}

pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap()
}

/// Private memory of the program's own, at a multiple of 2 MiB.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) at: *mut u8,
    whole: *mut u8,
    len: usize,
}

impl Memory {
    /// So many pages, that may be read, or written too.
    pub(crate) fn new(pages: usize, protection: i32) -> Self {
        let len = pages * PAGE + BLOCK;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let nowhere = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let whole = unsafe { libc::mmap(nowhere, len, protection, flags, -1, 0) };
        assert_ne!(whole, libc::MAP_FAILED);
        let whole = whole.cast::<u8>();
        let at = whole.wrapping_add(whole.align_offset(BLOCK));
        Self { at, whole, len }
    }

    /// 2 MiB in a huge page, if there are such.
    pub(crate) fn huge(protection: i32) -> Self {
        let memory = Self::new(512, protection);
        // SAFETY: advice on memory of our own. Where there are no huge pages, it is refused.
        let _ = unsafe { libc::madvise(memory.at.cast(), BLOCK, libc::MADV_HUGEPAGE) };
        memory
    }

    pub(crate) fn page(&self, n: usize) -> *mut u8 {
        self.at.wrapping_add(n * PAGE)
    }

    /// Writes another number into each word.
    pub(crate) fn fill(&self, pages: usize) {
        for n in 0..pages * PAGE / 8 {
            let word = self.at.cast::<u64>().wrapping_add(n);
            // SAFETY: memory of our own, which nobody refers to.
            unsafe { word.write_volatile(n as u64) };
        }
    }

    /// Whether the CPU finds those numbers.
    pub(crate) fn is_filled(&self, pages: usize) -> bool {
        (0..pages * PAGE / 8).all(|n| self.word(n) == n as u64)
    }

    /// A word, as the CPU finds it.
    pub(crate) fn word(&self, n: usize) -> u64 {
        let word = self.at.cast::<u64>().wrapping_add(n);
        // SAFETY: memory of our own, which nobody refers to.
        unsafe { word.read_volatile() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: memory of our own that nobody uses any more.
        let unmapped = unsafe { libc::munmap(self.whole.cast(), self.len) };
        assert!(unmapped == 0 || std::thread::panicking());
    }
}

/// Whether data that a device read is what `Memory::fill` wrote.
pub(crate) fn is_filled(data: &[u8]) -> bool {
    let words = data.chunks_exact(8).zip(0u64..);
    let mut words = words.map(|(word, n)| word == n.to_ne_bytes());
    words.all(|is_right| is_right)
}
