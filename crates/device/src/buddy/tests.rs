//! The allocator against a model: a set of pages.

extern crate std;
use super::*;
use std::println;

/// A run as the two numbers it is.
fn run(first: u32, count: u64) -> BlockRun {
    BlockRun {
        first: DevicePfn::new(first),
        count: PageCount::new(count),
    }
}

/// Checks the books, and that nothing can be merged any further.
fn check(buddy: &Buddy) {
    assert_eq!(buddy.free_pages() + buddy.used_pages(), buddy.total());
    let mut covered = 0;
    let mut free = 0;
    for (at, head) in buddy.heads.iter().enumerate() {
        let at = u32::try_from(at).unwrap();
        let (order, is_free) = match *head {
            Head::Inside => continue,
            Head::Free(order) => (u32::from(order), true),
            Head::Used(order) => (u32::from(order), false),
        };
        assert_eq!(at, covered, "runs follow each other without gap or overlap");
        assert!(at.is_multiple_of(1 << order), "natural alignment");
        covered += 1 << order;
        if is_free {
            free += 1 << order;
            assert_eq!(buddy.free_buddy(at, order), None, "free buddies are merged");
        }
    }
    assert_eq!((covered, free), (buddy.total, buddy.free));
}

#[test]
fn every_size_fills_up_and_merges_back() {
    for total in 0..=70u64 {
        for count in [1u64, 2, 4, 8, 16, 32, 64] {
            let mut buddy = Buddy::new(PageCount::new(total));
            let largest = buddy.largest_free();
            assert_eq!(largest, buddy.largest_possible());
            let mut runs = Vec::new();
            while let Ok(run) = buddy.alloc(PageCount::new(count)) {
                runs.push(run);
                check(&buddy);
            }
            assert_eq!(runs.len() as u64, total / count, "{count} in {total}");
            for run in runs {
                buddy.free(run);
                check(&buddy);
            }
            assert_eq!(buddy.largest_free(), largest);
        }
    }
}

#[test]
fn smallest_run_that_fits_is_used_lower_half_first() {
    let mut buddy = Buddy::new(PageCount::new(22));
    assert_eq!(buddy.alloc(PageCount::new(4)), Ok(run(16, 4)));
    assert_eq!(buddy.alloc(PageCount::new(2)), Ok(run(20, 2)));
    assert_eq!(buddy.alloc(PageCount::new(1)), Ok(run(0, 1)));
    assert_eq!(buddy.alloc(PageCount::new(4)), Ok(run(4, 4)));
    assert_eq!(buddy.largest_free(), PageCount::new(8));
}

#[test]
fn refusals_say_why() {
    let mut buddy = Buddy::new(PageCount::new(6));
    let count = PageCount::new(3);
    assert_eq!(
        buddy.alloc(count),
        Err(BuddyError::NotAPowerOfTwo { count })
    );
    assert_eq!(
        buddy.alloc(PageCount::ZERO),
        Err(BuddyError::NotAPowerOfTwo {
            count: PageCount::ZERO
        })
    );
    let (count, largest) = (PageCount::new(8), PageCount::new(4));
    assert_eq!(
        buddy.alloc(count),
        Err(BuddyError::TooLarge { count, largest })
    );
    buddy.alloc(largest).unwrap();
    let free = PageCount::new(2);
    assert_eq!(
        buddy.alloc(largest),
        Err(BuddyError::NoSpace {
            wanted: largest,
            free
        })
    );
    check(&buddy);
}

#[test]
#[should_panic(expected = "free already")]
fn double_free_is_told() {
    let mut buddy = Buddy::new(PageCount::new(8));
    let run = buddy.alloc(PageCount::ONE).unwrap();
    let _other_half = buddy.alloc(PageCount::ONE).unwrap();
    buddy.free(run);
    buddy.free(run);
}

#[test]
#[should_panic(expected = "was allocated as")]
fn free_of_another_length_is_told() {
    let mut buddy = Buddy::new(PageCount::new(8));
    buddy.alloc(PageCount::new(4)).unwrap();
    buddy.free(run(0, 2));
}

#[test]
#[should_panic(expected = "not the start of a run in use")]
fn free_of_the_middle_is_told() {
    let mut buddy = Buddy::new(PageCount::new(8));
    buddy.alloc(PageCount::new(4)).unwrap();
    buddy.free(run(2, 2));
}

#[test]
#[should_panic(expected = "outside of device memory")]
fn free_of_the_outside_is_told() {
    Buddy::new(PageCount::new(8)).free(run(8, 1));
}

/// Allocates and frees at random, and keeps the books a second time.
#[test]
fn random_runs_against_a_page_set() {
    for seed in 1..=20u64 {
        println!("seed {seed}");
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let total = 1 + next() % 1500;
        let mut buddy = Buddy::new(PageCount::new(total));
        let mut owned = vec![false; usize::try_from(total).unwrap()];
        let mut runs: Vec<BlockRun> = Vec::new();
        for _ in 0..800 {
            if next() % 5 < 3 {
                let Ok(run) = buddy.alloc(PageCount::new(1 << (next() % 10))) else {
                    continue;
                };
                let pages = &mut owned[run.first.index()..][..run.count.as_usize()];
                assert!(pages.iter().all(|used| !used), "{run:?} overlaps");
                pages.fill(true);
                runs.push(run);
            } else if !runs.is_empty() {
                let at = usize::try_from(next()).unwrap() % runs.len();
                let run = runs.swap_remove(at);
                owned[run.first.index()..][..run.count.as_usize()].fill(false);
                buddy.free(run);
            }
            let used = owned.iter().filter(|used| **used).count();
            assert_eq!(buddy.used_pages(), PageCount::from_usize(used));
            check(&buddy);
        }
        for run in runs {
            buddy.free(run);
        }
        check(&buddy);
        assert_eq!(buddy.largest_free(), buddy.largest_possible());
    }
}
