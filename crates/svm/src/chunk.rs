//! Which chunk a new range covers: a pure function.
//!
//! ```text
//!   bounds    [------------------------------)     mapping, window, mirrored mapping
//!   ranges          [ r )
//!   fault                       x
//!   2 MiB     [...............................)    reaches out of the bounds: no
//!   64 KiB                  [.......)              fits, if all of it is there or nobody cares
//!   4 KiB                      [.)                 always does
//! ```

use gpusvm_types::{BLOCK_SIZE, ByteSize, PAGE_SIZE, Span, VirtAddr};

/// What a chunk must keep to.
#[derive(Clone, Copy, Debug)]
pub struct Limits<'a> {
    /// What it lies in.
    pub bounds: Span,
    /// Its sizes: powers of two, descending.
    pub sizes: &'a [ByteSize],
    /// Up to this size, but for a page, it is populated as a whole.
    pub check_pages_threshold: ByteSize,
}

impl Limits<'_> {
    /// The sizes of chunks that must be populated, descending.
    pub fn checked_sizes(&self) -> impl Iterator<Item = ByteSize> {
        let is_checked = |size: &ByteSize| self.must_be_populated(*size);
        self.sizes.iter().copied().filter(is_checked)
    }

    fn must_be_populated(&self, size: ByteSize) -> bool {
        size > PAGE_SIZE && size <= self.check_pages_threshold
    }
}

/// The largest aligned chunk that holds `at`, keeps to the limits and is `free`. Chunks are asked whether
/// they are `populated` only if they must be.
///
/// `None` when not even the smallest fits.
pub fn choose(
    at: VirtAddr,
    limits: &Limits<'_>,
    free: impl Fn(Span) -> bool,
    populated: impl Fn(Span) -> bool,
) -> Option<Span> {
    gpusvm_sync::walk!("choose");
    let fits = |chunk: Span| {
        limits.bounds.covers(chunk)
            && free(chunk)
            && (!limits.must_be_populated(chunk.len()) || populated(chunk))
    };
    let mut chunks = limits.sizes.iter().map(|size| Span::chunk_of(at, *size));
    chunks.find(|chunk| fits(*chunk))
}

/// # Panics
///
/// When the sizes are not powers of two, descending, at most a block, the last one a page.
pub(crate) fn assert_sizes(sizes: &[ByteSize]) {
    assert!(
        sizes.iter().all(|size| size.get().is_power_of_two()),
        "chunks are powers of two"
    );
    assert!(sizes.is_sorted_by(|a, b| a > b), "chunk sizes descend");
    assert!(
        sizes.first().is_some_and(|size| *size <= BLOCK_SIZE),
        "no chunk crosses a block"
    );
    assert!(
        sizes.last() == Some(&PAGE_SIZE),
        "the smallest chunk is a page"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec::Vec;

    const SIZES: [ByteSize; 4] = [
        ByteSize::kib(32),
        ByteSize::kib(16),
        ByteSize::kib(8),
        ByteSize::kib(4),
    ];

    fn page(p: u64) -> VirtAddr {
        VirtAddr::new(p << 12)
    }

    /// Exhaustive: every fault, every bounds and every taken page in sixteen pages, with chunks of 8, 4, 2
    /// and 1 pages, against the definition.
    #[test]
    fn the_largest_chunk_that_fits_and_is_free() {
        for start in 0..16u64 {
            for end in start + 1..=16 {
                let bounds = Span::new(page(start), page(end)).unwrap();
                let limits = Limits {
                    bounds,
                    sizes: &SIZES,
                    check_pages_threshold: ByteSize::ZERO,
                };
                for at in start..end {
                    for taken in (0..16).filter(|taken| *taken != at) {
                        let taken = Span::page_of(page(taken));
                        let free = |chunk: Span| !chunk.overlaps(taken);
                        let got = choose(page(at), &limits, free, |_| false);
                        let want = [8u64, 4, 2, 1].into_iter().find_map(|pages| {
                            let first = at / pages * pages;
                            let chunk = Span::new(page(first), page(first + pages)).unwrap();
                            (bounds.covers(chunk) && !chunk.overlaps(taken)).then_some(chunk)
                        });
                        assert_eq!(got, want, "{at} in {bounds} without {taken}");
                    }
                }
            }
        }
    }

    /// Exhaustive: every fault, every set of eight pages that are there, and every threshold, against the
    /// definition.
    #[test]
    fn a_chunk_below_the_threshold_is_populated() {
        let bounds = Span::new(page(0), page(8)).unwrap();
        for threshold in [0, 1, 4, 7, 8, 16, 31, 32, 64].map(ByteSize::kib) {
            let limits = Limits {
                bounds,
                sizes: &SIZES,
                check_pages_threshold: threshold,
            };
            let checked: Vec<u64> = limits
                .checked_sizes()
                .map(|size| size.pages().get())
                .collect();
            for there in 0..256u32 {
                let is_there =
                    |first: u64, pages| (first..first + pages).all(|p| there >> p & 1 == 1);
                for at in 0..8 {
                    let populated =
                        |chunk: Span| is_there(chunk.first_page().get(), chunk.page_count().get());
                    let got = choose(page(at), &limits, |_| true, populated);
                    let want = [8u64, 4, 2, 1].into_iter().find_map(|pages| {
                        let first = at / pages * pages;
                        let passes = pages == 1
                            || ByteSize::kib(4 * pages) > threshold
                            || is_there(first, pages);
                        assert_eq!(
                            checked.contains(&pages),
                            pages > 1 && ByteSize::kib(4 * pages) <= threshold
                        );
                        passes.then(|| Span::new(page(first), page(first + pages)).unwrap())
                    });
                    assert_eq!(got, want, "{at} with {there:#010b} up to {threshold}");
                }
            }
        }
    }

    #[test]
    fn nothing_fits_outside_the_bounds() {
        let limits = Limits {
            bounds: Span::page_of(page(1)),
            sizes: &[PAGE_SIZE],
            check_pages_threshold: ByteSize::ZERO,
        };
        assert_eq!(choose(page(3), &limits, |_| true, |_| true), None);
    }
}
