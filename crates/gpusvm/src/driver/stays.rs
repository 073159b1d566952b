//! Pages that stay where they are, because a launch declared them and its device cannot fault.
//!
//! ```text
//!   launch      stay: entered ---> moves of before are over ---> mapped? ......... dropped
//!   migration            begin_move: refused as long as the launch runs ---------> moves
//! ```
//!
//! Pages in device memory are kept there by a lease on what they live in. Pages of RAM live in nothing
//! that could be leased; but all that takes them to a device is a migration, and all migrations of an
//! address space go through its devices. So who needs them enters their span here, and a migration of
//! any page in it is refused.
//!
//! A migration is announced for as long as it takes. So whoever declares pages waits for those that
//! were let through before, and from then on none is under way: what it finds mapped stays mapped,
//! whatever other devices and prefetches want. What the program does to its memory is not held up.
//!
//! # Locking
//!
//! The lock is held for one operation. A wait for a move comes after the serving of a range, and before
//! everything that a migration takes; a migration does not wait for who stays, it is refused.

use gpusvm_sync::{Arc, Condvar, Mutex};
use gpusvm_types::{Span, VirtAddr};
use std::collections::BTreeMap;

/// The spans of an address space that stay, and those that move.
#[derive(Debug, Default)]
pub(crate) struct Stays {
    spans: Mutex<Spans>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct Spans {
    /// By start and end: how many launches need it. Each is in one block.
    staying: BTreeMap<(VirtAddr, VirtAddr), u32>,
    /// One for each thread that migrates at most.
    moving: Vec<Span>,
}

/// Keeps a span where it is until it is dropped.
#[derive(Debug)]
pub(crate) struct Stay {
    stays: Arc<Stays>,
    span: Span,
}

/// A migration of a span, under way until it is dropped.
#[derive(Debug)]
pub(crate) struct Moving<'a> {
    stays: &'a Stays,
    span: Span,
}

impl Spans {
    fn is_staying(&self, span: Span) -> bool {
        // What reaches into the span begins in the same block.
        let first = (Span::block_of(span.start()).start(), VirtAddr::new(0));
        let behind = (span.end(), VirtAddr::new(0));
        let mut before_its_end = self.staying.range(first..behind);
        before_its_end.any(|((_, end), _)| *end > span.start())
    }

    fn is_moving(&self, span: Span) -> bool {
        self.moving.iter().any(|moving| moving.overlaps(span))
    }
}

impl Stays {
    /// Keeps `span`, which is in one block, where it is from now on. Returns when no migration of it is
    /// under way.
    pub(crate) fn stay(self: &Arc<Self>, span: Span) -> Stay {
        let mut spans = self.spans.lock();
        *spans.staying.entry(key(span)).or_insert(0) += 1;
        while spans.is_moving(span) {
            spans = self.moved.wait(spans);
        }
        drop(spans);
        let stays = Arc::clone(self);
        Stay { stays, span }
    }

    /// Whether a page of `span`, which is in one block, has to stay now.
    pub(crate) fn is_staying(&self, span: Span) -> bool {
        self.spans.lock().is_staying(span)
    }

    /// Begins a migration of `span`, which is in one block. `None` when a page of it has to stay.
    pub(crate) fn begin_move(&self, span: Span) -> Option<Moving<'_>> {
        let mut spans = self.spans.lock();
        if spans.is_staying(span) {
            return None;
        }
        spans.moving.push(span);
        Some(Moving { stays: self, span })
    }
}

impl Drop for Stay {
    fn drop(&mut self) {
        let mut spans = self.stays.spans.lock();
        if let Some(launches) = spans.staying.get_mut(&key(self.span)) {
            *launches -= 1;
            if *launches == 0 {
                spans.staying.remove(&key(self.span));
            }
        }
    }
}

impl Drop for Moving<'_> {
    fn drop(&mut self) {
        let mut spans = self.stays.spans.lock();
        if let Some(place) = spans.moving.iter().position(|span| *span == self.span) {
            spans.moving.swap_remove(place);
        }
        drop(spans);
        self.stays.moved.notify_all();
    }
}

fn key(span: Span) -> (VirtAddr, VirtAddr) {
    (span.start(), span.end())
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_types::PageCount;

    fn pages(first: u64, count: u64) -> Span {
        let block = VirtAddr::new(0x4000_0000).page();
        Span::of_pages(block + PageCount::new(first), PageCount::new(count))
    }

    #[test]
    fn what_overlaps_a_span_that_stays_does_not_move() {
        let stays = Arc::new(Stays::default());
        let stay = stays.stay(pages(16, 16));
        for (first, count, moves) in [
            (0, 512, false),
            (0, 16, true),
            (0, 17, false),
            (16, 1, false),
            (31, 1, false),
            (20, 4, false),
            (32, 16, true),
        ] {
            let moving = stays.begin_move(pages(first, count));
            assert_eq!(moving.is_some(), moves, "{count} pages from {first}");
            assert_eq!(stays.is_staying(pages(first, count)), !moves);
        }
        drop(stay);
        assert!(stays.begin_move(pages(0, 512)).is_some());
    }

    #[test]
    fn a_span_stays_as_long_as_anybody_needs_it() {
        let stays = Arc::new(Stays::default());
        let (one, other, small) = (
            stays.stay(pages(0, 512)),
            stays.stay(pages(0, 512)),
            stays.stay(pages(100, 1)),
        );
        drop(one);
        assert!(stays.is_staying(pages(0, 1)));
        drop(other);
        assert!(!stays.is_staying(pages(0, 1)));
        assert!(stays.is_staying(pages(0, 512)));
        drop(small);
        assert!(!stays.is_staying(pages(0, 512)));
    }

    #[test]
    fn who_stays_waits_for_moves_of_before() {
        let stays = Arc::new(Stays::default());
        let moving = stays.begin_move(pages(0, 512)).expect("nobody stays");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| drop(stays.stay(pages(3, 1))));
            while !stays.is_staying(pages(3, 1)) {
                std::thread::yield_now();
            }
            assert!(!thread.is_finished(), "pages are moving");
            assert!(stays.begin_move(pages(0, 512)).is_none(), "no more of them");
            drop(moving);
        });
        assert!(!stays.is_staying(pages(3, 1)));
    }
}
