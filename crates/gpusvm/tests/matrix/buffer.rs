//! Memory of the program's own: of its allocator, and mappings of every kind. All system calls that
//! map, move, lock and protect it are here.
//!
//! # Differences from the suite
//!
//! There the mirror covers the whole address space. Here the program adopts what may move: its
//! allocations and its private anonymous mappings, as one those that move. Shared mappings, files and huge pages of hugetlbfs
//! are used in place. Memory of the allocator is given back to the program before it is freed, because
//! the allocator writes into what it keeps; mappings are unmapped while they are shared.

use crate::record::{self, Record};
use crate::sections::Flags;
use gpusvm::{Adopted, ByteSize, Span, Svm, VirtAddr};
use std::alloc::Layout;
use std::fs::File;
use std::io::Error;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
/// What memory is filled with.
const PATTERN: u8 = 5;

/// A buffer, with the records in it.
#[derive(Debug)]
pub(crate) struct Buffer {
    at: *mut u8,
    len: usize,
    backing: Backing,
    /// What every byte is that nobody wrote, if that is known.
    fill: Option<u8>,
    adopted: Option<Adopted>,
}

#[derive(Debug)]
enum Backing {
    Heap(Layout),
    Mapped,
    /// Somebody else's.
    Borrowed,
}

// SAFETY: memory is not bound to a thread.
unsafe impl Send for Buffer {}
// SAFETY: it is used by atomics, or from one thread.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// As the flags want it.
    pub(crate) fn new(svm: &Svm, len: usize, flags: Flags) -> Self {
        if flags.has(Flags::MMAP) {
            Self::map(svm, len, flags)
        } else {
            Self::malloc(svm, len, flags)
        }
    }

    /// Memory of the program's allocator, shared.
    pub(crate) fn malloc(svm: &Svm, len: usize, flags: Flags) -> Self {
        let layout = Layout::from_size_align(len, align_for(len)).expect("a layout");
        // SAFETY: the size is not zero.
        let at = unsafe { std::alloc::alloc(layout) };
        assert!(!at.is_null(), "{len} bytes");
        let adopted = Some(adopt(svm, at, len, flags));
        let buffer = Self {
            at,
            len,
            backing: Backing::Heap(layout),
            fill: None,
            adopted,
        };
        buffer.filled(flags)
    }

    /// A mapping: private and anonymous unless the flags want another; only the first is shared with
    /// a device.
    pub(crate) fn map(svm: &Svm, len: usize, flags: Flags) -> Self {
        let huge = flags.has(Flags::HUGE);
        let align = if huge { HUGE } else { align_for(len) };
        let place = Reservation::new(len, align);
        let mut how = libc::MAP_FIXED;
        how |= if flags.has(Flags::SHARED) {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        if huge {
            how |= libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
        }
        let file = flags.has(Flags::FILE).then(|| temporary(len));
        let at = match &file {
            Some(file) => sys::map(place.at, len, how, file.as_raw_fd()),
            None => sys::map(place.at, len, how | libc::MAP_ANONYMOUS, -1),
        };
        place.give_up();
        let in_place = flags.any(Flags::SHARED | Flags::HUGE | Flags::FILE | Flags::BO_MAP);
        let buffer = Self {
            at,
            len,
            backing: Backing::Mapped,
            fill: Some(0),
            adopted: (!in_place).then(|| adopt(svm, at, len, flags)),
        };
        buffer.filled(flags)
    }

    /// Memory of the program that no device may move, private and empty.
    pub(crate) fn unshared(svm: &Svm, len: usize) -> Self {
        let flags = Flags::MMAP | Flags::BO_MAP | Flags::NO_MEMSET;
        Self::map(svm, len, flags)
    }

    /// Part of another buffer, which outlives it.
    pub(crate) fn borrowed(whole: &Self, offset: usize) -> Self {
        Self {
            at: whole.at.wrapping_add(offset),
            len: whole.len - offset,
            backing: Backing::Borrowed,
            fill: None,
            adopted: None,
        }
    }

    /// As `borrowed`, of so many bytes, in which nobody is to write.
    pub(crate) fn borrowed_part(whole: &Self, offset: usize, len: usize) -> Self {
        assert!(offset + len <= whole.len);
        let mut part = Self::borrowed(whole, offset);
        (part.len, part.fill) = (len, whole.fill);
        part
    }

    fn filled(mut self, flags: Flags) -> Self {
        if !flags.has(Flags::NO_MEMSET) {
            // SAFETY: our own memory, which nobody else uses yet.
            unsafe { self.at.write_bytes(PATTERN, self.len) };
            self.fill = Some(PATTERN);
        }
        self
    }

    pub(crate) fn at(&self) -> *mut u8 {
        self.at
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether a device may move it.
    pub(crate) fn is_shared(&self) -> bool {
        self.adopted.is_some()
    }

    pub(crate) fn span(&self) -> Span {
        let len = ByteSize::from_usize(self.len);
        Span::covering(VirtAddr::from(self.at.cast_const()), len).expect("a buffer has bytes")
    }

    /// What is in it. No device uses it meanwhile.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: our own memory, and nobody writes there.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }

    /// Has it hold `bytes`. No device uses it meanwhile.
    pub(crate) fn set(&self, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.len);
        // SAFETY: our own memory, and nobody else uses it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at, self.len) };
    }

    /// Record number `index`.
    pub(crate) fn record(&self, index: usize) -> Record {
        let offset = index * record::SIZE;
        assert!(offset + record::SIZE <= self.len, "a record of the buffer");
        Record::at(self.at.wrapping_add(offset))
    }

    /// That nothing is in these bytes but what they were filled with.
    pub(crate) fn check_untouched(&self, from: usize, to: usize) {
        let Some(fill) = self.fill else { return };
        assert!(from <= to && to <= self.len);
        let (at, len) = (self.at.wrapping_add(from), to - from);
        // SAFETY: our own memory; no device writes there, and everything was waited for.
        let bytes = unsafe { std::slice::from_raw_parts(at, len) };
        let wrong = bytes.iter().position(|byte| *byte != fill);
        if let Some(offset) = wrong {
            let found = bytes[offset];
            panic!(
                "{found:#x} instead of {fill:#x} at offset {:#x}",
                from + offset
            );
        }
    }

    /// Locks it into RAM. A limit may refuse.
    pub(crate) fn lock(&self) {
        if let Err(error) = sys::lock(self.at, self.len) {
            println!("note: mlock of {} bytes: {error}", self.len);
        }
    }

    pub(crate) fn unlock(&self) {
        sys::unlock(self.at, self.len);
    }

    /// Moves it, read-only or not, leaving an empty mapping behind or not.
    pub(crate) fn remap(&mut self, to: Reservation, flags: Flags) {
        let old = self.at;
        if flags.has(Flags::READ_ONLY) {
            sys::protect(old, self.len, libc::PROT_READ);
        }
        let keep = flags.has(Flags::DONTUNMAP);
        self.at = sys::remap(old, self.len, to.at, keep);
        to.give_up();
        if flags.has(Flags::READ_ONLY) {
            sys::protect(self.at, self.len, libc::PROT_READ | libc::PROT_WRITE);
        }
        if keep {
            sys::unmap(old, self.len);
        }
    }

    /// Unmaps part of it, or maps fresh locked memory there.
    pub(crate) fn punch(&self, offset: usize, len: usize, fresh: bool) {
        let at = self.at.wrapping_add(offset);
        assert!(offset + len <= self.len);
        sys::unmap(at, len);
        if fresh {
            let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            assert_eq!(sys::map(at, len, how | libc::MAP_LOCKED, -1), at);
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match self.backing {
            Backing::Heap(layout) => {
                self.adopted = None;
                // SAFETY: allocated with this layout, and nobody uses it any more.
                unsafe { std::alloc::dealloc(self.at, layout) };
            }
            Backing::Mapped => sys::unmap(self.at, self.len),
            Backing::Borrowed => {}
        }
    }
}

/// An aligned place for a mapping.
#[derive(Debug)]
pub(crate) struct Reservation {
    at: *mut u8,
    len: usize,
}

impl Reservation {
    pub(crate) fn new(len: usize, align: usize) -> Self {
        let whole = len + align;
        let start = sys::reserve(whole);
        let before = start.align_offset(align);
        let at = start.wrapping_add(before);
        if before > 0 {
            sys::unmap(start, before);
        }
        sys::unmap(at.wrapping_add(len), align - before);
        Self { at, len }
    }

    /// For a buffer of this length.
    pub(crate) fn for_buffer(len: usize) -> Self {
        Self::new(len, align_for(len))
    }

    pub(crate) fn at(&self) -> *mut u8 {
        self.at
    }

    /// Something else is mapped there now.
    fn give_up(self) {
        std::mem::forget(self);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        sys::unmap(self.at, self.len);
    }
}

/// A page of shared memory: used in place, whatever else moves.
#[derive(Debug)]
pub(crate) struct SharedPage(*mut u8);

impl SharedPage {
    pub(crate) fn new() -> Self {
        let how = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        Self(sys::map(std::ptr::null_mut(), PAGE, how, -1))
    }

    /// A word in it.
    pub(crate) fn word(&self, index: usize) -> &AtomicU64 {
        // SAFETY: in the page, aligned, mapped as long as it is borrowed, and only used by atomics.
        unsafe { AtomicU64::from_ptr(self.fence(index).0) }
    }

    /// A fence in it.
    pub(crate) fn fence(&self, index: usize) -> record::Fence {
        assert!(index < PAGE / 8);
        record::Fence(self.0.cast::<u64>().wrapping_add(index))
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        sys::unmap(self.0, PAGE);
    }
}

/// As large as the buffer, for those sizes that there are.
fn align_for(len: usize) -> usize {
    match len {
        HUGE.. => HUGE,
        0x1_0000.. => 0x1_0000,
        _ => PAGE,
    }
}

fn adopt(svm: &Svm, at: *mut u8, len: usize, flags: Flags) -> Adopted {
    let (at, size) = (at.cast_const(), ByteSize::from_usize(len));
    let adopted = if flags.has(Flags::REMAP) {
        svm.adopt_as_one(at, size)
    } else {
        svm.adopt(at, size)
    };
    adopted.unwrap_or_else(|error| panic!("adopting {len} bytes at {at:?}: {error}"))
}

/// A file that has no name any more.
fn temporary(len: usize) -> File {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("gpusvm-matrix-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(&path);
    let file = file.expect("a temporary file");
    std::fs::remove_file(&path).expect("its name");
    file.set_len(len as u64).expect("its length");
    file
}

/// The system calls.
mod sys {
    use super::Error;
    use std::io::Result;

    const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

    fn mapped(at: *mut libc::c_void) -> *mut u8 {
        assert_ne!(at, libc::MAP_FAILED, "{}", Error::last_os_error());
        at.cast()
    }

    fn done(rc: libc::c_int) {
        assert_eq!(rc, 0, "{}", Error::last_os_error());
    }

    pub(super) fn map(at: *mut u8, len: usize, how: libc::c_int, fd: libc::c_int) -> *mut u8 {
        // SAFETY: what is replaced, if anything, is a place that was reserved for this.
        mapped(unsafe { libc::mmap(at.cast(), len, READ_WRITE, how, fd, 0) })
    }

    pub(super) fn reserve(len: usize) -> *mut u8 {
        let how = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: no address is asked for.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, how, -1, 0) };
        mapped(at)
    }

    pub(super) fn unmap(at: *mut u8, len: usize) {
        // SAFETY: memory of the test, which nobody uses any more.
        done(unsafe { libc::munmap(at.cast(), len) });
    }

    pub(super) fn remap(from: *mut u8, len: usize, to: *mut u8, keep: bool) -> *mut u8 {
        let mut how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        if keep {
            how |= libc::MREMAP_DONTUNMAP;
        }
        // SAFETY: a mapping of the test, to a place that was reserved for it.
        mapped(unsafe { libc::mremap(from.cast(), len, len, how, to.cast::<libc::c_void>()) })
    }

    pub(super) fn protect(at: *mut u8, len: usize, access: libc::c_int) {
        // SAFETY: memory of the test, which it does not write meanwhile.
        done(unsafe { libc::mprotect(at.cast(), len, access) });
    }

    pub(super) fn lock(at: *mut u8, len: usize) -> Result<()> {
        // SAFETY: it changes nothing that can be seen.
        match unsafe { libc::mlock(at.cast(), len) } {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        }
    }

    pub(super) fn unlock(at: *mut u8, len: usize) {
        // SAFETY: as above.
        done(unsafe { libc::munlock(at.cast(), len) });
    }
}
