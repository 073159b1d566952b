//! Spans: half-open, page-aligned, non-empty pieces of an address space.
//!
//! ```text
//!   1.  [  a  )  [  b  )      no overlap, intersection None
//!   2.  [  a  [xx)  b  )      intersection x
//!   3.  [  a  [x b x)  )      contains
//! ```

use crate::{BLOCK_SIZE, ByteSize, PAGE_SIZE, PageCount, PageIndex, VirtAddr};
use core::fmt;

/// A half-open, page-aligned, non-empty piece of an address space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    // INVARIANT: start < end, both multiples of the page size.
    start: VirtAddr,
    end: VirtAddr,
}

/// Why two addresses are not a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SpanError {
    /// The start or the end is not page aligned.
    Unaligned {
        /// The address that is not aligned.
        at: VirtAddr,
    },
    /// The end is not above the start.
    Empty {
        /// Where the span would start.
        at: VirtAddr,
    },
    /// The end is past the end of the address space.
    Overflow {
        /// Where the span would start.
        at: VirtAddr,
        /// How long it would be.
        len: ByteSize,
    },
}

impl fmt::Display for SpanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unaligned { at } => write!(f, "{at} is not a multiple of {PAGE_SIZE}"),
            Self::Empty { at } => write!(f, "a span at {at} that is empty"),
            Self::Overflow { at, len } => {
                write!(f, "{len} at {at} reach past the end of the address space")
            }
        }
    }
}

impl core::error::Error for SpanError {}

impl Span {
    /// Every page but the last: for who has no bounds.
    pub const EVERYWHERE: Self = Self {
        start: VirtAddr::new(0),
        end: VirtAddr::new(u64::MAX).align_down(PAGE_SIZE),
    };

    /// The span from `start` up to, and without, `end`.
    ///
    /// # Errors
    ///
    /// `Unaligned` when either is not page aligned, `Empty` when `end` is not above `start`.
    pub const fn new(start: VirtAddr, end: VirtAddr) -> Result<Self, SpanError> {
        if !start.is_aligned(PAGE_SIZE) {
            return Err(SpanError::Unaligned { at: start });
        }
        if !end.is_aligned(PAGE_SIZE) {
            return Err(SpanError::Unaligned { at: end });
        }
        if start.get() >= end.get() {
            return Err(SpanError::Empty { at: start });
        }
        Ok(Self { start, end })
    }

    /// The span of `len` bytes from `start` on.
    ///
    /// # Errors
    ///
    /// As [`Span::new`], and `Overflow` when the end does not exist.
    pub const fn from_len(start: VirtAddr, len: ByteSize) -> Result<Self, SpanError> {
        match start.checked_add(len) {
            Some(end) => Self::new(start, end),
            None => Err(SpanError::Overflow { at: start, len }),
        }
    }

    /// The pages that hold any of `len` bytes at `start`: aligned outward.
    ///
    /// # Errors
    ///
    /// `Empty` when `len` is zero, `Overflow` when the end does not exist.
    pub fn covering(start: VirtAddr, len: ByteSize) -> Result<Self, SpanError> {
        if len.is_zero() {
            return Err(SpanError::Empty { at: start });
        }
        let end = start
            .checked_add(len)
            .and_then(|end| end.align_up(PAGE_SIZE));
        match end {
            Some(end) => Self::new(start.align_down(PAGE_SIZE), end),
            None => Err(SpanError::Overflow { at: start, len }),
        }
    }

    /// The whole pages inside `len` bytes at `start`: aligned inward.
    ///
    /// # Errors
    ///
    /// `Empty` when no whole page is inside, `Overflow` when the end does not exist.
    pub fn inside(start: VirtAddr, len: ByteSize) -> Result<Self, SpanError> {
        let overflow = SpanError::Overflow { at: start, len };
        let end = start.checked_add(len).ok_or(overflow)?;
        Self::new(
            start.align_up(PAGE_SIZE).ok_or(overflow)?,
            end.align_down(PAGE_SIZE),
        )
    }

    /// `count` pages from `first` on.
    ///
    /// # Panics
    ///
    /// When `count` is zero or the end does not exist.
    pub fn of_pages(first: PageIndex, count: PageCount) -> Self {
        Self::from_len(first.start(), count.bytes()).expect("at least one page that exists")
    }

    /// The one page that holds `at`.
    pub fn page_of(at: VirtAddr) -> Self {
        Self::of_pages(at.page(), PageCount::ONE)
    }

    /// The 2 MiB block that holds `at`.
    ///
    /// # Panics
    ///
    /// In the last block of the 64-bit space, whose end does not exist; no process has it.
    pub fn block_of(at: VirtAddr) -> Self {
        Self::from_len(at.block_start(), BLOCK_SIZE).expect("a block below the end of the space")
    }

    /// The chunk of `size` bytes, a power of two of at least a page, that holds `at`.
    ///
    /// # Panics
    ///
    /// When `size` is not a power of two of at least a page.
    pub fn chunk_of(at: VirtAddr, size: ByteSize) -> Self {
        assert!(size.get().is_power_of_two(), "a chunk is a power of two");
        Self::from_len(at.align_down(size), size).expect("a chunk below the end of the space")
    }

    /// The first address.
    pub const fn start(self) -> VirtAddr {
        self.start
    }

    /// The first address behind the span.
    pub const fn end(self) -> VirtAddr {
        self.end
    }

    /// The length in bytes.
    pub const fn len(self) -> ByteSize {
        ByteSize::new(self.end.get() - self.start.get())
    }

    /// Never: kept so that `len` has its companion.
    pub const fn is_empty(self) -> bool {
        false
    }

    /// The length in pages.
    pub const fn page_count(self) -> PageCount {
        self.len().whole_pages()
    }

    /// The first page.
    pub const fn first_page(self) -> PageIndex {
        self.start.page()
    }

    /// Every page, ascending.
    pub fn pages(self) -> impl ExactSizeIterator<Item = PageIndex> + DoubleEndedIterator + Clone {
        let first = self.first_page();
        (0..self.page_count().as_usize()).map(move |i| first + PageCount::from_usize(i))
    }

    /// The pieces of the span in each 2 MiB block, ascending.
    pub fn blocks(self) -> impl Iterator<Item = Self> + Clone {
        let mut next = Some(self);
        core::iter::from_fn(move || {
            let rest = next?;
            let piece = rest.intersection(Self::block_of(rest.start))?;
            next = Self::new(piece.end, rest.end).ok();
            Some(piece)
        })
    }

    /// Whether `at` is inside.
    pub const fn contains(self, at: VirtAddr) -> bool {
        self.start.get() <= at.get() && at.get() < self.end.get()
    }

    /// Whether all of `other` is inside.
    pub const fn covers(self, other: Self) -> bool {
        self.start.get() <= other.start.get() && other.end.get() <= self.end.get()
    }

    /// Whether any page is in both.
    pub const fn overlaps(self, other: Self) -> bool {
        self.start.get() < other.end.get() && other.start.get() < self.end.get()
    }

    /// The pages that are in both, if any.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end)).ok()
    }

    /// The smallest span that covers both.
    pub fn union(self, other: Self) -> Self {
        Self {
            start: self.start.min(other.start),
            end: self.end.max(other.end),
        }
    }

    /// What is left of the span below and above `hole`.
    pub fn without(self, hole: Self) -> [Option<Self>; 2] {
        if !self.overlaps(hole) {
            return [Some(self), None];
        }
        [
            Self::new(self.start, hole.start).ok(),
            Self::new(hole.end, self.end).ok(),
        ]
    }

    /// Where `page` is in the span, counted from its first page.
    ///
    /// # Panics
    ///
    /// When the page is not inside.
    pub fn index_of(self, page: PageIndex) -> usize {
        assert!(self.contains(page.start()), "{page:?} is not in {self}");
        page.offset_from(self.first_page()).as_usize()
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {})", self.start, self.end)
    }
}

#[cfg(test)]
mod tests {
    extern crate alloc;
    use super::*;
    use alloc::vec::Vec;

    fn span(start: u64, end: u64) -> Span {
        Span::new(VirtAddr::new(start << 12), VirtAddr::new(end << 12)).unwrap()
    }

    /// Exhaustive for small sizes: every pair of spans below eight pages, against sets of pages.
    #[test]
    fn interval_logic_equals_sets_of_pages() {
        let all = || (0..8u64).flat_map(|a| (a + 1..=8).map(move |b| (a, b)));
        for (a0, a1) in all() {
            for (b0, b1) in all() {
                let (a, b) = (span(a0, a1), span(b0, b1));
                let both: Vec<u64> = (a0..a1).filter(|p| (b0..b1).contains(p)).collect();
                let got: Vec<u64> = a
                    .intersection(b)
                    .into_iter()
                    .flat_map(Span::pages)
                    .map(PageIndex::get)
                    .collect();
                assert_eq!(got, both, "{a} and {b}");
                assert_eq!(a.overlaps(b), !both.is_empty());
                assert_eq!(a.covers(b), both.len() as u64 == b1 - b0);
                let rest: Vec<u64> = a
                    .without(b)
                    .into_iter()
                    .flatten()
                    .flat_map(Span::pages)
                    .map(PageIndex::get)
                    .collect();
                let want: Vec<u64> = (a0..a1).filter(|p| !(b0..b1).contains(p)).collect();
                assert_eq!(rest, want, "{a} without {b}");
            }
        }
    }

    #[test]
    fn blocks_cut_at_two_mebibytes() {
        let pieces: Vec<Span> = span(510, 1030).blocks().collect();
        assert_eq!(pieces, [span(510, 512), span(512, 1024), span(1024, 1030)]);
    }

    #[test]
    fn bad_input_says_what_is_wrong() {
        let at = VirtAddr::new;
        assert_eq!(
            Span::new(at(1), at(4096)),
            Err(SpanError::Unaligned { at: at(1) })
        );
        assert_eq!(
            Span::new(at(4096), at(4096)),
            Err(SpanError::Empty { at: at(4096) })
        );
        let huge = ByteSize::new(u64::MAX - 4095);
        assert!(matches!(
            Span::from_len(at(8192), huge),
            Err(SpanError::Overflow { .. })
        ));
        assert!(matches!(
            Span::inside(at(1), ByteSize::new(4096)),
            Err(SpanError::Empty { .. })
        ));
        assert_eq!(Span::covering(at(4095), ByteSize::new(2)), Ok(span(0, 2)));
    }
}
