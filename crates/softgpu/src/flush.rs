//! How a flush knows that no access to a span is in flight, though accesses pay no fence.
//!
//! ```text
//!   unit                                      flush(span), after zap(span)
//!   1  word = page, sequence number           a  stamp of the span's colours = a new one
//!      -- compiler fence only --              b  membarrier
//!   2  stamp of the page's colour             c  for each unit: word in span? wait until it differs
//!   3  TLB entry with that stamp, or walk
//!   4  load or store
//!   5  word = idle (release)
//! ```
//!
//! # Why this is enough
//!
//! `membarrier` makes every running thread of the process pass a full memory barrier between b's
//! begin and its end, and every other thread passes one when it is scheduled. Take that barrier, B,
//! of one unit, and one access of it to a page of the span.
//!
//! - **1 is before B.** The word is visible to c. Either the unit has passed 5, whose release makes
//!   its access happen before the flush returns, or c sees the word and waits for that.
//! - **1 is after B.** Then 2, 3 and 4 are too, and the unit sees a, and the zap before it: the stamp
//!   is new, no TLB entry has it that was filled before, and the walk finds what the zap left.
//!
//! There remains the TLB entry itself. A fill reads the stamp (2), *then* the entry (3), and stores
//! both. The zap stores the entry, *then* the stamp. A fill that read the old entry can therefore
//! only carry the old stamp: had it read the new stamp (acquire), it would have seen the zapped
//! entry (release). So an entry that outlives its page never matches again, because stamps are
//! taken from one counter and never come back. One membarrier suffices; no unit is interrupted in
//! software, and none has to acknowledge.
//!
//! Where `membarrier` is refused (some sandboxes), a unit passes a sequentially consistent fence
//! between 1 and 2, and the flush passes one at b: the same argument with that fence as B. Which of
//! the two it is, is decided once, when the device is built.
//!
//! # The word
//!
//! ```text
//!   63                     28 27        18 17              0
//!   [ first page             | page count | sequence number ]     zero: idle
//! ```
//!
//! The sequence number makes the wait finite: a unit that accesses the same page again and again
//! shows another word each time, and any change means that the access that was seen is over.
//!
//! # Colours
//!
//! Stamps are kept for 64 colours of each address space; the block number of a page says which is
//! its. A flush of few blocks spares the translations of all others.

use crate::counters::UnitCounters;
use gpusvm_sync::atomic::{AtomicU64, Ordering, compiler_fence, fence};
use gpusvm_types::{PAGE_SHIFT, PageIndex, Span};
use rustix::thread::{MembarrierCommand, membarrier};
use std::thread;
use std::time::Duration;

/// Colours of an address space.
const COLOURS: usize = 64;
const COUNT_SHIFT: u32 = 18;
const PAGE_SHIFT_IN_WORD: u32 = 28;
/// The most pages one access can claim.
pub(crate) const MOST_PAGES: u64 = (1 << (PAGE_SHIFT_IN_WORD - COUNT_SHIFT)) - 1;
/// No access is in flight.
pub(crate) const IDLE: u64 = 0;

/// How often a flush looks at a word before it gives the processor away.
const SPINS: u32 = 200;
/// How often it looks in all before it sleeps.
const LOOKS: u32 = SPINS + 100;
/// How long it sleeps: only for a unit that the kernel does not let run.
const NAP: Duration = Duration::from_micros(50);

/// The word for an access to `pages` pages from that of `at` on.
#[inline]
pub(crate) fn word(at: u64, pages: u64, sequence: u64) -> u64 {
    debug_assert!(0 < pages && pages <= MOST_PAGES);
    let sequence = sequence & ((1 << COUNT_SHIFT) - 1);
    (at >> PAGE_SHIFT) << PAGE_SHIFT_IN_WORD | pages << COUNT_SHIFT | sequence
}

/// Whether a word claims a page of `span`.
fn claims(word: u64, span: Span) -> bool {
    let first = word >> PAGE_SHIFT_IN_WORD;
    let count = (word >> COUNT_SHIFT) & MOST_PAGES;
    let start = span.first_page().get();
    first < start + span.page_count().get() && start < first + count
}

/// What one unit shows to the others.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct UnitShared {
    /// What it is accessing.
    pub(crate) in_flight: AtomicU64,
    /// What it has done.
    pub(crate) counters: UnitCounters,
}

/// All units as a flush sees them.
#[derive(Debug)]
pub(crate) struct Units {
    /// One for each.
    pub(crate) shared: Box<[UnitShared]>,
    /// Whether `membarrier` does the units' part of the ordering.
    pub(crate) asymmetric: bool,
    /// The process whose threads they are: in a child of fork nothing is in flight, whatever words say.
    owner: u32,
}

impl Units {
    /// `count` idle units. Registers the process for `membarrier` if it can be.
    pub(crate) fn new(count: usize) -> Self {
        let asymmetric = membarrier(MembarrierCommand::RegisterPrivateExpedited).is_ok();
        Self {
            shared: (0..count).map(|_| UnitShared::default()).collect(),
            asymmetric,
            owner: std::process::id(),
        }
    }

    /// Step 1 of an access, of the unit with this word.
    #[inline(always)]
    pub(crate) fn publish(asymmetric: bool, in_flight: &AtomicU64, word: u64) {
        in_flight.store(word, Ordering::Relaxed);
        if asymmetric {
            compiler_fence(Ordering::SeqCst)
        } else {
            fence(Ordering::SeqCst)
        }
    }

    /// Steps b and c: returns when no access to `span` that began before is in flight.
    pub(crate) fn quiesce(&self, span: Span) {
        if self.asymmetric {
            membarrier(MembarrierCommand::PrivateExpedited).expect("registered when built");
        } else {
            fence(Ordering::SeqCst);
        }
        for unit in &self.shared {
            let seen = unit.in_flight.load(Ordering::Acquire);
            if claims(seen, span) {
                wait_for_change(&unit.in_flight, seen, self.owner);
            }
        }
    }
}

/// An access takes nanoseconds, unless its unit was preempted in the middle of it.
#[cold]
fn wait_for_change(word: &AtomicU64, seen: u64, owner: u32) {
    for turn in 0u32.. {
        if word.load(Ordering::Acquire) != seen {
            return;
        }
        match turn {
            0..SPINS => core::hint::spin_loop(),
            SPINS..LOOKS => thread::yield_now(),
            _ if std::process::id() != owner => return,
            _ => thread::sleep(NAP),
        }
    }
}

/// Where stamps come from. One for the whole process: no two address spaces share one.
static STAMPS: AtomicU64 = AtomicU64::new(1);

/// The stamps of one address space.
#[derive(Debug)]
pub(crate) struct Stamps([AtomicU64; COLOURS]);

impl Stamps {
    /// Stamps that no TLB entry has.
    pub(crate) fn new() -> Self {
        let stamp = STAMPS.fetch_add(1, Ordering::Relaxed);
        Self([const { 0 }; COLOURS].map(|_: u64| AtomicU64::new(stamp)))
    }

    /// The stamp that a translation of the block must have now.
    #[inline(always)]
    pub(crate) fn of_block(&self, block: u64) -> u64 {
        self.0[colour(block)].load(Ordering::Acquire)
    }

    /// Outdates every translation of `span` that a TLB holds.
    pub(crate) fn renew(&self, span: Span) {
        let stamp = STAMPS.fetch_add(1, Ordering::Relaxed);
        let first = block_of(span.first_page());
        let last = block_of(span.end().page());
        let blocks = last - first + 1;
        for block in first..first + blocks.min(COLOURS as u64) {
            self.0[colour(block)].store(stamp, Ordering::Release);
        }
    }

    /// Outdates every translation.
    pub(crate) fn renew_all(&self) {
        let stamp = STAMPS.fetch_add(1, Ordering::Relaxed);
        self.0
            .iter()
            .for_each(|slot| slot.store(stamp, Ordering::Release));
    }
}

/// Neighbouring blocks have different colours; far ones are mixed in.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "six bits are left")]
fn colour(block: u64) -> usize {
    (block & (COLOURS as u64 - 1)) as usize
}

fn block_of(page: PageIndex) -> u64 {
    page.get() >> (gpusvm_types::BLOCK_SHIFT - PAGE_SHIFT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_types::PageCount;

    #[test]
    fn word_claims_exactly_its_pages() {
        let pages = |first, count| Span::of_pages(PageIndex::new(first), PageCount::new(count));
        for (first, count) in [(0, 1), (5, 1), (5, 16), (1 << 35, 511)] {
            let word = word(first << PAGE_SHIFT | 0x123, count, 77);
            assert!(claims(word, pages(first, 1)));
            assert!(claims(word, pages(first + count - 1, 4)));
            assert!(!claims(word, pages(first + count, 4)));
            assert!(first == 0 || !claims(word, pages(first - 1, 1)));
        }
        assert!(!claims(IDLE, pages(0, 10)));
    }

    #[test]
    fn renewal_spares_other_colours_and_never_repeats() {
        let stamps = Stamps::new();
        let before: Vec<u64> = (0..64).map(|block| stamps.of_block(block)).collect();
        stamps.renew(Span::of_pages(
            PageIndex::new(3 * 512 + 511),
            PageCount::new(2),
        ));
        for block in 0..64 {
            let same = stamps.of_block(block) == before[usize::try_from(block).unwrap()];
            assert_eq!(same, block != 3 && block != 4, "block {block}");
        }
        stamps.renew_all();
        assert!((0..64).all(|block| stamps.of_block(block) > before[0]));
    }
}
