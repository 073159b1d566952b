//! Ending a registration, of the mapping that it was for and of no other.
//!
//! ```text
//!   thread A   mremap(X -> Y) ...
//!   thread B                   mremap(Z -> X) ......... B's pages are on a device: X must stay registered
//!   we                                         X ends
//! ```
//!
//! A registration belongs to a mapping, and goes with it; but it is ended by address, and the address can
//! be another mapping's by then, unheard of or heard of but not done. What that one has on a device would
//! be read as zeroes. So:
//!
//! - Where an arrival was read, nothing is ended. It is not done before the block of what was there before
//!   is unlocked, and we have it locked.
//! - Where something happened to mappings that was not read, nothing is ended.
//! - Where that is so by the time that the registration has ended, it begins again, before anything is
//!   read: whoever moved something there waits for that.
//!
//! Nothing is registered in excess where it can be helped: it would tell of an end that nobody waits for,
//! or that is taken for another ([`crate::events`]).

use crate::block::BlockGuard;
use crate::outbound::runs;
use gpusvm_types::Span;
use rustix::io::Errno;
use std::time::Duration;

/// What is heard of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Listening {
    /// Touches of missing pages, and the end of it.
    ToTouches,
    /// The end of it.
    ToItsEnd,
}

/// How often to try, where mappings change all the time.
const TRIES: u32 = 64;
/// How many of the tries only yield.
const YIELDS: u32 = 16;
const NAP: Duration = Duration::from_micros(50);

impl BlockGuard<'_> {
    /// Hears no more of touches of `part`. `false` when its mapping has moved, and it is not known yet
    /// whether an empty one is left behind, or the new place, which is registered, is not known yet; or as
    /// `let_go`.
    pub(crate) fn let_go_of_what_is_left(&self, part: Span) -> bool {
        let events = &self.process.events;
        let may_have_moved = || events.is_owed(part) || events.is_departing(part);
        if may_have_moved() {
            return false;
        }
        let words = self.region.words_in(part);
        // What was unmapped has no registration any more.
        let mut left = runs(part, |i| !words[i].get().unmapped);
        // What moved before a registration was ended was read by then.
        left.all(|run| self.let_go(run, Listening::ToTouches)) && !may_have_moved()
    }

    /// Hears no more of `piece`, of which nothing is on a device. `false` when mappings changed all the
    /// time: then it goes on.
    pub(crate) fn let_go(&self, piece: Span, what: Listening) -> bool {
        let process = self.process;
        let mut end = |piece: Span| match what {
            Listening::ToTouches => process.mover.disarm(piece),
            Listening::ToItsEnd => process.mover.unwatch(piece),
        };
        let begin = |piece: Span| match what {
            Listening::ToTouches => process.mover.arm(piece, self.region.behind()),
            Listening::ToItsEnd => process.mover.watch(piece),
        };
        try_often(|| {
            process.source.unless_more_is_told(
                &mut || process.events.each_without_arrival(piece, &mut end),
                &mut || begin_again(piece, begin),
            )
        })
    }
}

/// Tries until it succeeds, for a few milliseconds at least. Whether it did.
pub(crate) fn try_often(mut act: impl FnMut() -> bool) -> bool {
    (0..TRIES).any(|tries| {
        match tries {
            0 => {}
            1..YIELDS => std::thread::yield_now(),
            _ => std::thread::sleep(NAP),
        }
        act()
    })
}

/// Whatever is there by now. What was not registered before is so in excess, for a moment.
fn begin_again(piece: Span, begin: impl Fn(Span) -> Result<(), Errno>) {
    if begin(piece).is_err() {
        // What cannot be registered is beside what must be.
        for page in piece.pages() {
            let _ = begin(Span::page_of(page.start()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_succeeds_is_tried_so_often() {
        let mut tries = 0;
        let mut after = |most: u32| {
            tries = 0;
            let succeeds = try_often(|| {
                tries += 1;
                tries > most
            });
            (succeeds, tries)
        };
        assert_eq!(after(0), (true, 1));
        assert_eq!(after(TRIES - 1), (true, TRIES));
        assert_eq!(after(TRIES), (false, TRIES));
    }
}
