//! From a device page to its block: the one loop, for every world.
//!
//! ```text
//!   where does it live? ---> lock that block ---> does it still live there? ---> yes: it stays
//!        ^                                                 |
//!        `------------------- no: it moved meanwhile ------'      so often, then it is left alone
//! ```

use gpusvm_types::PageIndex;

/// How often a page may have moved to another address by the time its block is locked. Each time the
/// program called `mremap` in that moment.
pub const MAX_CHASES: u32 = 64;

/// Locks the block that a device page lives in. `None` when the page is not in use, or its address is
/// mirrored no more, or after [`MAX_CHASES`]: whoever evicts looks again, or leaves it where it is.
pub fn lock_where_it_lives<B>(
    address: impl Fn() -> Option<PageIndex>,
    mut lock: impl FnMut(PageIndex) -> Option<B>,
) -> Option<(B, PageIndex)> {
    for _ in 0..MAX_CHASES {
        let at = address()?;
        let block = lock(at);
        // It may have moved to another address, or home, before the lock was held.
        if address() == Some(at) {
            return block.map(|block| (block, at));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::cell::Cell;

    /// How many locks it takes to catch a page that moves so often.
    fn chase(moves: u64) -> (u64, Option<u64>) {
        let (at, locks) = (Cell::new(0), Cell::new(0));
        let address = || Some(PageIndex::new(at.get()));
        let caught = lock_where_it_lives(address, |_| {
            locks.set(locks.get() + 1);
            if at.get() < moves {
                at.set(at.get() + 1);
            }
            Some(())
        });
        (locks.get(), caught.map(|(_, at)| at.get()))
    }

    #[test]
    fn a_page_that_moves_is_followed_so_often() {
        assert_eq!(chase(0), (1, Some(0)));
        assert_eq!(chase(5), (6, Some(5)));
        let bound = u64::from(MAX_CHASES);
        assert_eq!(chase(bound - 1), (bound, Some(bound - 1)));
        assert_eq!(chase(u64::MAX), (bound, None));
    }

    #[test]
    fn a_page_that_is_not_in_use_or_not_mirrored_has_no_block() {
        assert_eq!(lock_where_it_lives(|| None, |_| Some(())), None);
        let address = || Some(PageIndex::new(1));
        assert_eq!(lock_where_it_lives::<()>(address, |_| None), None);
    }
}
