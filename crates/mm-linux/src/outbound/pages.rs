//! Some of the pages of a span: as a set, and as the runs that they make.

use core::iter;
use gpusvm_types::{PAGES_PER_BLOCK, PageCount, Span};

/// Some of the pages of a span, by their place in it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PageSet([u64; PAGES_PER_BLOCK / 64]);

impl PageSet {
    pub(crate) fn insert(&mut self, pages: core::ops::Range<usize>) {
        pages.for_each(|i| self.0[i / 64] |= 1 << (i % 64));
    }

    pub(super) fn remove(&mut self, pages: core::ops::Range<usize>) {
        pages.for_each(|i| self.0[i / 64] &= !(1 << (i % 64)));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(|bits| *bits == 0)
    }

    pub(crate) fn contains(&self, i: usize) -> bool {
        self.0[i / 64] >> (i % 64) & 1 == 1
    }
}

/// Where the pages of `run` are among those of `span`.
pub(super) fn indices(span: Span, run: Span) -> core::ops::Range<usize> {
    let first = span.index_of(run.first_page());
    first..first + run.page_count().as_usize()
}

/// The longest pieces of `span` in which `is_in` holds for every page, by its place in the span.
pub(crate) fn runs(span: Span, is_in: impl Fn(usize) -> bool) -> impl Iterator<Item = Span> {
    let (first, len) = (span.first_page(), span.page_count().as_usize());
    let mut next = 0;
    iter::from_fn(move || {
        let start = (next..len).find(|i| is_in(*i))?;
        // Behind it: asked again, what others mark meanwhile may answer otherwise, and no run is empty.
        let end = (start + 1..len).find(|i| !is_in(*i)).unwrap_or(len);
        next = end;
        let count = PageCount::from_usize(end - start);
        Some(Span::of_pages(first + PageCount::from_usize(start), count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_types::VirtAddr;

    /// Story: whoever registered pages asked whether the first was unmapped, twice, and panicked where it was
    /// by then.
    #[test]
    fn what_is_marked_while_it_is_looked_at_makes_no_empty_run() {
        let span = Span::of_pages(VirtAddr::new(0x10_0000).page(), PageCount::new(2));
        let looks = core::cell::Cell::new(0);
        let only_first_look = |_| looks.replace(looks.get() + 1) == 0;
        let found: Vec<_> = runs(span, only_first_look).collect();
        assert_eq!(found, [Span::page_of(span.start())]);
    }

    #[test]
    fn runs_table() {
        let span = Span::of_pages(VirtAddr::new(0x10_0000).page(), PageCount::new(6));
        for (mask, want) in [
            ([0, 0, 0, 0, 0, 0], vec![]),
            ([1, 1, 1, 1, 1, 1], vec![(0, 6)]),
            ([1, 0, 1, 1, 0, 1], vec![(0, 1), (2, 2), (5, 1)]),
            ([0, 1, 1, 0, 0, 0], vec![(1, 2)]),
        ] {
            let found = runs(span, |i| mask[i] == 1);
            let found = found.map(|run| (span.index_of(run.first_page()), run.page_count().get()));
            assert_eq!(found.collect::<Vec<_>>(), want, "{mask:?}");
        }
    }
}
