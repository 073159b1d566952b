//! Address space that the engine sets aside when it starts, for what it maps later.
//!
//! ```text
//!   [ piece | piece | free | piece | free ............................... )     a piece is a Mapping
//! ```
//!
//! The kernel puts a mapping into the first hole that is large enough, and some holes are the program's: left
//! there to be mapped again, or to be unmapped together with what is around them. So what comes and goes
//! with the program's memory is mapped in here.
//!
//! # Locking
//!
//! The list of what is free has a lock, a leaf. Giving a piece back allocates nothing.

use super::map::{self, Mapping, Request};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{ByteSize, Span};
use rustix::io::Errno;

/// How much: page words of 2 TiB. What is not used takes up no memory.
const SIZE: ByteSize = ByteSize::gib(4);
/// How many free pieces are known at a time. What is given back beyond that is lost as address space.
const MOST_FREE: usize = 4096;

/// Address space of the engine's own.
#[derive(Debug)]
pub(crate) struct Room {
    // INVARIANT: ascending, in what was set aside, and used by nobody.
    free: Mutex<Vec<Span>>,
    _reserved: Mapping,
    /// A child of fork has other things there.
    owner: u32,
}

impl Room {
    /// Sets it aside.
    ///
    /// # Errors
    ///
    /// `ENOMEM`: there is no such address space.
    pub(crate) fn reserve() -> Result<Arc<Self>, Errno> {
        let reserved = Request::new(SIZE).apart().reserved().dont_fork().map()?;
        let mut free = Vec::with_capacity(MOST_FREE);
        free.push(reserved.span());
        Ok(Arc::new(Self {
            free: Mutex::new(free),
            _reserved: reserved,
            owner: std::process::id(),
        }))
    }

    /// Takes the first piece that is large enough. `None` when there is none.
    pub(super) fn take(&self, len: ByteSize) -> Option<Span> {
        let mut free = self.free.lock();
        let at = free.iter().position(|piece| piece.len() >= len)?;
        let taken = Span::from_len(free[at].start(), len).ok()?;
        match Span::new(taken.end(), free[at].end()) {
            Ok(rest) => free[at] = rest,
            Err(_) => {
                free.remove(at);
            }
        }
        Some(taken)
    }

    /// Takes a piece back, whose bytes nobody relies on.
    pub(super) fn give_back(&self, piece: Span) {
        // What cannot be set aside anew stays as it is: nobody gets it.
        if self.owner != std::process::id() || map::set_aside(piece).is_err() {
            return;
        }
        let mut free = self.free.lock();
        let at = free.partition_point(|other| other.start() < piece.start());
        let joins_last = at > 0 && free[at - 1].end() == piece.start();
        let joins_next = free.get(at).is_some_and(|next| next.start() == piece.end());
        match (joins_last, joins_next) {
            (true, true) => {
                free[at - 1] = free[at - 1].union(free[at]);
                free.remove(at);
            }
            (true, false) => free[at - 1] = free[at - 1].union(piece),
            (false, true) => free[at] = free[at].union(piece),
            (false, false) if free.len() < MOST_FREE => free.insert(at, piece),
            (false, false) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(room: &Arc<Room>, kib: u64) -> Mapping {
        let request = Request::new(ByteSize::kib(kib)).dont_fork();
        request.map_in(room).unwrap()
    }

    #[test]
    fn pieces_are_in_the_room_and_zero_whoever_had_them_before() {
        let room = Room::reserve().unwrap();
        let all = room._reserved.span();
        for _ in 0..3 {
            let (first, second) = (map(&room, 8), map(&room, 4));
            assert!(all.covers(first.span()) && all.covers(second.span()));
            assert_eq!(first.span().end(), second.span().start());
            assert_eq!(
                (first.load(ByteSize::ZERO), second.load(ByteSize::ZERO)),
                (0, 0)
            );
            first.store(ByteSize::ZERO, 7);
            second.store(ByteSize::ZERO, 7);
        }
        assert_eq!(*room.free.lock(), [all]);
    }

    #[test]
    fn what_is_free_grows_together_in_any_order() {
        let room = Room::reserve().unwrap();
        let all = room._reserved.span();
        let mut pieces: Vec<_> = (0..4).map(|_| Some(map(&room, 4))).collect();
        let used = |room: &Room| room.free.lock().len();
        for (n, holes) in [(1, 2), (3, 2), (0, 2), (2, 1)] {
            drop(pieces[n].take());
            assert_eq!(used(&room), holes, "after {n}");
        }
        assert_eq!(*room.free.lock(), [all]);
    }

    /// A hole of the program's stays one, whatever is mapped in the room.
    #[test]
    fn no_piece_comes_to_lie_in_a_hole_of_others() {
        let room = Room::reserve().unwrap();
        let hole = {
            let mapping = Request::new(ByteSize::kib(4)).map().unwrap();
            mapping.span()
        };
        let pieces: Vec<_> = (0..64).map(|_| map(&room, 4)).collect();
        assert!(
            pieces
                .iter()
                .all(|piece| piece.span().intersection(hole).is_none())
        );
    }
}
