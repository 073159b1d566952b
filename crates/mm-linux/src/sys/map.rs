//! Owned mappings, and what can be done to memory by its address.
//!
//! ```text
//!   Request::new(len).aligned().huge().dont_fork().locked().map() -> Mapping
//! ```
//!
//! A [`Mapping`] is private, anonymous and never reserved up front; it is unmapped on drop. Its
//! bytes are read and written a byte at a time here, and by whoever knows more through
//! [`Mapping::as_ptr`]: pages of it come and go, so that it is never a slice.

use super::room::Room;
use super::{place, pointer};
use gpusvm_sync::Arc;
use gpusvm_types::{BLOCK_SIZE, ByteSize, Span, VirtAddr};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};

/// What a mapping is to be like.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub(crate) struct Request {
    len: ByteSize,
    reserved: bool,
    aligned: bool,
    huge: Huge,
    dont_fork: bool,
    locked: bool,
    apart: bool,
}

#[derive(Clone, Copy, Debug)]
enum Huge {
    AsTheSystem,
    Wanted,
    Never,
}

impl Request {
    /// `len` bytes to read and write, rounded up to pages.
    pub(crate) const fn new(len: ByteSize) -> Self {
        let huge = Huge::AsTheSystem;
        Self {
            len,
            reserved: false,
            aligned: false,
            huge,
            dont_fork: false,
            locked: false,
            apart: false,
        }
    }

    /// Not in a hole that the program left in its address space: see [`place`].
    pub(crate) const fn apart(mut self) -> Self {
        self.apart = true;
        self
    }

    /// Address space only: any touch is a SIGSEGV until [`protect`] says otherwise.
    pub(crate) const fn reserved(mut self) -> Self {
        self.reserved = true;
        self
    }

    /// Starts at a multiple of 2 MiB.
    pub(crate) const fn aligned(mut self) -> Self {
        self.aligned = true;
        self
    }

    /// Huge pages, where the system allows them at all.
    pub(crate) const fn huge(mut self) -> Self {
        self.huge = Huge::Wanted;
        self
    }

    /// Base pages only.
    pub(crate) const fn never_huge(mut self) -> Self {
        self.huge = Huge::Never;
        self
    }

    /// A forked child does not get it.
    pub(crate) const fn dont_fork(mut self) -> Self {
        self.dont_fork = true;
        self
    }

    /// Never swapped once it is in RAM, as far as `RLIMIT_MEMLOCK` allows: it is worth a try, and no
    /// reason to fail.
    pub(crate) const fn locked(mut self) -> Self {
        self.locked = true;
        self
    }

    /// Maps it.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: no address space, or too many mappings. `EINVAL`: no length.
    pub(crate) fn map(self) -> Result<Mapping, Errno> {
        let len = self.len.pages().bytes();
        let mapping = if self.aligned {
            self.map_aligned(len)?
        } else {
            self.map_anywhere(len)?
        };
        self.advised(mapping)
    }

    /// As [`Request::map`], in address space of the engine's own, or anywhere if that is full. Not aligned,
    /// and to read and write.
    ///
    /// # Errors
    ///
    /// As [`Request::map`].
    pub(crate) fn map_in(self, room: &Arc<Room>) -> Result<Mapping, Errno> {
        let Some(span) = room.take(self.len.pages().bytes()) else {
            return self.map();
        };
        // From here on it goes back when it is dropped.
        let mapping = Mapping {
            span,
            owner: None,
            room: Some(Arc::clone(room)),
        };
        // SAFETY: set aside and nobody's: there is nothing yet that could be touched.
        unsafe { protect(span, MprotectFlags::READ | MprotectFlags::WRITE) }?;
        self.advised(mapping)
    }

    fn advised(self, mut mapping: Mapping) -> Result<Mapping, Errno> {
        let (span, len) = (mapping.span, mapping.span.len());
        match self.huge {
            Huge::AsTheSystem => {}
            // EINVAL: a kernel without huge pages, which is as good as it gets.
            Huge::Wanted => ignore_invalid(mapping.advise(Advice::LinuxHugepage))?,
            Huge::Never => ignore_invalid(mapping.advise(Advice::LinuxNoHugepage))?,
        }
        if self.dont_fork {
            mapping.advise(Advice::LinuxDontFork)?;
            mapping.owner = Some(std::process::id());
        }
        if self.locked {
            let flags = rustix::mm::MlockFlags::ONFAULT;
            // SAFETY: the mapping is ours; its bytes do not change.
            let _ = unsafe { rustix::mm::mlock_with(pointer(span.start()), len.as_usize(), flags) };
        }
        Ok(mapping)
    }

    fn map_anywhere(self, len: ByteSize) -> Result<Mapping, Errno> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let access = if self.reserved {
            ProtFlags::empty()
        } else {
            access
        };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let wanted = if self.apart {
            pointer(place::next(len))
        } else {
            core::ptr::null_mut()
        };
        // SAFETY: an address is only wished for, so that nothing that exists is replaced.
        let at = unsafe { rustix::mm::mmap_anonymous(wanted, len.as_usize(), access, flags) }?;
        at.expose_provenance();
        let span = Span::from_len(VirtAddr::from(at), len).expect("whole pages at a page");
        Ok(Mapping {
            span,
            owner: None,
            room: None,
        })
    }

    /// Maps a block more than asked, and gives back what is outside.
    fn map_aligned(self, len: ByteSize) -> Result<Mapping, Errno> {
        let wide = self.map_anywhere(
            len.get()
                .checked_add(BLOCK_SIZE.get())
                .map_or_else(|| Err(Errno::NOMEM), |bytes| Ok(ByteSize::new(bytes)))?,
        )?;
        let start = wide
            .span
            .start()
            .align_up(BLOCK_SIZE)
            .expect("inside the mapping");
        let span = Span::from_len(start, len).expect("inside the mapping");
        let outside = wide.span.without(span);
        core::mem::forget(wide);
        for piece in outside.into_iter().flatten() {
            unmap(piece);
        }
        Ok(Mapping {
            span,
            owner: None,
            room: None,
        })
    }
}

fn ignore_invalid(result: Result<(), Errno>) -> Result<(), Errno> {
    match result {
        Err(Errno::INVAL) => Ok(()),
        result => result,
    }
}

/// A private anonymous mapping of our own.
#[derive(Debug)]
pub(crate) struct Mapping {
    // INVARIANT: mapped, and nobody else unmaps it; in the process that has it.
    span: Span,
    /// The process that has it, when its children do not: what they have there is theirs.
    owner: Option<u32>,
    /// Whose address space it is in, if it is set aside.
    room: Option<Arc<Room>>,
}

impl Mapping {
    /// Where it is.
    pub(crate) const fn span(&self) -> Span {
        self.span
    }

    /// Its first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        pointer(self.span.start()).cast()
    }

    fn advise(&self, advice: Advice) -> Result<(), Errno> {
        // SAFETY: callers pass advice that changes no byte, on a mapping of our own.
        unsafe { madvise(self.span, advice) }
    }

    /// The byte at `offset`, from memory.
    #[cfg(test)]
    pub(crate) fn load(&self, offset: ByteSize) -> u8 {
        assert!(offset.get() < self.span.len().get(), "inside the mapping");
        // SAFETY: inside the mapping, by the assertion.
        let at = unsafe { self.as_ptr().add(offset.as_usize()) };
        // SAFETY: mapped; tests only share bytes between threads on purpose, as the real
        // application would.
        unsafe { at.read_volatile() }
    }

    /// Writes the byte at `offset`, to memory.
    #[cfg(test)]
    pub(crate) fn store(&self, offset: ByteSize, value: u8) {
        assert!(offset.get() < self.span.len().get(), "inside the mapping");
        // SAFETY: inside the mapping, by the assertion.
        let at = unsafe { self.as_ptr().add(offset.as_usize()) };
        // SAFETY: as for `load`.
        unsafe { at.write_volatile(value) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.owner.is_some_and(|owner| owner != std::process::id()) {
            return;
        }
        match &self.room {
            Some(room) => room.give_back(self.span),
            None => unmap(self.span),
        }
    }
}

/// Makes address space of a mapping of our own again, with nothing in it.
///
/// # Errors
///
/// `ENOMEM`: too many mappings.
pub(super) fn set_aside(span: Span) -> Result<(), Errno> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
    let (at, len) = (pointer(span.start()), span.len().as_usize());
    // SAFETY: in the place of a piece of a room, which nobody uses any more.
    unsafe { rustix::mm::mmap_anonymous(at, len, ProtFlags::empty(), flags) }?;
    // SAFETY: changes no byte; there is none.
    unsafe { madvise(span, Advice::LinuxDontFork) }
}

fn unmap(span: Span) {
    // SAFETY: only called on what this file mapped and nobody uses any more.
    let result = unsafe { rustix::mm::munmap(pointer(span.start()), span.len().as_usize()) };
    // Fails only when a split mapping would be one too many: the address space is then lost.
    debug_assert!(result.is_ok(), "unmap {span}: {result:?}");
}

/// Drops the pages of `span`: a touch finds zeros, or faults if registered. Locked pages too.
///
/// # Errors
///
/// `ENOMEM`: part of it is not mapped. `EINVAL`: not a kind of memory that can be dropped.
///
/// # Safety
///
/// Nobody may rely on the bytes of `span`.
pub(crate) unsafe fn discard(span: Span) -> Result<(), Errno> {
    // The other one first would drop, and tell of, what is before the first locked page, and then once more.
    // SAFETY: as the caller promises.
    match unsafe { madvise(span, Advice::LinuxDontneedLocked) } {
        // Linux before 5.18, which has said so before it did anything.
        // SAFETY: as the caller promises.
        Err(Errno::INVAL) => unsafe { madvise(span, Advice::LinuxDontNeed) },
        result => result,
    }
}

/// Makes every page of `span` present and our own, as a write would, without changing a byte:
/// breaks sharing with a forked child. Waits, as a write would, for missing pages of a
/// registered span.
///
/// # Errors
///
/// `EHWPOISON`: a page is poisoned. `EFAULT`: missing, where user-mode-only is registered.
/// `ENOMEM`: part of it is not mapped. `EINVAL`: not writable, or Linux before 5.14.
pub(crate) fn populate_write(span: Span) -> Result<(), Errno> {
    // SAFETY: changes no byte.
    unsafe { madvise(span, Advice::LinuxPopulateWrite) }
}

/// Makes every page of memory of our own present, as [`populate_write`] does, on any Linux. The bytes
/// may become zeroes.
///
/// # Errors
///
/// `ENOMEM`: part of it is not mapped, or there is no memory.
pub(crate) fn populate(span: Span) -> Result<(), Errno> {
    match populate_write(span) {
        Err(Errno::INVAL) => {}
        result => return result,
    }
    for page in span.pages() {
        // SAFETY: callers pass memory of their own, whose bytes nobody relies on.
        unsafe { pointer(page.start()).cast::<u8>().write_volatile(0) };
    }
    Ok(())
}

/// Sets who may touch `span`.
///
/// # Errors
///
/// `ENOMEM`: part of it is not mapped, or too many mappings. `EACCES`: a file that does not allow
/// it.
///
/// # Safety
///
/// Nobody may touch `span` in a way that `access` forbids, unless a handler makes it good.
pub(crate) unsafe fn protect(span: Span, access: MprotectFlags) -> Result<(), Errno> {
    // SAFETY: as the caller promises.
    unsafe { rustix::mm::mprotect(pointer(span.start()), span.len().as_usize(), access) }
}

/// Takes the pages of `from` to `to`, atomically, in the place of what is mapped there. What `from`
/// was stays mapped, with its protection, and without its pages.
///
/// # Errors
///
/// `EINVAL`: the two overlap, or `from` is of a kind that cannot be kept. `EFAULT`: `from` is not
/// one mapping. `ENOMEM`: too many mappings.
///
/// # Safety
///
/// Nobody may rely on the bytes at `from`, nor on what was at `to`.
pub(crate) unsafe fn remap_fixed(from: Span, to: VirtAddr) -> Result<(), Errno> {
    // SAFETY: as the caller promises.
    unsafe { remap(from, to, MremapFlags::MAYMOVE | MremapFlags::DONTUNMAP) }
}

/// As [`remap_fixed`], but `from` is unmapped.
///
/// # Errors
///
/// As [`remap_fixed`].
///
/// # Safety
///
/// As [`remap_fixed`]; and nobody may own `from` any more.
#[cfg(test)]
pub(crate) unsafe fn remap_away(from: Span, to: VirtAddr) -> Result<(), Errno> {
    // SAFETY: as the caller promises.
    unsafe { remap(from, to, MremapFlags::MAYMOVE) }
}

/// # Safety
///
/// As [`remap_fixed`], and what `flags` do to `from` must be fine with its owner.
unsafe fn remap(from: Span, to: VirtAddr, flags: MremapFlags) -> Result<(), Errno> {
    let len = from.len().as_usize();
    // SAFETY: as the caller promises.
    unsafe { rustix::mm::mremap_fixed(pointer(from.start()), len, len, flags, pointer(to)) }
        .map(drop)
}

/// # Safety
///
/// Whatever `advice` does to the bytes of `span` must be fine with whoever uses them.
unsafe fn madvise(span: Span, advice: Advice) -> Result<(), Errno> {
    // SAFETY: as the caller promises.
    unsafe { rustix::mm::madvise(pointer(span.start()), span.len().as_usize(), advice) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_mappings_start_at_a_block() {
        for _ in 0..8 {
            let mapping = Request::new(ByteSize::kib(12)).aligned().map().unwrap();
            assert!(mapping.span().start().is_aligned(BLOCK_SIZE));
            assert_eq!(mapping.span().len(), ByteSize::kib(12));
            mapping.store(ByteSize::kib(11), 7);
            assert_eq!(mapping.load(ByteSize::kib(11)), 7);
        }
    }

    #[test]
    fn discard_drops_locked_pages_too() {
        let mapping = match Request::new(ByteSize::kib(16)).locked().map() {
            Ok(mapping) => mapping,
            Err(errno) => {
                eprintln!("skipped: mlock: {errno}");
                return;
            }
        };
        mapping.store(ByteSize::ZERO, 7);
        // SAFETY: the bytes are ours.
        unsafe { discard(mapping.span()) }.unwrap();
        assert_eq!(mapping.load(ByteSize::ZERO), 0);
    }

    /// The way of the last rung: out to staging, where the old place stays closed; and back.
    #[test]
    fn remap_takes_a_closed_block_out_and_puts_it_back() {
        let home = Request::new(BLOCK_SIZE).aligned().map().unwrap();
        let staging = Request::new(BLOCK_SIZE).aligned().reserved().map().unwrap();
        home.store(ByteSize::kib(8), 42);
        let access = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: both mappings are ours, and nothing of them is touched while it is closed.
        unsafe { protect(home.span(), MprotectFlags::empty()) }.unwrap();
        // SAFETY: as above.
        unsafe { remap_fixed(home.span(), staging.span().start()) }.unwrap();
        // SAFETY: as above.
        unsafe { protect(staging.span(), access) }.unwrap();
        assert_eq!(staging.load(ByteSize::kib(8)), 42);
        // SAFETY: as above; the old place of the pages is given up with its owner.
        unsafe { remap_away(staging.span(), home.span().start()) }.unwrap();
        core::mem::forget(staging);
        assert_eq!(home.load(ByteSize::kib(8)), 42);
    }

    /// Story: what a child had mapped in the place of a staging pool, which it did not get, went when the
    /// child dropped the parent's engine.
    #[test]
    fn what_a_child_does_not_get_it_does_not_unmap() {
        let forks = crate::sys::testing::Forks::lock();
        let mapping = Request::new(ByteSize::kib(8)).dont_fork().map().unwrap();
        let ended = forks.child(|| {
            let span = mapping.span();
            let flags = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
            let (at, len) = (pointer(span.start()), span.len().as_usize());
            // SAFETY: nothing that is there is replaced.
            let mapped = unsafe { rustix::mm::mmap_anonymous(at, len, ProtFlags::READ, flags) };
            let is_free = mapped == Ok(at);
            // SAFETY: it is not used in the child any more, which ends before it would be dropped again.
            drop(unsafe { core::ptr::read(&raw const mapping) });
            // Refused where nothing is mapped.
            // SAFETY: changes no byte.
            let is_there = unsafe { madvise(span, Advice::Normal) }.is_ok();
            i32::from(!is_free || !is_there)
        });
        assert_eq!(ended, crate::sys::testing::Ended::Exit(0));
        mapping.store(ByteSize::ZERO, 1);
    }
}
