//! Where pages are between homes: a pool of 2 MiB slots.
//!
//! ```text
//!   Empty ---- pages of the program move in ----> (held) ---- all of them stay ----> Warm
//!     ^                                                                               |
//!     +--------- pages move out, to the program --- (held) <------- filled by a copy -+
//! ```
//!
//! A block that left for a device leaves its pages behind, and they are what the next block that comes
//! home arrives in. In steady state the kernel zeroes nothing and frees nothing.
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
/// How long to wait for a slot.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pool.
#[derive(Debug)]
pub(crate) struct Staging {
    area: Mapping,
    /// Where fresh pages are born: not registered, so that touching it is an ordinary fault.
    nursery: Mutex<Mapping>,
    free: Mutex<Free>,
    returned: Condvar,
}

/// Slots by state; fixed arrays used as stacks.
#[derive(Debug)]
struct Free {
    empty: Stack,
    warm: Stack,
}

#[derive(Debug)]
struct Stack {
    slots: [usize; SLOTS],
    len: usize,
}

/// A slot that somebody holds.
#[derive(Debug)]
pub(crate) struct Slot<'a> {
    staging: &'a Staging,
    index: usize,
    state: Leave,
}

/// What a slot holds when it goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// No page.
    Empty,
    /// All its pages.
    Warm,
    /// Some pages.
    Dirty,
}

impl Staging {
    /// Reserves the pool.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(thp: Thp) -> Result<Self, Errno> {
        let request = |size| {
            let request = Request::new(size).aligned().dont_fork();
            if thp == Thp::Never {
                request
            } else {
                request.huge()
            }
        };
        let slots = u64::try_from(SLOTS).unwrap_or(u64::MAX);
        let mut empty = Stack {
            slots: [0; SLOTS],
            len: 0,
        };
        (0..SLOTS).rev().for_each(|slot| empty.push(slot));
        let free = Free {
            empty,
            warm: Stack {
                slots: [0; SLOTS],
                len: 0,
            },
        };
        Ok(Self {
            area: request(ByteSize::new(BLOCK_SIZE.get() * slots)).map()?,
            nursery: Mutex::new(request(BLOCK_SIZE).map()?),
            free: Mutex::new(free),
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

    /// A slot without pages. `None` when none came back in time.
    pub(crate) fn take_empty(&self) -> Option<Slot<'_>> {
        let (index, warm) = self.take(|free| match free.empty.pop() {
            Some(slot) => Some((slot, false)),
            None => free.warm.pop().map(|slot| (slot, true)),
        })?;
        let slot = Slot {
            staging: self,
            index,
            state: Leave::Dirty,
        };
        if warm {
            slot.discard();
        }
        Some(slot)
    }

    /// A slot with all its pages, their contents anything; `warm_up` moves fresh pages, which are
    /// at its first argument, to its second. `None` when none came back in time.
    pub(crate) fn take_warm(
        &self,
        warm_up: impl FnOnce(Span, VirtAddr) -> Result<(), Errno>,
    ) -> Option<Slot<'_>> {
        let (index, warm) = self.take(|free| match free.warm.pop() {
            Some(slot) => Some((slot, true)),
            None => free.empty.pop().map(|slot| (slot, false)),
        })?;
        let slot = Slot {
            staging: self,
            index,
            state: Leave::Dirty,
        };
        if !warm {
            let nursery = self.nursery.lock();
            map::populate_write(nursery.span()).ok()?;
            warm_up(nursery.span(), slot.start()).ok()?;
        }
        Some(slot)
    }

    fn take<T>(&self, pick: impl Fn(&mut Free) -> Option<T>) -> Option<T> {
        let mut free = self.free.lock();
        loop {
            if let Some(picked) = pick(&mut free) {
                return Some(picked);
            }
            let (again, timed_out) = self.returned.wait_timeout(free, PATIENCE);
            free = again;
            if timed_out {
                return pick(&mut free);
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

    /// Says what the slot holds, before it goes back.
    pub(crate) fn leave(&mut self, state: Leave) {
        self.state = state;
    }

    fn start(&self) -> VirtAddr {
        let before = u64::try_from(self.index).unwrap_or(u64::MAX);
        self.staging.area.span().start() + ByteSize::new(BLOCK_SIZE.get() * before)
    }

    fn discard(&self) {
        // SAFETY: the slot is ours, and nobody relies on the bytes of a slot that is given up.
        let discarded = unsafe { map::discard(self.span()) };
        debug_assert!(discarded.is_ok(), "discard of a slot: {discarded:?}");
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let keep = self.state == Leave::Warm && {
            // Only a hint: the count is looked at again below.
            self.staging.free.lock().warm.len < MAX_WARM
        };
        if !keep && self.state != Leave::Empty {
            self.discard();
        }
        let mut free = self.staging.free.lock();
        let stack = if keep {
            &mut free.warm
        } else {
            &mut free.empty
        };
        stack.push(self.index);
        drop(free);
        self.staging.returned.notify_one();
    }
}

impl Stack {
    fn push(&mut self, slot: usize) {
        self.slots[self.len] = slot;
        self.len += 1;
    }

    fn pop(&mut self) -> Option<usize> {
        self.len = self.len.checked_sub(1)?;
        Some(self.slots[self.len])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_come_back_as_they_were_left() {
        let staging = Staging::new(Thp::read()).unwrap();
        let mut slot = staging.take_empty().unwrap();
        map::populate_write(slot.span()).unwrap();
        slot.leave(Leave::Warm);
        let place = slot.span();
        drop(slot);
        let warm = staging
            .take_warm(|_, _| panic!("a warm one is there"))
            .unwrap();
        assert_eq!(warm.span(), place);
    }

    #[test]
    fn no_more_warm_slots_are_kept_than_said() {
        let staging = Staging::new(Thp::read()).unwrap();
        let held: Vec<_> = (0..MAX_WARM + 2)
            .filter_map(|_| staging.take_empty())
            .collect();
        for mut slot in held {
            slot.leave(Leave::Warm);
        }
        // Dropped one after the other at the end of each pass.
        assert_eq!(staging.free.lock().warm.len, MAX_WARM);
        assert_eq!(staging.free.lock().empty.len, SLOTS - MAX_WARM);
    }
}
