//! Where pages are between homes: a pool of 2 MiB slots.
//!
//! ```text
//!   Clean --- a huge page moves in ---> (held) --- it stays ---> Huge   the next huge block arrives
//!     ^                                                           |     in it
//!     +------- it moves on, to the program --- (held) <-----------+
//!
//!   Table --- base pages move in -----> (held) --- all stay ---> Base   the same of base pages
//!     ^                                                           |
//!     +------- they move on, to the program -- (held) <-----------+
//! ```
//!
//! A block that left for a device leaves its pages behind, and they are what the next block that comes
//! home arrives in. In steady state the kernel zeroes nothing and frees nothing.
//!
//! # Huge and base pages are kept apart
//!
//! Base pages leave an empty page table behind when they move on. A huge page that moves to where
//! such a table is gets split, which costs three times as much as copying it. So a slot knows whether
//! a table is there; dropping pages takes the table away on kernels that reclaim page tables
//! (Linux 6.14), and elsewhere huge pages that arrive there are split, and work.
//!
//! # Locking
//!
//! The pool's lock is held for a few instructions. Whoever holds a slot waits for no other, so
//! waiting for one ends.

use crate::sys::map::{self, Mapping, Request};
use crate::sys::thp::Thp;
use core::time::Duration;
use gpusvm_sync::{Condvar, Mutex};
use gpusvm_types::{BLOCK_SIZE, ByteSize, DmaAddr, Span, VirtAddr};
use rustix::io::Errno;

/// How many slots there are: more than threads that migrate at once.
const SLOTS: usize = 24;
/// How many warm slots are kept; 2 MiB of RAM each.
const MAX_WARM: usize = 8;
/// How many of them of one kind the other kind leaves alone.
const FEW_WARM: usize = 2;
/// How long to wait for a slot.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pool.
#[derive(Debug)]
pub(crate) struct Staging {
    area: Mapping,
    nurseries: Nurseries,
    slots: Mutex<[State; SLOTS]>,
    returned: Condvar,
}

/// Where fresh pages are born: not registered, so that touching them is an ordinary fault.
#[derive(Debug)]
struct Nurseries {
    huge: Mutex<Mapping>,
    base: Mutex<Mapping>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Held,
    Free(Content),
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Nothing, not even a page table.
    Clean,
    /// An empty page table.
    Table,
    /// All its pages, as one.
    Huge,
    /// All its pages, one by one.
    Base,
    /// Some pages.
    Some,
}

/// What pages are wanted in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// One huge page, to be moved on.
    Huge,
    /// Base pages, to be moved on.
    Base,
    /// Any, to be copied from.
    Any,
}

/// A slot that somebody holds.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    staging: &'a Staging,
    index: usize,
    content: Content,
}

impl Staging {
    /// Reserves the pool. With `forked`, children of fork get copies of it, because parts of it may
    /// become memory of the program.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(thp: Thp, forked: bool) -> Result<Self, Errno> {
        let request = |size| {
            let request = Request::new(size).apart().aligned();
            let request = if forked { request } else { request.dont_fork() };
            if thp == Thp::Never {
                request
            } else {
                request.huge()
            }
        };
        let slots = u64::try_from(SLOTS).unwrap_or(u64::MAX);
        let base = Request::new(BLOCK_SIZE)
            .apart()
            .aligned()
            .never_huge()
            .dont_fork();
        Ok(Self {
            area: request(ByteSize::new(BLOCK_SIZE.get() * slots)).map()?,
            nurseries: Nurseries {
                huge: Mutex::new(request(BLOCK_SIZE).map()?),
                base: Mutex::new(base.map()?),
            },
            slots: Mutex::new([State::Free(Content::Clean); SLOTS]),
            returned: Condvar::new(),
        })
    }

    /// Where all slots are.
    pub(crate) fn span(&self) -> Span {
        self.area.span()
    }

    /// The most RAM that idle slots keep.
    pub(crate) const fn max_idle() -> ByteSize {
        ByteSize::new(BLOCK_SIZE.get() * MAX_WARM as u64)
    }

    /// How many slots somebody holds.
    pub(crate) fn in_use(&self) -> usize {
        let slots = self.slots.lock();
        slots.iter().filter(|slot| **slot == State::Held).count()
    }

    /// A slot without pages, fit for a huge page or for base pages. `None` when none came back in
    /// time.
    pub(crate) fn take_empty(&self, huge: bool) -> Option<Slot<'_>> {
        let mut slot = self.take(if huge {
            [Content::Clean, Content::Table, Content::Base, Content::Huge]
        } else {
            [Content::Table, Content::Clean, Content::Base, Content::Huge]
        })?;
        match slot.content {
            Content::Clean => {}
            Content::Table if !huge => {}
            _ => slot.discard(),
        }
        Some(slot)
    }

    /// A slot with all its pages, their contents anything; `warm_up` moves fresh pages, which are
    /// at its first argument, to its second. `None` when none came back in time, or there is no
    /// memory.
    pub(crate) fn take_warm(
        &self,
        want: Want,
        warm_up: impl FnOnce(Span, VirtAddr) -> Result<(), Errno>,
    ) -> Option<Slot<'_>> {
        let mut slot = self.take(match want {
            Want::Huge => [Content::Huge, Content::Clean, Content::Table, Content::Base],
            Want::Base => [Content::Base, Content::Table, Content::Clean, Content::Huge],
            Want::Any => [Content::Base, Content::Huge, Content::Clean, Content::Table],
        })?;
        let (nursery, fresh) = match want {
            Want::Huge | Want::Any => (&self.nurseries.huge, Content::Huge),
            Want::Base => (&self.nurseries.base, Content::Base),
        };
        match (want, slot.content) {
            (_, Content::Huge) | (Want::Base | Want::Any, Content::Base) => return Some(slot),
            (_, Content::Clean) | (Want::Base, Content::Table) => {}
            _ => slot.discard(),
        }
        slot.content = Content::Some;
        let nursery = nursery.lock();
        map::populate(nursery.span()).ok()?;
        warm_up(nursery.span(), slot.start()).ok()?;
        slot.content = fresh;
        Some(slot)
    }

    /// Takes a slot of the first of these kinds that there is.
    fn take(&self, kinds: [Content; 4]) -> Option<Slot<'_>> {
        let pick = |slots: &mut [State; SLOTS]| {
            let find = |kind| slots.iter().position(|slot| *slot == State::Free(kind));
            let (index, content) = kinds
                .into_iter()
                .find_map(|kind| find(kind).map(|index| (index, kind)))?;
            slots[index] = State::Held;
            Some(Slot {
                staging: self,
                index,
                content,
            })
        };
        let mut slots = self.slots.lock();
        loop {
            if let Some(picked) = pick(&mut slots) {
                return Some(picked);
            }
            let (again, timed_out) = self.returned.wait_timeout(slots, PATIENCE);
            slots = again;
            if timed_out {
                return pick(&mut slots);
            }
        }
    }
}

impl Slot<'_> {
    /// Where it is.
    pub(crate) fn span(&self) -> Span {
        Span::from_len(self.start(), BLOCK_SIZE).expect("inside the pool")
    }

    /// The place in the slot that corresponds to `at` in its block.
    pub(crate) fn place_of(&self, at: VirtAddr) -> VirtAddr {
        self.start() + at.offset_from(at.block_start())
    }

    /// As `place_of`, for a copy engine.
    pub(crate) fn dma_of(&self, at: VirtAddr) -> DmaAddr {
        DmaAddr::new(self.place_of(at).get())
    }

    /// What it holds, as far as is known.
    pub(crate) fn content(&self) -> Content {
        self.content
    }

    /// Says what it holds.
    pub(crate) fn holds(&mut self, content: Content) {
        self.content = content;
    }

    fn start(&self) -> VirtAddr {
        let before = u64::try_from(self.index).unwrap_or(u64::MAX);
        self.staging.area.span().start() + ByteSize::new(BLOCK_SIZE.get() * before)
    }

    /// Before a warm slot goes back: another one of the other kind, or this one, gives its pages up
    /// when there are enough. Only a hint: several at once may each find room, and all be kept.
    fn make_room(&mut self, other_kind: Content) {
        let other = {
            let mut slots = self.staging.slots.lock();
            let count = |kind| {
                slots
                    .iter()
                    .filter(|slot| **slot == State::Free(kind))
                    .count()
            };
            let others = count(other_kind);
            if others + count(self.content) < MAX_WARM {
                return;
            }
            let of_other_kind = |slot: &State| *slot == State::Free(other_kind);
            let index = slots
                .iter()
                .position(of_other_kind)
                .filter(|_| others > FEW_WARM);
            index.map(|index| {
                slots[index] = State::Held;
                Slot {
                    staging: self.staging,
                    index,
                    content: Content::Some,
                }
            })
        };
        if other.is_none() {
            self.discard();
        }
    }

    fn discard(&mut self) {
        // SAFETY: the slot is ours, and nobody relies on the bytes of a slot that is given up.
        let discarded = unsafe { map::discard(self.span()) };
        debug_assert!(discarded.is_ok(), "discard of a slot: {discarded:?}");
        self.content = Content::Clean;
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        match self.content {
            Content::Clean | Content::Table => {}
            Content::Huge => self.make_room(Content::Base),
            Content::Base => self.make_room(Content::Huge),
            Content::Some => self.discard(),
        }
        self.staging.slots.lock()[self.index] = State::Free(self.content);
        self.staging.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool() -> Staging {
        Staging::new(Thp::read(), false).unwrap()
    }

    /// Every slot is held, and none comes back.
    #[test]
    fn who_waits_for_a_slot_in_vain_gives_up() {
        let staging = pool();
        let held: Vec<_> = (0..SLOTS)
            .filter_map(|_| staging.take_empty(true))
            .collect();
        assert_eq!(held.len(), SLOTS);
        assert!(staging.take_empty(true).is_none());
        drop(held);
        assert!(staging.take_empty(true).is_some());
    }

    fn count(staging: &Staging, content: Content) -> usize {
        let slots = staging.slots.lock();
        slots
            .iter()
            .filter(|slot| **slot == State::Free(content))
            .count()
    }

    #[test]
    fn slots_come_back_as_they_were_left() {
        let staging = pool();
        for (content, want) in [(Content::Huge, Want::Huge), (Content::Base, Want::Base)] {
            let mut slot = staging.take_empty(false).unwrap();
            map::populate(slot.span()).unwrap();
            slot.holds(content);
            let place = slot.span();
            drop(slot);
            let warm = staging
                .take_warm(want, |_, _| panic!("a warm one is there"))
                .unwrap();
            assert_eq!((warm.span(), warm.content()), (place, content));
        }
    }

    #[test]
    fn a_slot_with_a_table_is_for_base_pages_first() {
        let staging = pool();
        let mut slot = staging.take_empty(false).unwrap();
        slot.holds(Content::Table);
        let place = slot.span();
        drop(slot);
        assert_ne!(staging.take_empty(true).unwrap().span(), place);
        assert_eq!(staging.take_empty(false).unwrap().span(), place);
    }

    #[test]
    fn a_slot_of_the_wrong_kind_is_emptied_rather_than_split() {
        let staging = pool();
        let mut held: Vec<_> = (0..SLOTS)
            .filter_map(|_| staging.take_empty(false))
            .collect();
        let mut last = held.pop().unwrap();
        last.holds(Content::Base);
        drop(last);
        let mut fresh = false;
        let slot = staging.take_warm(Want::Huge, |_, _| {
            fresh = true;
            Ok(())
        });
        assert_eq!(slot.map(|slot| slot.content()), Some(Content::Huge));
        assert!(fresh);
    }

    #[test]
    fn no_more_warm_slots_are_kept_than_said() {
        let staging = pool();
        let held: Vec<_> = (0..MAX_WARM + 2)
            .filter_map(|_| staging.take_empty(true))
            .collect();
        assert_eq!(staging.in_use(), MAX_WARM + 2);
        for mut slot in held {
            slot.holds(Content::Huge);
        }
        // Dropped one after the other at the end of each pass.
        assert_eq!(count(&staging, Content::Huge), MAX_WARM);
        assert_eq!(count(&staging, Content::Clean), SLOTS - MAX_WARM);
        assert_eq!(staging.in_use(), 0);
    }

    #[test]
    fn the_kind_that_is_in_demand_takes_the_room() {
        let staging = pool();
        let leave = |content| {
            let slots: Vec<_> = (0..MAX_WARM)
                .filter_map(|_| staging.take_empty(true))
                .collect();
            for mut slot in slots {
                slot.holds(content);
            }
        };
        leave(Content::Huge);
        leave(Content::Base);
        assert_eq!(count(&staging, Content::Huge), FEW_WARM);
        assert_eq!(count(&staging, Content::Base), MAX_WARM - FEW_WARM);
        leave(Content::Huge);
        assert_eq!(count(&staging, Content::Base), FEW_WARM);
    }
}
