//! An interval map: which pages have a value, apart from ranges.
//!
//! ```text
//!   1.  set    . . [ b b ) . .    nothing there           [ b b )
//!   2.  set    [ a a [ b ) a )    inside another          [ a a )[ b )[ a )
//!   3.  set    [ a ) [ b ) [ a )  becomes a               [ a a a )          one again
//!   4.  set    [ a [ b b ) c )    reaches into two        [ a )[ b b )[ c )
//!   5.  clear  [ a a (   ) a )    from the middle         [ a a )   [ a )
//! ```

use gpusvm_types::{Span, VirtAddr};
use std::collections::BTreeMap;

/// Pieces with a value, without overlap; neighbours differ.
#[derive(Clone, Debug)]
pub(crate) struct Tree<V> {
    /// By start: where it ends, and what it has.
    pieces: BTreeMap<VirtAddr, (VirtAddr, V)>,
}

impl<V> Default for Tree<V> {
    fn default() -> Self {
        let pieces = BTreeMap::new();
        Self { pieces }
    }
}

impl<V: Copy + PartialEq> Tree<V> {
    /// Gives every page of `span` the value that `change` makes of the one it had; `None` is none.
    pub(crate) fn update(&mut self, span: Span, change: impl Fn(Option<V>) -> Option<V>) {
        let before = self.pieces_and_gaps(span);
        self.cut(span.start());
        self.cut(span.end());
        let inside = self.pieces.range(span.start()..span.end());
        let starts: Vec<VirtAddr> = inside.map(|(start, _)| *start).collect();
        for start in starts {
            self.pieces.remove(&start);
        }
        for (piece, value) in before {
            if let Some(value) = change(value) {
                self.pieces.insert(piece.start(), (piece.end(), value));
                self.join(piece.start());
            }
        }
        self.join(span.end());
    }

    /// No page of `span` has a value any more.
    pub(crate) fn clear(&mut self, span: Span) {
        self.update(span, |_| None);
    }

    /// What the pages of `span` have, in pieces, with the gaps between them. Ascending.
    pub(crate) fn pieces_and_gaps(&self, span: Span) -> Vec<(Span, Option<V>)> {
        let mut all = Vec::new();
        let mut from = span.start();
        for (piece, value) in self.pieces_in(span) {
            all.extend(Span::new(from, piece.start()).map(|gap| (gap, None)));
            all.push((piece, Some(value)));
            from = piece.end();
        }
        all.extend(Span::new(from, span.end()).map(|gap| (gap, None)));
        all
    }

    /// The pieces with a value that overlap `span`, cut to it. Ascending.
    pub(crate) fn pieces_in(&self, span: Span) -> impl Iterator<Item = (Span, V)> + '_ {
        // Pieces do not overlap, so at most one that begins below reaches in.
        let below = self.pieces.range(..span.start()).next_back();
        let inside = self.pieces.range(span.start()..span.end());
        below
            .into_iter()
            .chain(inside)
            .filter_map(move |(start, (end, value))| {
                let piece = Span::new(*start, *end).ok()?;
                Some((piece.intersection(span)?, *value))
            })
    }

    /// What the page at `at` has.
    pub(crate) fn at(&self, at: VirtAddr) -> Option<V> {
        let (_, (end, value)) = self.pieces.range(..=at).next_back()?;
        (at < *end).then_some(*value)
    }

    /// All pieces. Ascending.
    pub(crate) fn all(&self) -> impl Iterator<Item = (Span, V)> + '_ {
        let piece = |(start, (end, value)): (&VirtAddr, &(VirtAddr, V))| {
            Some((Span::new(*start, *end).ok()?, *value))
        };
        self.pieces.iter().filter_map(piece)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// No piece has `at` inside any more, but at an end.
    fn cut(&mut self, at: VirtAddr) {
        let Some((_, piece)) = self.pieces.range_mut(..at).next_back() else {
            return;
        };
        let (end, value) = *piece;
        if end > at {
            piece.0 = at;
            self.pieces.insert(at, (end, value));
        }
    }

    /// The piece that begins at `at` becomes one with the one below, if they are equal.
    fn join(&mut self, at: VirtAddr) {
        let Some(&(end, value)) = self.pieces.get(&at) else {
            return;
        };
        if let Some((_, below)) = self.pieces.range_mut(..at).next_back()
            && *below == (at, value)
        {
            below.0 = end;
            self.pieces.remove(&at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: u64 = 8;

    fn at(page: u64) -> VirtAddr {
        VirtAddr::new(page << 12)
    }

    fn span(first: u64, end: u64) -> Span {
        Span::new(at(first), at(end)).unwrap()
    }

    /// The value of each page, `.` for none.
    fn drawn(tree: &Tree<char>) -> String {
        (0..PAGES)
            .map(|page| tree.at(at(page)).unwrap_or('.'))
            .collect()
    }

    /// A tree that looks so.
    fn tree_of(drawing: &str) -> Tree<char> {
        let mut tree = Tree::default();
        for (page, value) in (0..).zip(drawing.chars()) {
            let value = (value != '.').then_some(value);
            tree.update(span(page, page + 1), |_| value);
        }
        tree
    }

    /// Neighbours differ, nothing overlaps, and what is found in pieces is what pages have.
    fn check(tree: &Tree<char>, whole: Span) {
        let pieces: Vec<_> = tree.all().collect();
        for pair in pieces.windows(2) {
            let ((below, one), (above, other)) = (pair[0], pair[1]);
            assert!(below.end() <= above.start(), "{pieces:?}");
            assert!(below.end() < above.start() || one != other, "{pieces:?}");
        }
        let mut from = whole.start();
        for (piece, value) in tree.pieces_and_gaps(whole) {
            assert_eq!(piece.start(), from);
            assert!(piece.pages().all(|page| tree.at(page.start()) == value));
            from = piece.end();
        }
        assert_eq!(from, whole.end());
    }

    /// The drawings of this module.
    #[test]
    fn drawings() {
        for (number, before, (first, end), value, after, pieces) in [
            (1, "........", (2, 4), Some('b'), "..bb....", 1),
            (2, "aaaa....", (2, 3), Some('b'), "aaba....", 3),
            (3, "a.ba....", (1, 3), Some('a'), "aaaa....", 1),
            (4, "aacc....", (1, 3), Some('b'), "abbc....", 3),
            (5, "aaaa....", (2, 3), None, "aa.a....", 2),
        ] {
            let mut tree = tree_of(before);
            tree.update(span(first, end), |_| value);
            assert_eq!(drawn(&tree), after, "drawing {number}");
            assert_eq!(tree.all().count(), pieces, "drawing {number}");
            check(&tree, span(0, PAGES));
        }
    }

    /// Every map of five pages with two values, every span, and each change: against the definition.
    #[test]
    fn every_small_map() {
        const SMALL: u32 = 5;
        let values = ['.', 'a', 'b'];
        for number in 0..3usize.pow(SMALL) {
            let digit = |page| values[number / 3usize.pow(page) % 3];
            let before: Vec<char> = (0..SMALL).map(digit).collect();
            for first in 0..u64::from(SMALL) {
                for end in first + 1..=u64::from(SMALL) {
                    for value in [None, Some('a'), Some('b')] {
                        let mut tree = tree_of(&before.iter().collect::<String>());
                        tree.update(span(first, end), |_| value);
                        for (page, old) in (0..).zip(&before) {
                            let is_in = (first..end).contains(&page);
                            let wanted = if is_in {
                                value
                            } else {
                                Some(*old).filter(|v| *v != '.')
                            };
                            assert_eq!(tree.at(at(page)), wanted, "{before:?} {first}..{end}");
                        }
                        check(&tree, span(0, PAGES));
                    }
                }
            }
        }
    }

    /// Changes that depend on what was there, on many pages, against an array.
    #[test]
    fn random_changes_against_an_array() {
        const MANY: u64 = 200;
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let next = |old: Option<char>| match old {
            None => Some('a'),
            Some('a') => Some('b'),
            Some(_) => None,
        };
        let mut tree = Tree::default();
        let mut flat = vec![None; usize::try_from(MANY).unwrap()];
        for _ in 0..4_000 {
            let first = random(MANY);
            let end = first + 1 + random(MANY - first);
            let value = ['a', 'b', 'c'][usize::try_from(random(3)).unwrap()];
            let change = |old: Option<char>| match value {
                'c' => next(old),
                value => Some(value),
            };
            tree.update(span(first, end), change);
            for page in first..end {
                let place = &mut flat[usize::try_from(page).unwrap()];
                *place = change(*place);
            }
            let hole = random(MANY);
            tree.clear(span(hole, hole + 1));
            flat[usize::try_from(hole).unwrap()] = None;
            let found: Vec<_> = (0..MANY).map(|page| tree.at(at(page))).collect();
            assert_eq!(found, flat);
            check(&tree, span(0, MANY));
        }
        assert!(!tree.is_empty());
        tree.clear(span(0, MANY));
        assert!(tree.is_empty());
    }
}
