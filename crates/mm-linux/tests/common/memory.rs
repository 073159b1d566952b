//! Memory of the program, whose bytes are known.

use gpusvm_mm::{AddressSpace, ArmToken};
use gpusvm_mm_linux::{Process, Rung};
use gpusvm_types::{ByteSize, PAGE_SIZE, Span, VirtAddr};
use std::sync::Mutex;
use std::sync::atomic::AtomicU64;

/// Which pages memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    /// 2 MiB, of the engine's allocator, where the system has them.
    Huge,
    /// 4 KiB, adopted where memory can be adopted.
    Base,
}

/// Memory of the program.
#[derive(Debug)]
pub(crate) struct Memory {
    span: Span,
    pages: Pages,
    /// To be unmapped; else it is the engine's.
    ours: bool,
    armed: Mutex<Option<ArmToken>>,
}

impl Memory {
    /// `len` bytes, at a block.
    pub(crate) fn new(process: &Process, len: ByteSize, pages: Pages) -> Self {
        if pages == Pages::Huge || process.rung() == Rung::Signals {
            let span = process.allocate(len).unwrap();
            if pages == Pages::Base {
                advise(span, libc::MADV_NOHUGEPAGE).unwrap();
            }
            return Self::at_span(span, pages, false);
        }
        let span = map(len);
        advise(span, libc::MADV_NOHUGEPAGE).unwrap();
        assert_eq!(process.adopt(span.start(), span.len()), Ok(span));
        Self::at_span(span, pages, true)
    }

    const fn at_span(span: Span, pages: Pages, ours: bool) -> Self {
        let armed = Mutex::new(None);
        Self {
            span,
            pages,
            ours,
            armed,
        }
    }

    /// Lets its pages leave.
    pub(crate) fn arm(&self, process: &Process) {
        let token = process.arm(self.span).unwrap();
        *self.armed.lock().unwrap() = Some(token);
    }

    /// Ends it.
    pub(crate) fn disarm(&self, process: &Process) {
        if let Some(token) = self.armed.lock().unwrap().take() {
            process.disarm(self.span, token);
        }
    }

    pub(crate) fn span(&self) -> Span {
        self.span
    }

    pub(crate) fn pages(&self) -> Pages {
        self.pages
    }

    pub(crate) fn at(&self, offset: ByteSize) -> VirtAddr {
        self.span.start() + offset
    }

    /// `len` bytes at `offset`.
    pub(crate) fn part(&self, offset: ByteSize, len: ByteSize) -> Span {
        Span::from_len(self.at(offset), len).unwrap()
    }

    /// Two words of each page say which page it is.
    pub(crate) fn fill(&self, seed: u64) {
        self.fill_part(self.span, seed);
    }

    pub(crate) fn fill_part(&self, part: Span, seed: u64) {
        for page in part.pages() {
            let at = page.start();
            store(at, value(seed, at.get()));
            store(at + ByteSize::new(4088), value(seed, at.get() + 4088));
        }
    }

    /// Whether the CPU reads what `fill` wrote.
    pub(crate) fn check(&self, seed: u64) {
        self.check_part(self.span, seed);
    }

    pub(crate) fn check_part(&self, part: Span, seed: u64) {
        check_moved(part, part, seed);
    }

    /// As `check`, without a panic: for children of fork.
    pub(crate) fn is_filled(&self, seed: u64) -> bool {
        self.span.pages().all(|page| {
            let at = page.start();
            load(at) == value(seed, at.get())
                && load(at + ByteSize::new(4088)) == value(seed, at.get() + 4088)
        })
    }

    /// A word of the program's.
    pub(crate) fn word(&self, offset: ByteSize) -> &AtomicU64 {
        assert!(offset.get() + 8 <= self.span.len().get());
        // SAFETY: inside, aligned by the caller, and only used as an atomic meanwhile.
        unsafe { AtomicU64::from_ptr(pointer(self.at(offset)).cast()) }
    }

    /// Gives it back.
    pub(crate) fn end(&self, process: &Process) {
        if self.ours {
            process.unadopt(self.span).unwrap();
            unmap(self.span);
        } else {
            process.free(self.span);
        }
    }
}

/// Whether what was written to `written` is now read at `part`.
pub(crate) fn check_moved(part: Span, written: Span, seed: u64) {
    for (page, old) in part.pages().zip(written.pages()) {
        let (at, old) = (page.start(), old.start());
        assert_eq!(load(at), value(seed, old.get()), "first word of {at}");
        let end = ByteSize::new(4088);
        assert_eq!(
            load(at + end),
            value(seed, old.get() + 4088),
            "last word of {at}"
        );
    }
}

/// Whether the CPU reads zeroes.
pub(crate) fn check_zero(part: Span) {
    for page in part.pages() {
        assert_eq!(load(page.start()), 0, "{page:?}");
    }
}

/// The word that `fill` writes to an address.
pub(crate) fn value(seed: u64, at: u64) -> u64 {
    (at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

pub(crate) fn load(at: VirtAddr) -> u64 {
    // SAFETY: tests read what they mapped, or die on purpose.
    unsafe { pointer(at).cast::<u64>().read_volatile() }
}

pub(crate) fn store(at: VirtAddr, value: u64) {
    // SAFETY: as for `load`.
    unsafe { pointer(at).cast::<u64>().write_volatile(value) };
}

pub(crate) fn pointer(at: VirtAddr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(ByteSize::new(at.get()).as_usize())
}

/// Private anonymous memory that starts at a block and ends with one that stays unmapped.
pub(crate) fn map(len: ByteSize) -> Span {
    let block = ByteSize::mib(2);
    let wide = len + block + block;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let len_wide = wide.as_usize();
    // SAFETY: no address is asked for.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), len_wide, access, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at.expose_provenance();
    let wide = Span::from_len(VirtAddr::from(at), wide).unwrap();
    let start = wide.start().align_up(block).unwrap();
    let span = Span::covering(start, len).unwrap();
    wide.without(span).into_iter().flatten().for_each(unmap);
    span
}

/// The same at a place where nothing is mapped.
pub(crate) fn map_at(span: Span) -> Span {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let (at, len) = (pointer(span.start()).cast(), span.len().as_usize());
    // SAFETY: nothing that is there is replaced.
    let mapped = unsafe { libc::mmap(at, len, access, flags, -1, 0) };
    assert_eq!(mapped, at);
    span
}

pub(crate) fn unmap(span: Span) {
    // SAFETY: a test unmaps what it mapped.
    let done = unsafe { libc::munmap(pointer(span.start()).cast(), span.len().as_usize()) };
    assert_eq!(done, 0);
}

pub(crate) fn advise(span: Span, advice: libc::c_int) -> std::io::Result<()> {
    let at = pointer(span.start()).cast();
    // SAFETY: a test knows what it does to its memory.
    match unsafe { libc::madvise(at, span.len().as_usize(), advice) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

pub(crate) fn protect(span: Span, access: libc::c_int) {
    let at = pointer(span.start()).cast();
    // SAFETY: as for `advise`.
    let done = unsafe { libc::mprotect(at, span.len().as_usize(), access) };
    assert_eq!(done, 0);
}

/// Moves a mapping to `to`, over what is there.
pub(crate) fn remap(from: Span, to: VirtAddr, keep: bool) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let flags = if keep {
        flags | libc::MREMAP_DONTUNMAP
    } else {
        flags
    };
    let (at, len) = (pointer(from.start()).cast(), from.len().as_usize());
    // SAFETY: as for `advise`.
    let done = unsafe { libc::mremap(at, len, len, flags, pointer(to)) };
    assert_ne!(
        done,
        libc::MAP_FAILED,
        "{}",
        std::io::Error::last_os_error()
    );
}

/// Makes a mapping longer, where it is.
pub(crate) fn grow(span: Span, len: ByteSize) -> Span {
    let at = pointer(span.start()).cast();
    let (old, new) = (span.len().as_usize(), len.as_usize());
    // SAFETY: as for `advise`.
    let done = unsafe { libc::mremap(at, old, new, 0) };
    assert_eq!(done, at, "{}", std::io::Error::last_os_error());
    Span::from_len(span.start(), len).unwrap()
}

/// Whether the mapping at `at` is registered with a userfaultfd for missing pages.
pub(crate) fn is_registered(at: VirtAddr) -> bool {
    has_flag(at, &["um"])
}

/// Whether it is registered with one, for whatever.
pub(crate) fn is_registered_anyhow(at: VirtAddr) -> bool {
    has_flag(at, &["um", "uw"])
}

/// As `is_registered_anyhow`, of any part of `span`.
pub(crate) fn is_any_registered(span: Span) -> bool {
    has_flags(span, &["um", "uw"])
}

fn has_flag(at: VirtAddr, flags: &[&str]) -> bool {
    has_flags(Span::page_of(at), flags)
}

/// Whether a mapping in `span` has one of the flags.
fn has_flags(span: Span, flags: &[&str]) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let head = line.split(' ').next().unwrap_or_default();
        if let Some((start, end)) = head.split_once('-')
            && let (Ok(start), Ok(end)) =
                (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            inside = start < span.end().get() && span.start().get() < end;
        }
        let is_one = |flag| flags.contains(&flag);
        if inside && line.starts_with("VmFlags:") && line.split(' ').any(is_one) {
            return true;
        }
    }
    false
}

/// `n` pages, in bytes.
pub(crate) fn pages(n: u64) -> ByteSize {
    ByteSize::new(PAGE_SIZE.get() * n)
}
