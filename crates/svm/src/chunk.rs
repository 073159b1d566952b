//! Which chunk a new range covers: a pure function.
//!
//! ```text
//!   bounds    [------------------------------)     mapping, window, mirrored mapping
//!   ranges          [ r )
//!   fault                       x
//!   2 MiB     [...............................)    reaches out of the bounds: no
//!   64 KiB                  [.......)              fits
//! ```

use gpusvm_types::{BLOCK_SIZE, ByteSize, PAGE_SIZE, Span, VirtAddr};

/// The largest aligned chunk that holds `at`, lies in `bounds` and is `free`.
///
/// `sizes` are powers of two, descending. `None` when not even the smallest fits.
pub fn choose(
    at: VirtAddr,
    bounds: Span,
    sizes: &[ByteSize],
    free: impl Fn(Span) -> bool,
) -> Option<Span> {
    gpusvm_sync::walk!("choose");
    let chunks = sizes.iter().map(|size| Span::chunk_of(at, *size));
    chunks
        .into_iter()
        .find(|chunk| bounds.covers(*chunk) && free(*chunk))
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

    /// Exhaustive: every fault, every bounds and every taken page in sixteen pages, with chunks of 8, 4, 2
    /// and 1 pages, against the definition.
    #[test]
    fn the_largest_chunk_that_fits_and_is_free() {
        let page = |p: u64| VirtAddr::new(p << 12);
        let sizes: [ByteSize; 4] = [8, 4, 2, 1].map(|pages| ByteSize::kib(4 * pages));
        for start in 0..16u64 {
            for end in start + 1..=16 {
                let bounds = Span::new(page(start), page(end)).unwrap();
                for at in start..end {
                    for taken in (0..16).filter(|taken| *taken != at) {
                        let taken = Span::page_of(page(taken));
                        let got = choose(page(at), bounds, &sizes, |chunk| !chunk.overlaps(taken));
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

    #[test]
    fn nothing_fits_outside_the_bounds() {
        let bounds = Span::page_of(VirtAddr::new(0x1000));
        assert_eq!(
            choose(VirtAddr::new(0x3000), bounds, &[PAGE_SIZE], |_| true),
            None
        );
    }
}
