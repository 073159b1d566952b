//! What a program does to its memory: system calls.

use super::{APART, Kind, Prot};
use gpusvm_types::{BLOCK_SIZE, ByteSize, Span, VirtAddr};
use std::io::Error;
use std::sync::atomic::{AtomicU64, Ordering};

/// Addresses for `len` bytes, from a multiple of 2 MiB on, where nothing is mapped, and nothing beside:
/// far from where the system places what it is not told where to place, so that they stay free between
/// two mappings of a test, whatever other tests map.
pub(super) fn reserve(len: ByteSize) -> Span {
    /// 16 TiB.
    static NEXT: AtomicU64 = AtomicU64::new(1 << 44);
    let wide = APART + len.max(BLOCK_SIZE) + BLOCK_SIZE + APART;
    let at = VirtAddr::new(NEXT.fetch_add(wide.get(), Ordering::Relaxed));
    let start = (at + APART).align_up(BLOCK_SIZE);
    Span::covering(start.expect("an address"), len).expect("pages")
}

/// Maps memory of a kind at `span`, readable and writable. With the file behind it, if there is one.
pub(super) fn map_at(span: Span, kind: Kind) -> Option<libc::c_int> {
    let (sharing, file) = match kind {
        Kind::Mirrored | Kind::Huge | Kind::Plain => (libc::MAP_PRIVATE, None),
        Kind::Shared => (libc::MAP_SHARED, None),
        Kind::FileShared => (libc::MAP_SHARED, Some(new_file(span.len()))),
        Kind::FilePrivate => (libc::MAP_PRIVATE, Some(new_file(span.len()))),
    };
    let anonymous = if file.is_none() {
        libc::MAP_ANONYMOUS
    } else {
        0
    };
    let flags = sharing | anonymous | libc::MAP_FIXED_NOREPLACE | libc::MAP_NORESERVE;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let (at, len) = (pointer(span.start()).cast(), span.len().as_usize());
    // SAFETY: nothing that is there is replaced.
    let mapped = unsafe { libc::mmap(at, len, access, flags, file.unwrap_or(-1), 0) };
    assert_eq!(mapped, at, "{}", Error::last_os_error());
    match kind {
        Kind::Huge => advise(span, libc::MADV_HUGEPAGE),
        Kind::Mirrored | Kind::Plain => advise(span, libc::MADV_NOHUGEPAGE),
        _ => {}
    }
    file
}

pub(super) fn unmap(span: Span) {
    // SAFETY: a test unmaps what it mapped.
    let done = unsafe { libc::munmap(pointer(span.start()).cast(), span.len().as_usize()) };
    assert_eq!(done, 0, "{}", Error::last_os_error());
}

pub(super) fn protect(span: Span, prot: Prot) {
    let access = match prot {
        Prot::None => libc::PROT_NONE,
        Prot::Read => libc::PROT_READ,
        Prot::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
    };
    let at = pointer(span.start()).cast();
    // SAFETY: a test knows what it does to its memory.
    let done = unsafe { libc::mprotect(at, span.len().as_usize(), access) };
    assert_eq!(done, 0, "{}", Error::last_os_error());
}

/// Advice that is not taken, such as huge pages where there are none, does no harm.
pub(super) fn advise(span: Span, advice: libc::c_int) {
    let at = pointer(span.start()).cast();
    // SAFETY: as for `protect`.
    let done = unsafe { libc::madvise(at, span.len().as_usize(), advice) };
    assert!(
        done == 0 || advice == libc::MADV_HUGEPAGE,
        "{}",
        Error::last_os_error()
    );
}

/// Moves a mapping to `to`, where nothing is.
pub(super) fn remap(from: Span, to: Span, dontunmap: bool) {
    let stays = if dontunmap { libc::MREMAP_DONTUNMAP } else { 0 };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | stays;
    let (at, len) = (pointer(from.start()).cast(), from.len().as_usize());
    // SAFETY: as for `protect`.
    let moved = unsafe { libc::mremap(at, len, len, flags, pointer(to.start())) };
    assert_ne!(moved, libc::MAP_FAILED, "{}", Error::last_os_error());
}

/// How a child ended; `None` when a signal killed it.
pub(super) fn exit_code(pid: libc::pid_t) -> Option<i32> {
    let mut status = 0;
    // SAFETY: our own child, and a status of our own.
    let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(ended, pid, "{}", Error::last_os_error());
    libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status))
}

/// A word of a file.
pub(super) fn read_file(file: libc::c_int, offset: ByteSize) -> Option<u64> {
    let mut word = [0; 8];
    let offset = libc::off_t::try_from(offset.get()).ok()?;
    // SAFETY: eight bytes of our own.
    let read = unsafe { libc::pread(file, word.as_mut_ptr().cast(), word.len(), offset) };
    (read == 8).then(|| u64::from_ne_bytes(word))
}

pub(super) fn close(file: libc::c_int) {
    // SAFETY: opened here, and closed once.
    unsafe { libc::close(file) };
}

/// A file without a name.
fn new_file(len: ByteSize) -> libc::c_int {
    // SAFETY: a name that ends.
    let file = unsafe { libc::memfd_create(c"conformance".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(file >= 0, "{}", Error::last_os_error());
    let len = libc::off_t::try_from(len.get()).expect("a length");
    // SAFETY: our own file.
    let done = unsafe { libc::ftruncate(file, len) };
    assert_eq!(done, 0, "{}", Error::last_os_error());
    file
}

pub(super) fn pointer(at: VirtAddr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(ByteSize::new(at.get()).as_usize())
}
