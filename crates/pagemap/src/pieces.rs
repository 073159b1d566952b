//! Copies as the device wants them: few, long, contiguous.
//!
//! ```text
//!   sources   P P P . . P | K P      P page, . hole, K kept
//!   pieces    copy--  clear  copy  copy
//! ```

use crate::PagemapAddr;
use alloc::fmt;
use gpusvm_mm::{DevicePage, Leaving, Source};
use gpusvm_types::{ByteSize, DevAddr, DevicePfn, DmaAddr, PAGE_SIZE};

/// Why pages move. Every migration carries its cause, and every counter is kept by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Cause {
    /// The device touched them.
    DeviceFault,
    /// The CPU touched them.
    CpuFault,
    /// Somebody expects the device to touch them.
    Prefetch,
    /// Device memory was needed for others.
    Eviction,
    /// A launch declared them.
    Declared,
    /// Part of their mapping was unmapped.
    Unmap,
    /// The process forked.
    Fork,
    /// They were asked for, or the engine ends.
    Asked,
    /// They do not move: the device gets a copy to read.
    Duplicate,
}

impl Cause {
    /// All of them, in the order of [`Cause::index`].
    pub const ALL: [Self; 9] = [
        Self::DeviceFault,
        Self::CpuFault,
        Self::Prefetch,
        Self::Eviction,
        Self::Declared,
        Self::Unmap,
        Self::Fork,
        Self::Asked,
        Self::Duplicate,
    ];

    /// The place in arrays of counters.
    pub fn index(self) -> usize {
        Self::ALL
            .iter()
            .position(|cause| *cause == self)
            .unwrap_or_default()
    }

    /// The name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DeviceFault => "device_fault",
            Self::CpuFault => "cpu_fault",
            Self::Prefetch => "prefetch",
            Self::Eviction => "eviction",
            Self::Declared => "declared",
            Self::Unmap => "unmap",
            Self::Fork => "fork",
            Self::Asked => "asked",
            Self::Duplicate => "duplicate",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A contiguous piece of a migration to a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToDevmem {
    /// Bytes to copy.
    Copy {
        /// Where they are.
        from: DmaAddr,
        /// Where they go.
        to: DevAddr,
        /// How many.
        len: ByteSize,
    },
    /// Holes: nothing to copy.
    Clear {
        /// Where the zeroes go.
        to: DevAddr,
        /// How many bytes.
        len: ByteSize,
    },
}

/// A contiguous piece of a migration to RAM, or to the memory of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToRam {
    /// Where the bytes are.
    pub from: DevAddr,
    /// Where they go: never [`PagemapAddr::Vram`].
    pub to: PagemapAddr,
    /// How many.
    pub len: ByteSize,
}

/// The pieces that fill `pfns` from `sources`, page by page, merged.
pub(crate) fn to_devmem<'a>(
    sources: &'a [Source],
    pfns: &'a [DevicePfn],
) -> impl Iterator<Item = ToDevmem> + 'a {
    let single = sources
        .iter()
        .zip(pfns)
        .filter_map(|(source, pfn)| match *source {
            Source::Page(from) => Some(ToDevmem::Copy {
                from,
                to: pfn.dev_addr(),
                len: PAGE_SIZE,
            }),
            Source::Hole => Some(ToDevmem::Clear {
                to: pfn.dev_addr(),
                len: PAGE_SIZE,
            }),
            Source::Device(_) | Source::InPlace | Source::Kept(_) => None,
        });
    merged(single, |a, b| match (a, b) {
        (
            ToDevmem::Copy { from, to, len },
            ToDevmem::Copy {
                from: f,
                to: t,
                len: more,
            },
        ) if from + len == f && to + len == t => Some(ToDevmem::Copy {
            from,
            to,
            len: len + more,
        }),
        (ToDevmem::Clear { to, len }, ToDevmem::Clear { to: t, len: more }) if to + len == t => {
            Some(ToDevmem::Clear {
                to,
                len: len + more,
            })
        }
        _ => None,
    })
}

/// The pieces that bring `leaving` home, merged.
pub(crate) fn to_ram(leaving: &[Option<Leaving>]) -> impl Iterator<Item = ToRam> + '_ {
    let single = leaving.iter().flatten().map(|page| ToRam {
        from: page.from.pfn.dev_addr(),
        to: PagemapAddr::System(page.to),
        len: PAGE_SIZE,
    });
    merged(single, join_to_ram)
}

/// The pieces that bring those of `sources` that `is_mine` names to their place on a peer, merged.
pub(crate) fn to_peer<'a>(
    sources: &'a [Source],
    places: &'a [Option<PagemapAddr>],
    is_mine: impl Fn(DevicePage) -> bool + 'a,
) -> impl Iterator<Item = ToRam> + 'a {
    let single = sources
        .iter()
        .zip(places)
        .filter_map(move |(source, place)| match (source, place) {
            (Source::Device(page), Some(to)) if is_mine(*page) => Some(ToRam {
                from: page.pfn.dev_addr(),
                to: *to,
                len: PAGE_SIZE,
            }),
            _ => None,
        });
    merged(single, join_to_ram)
}

fn join_to_ram(a: ToRam, b: ToRam) -> Option<ToRam> {
    let adjacent = a.from + a.len == b.from && a.to.continues_with(b.to, a.len);
    adjacent.then(|| ToRam {
        len: a.len + b.len,
        ..a
    })
}

/// Joins neighbours as long as `join` can.
fn merged<T: Copy>(
    mut items: impl Iterator<Item = T>,
    join: impl Fn(T, T) -> Option<T>,
) -> impl Iterator<Item = T> {
    let mut pending = items.next();
    core::iter::from_fn(move || {
        let mut piece = pending.take()?;
        for next in items.by_ref() {
            match join(piece, next) {
                Some(longer) => piece = longer,
                None => {
                    pending = Some(next);
                    break;
                }
            }
        }
        Some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;
    use gpusvm_mm::KeptReason;

    fn page(i: u64) -> Source {
        Source::Page(DmaAddr::new(0x10_0000 + i * 4096))
    }

    /// The drawing of the module, as a row.
    #[test]
    fn neighbours_of_one_kind_merge() {
        let kept = Source::Kept(KeptReason::Busy);
        let sources = [
            page(0),
            page(1),
            page(2),
            Source::Hole,
            Source::Hole,
            page(5),
            kept,
            page(7),
        ];
        let pfns: Vec<DevicePfn> = (8..16).map(DevicePfn::new).collect();
        let pieces: Vec<ToDevmem> = to_devmem(&sources, &pfns).collect();
        let copy = |page: u64, pages: u64| ToDevmem::Copy {
            from: DmaAddr::new(0x10_0000 + page * 4096),
            to: DevAddr::new((8 + page) * 4096),
            len: ByteSize::new(pages * 4096),
        };
        let clear = ToDevmem::Clear {
            to: DevAddr::new(11 * 4096),
            len: ByteSize::new(2 * 4096),
        };
        assert_eq!(pieces, [copy(0, 3), clear, copy(5, 1), copy(7, 1)]);
    }

    #[test]
    fn scattered_device_pages_do_not_merge() {
        let pfns = [DevicePfn::new(3), DevicePfn::new(9)];
        assert_eq!(to_devmem(&[page(0), page(1)], &pfns).count(), 2);
    }

    #[test]
    fn every_cause_has_its_own_place() {
        for (i, cause) in Cause::ALL.into_iter().enumerate() {
            assert_eq!(cause.index(), i);
        }
    }
}
