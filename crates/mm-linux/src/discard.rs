//! Dropping pages that live elsewhere now, and telling the removals that the kernel reports then from the
//! program's.
//!
//! ```text
//!   we drop        [................)   told of; the kernel goes on when that is read
//!   somebody cuts         |....|        mprotect of a part, and maybe back again
//!   the kernel     [......)             drops up to the cut, and tells of the next piece before it goes on
//!                         [....)        and of the next: nothing says that these are ours
//! ```
//!
//! The program may drop the same pages at the same time, and what devices have of them goes with them. Taken
//! for each other, either way, data is lost or comes back. But the kernel goes from the front: when it tells of
//! a piece once more, all before that piece is gone, and its first page is still there, and will be until the
//! message is read. So as long as something is being dropped, messages are read one by one, with a look at
//! the page table before each. Dropping is done by one thread at a time.
//!
//! # What this does not tell
//!
//! The kernel can pause half way through a piece; a removal of the program's that begins exactly there, in
//! that moment, is taken for ours. So it is if the message that was there for the look has gone by the time of the
//! read, because its thread was woken or killed: then the look is older than the message. And where ours
//! fails before it is told of, because the program moved the memory away, a removal of the same pages was
//! taken for it.
//!
//! # Locking
//!
//! `turn` is held while pages are dropped, with a block locked. `now` is a leaf, which the reader of messages
//! takes too, for as long as it looks at the page table: so who maps or unmaps can hold it up.

use crate::outbound::PageSet;
use crate::process::Process;
use crate::region::Behind;
use crate::sys::pagemap::{Categories, PageMap, Region as PageRegion};
use gpusvm_sync::Mutex;
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_types::{PAGES_PER_BLOCK, PageIndex, Span};

/// What is being dropped.
#[derive(Debug)]
pub(crate) struct Discards {
    /// Whether the kernel tells again of what is behind a cut: since Linux 6.17. Before, it leaves it.
    tells_again: bool,
    turn: Mutex<()>,
    is_on: AtomicBool,
    now: Mutex<Option<Discard>>,
}

impl Discards {
    /// Nothing yet. `tells_again`: whether the kernel tells once more of what is behind a cut.
    pub(crate) fn new(tells_again: bool) -> Self {
        Self {
            tells_again,
            turn: Mutex::new(()),
            is_on: AtomicBool::new(false),
            now: Mutex::new(None),
        }
    }
}

/// Pages of a block that are being dropped.
#[derive(Debug)]
struct Discard {
    span: Span,
    behind: Behind,
    /// Whether the kernel tells of a part of them again.
    tells_again: bool,
    /// Those that were not told of yet.
    expected: PageSet,
    /// Where that began which told of a page last: told of again, it is part of a piece that begins behind.
    told_from: [u16; PAGES_PER_BLOCK],
    /// Those that were there before.
    before: PageSet,
    /// Those that were there before the message that was read last, and that was there already.
    there: PageSet,
}

/// Which pages of a removal are dropped by us.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ours {
    span: Span,
    pages: PageSet,
}

impl Ours {
    /// Whether this one is.
    pub(crate) fn contains(&self, page: PageIndex) -> bool {
        self.span.contains(page.start()) && self.pages.contains(self.span.index_of(page))
    }
}

impl Process {
    /// Drops what is left here of pages that live elsewhere now, with their block locked. `false` when some of
    /// it may be there still, because the program changed mappings of it meanwhile.
    pub(crate) fn discard(&self, run: Span, behind: Behind) -> bool {
        let _turn = self.discards.turn.lock();
        let before = self.there(run, behind);
        *self.discards.now.lock() = Some(Discard {
            span: run,
            behind,
            tells_again: self.discards.tells_again,
            expected: PageSet::first(run.page_count().as_usize()),
            told_from: [0; PAGES_PER_BLOCK],
            before,
            there: before,
        });
        self.discards.is_on.store(true, Ordering::Release);
        // Whoever reads several messages at once is done.
        self.source.fence();
        let is_dropped = self.mover.discard(run);
        // What was told of is known, of ours all of it.
        self.source.fence();
        *self.discards.now.lock() = None;
        self.discards.is_on.store(false, Ordering::Release);
        // What was behind a cut may be neither told of nor dropped.
        is_dropped && self.there(run, behind).is_empty()
    }

    /// Whether messages are to be read one by one, with a look before each.
    pub(crate) fn is_discarding(&self) -> bool {
        self.discards.is_on.load(Ordering::Acquire)
    }

    /// Looks at what is being dropped. A message is there, and nobody has read it.
    pub(crate) fn look_at_discard(&self) {
        if let Some(discard) = self.discards.now.lock().as_mut() {
            discard.there = self.there(discard.span, discard.behind);
        }
    }

    /// Which pages of `part`, which is what one mirrored mapping has of a removal that was just told of, are
    /// ours.
    pub(crate) fn whose(
        &self,
        told: Span,
        part: Span,
        is_given_up: impl Fn(PageIndex) -> bool,
    ) -> Option<Ours> {
        let mut now = self.discards.now.lock();
        now.as_mut()?.hear(told, part, is_given_up)
    }

    /// The pages of a span that the kernel has. None, where it does not tell.
    fn there(&self, span: Span, behind: Behind) -> PageSet {
        there(&self.pages, span, behind)
    }
}

fn there(pages: &PageMap, span: Span, behind: Behind) -> PageSet {
    let (mut set, mut rest) = (PageSet::default(), Some(span));
    let mut found = [PageRegion::EMPTY; 64];
    while let Some(left) = rest {
        let Ok(scanned) = pages.scan(left, &mut found) else {
            return PageSet::default();
        };
        for region in &found[..scanned.regions] {
            let piece = Span::new(region.start, region.end).ok();
            let Some(piece) = piece.and_then(|piece| piece.intersection(span)) else {
                continue;
            };
            // Of a file, a mark of protection stays behind, which is no page; what is not present can be one.
            let all_are =
                behind == Behind::Zeroes || region.categories.contains(Categories::PRESENT);
            for page in piece.pages() {
                if all_are || !pages.is_marker(Span::page_of(page.start())) {
                    let i = span.index_of(page);
                    set.insert(i..i + 1);
                }
            }
        }
        rest = Span::new(scanned.until, span.end()).ok();
    }
    set
}

impl Discard {
    /// Which pages of `told` are ours: those that were expected, once, or all of them if the kernel tells of a
    /// piece behind a cut. Should the program drop the same pages, the two removals are as good as
    /// each other: the second counts.
    fn hear(
        &mut self,
        told: Span,
        part: Span,
        is_given_up: impl Fn(PageIndex) -> bool,
    ) -> Option<Ours> {
        let part = part.intersection(self.span)?;
        let first = self.span.index_of(part.first_page());
        let range = first..first + part.page_count().as_usize();
        let mut pages = PageSet::default();
        for i in range.clone().filter(|i| self.expected.contains(*i)) {
            pages.insert(i..i + 1);
        }
        if !pages.is_empty() {
            self.expected.remove(range.clone());
        } else if part == told && self.is_behind_a_cut(&range, is_given_up) {
            pages.insert(range.clone());
        }
        for i in range.clone().filter(|i| pages.contains(*i)) {
            self.told_from[i] = u16::try_from(range.start).expect("a page of a block");
        }
        Some(Ours {
            span: self.span,
            pages,
        })
    }

    /// Whether the kernel has dropped all before these pages, and is about to drop them.
    fn is_behind_a_cut(
        &self,
        told: &core::ops::Range<usize>,
        is_given_up: impl Fn(PageIndex) -> bool,
    ) -> bool {
        let page = |i: &usize| self.span.first_page() + gpusvm_types::PageCount::from_usize(*i);
        // What the program dropped or unmapped says nothing.
        let was_there = |i: &usize| self.before.contains(*i) && !is_given_up(page(i));
        let mut gone = (0..told.start).filter(was_there);
        let next = told.clone().find(was_there);
        self.tells_again
            && usize::from(self.told_from[told.start]) < told.start
            && gone.all(|i| !self.there.contains(i))
            && next.is_none_or(|i| self.there.contains(i))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_types::{PageCount, VirtAddr};

    fn pages(first: u64, count: u64) -> Span {
        let first = VirtAddr::new(0x10_0000).page() + PageCount::new(first);
        Span::of_pages(first, PageCount::new(count))
    }

    /// Eight pages, of which some were there, and some still are.
    fn discard(before: &[usize], there: &[usize]) -> Discard {
        let set = |pages: &[usize]| {
            let mut set = PageSet::default();
            pages.iter().for_each(|i| set.insert(*i..*i + 1));
            set
        };
        Discard {
            span: pages(0, 8),
            behind: Behind::Zeroes,
            tells_again: true,
            expected: PageSet::first(8),
            told_from: [0; PAGES_PER_BLOCK],
            before: set(before),
            there: set(there),
        }
    }

    /// How many of the pages that are told of are ours.
    fn ours(discard: &mut Discard, told: Span) -> usize {
        let heard = discard.hear(told, told, |_| false);
        let is_ours = |page: &PageIndex| heard.is_some_and(|ours| ours.contains(*page));
        told.pages().filter(is_ours).count()
    }

    #[test]
    fn a_removal_is_expected_once() {
        let all: Vec<usize> = (0..8).collect();
        let mut now = discard(&all, &all);
        assert_eq!(ours(&mut now, pages(20, 4)), 0, "elsewhere");
        assert_eq!(
            ours(&mut now, pages(6, 4)),
            2,
            "what reaches beyond is the program's there"
        );
        assert_eq!(
            ours(&mut now, pages(0, 8)),
            6,
            "and those are as good as ours"
        );
        assert_eq!(ours(&mut now, pages(0, 8)), 0, "the program's");
    }

    /// Told of all, the kernel tells of a part once more; or the program drops that part.
    #[test]
    fn what_is_told_again_is_behind_what_is_gone() {
        let all: Vec<usize> = (0..8).collect();
        for (before, there, told, is_ours, what) in [
            (
                &all[..],
                &all[..],
                pages(3, 5),
                false,
                "nothing is gone yet",
            ),
            (&all, &all[3..], pages(3, 5), true, "behind the cut"),
            (&all, &all[3..], pages(3, 2), true, "between two cuts"),
            (
                &all,
                &all[3..],
                pages(2, 6),
                false,
                "its first page is gone",
            ),
            (
                &all,
                &all[3..],
                pages(4, 4),
                false,
                "a page before it is there",
            ),
            (&all, &[], pages(3, 5), false, "all is gone"),
            (&all, &all[3..], pages(3, 6), false, "more than ours"),
            (&all, &all[3..], pages(0, 8), false, "from the beginning"),
            (&[0, 1, 5], &[5], pages(3, 5), true, "holes say nothing"),
            (
                &[0, 1],
                &[],
                pages(3, 5),
                true,
                "nothing was there to be dropped",
            ),
            (
                &[0, 1],
                &[1],
                pages(3, 5),
                false,
                "but before it is something",
            ),
        ] {
            let mut now = discard(before, there);
            assert_eq!(ours(&mut now, pages(0, 8)), 8);
            let wanted = if is_ours {
                told.page_count().as_usize()
            } else {
                0
            };
            assert_eq!(ours(&mut now, told), wanted, "{what}");
        }
    }

    /// The kernel waits for one message at a time, and goes on behind it.
    #[test]
    fn a_piece_is_told_again_once() {
        let all: Vec<usize> = (0..8).collect();
        let mut now = discard(&all, &all[3..]);
        assert_eq!(ours(&mut now, pages(0, 8)), 8);
        assert_eq!(ours(&mut now, pages(3, 5)), 5);
        assert_eq!(ours(&mut now, pages(3, 5)), 0, "the program's");
        now.there = PageSet::default();
        now.there.insert(6..8);
        assert_eq!(ours(&mut now, pages(6, 2)), 2, "cut once more");
    }

    /// The mapping was cut before, and the program drops what is behind the cut just before we do.
    #[test]
    fn what_the_program_dropped_first_is_not_told_again() {
        let all: Vec<usize> = (0..8).collect();
        let mut now = discard(&all, &all);
        assert_eq!(ours(&mut now, pages(3, 5)), 5, "as good as ours");
        assert_eq!(ours(&mut now, pages(0, 3)), 3);
        now.there = PageSet::default();
        now.there.insert(3..8);
        assert_eq!(ours(&mut now, pages(3, 5)), 0, "as good as the program's");
    }

    #[test]
    fn what_the_program_gave_up_is_no_evidence() {
        let all: Vec<usize> = (0..8).collect();
        let mut now = discard(&all, &all[4..]);
        assert_eq!(ours(&mut now, pages(0, 8)), 8);
        let third = pages(3, 1).first_page();
        let heard = now
            .hear(pages(3, 5), pages(3, 5), |page| page == third)
            .unwrap();
        assert!(
            heard.contains(third),
            "its first page was dropped by the program"
        );
    }
}
