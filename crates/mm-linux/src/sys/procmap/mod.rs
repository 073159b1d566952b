//! Which mapping an address lies in: the kernel's `find_vma`, from outside.
//!
//! ```text
//!        [ a )        [ b )[ c )
//!     ^    ^      ^     ^
//!     a    a      b     b           find(^)
//! ```
//!
//! `PROCMAP_QUERY` (Linux 6.11) asks for one mapping; without it the text of `/proc/self/maps`
//! is read from the start up to the answer (`text.rs`).

mod text; // the lines of /proc/self/maps

use super::ioctl::Call;
use gpusvm_types::{Span, VirtAddr};
use linux_raw_sys::general as raw;
use raw::procmap_query_flags as flags;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

const QUERY: Opcode = opcode::read_write::<raw::procmap_query>(b'f', 17);

/// A mapping of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RawVma {
    /// From where to where.
    pub(crate) span: Span,
    /// May be read.
    pub(crate) read: bool,
    /// May be written.
    pub(crate) write: bool,
    /// May be executed.
    pub(crate) exec: bool,
    /// Writes are seen by whoever else maps it.
    pub(crate) shared: bool,
    /// Private memory of nobody's file: what can be mirrored. The heap and the stacks count.
    pub(crate) anonymous_private: bool,
    /// Private memory over a file. By text that may also be one of hugetlbfs.
    pub(crate) private_file: bool,
    /// Of hugetlbfs. By text only the anonymous ones are known.
    pub(crate) hugetlb: bool,
    /// The stack of the first thread.
    pub(crate) is_stack: bool,
    /// The heap of `brk`.
    pub(crate) is_heap: bool,
}

impl RawVma {
    /// Whether it is private memory of nobody's file, in pages of the usual size.
    pub(crate) const fn is_plain(&self) -> bool {
        self.anonymous_private && !self.hugetlb
    }
}

/// The mappings of this process.
///
/// It keeps showing the process that opened it: a forked child opens its own.
#[derive(Debug)]
pub(crate) struct VmaTable {
    fd: OwnedFd,
    // Whether `PROCMAP_QUERY` was refused once. Only ever goes up.
    text_only: AtomicBool,
}

impl VmaTable {
    /// Opens the mappings of this process.
    ///
    /// # Errors
    ///
    /// `/proc` is not there, or may not be read.
    pub(crate) fn open() -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/proc/self/maps", flags, Mode::empty())?;
        Ok(Self {
            fd,
            text_only: AtomicBool::new(false),
        })
    }

    /// The mapping that holds `at`, or the next above, or none.
    ///
    /// # Errors
    ///
    /// Those of the kernel; none is expected.
    pub(crate) fn find(&self, at: VirtAddr) -> Result<Option<RawVma>, Errno> {
        if !self.text_only.load(Ordering::Relaxed) {
            match self.query(at) {
                Err(Errno::NOTTY) => self.text_only.store(true, Ordering::Relaxed),
                result => return result,
            }
        }
        text::find(&self.fd, at)
    }

    /// Whether the kernel has `PROCMAP_QUERY`.
    pub(crate) fn has_query(&self) -> bool {
        !matches!(self.query(VirtAddr::new(0)), Err(Errno::NOTTY))
    }

    fn query(&self, at: VirtAddr) -> Result<Option<RawVma>, Errno> {
        let mut name = [0; NAME_ROOM];
        match self.query_into(at, &mut name) {
            Ok(found) => Ok(Some(vma_of(&found, name_of(&name, &found)))),
            Err(Errno::NOENT) => Ok(None),
            // Only paths are that long, and what has a path is not anonymous.
            Err(Errno::NAMETOOLONG) => match self.query_into(at, &mut []) {
                Ok(found) => Ok(Some(vma_of(&found, b"/"))),
                Err(Errno::NOENT) => Ok(None),
                Err(errno) => Err(errno),
            },
            Err(errno) => Err(errno),
        }
    }

    fn query_into(&self, at: VirtAddr, name: &mut [u8]) -> Result<raw::procmap_query, Errno> {
        let name_size = u32::try_from(name.len()).expect("a short name");
        let mut arg = raw::procmap_query {
            size: size_of::<raw::procmap_query>() as u64,
            query_flags: flags::PROCMAP_QUERY_COVERING_OR_NEXT_VMA as u64,
            query_addr: at.get(),
            vma_start: 0,
            vma_end: 0,
            vma_flags: 0,
            vma_page_size: 0,
            vma_offset: 0,
            inode: 0,
            dev_major: 0,
            dev_minor: 0,
            vma_name_size: name_size,
            build_id_size: 0,
            vma_name_addr: if name.is_empty() {
                0
            } else {
                VirtAddr::from(name.as_mut_ptr()).get()
            },
            build_id_addr: 0,
        };
        // SAFETY: the structure is the one of this ioctl; the name goes where there is room.
        let call = unsafe { Call::new(QUERY, &mut arg) };
        // SAFETY: as above, on a maps file.
        unsafe { rustix::ioctl::ioctl(&self.fd, call) }?;
        Ok(arg)
    }
}

/// Longer than any name that is not a path: `[anon:` and 80 bytes are the most.
const NAME_ROOM: usize = 128;

fn name_of<'a>(room: &'a [u8], found: &raw::procmap_query) -> &'a [u8] {
    // The size counts the terminating zero, and is zero without a name.
    let len = usize::try_from(found.vma_name_size)
        .expect("fits the room")
        .saturating_sub(1);
    &room[..len.min(room.len())]
}

fn vma_of(found: &raw::procmap_query, name: &[u8]) -> RawVma {
    let has = |flag: flags| found.vma_flags & flag as u64 != 0;
    let shared = has(flags::PROCMAP_QUERY_VMA_SHARED);
    let hugetlb = found.vma_page_size > gpusvm_types::PAGE_SIZE.get();
    RawVma {
        span: Span::new(VirtAddr::new(found.vma_start), VirtAddr::new(found.vma_end))
            .expect("mappings are page aligned and not empty"),
        read: has(flags::PROCMAP_QUERY_VMA_READABLE),
        write: has(flags::PROCMAP_QUERY_VMA_WRITABLE),
        exec: has(flags::PROCMAP_QUERY_VMA_EXECUTABLE),
        shared,
        anonymous_private: is_anonymous(shared, found.inode, name),
        private_file: !shared && found.inode != 0 && !hugetlb,
        hugetlb,
        is_stack: name == b"[stack]",
        is_heap: name == b"[heap]",
    }
}

/// Whether a mapping is private memory of nobody's file, by what both sources tell.
///
/// The kernel's own (`[vdso]`, `[vvar]`, `[uprobes]`) have no inode either, but a name.
fn is_anonymous(shared: bool, inode: u64, name: &[u8]) -> bool {
    let plain = matches!(name, b"" | b"[heap]" | b"[stack]") || name.starts_with(b"[anon:");
    !shared && inode == 0 && plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::Request;
    use gpusvm_types::{BLOCK_SIZE, ByteSize};

    fn all(find: impl Fn(VirtAddr) -> Result<Option<RawVma>, Errno>) -> Vec<RawVma> {
        let mut at = VirtAddr::new(0);
        let mut all = Vec::new();
        while let Some(vma) = find(at).unwrap() {
            at = vma.span.end();
            all.push(vma);
        }
        all
    }

    /// Other tests map and unmap meanwhile: one quiet pass in many is enough.
    #[test]
    fn query_and_text_tell_the_same_of_every_mapping() {
        let table = VmaTable::open().unwrap();
        if !table.has_query() {
            eprintln!("skipped: no PROCMAP_QUERY before Linux 6.11");
            return;
        }
        for _ in 0..200 {
            let asked = all(|at| table.query(at));
            let read = all(|at| text::find(&table.fd, at));
            if asked == read && asked == all(|at| table.query(at)) {
                assert!(asked.len() > 10);
                assert_eq!(asked.iter().filter(|vma| vma.is_stack).count(), 1);
                return;
            }
        }
        panic!("never the same");
    }

    #[test]
    fn finds_the_next_above_a_hole() {
        let table = VmaTable::open().unwrap();
        let mapping = Request::new(ByteSize::kib(64))
            .reserved()
            .aligned()
            .map()
            .unwrap();
        let span = mapping.span();
        for find in [VmaTable::find, |table: &VmaTable, at| {
            text::find(&table.fd, at)
        }] {
            let vma = find(&table, span.start() + ByteSize::kib(5))
                .unwrap()
                .unwrap();
            assert!(vma.span.covers(span), "{vma:?} holds {span}");
            assert!(!vma.read && !vma.write && !vma.exec && !vma.shared && vma.anonymous_private);
            let lowest = find(&table, VirtAddr::new(0)).unwrap().unwrap();
            assert!(lowest.span.start() > VirtAddr::new(0));
            assert!(!lowest.anonymous_private, "the program: {lowest:?}");
            assert_eq!(find(&table, VirtAddr::new(0x7fff_ffff_f000)), Ok(None));
        }
    }

    #[test]
    fn a_shared_mapping_and_a_huge_one_are_not_for_us() {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let table = VmaTable::open().unwrap();
        let access = ProtFlags::READ | ProtFlags::WRITE;
        for (flags, hugetlb) in [
            (MapFlags::SHARED, false),
            (
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::HUGETLB,
                true,
            ),
        ] {
            let len = BLOCK_SIZE.as_usize();
            // SAFETY: no address is asked for.
            let at = unsafe { mmap_anonymous(core::ptr::null_mut(), len, access, flags) }.unwrap();
            for vma in [table.find(at.into()), text::find(&table.fd, at.into())] {
                let vma = vma.unwrap().unwrap();
                assert!(
                    vma.span.contains(at.into()) && !vma.anonymous_private,
                    "{vma:?}"
                );
                assert_eq!(vma.hugetlb, hugetlb, "{vma:?}");
            }
            // SAFETY: mapped above, never touched.
            unsafe { rustix::mm::munmap(at, len) }.unwrap();
        }
    }
}
