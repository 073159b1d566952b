//! The ends of mappings that were not read yet.
//!
//! A mapping whose messages we get ends in one of two ways, each of which is told, once, for every page:
//! `Unmap`, or `Remap` and then `Unmap` of the old place. (Where two descriptors hear of it, one of a part
//! and one of another, `Unmap` is told by both, of all of it.) But a message is queued after the kernel let go
//! of the address space, so that another thread can take the place, and tell of it, before:
//!
//! ```text
//!   thread A   mremap(X -> Y)  ......................... Remap(X -> Y) ....................... Unmap(X)
//!   thread B            mremap(Z -> X) .... Remap(Z -> X) ....... Unmap(Z)
//!
//!   read                                    Remap(Z -> X)   Remap(X -> Y)    Unmap(Z)   Unmap(X)
//!   done       Remap(X -> Y)  Unmap(X)  Remap(Z -> X)  Unmap(Z)
//! ```
//!
//! So an arrival waits until its place is free: until every end of what was there before has been read.
//! Those are written down here, the oldest first, and an end that is read is that of the oldest mapping
//! that it can be of: it is done before the arrival that waits for it.
//!
//! - A remap owes the unmap of its old place.
//! - An arrival at a place with a mapping that has not ended is owed the end of it.
//!
//! A remap with `MREMAP_DONTUNMAP` owes none: the old mapping stays. Nor does one end that nobody listened
//! to. But the kernel counts the messages that are not read yet: once it is seen to count none, none is
//! owed (`Ends::forgive`).

use gpusvm_types::Span;

/// How many ends can be owed. Of more, the oldest are forgotten.
const ENDS: usize = 128;

/// An end that was not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct End {
    span: Span,
    /// Arrivals from this one on wait for it.
    before: u64,
    /// The remap of it was read, the unmap was not.
    moved: bool,
}

/// The ends that were not read yet. Of a fixed size: the reader allocates nothing.
#[derive(Debug)]
pub(super) struct Ends {
    ends: [Option<End>; ENDS],
    len: usize,
    last: u64,
}

impl Ends {
    pub(super) const fn new() -> Self {
        Self {
            ends: [None; ENDS],
            len: 0,
            last: 0,
        }
    }

    /// The number of a remap that was just read.
    pub(super) fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// That of the last one.
    pub(super) const fn last(&self) -> u64 {
        self.last
    }

    /// What was in `span` when remap `number` brought something else there has not ended.
    pub(super) fn owe(&mut self, span: Span, number: u64) {
        self.push(End {
            span,
            before: number,
            moved: false,
        });
    }

    /// Remap `number` took what is in `from` away: its unmap is owed. If that was of a mapping which
    /// something took the place of before, says for which arrival it makes room.
    pub(super) fn depart(&mut self, from: Span, number: u64) -> Option<u64> {
        let of_older = |end: &End| !end.moved && end.span.overlaps(from);
        let older = self.take(from, of_older);
        let (span, before) = older.unwrap_or((from, number));
        self.push(End {
            span,
            before,
            moved: true,
        });
        older.map(|(_, before)| before)
    }

    /// An unmap of `span` was read. What of it was owed, and for which arrival it makes room.
    pub(super) fn pay(&mut self, span: Span) -> Option<(Span, u64)> {
        self.take(span, |end| end.span.overlaps(span))
    }

    /// Whether arrival `number` at `to` has to wait.
    pub(super) fn holds(&self, to: Span, number: u64) -> bool {
        let mut ends = self.iter();
        ends.any(|end| end.before <= number && end.span.overlaps(to))
    }

    /// Whether an end is owed in `span`.
    pub(super) fn is_owed(&self, span: Span) -> bool {
        self.iter().any(|end| end.span.overlaps(span))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Nothing is owed any more: all that the kernel had to say was read.
    pub(super) fn forgive(&mut self) {
        self.len = 0;
    }

    /// What arrival `number` at `to` waits for is not owed any more: it has waited for long enough.
    pub(super) fn forgive_before(&mut self, to: Span, number: u64) {
        let holds = |end: &End| end.before <= number && end.span.overlaps(to);
        while self.take(to, holds).is_some() {}
    }

    /// Takes what `span` has of the oldest end that `is_it`.
    fn take(&mut self, span: Span, is_it: impl Fn(&End) -> bool) -> Option<(Span, u64)> {
        let at = self.iter().position(|end| is_it(&end))?;
        let end = self.ends[at]?;
        let taken = end.span.intersection(span)?;
        let [below, above] = end.span.without(taken).map(|rest| {
            let span = rest?;
            Some(End { span, ..end })
        });
        match below.or(above) {
            rest @ Some(_) => self.ends[at] = rest,
            None => self.remove(at),
        }
        if let (Some(_), Some(above)) = (below, above) {
            self.insert(at + 1, above);
        }
        Some((taken, end.before))
    }

    fn push(&mut self, end: End) {
        // Those of a place that had to end before the same arrival come before the later ones.
        let at = self.iter().position(|other| other.before > end.before);
        self.insert(at.unwrap_or(self.len), end);
    }

    fn insert(&mut self, at: usize, end: End) {
        let at = if self.len == ENDS {
            self.remove(0);
            at.saturating_sub(1)
        } else {
            at
        };
        self.ends.copy_within(at..self.len, at + 1);
        self.ends[at] = Some(end);
        self.len += 1;
    }

    fn remove(&mut self, at: usize) {
        self.ends.copy_within(at + 1..self.len, at);
        self.len -= 1;
    }

    fn iter(&self) -> impl Iterator<Item = End> + '_ {
        self.ends[..self.len].iter().copied().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_types::VirtAddr;

    fn span(first: u64, end: u64) -> Span {
        Span::new(VirtAddr::new(first << 12), VirtAddr::new(end << 12)).unwrap()
    }

    #[test]
    fn an_unmap_is_that_of_the_oldest_mapping_that_it_can_be_of() {
        let mut ends = Ends::new();
        let first = ends.number();
        assert_eq!(ends.depart(span(0, 8), first), None);
        let second = ends.number();
        assert!(ends.holds(span(4, 12), second) && !ends.holds(span(8, 12), second));
        assert_eq!(ends.pay(span(2, 4)), Some((span(2, 4), first)));
        assert_eq!(ends.pay(span(2, 4)), None, "paid once");
        assert_eq!(ends.pay(span(0, 6)), Some((span(0, 2), first)));
        assert_eq!(ends.pay(span(0, 6)), Some((span(4, 6), first)));
        assert_eq!(ends.pay(span(0, 9)), Some((span(6, 8), first)));
        assert!(!ends.holds(span(4, 12), second) && ends.is_empty());
    }

    #[test]
    fn a_remap_that_is_read_late_makes_room_for_the_arrival_and_still_owes_its_unmap() {
        let mut ends = Ends::new();
        let arrival = ends.number();
        ends.owe(span(0, 8), arrival);
        let late = ends.number();
        assert_eq!(ends.depart(span(0, 8), late), Some(arrival));
        assert!(ends.holds(span(0, 8), arrival));
        // What arrived is moved on: that is the newer mapping's.
        let next = ends.number();
        assert_eq!(ends.depart(span(0, 8), next), None);
        assert_eq!(ends.pay(span(0, 8)), Some((span(0, 8), arrival)));
        assert!(!ends.holds(span(0, 8), arrival));
        assert_eq!(ends.pay(span(0, 8)), Some((span(0, 8), next)));
    }

    #[test]
    fn more_than_there_is_room_for_and_what_never_comes_are_forgotten() {
        let mut ends = Ends::new();
        for page in 0..=ENDS as u64 {
            let number = ends.number();
            ends.depart(span(page, page + 1), number);
        }
        assert!(!ends.is_owed(span(0, 1)) && ends.is_owed(span(1, 2)));
        assert!(ends.is_owed(span(ENDS as u64, ENDS as u64 + 1)));
        ends.forgive();
        assert!(ends.is_empty() && !ends.is_owed(span(0, 1000)));
    }
}
