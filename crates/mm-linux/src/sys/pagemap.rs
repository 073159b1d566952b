//! Which pages of a span are there, and of what kind.
//!
//! `PAGEMAP_SCAN` (Linux 6.7) answers in runs; without it the entries of `/proc/self/pagemap` are
//! read one by one, which tells less: zero pages and huge pages cannot be told from others.
//!
//! ```text
//!   pages        P P P . . Z Z P      P present, Z zero page, . hole
//!   regions     [  P  )    [Z )[P)    what is not there is in no region
//! ```
//!
//! A hole with a write-protect marker or a poison marker shows as swapped.

use super::ioctl::Call;
use gpusvm_types::{PAGE_SIZE, Span, VirtAddr};
use linux_raw_sys::general as raw;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

const SCAN: Opcode = opcode::read_write::<raw::pm_scan_arg>(b'f', 16);

/// What is known of a page that is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Categories(u64);

impl Categories {
    /// In memory.
    pub(crate) const PRESENT: Self = Self(raw::PAGE_IS_PRESENT as u64);
    /// Swapped out, or a marker.
    pub(crate) const SWAPPED: Self = Self(raw::PAGE_IS_SWAPPED as u64);
    /// The shared page of zeros.
    pub(crate) const ZERO: Self = Self(raw::PAGE_IS_PFNZERO as u64);
    /// Mapped as part of a huge page.
    pub(crate) const HUGE: Self = Self(raw::PAGE_IS_HUGE as u64);
    /// Of a file, or shared memory.
    pub(crate) const FILE: Self = Self(raw::PAGE_IS_FILE as u64);
    /// Not write-protected by userfaultfd.
    const WRITTEN: Self = Self(raw::PAGE_IS_WRITTEN as u64);

    const KIND: Self = Self(Self::ZERO.0 | Self::HUGE.0 | Self::FILE.0);
    const THERE: Self = Self(Self::PRESENT.0 | Self::SWAPPED.0);

    /// Whether all of `others` hold.
    pub(crate) const fn contains(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }
}

/// A run of pages of the same categories: in memory, or swapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Region {
    /// The first byte.
    pub(crate) start: VirtAddr,
    /// The first byte behind.
    pub(crate) end: VirtAddr,
    /// What its pages are.
    pub(crate) categories: Categories,
}

// An address and the categories are one 64-bit word each: the kernel writes regions in place.
const _: () = assert!(size_of::<Region>() == size_of::<raw::page_region>());
const _: () =
    assert!(core::mem::offset_of!(Region, end) == core::mem::offset_of!(raw::page_region, end));
const _: () = assert!(
    core::mem::offset_of!(Region, categories)
        == core::mem::offset_of!(raw::page_region, categories)
);

impl Region {
    /// Room for a region.
    pub(crate) const EMPTY: Self = Self {
        start: VirtAddr::new(0),
        end: VirtAddr::new(0),
        categories: Categories(0),
    };
}

/// Which pages a scan tells of, of those that are there: these categories hold, and those do not.
#[derive(Clone, Copy, Debug, Default)]
struct Only {
    set: Categories,
    clear: Categories,
}

/// What a scan found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scanned {
    /// How many regions were written.
    pub(crate) regions: usize,
    /// Up to where they tell: the end of the span, unless they ran out.
    pub(crate) until: VirtAddr,
    /// Whether zero pages, huge pages and file pages are told apart.
    pub(crate) kinds: bool,
}

/// The page tables of this process, as far as it may see them.
///
/// It keeps showing the process that opened it: a forked child opens its own.
#[derive(Debug)]
pub(crate) struct PageMap {
    fd: OwnedFd,
    // Whether `PAGEMAP_SCAN` was refused once. Only ever goes up.
    entries_only: AtomicBool,
}

impl PageMap {
    /// Opens the page tables of this process.
    ///
    /// # Errors
    ///
    /// `/proc` is not there, or may not be read.
    pub(crate) fn open() -> Result<Self, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/proc/self/pagemap", flags, Mode::empty())?;
        Ok(Self {
            fd,
            entries_only: AtomicBool::new(false),
        })
    }

    /// The runs of pages of `span` that are there, ascending, as many as fit in `out`.
    ///
    /// # Errors
    ///
    /// Those of the kernel; none is expected with a span that a process can map.
    ///
    /// # Panics
    ///
    /// When `out` is empty.
    pub(crate) fn scan(&self, span: Span, out: &mut [Region]) -> Result<Scanned, Errno> {
        assert!(!out.is_empty(), "room for a region");
        if !self.entries_only.load(Ordering::Relaxed) {
            match self.scan_runs(span, out) {
                Err(Errno::NOTTY) => self.entries_only.store(true, Ordering::Relaxed),
                result => return result,
            }
        }
        self.scan_entries(span, out)
    }

    /// Whether nothing is at a page, as far as is known.
    pub(crate) fn is_absent(&self, page: Span) -> bool {
        self.scan(page, &mut [Region::EMPTY])
            .is_ok_and(|scanned| scanned.regions == 0)
    }

    /// Whether nothing is at a page but a write-protect marker; a page that was swapped out while it was
    /// write-protected looks the same.
    pub(crate) fn is_marker(&self, page: Span) -> bool {
        let only = Only {
            set: Categories::SWAPPED,
            clear: Categories(Categories::PRESENT.0 | Categories::WRITTEN.0),
        };
        match self.scan_only(page, only, &mut [Region::EMPTY]) {
            Err(Errno::NOTTY) => self.has_marker_entry(page),
            scanned => scanned.is_ok_and(|scanned| scanned.regions == 1),
        }
    }

    /// As `is_marker`, without `PAGEMAP_SCAN`.
    fn has_marker_entry(&self, page: Span) -> bool {
        /// Present, swapped, write-protected by userfaultfd.
        const BITS: u64 = 1 << 63 | 1 << 62 | 1 << 57;
        const MARKER: u64 = 1 << 62 | 1 << 57;
        let mut entry = [0; 8];
        let read = rustix::io::pread(&self.fd, &mut entry, page.first_page().get() * 8);
        read == Ok(8) && u64::from_ne_bytes(entry) & BITS == MARKER
    }

    /// Whether the kernel has `PAGEMAP_SCAN`.
    pub(crate) fn has_scan(&self) -> bool {
        let page = Span::page_of(VirtAddr::from(core::ptr::from_ref(self)));
        !matches!(
            self.scan_runs(page, &mut [Region::EMPTY]),
            Err(Errno::NOTTY)
        )
    }

    fn scan_runs(&self, span: Span, out: &mut [Region]) -> Result<Scanned, Errno> {
        self.scan_only(span, Only::default(), out)
    }

    fn scan_only(&self, span: Span, only: Only, out: &mut [Region]) -> Result<Scanned, Errno> {
        let mut arg = raw::pm_scan_arg {
            size: size_of::<raw::pm_scan_arg>() as u64,
            flags: 0,
            start: span.start().get(),
            end: span.end().get(),
            walk_end: 0,
            vec: VirtAddr::from(out.as_mut_ptr()).get(),
            vec_len: out.len() as u64,
            max_pages: 0,
            category_inverted: only.clear.0,
            category_mask: only.set.0 | only.clear.0,
            // Of those that are inverted, it would be the others.
            category_anyof_mask: Categories::THERE.0 & !only.clear.0,
            return_mask: Categories::THERE.0 | Categories::KIND.0,
        };
        // SAFETY: the structure is the one of this ioctl; `vec` and `vec_len` are those of `out`,
        // whose elements are laid out as `page_region`.
        let call = unsafe { Call::new(SCAN, &mut arg) };
        // SAFETY: as above, on a pagemap.
        let regions = unsafe { rustix::ioctl::ioctl(&self.fd, call) }?;
        let regions = usize::try_from(regions).expect("a count");
        Ok(Scanned {
            regions,
            until: VirtAddr::new(arg.walk_end),
            kinds: true,
        })
    }

    fn scan_entries(&self, span: Span, out: &mut [Region]) -> Result<Scanned, Errno> {
        const BATCH: usize = 64;
        let mut regions = 0;
        let mut at = span.start();
        while at < span.end() {
            let left = span.end().offset_from(at).whole_pages().as_usize();
            let mut bytes = [0u8; BATCH * 8];
            let room = &mut bytes[..left.min(BATCH) * 8];
            let got = rustix::io::pread(&self.fd, &mut *room, at.page().get() * 8)?;
            // Behind the last address of a process the file ends: nothing is there.
            if got == 0 {
                break;
            }
            for entry in room[..got].as_chunks::<8>().0 {
                let next = at + PAGE_SIZE;
                if let Some(categories) = of_entry(u64::from_ne_bytes(*entry))
                    && !append(
                        out,
                        &mut regions,
                        Region {
                            start: at,
                            end: next,
                            categories,
                        },
                    )
                {
                    return Ok(Scanned {
                        regions,
                        until: at,
                        kinds: false,
                    });
                }
                at = next;
            }
        }
        Ok(Scanned {
            regions,
            until: span.end(),
            kinds: false,
        })
    }
}

/// What an entry of the file says, or `None` for a hole.
fn of_entry(entry: u64) -> Option<Categories> {
    let bit = |n: u32, category: Categories| if entry >> n & 1 == 1 { category.0 } else { 0 };
    let there = bit(63, Categories::PRESENT) | bit(62, Categories::SWAPPED);
    (there != 0).then(|| Categories(there | bit(61, Categories::FILE)))
}

/// Puts a region behind the others, grown together with the last if they meet; whether it fit.
fn append(out: &mut [Region], regions: &mut usize, new: Region) -> bool {
    if let Some(last) = out[..*regions].last_mut()
        && last.end == new.start
        && last.categories == new.categories
    {
        last.end = new.end;
        return true;
    }
    let Some(free) = out.get_mut(*regions) else {
        return false;
    };
    *free = new;
    *regions += 1;
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::{Mapping, Request};
    use gpusvm_types::ByteSize;

    fn page(mapping: &Mapping, n: u64) -> VirtAddr {
        mapping.span().start() + ByteSize::kib(4 * n)
    }

    fn written(mapping: &Mapping, pages: &[u64]) {
        for n in pages {
            mapping.store(ByteSize::kib(4 * n), 1);
        }
    }

    /// Pages 0..3 and 5 written, 6 read (the zero page), the rest holes.
    fn example() -> Mapping {
        let mapping = Request::new(ByteSize::kib(64)).never_huge().map().unwrap();
        written(&mapping, &[0, 1, 2, 5]);
        assert_eq!(mapping.load(ByteSize::kib(24)), 0);
        mapping
    }

    #[test]
    fn runs_tell_holes_and_zero_pages() {
        let pagemap = PageMap::open().unwrap();
        if !pagemap.has_scan() {
            eprintln!("skipped: no PAGEMAP_SCAN before Linux 6.7");
            return;
        }
        let mapping = example();
        let mut out = [Region::EMPTY; 8];
        let got = pagemap.scan_runs(mapping.span(), &mut out).unwrap();
        let present = Categories::PRESENT;
        let zero = Categories(present.0 | Categories::ZERO.0);
        let region = |a, b, categories| Region {
            start: page(&mapping, a),
            end: page(&mapping, b),
            categories,
        };
        assert_eq!(
            out[..got.regions],
            [
                region(0, 3, present),
                region(5, 6, present),
                region(6, 7, zero)
            ]
        );
        assert_eq!(got.until, mapping.span().end());
    }

    #[test]
    fn entries_agree_with_runs_on_what_is_there() {
        let pagemap = PageMap::open().unwrap();
        let mapping = example();
        let mut out = [Region::EMPTY; 8];
        let got = pagemap.scan_entries(mapping.span(), &mut out).unwrap();
        assert!(!got.kinds);
        let spans: Vec<_> = out[..got.regions]
            .iter()
            .map(|r| (r.start, r.end))
            .collect();
        let at = |n| page(&mapping, n);
        assert_eq!(spans, [(at(0), at(3)), (at(5), at(7))]);
    }

    #[test]
    fn too_many_runs_stop_where_they_ran_out() {
        let pagemap = PageMap::open().unwrap();
        let mapping = Request::new(ByteSize::mib(1)).never_huge().map().unwrap();
        written(&mapping, &[0, 2, 4, 100, 200]);
        type Scan = fn(&PageMap, Span, &mut [Region]) -> Result<Scanned, Errno>;
        let mut ways: Vec<Scan> = vec![PageMap::scan_entries];
        if pagemap.has_scan() {
            ways.push(PageMap::scan_runs);
        }
        for way in ways {
            let mut found = Vec::new();
            let mut rest = Some(mapping.span());
            while let Some(span) = rest {
                let mut out = [Region::EMPTY; 2];
                let got = way(&pagemap, span, &mut out).unwrap();
                found.extend(out[..got.regions].iter().map(|r| r.start));
                rest = Span::new(got.until, span.end()).ok();
            }
            assert_eq!(found, [0, 2, 4, 100, 200].map(|n| page(&mapping, n)));
        }
    }
}
