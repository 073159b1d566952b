//! Allocations that grow while devices have them, and memory that is adopted and given up all the time.

use crate::common::Map;
use crate::load::{check, on_pages, sum_on_device, under_load};
use crate::{BLOCK, PAGE, on_rungs};
use gpusvm::{ByteSize, SvmPtr};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const PAGES: usize = BLOCK / PAGE;
const ROUNDS: u64 = 100;

/// `realloc` moves the mapping, or copies it where it cannot: the data follows.
#[test]
fn a_vec_that_grows_while_a_device_has_it_keeps_its_data() {
    on_rungs(true, |svm| {
        under_load(svm, || {
            for (round, pages) in (0u64..).zip([PAGES / 2, PAGES, 3 * PAGES, 40, PAGES + 1]) {
                let mut words = vec![0u64; pages * PAGE / 8];
                let len = ByteSize::from_usize(pages * PAGE);
                let _adopted = svm.adopt(words.as_ptr(), len).unwrap();
                let p = SvmPtr::from(words.as_mut_ptr());
                on_pages(svm, p, pages, Some(round)).unwrap();
                for more in [1, 3, 8] {
                    words.reserve_exact(more * pages * PAGE / 8);
                    let p = SvmPtr::from(black_box(&mut words).as_mut_ptr());
                    let n = pages as u64;
                    let sum = sum_on_device(svm, p, pages);
                    assert_eq!(sum, round * n + n * (n - 1) / 2, "{more}");
                    check(p, pages, round);
                }
                on_pages(svm, SvmPtr::from(words.as_mut_ptr()), pages, Some(77)).unwrap();
                words.shrink_to_fit();
                check(SvmPtr::from(words.as_mut_ptr()), pages, 77);
            }
        });
    });
}

/// One thread adopts memory and gives it up again, all the time; another reads it; and devices write it.
/// Adopted or not, it is one and the same memory.
#[test]
fn memory_is_adopted_and_given_up_under_a_device() {
    on_rungs(true, |svm| {
        let map = Map::new(BLOCK, false);
        let p = SvmPtr::from(map.at.cast::<u64>());
        let (ends, adoptions) = (AtomicBool::new(false), AtomicU64::new(0));
        let at = &map;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ends.load(Ordering::Relaxed) {
                    let adopted = svm.adopt(at.at, ByteSize::from_usize(BLOCK)).unwrap();
                    adoptions.fetch_add(1, Ordering::Relaxed);
                    drop(adopted);
                }
            });
            scope.spawn(|| {
                // SAFETY: mapped until the test ends; others use it by atomics.
                let word =
                    |page: usize| unsafe { AtomicU64::from_ptr(p.add(page * PAGE / 8).as_ptr()) };
                for page in (0..PAGES).cycle() {
                    if ends.load(Ordering::Relaxed) {
                        break;
                    }
                    let found = word(page).load(Ordering::Relaxed);
                    assert!(found <= ROUNDS * 1000 + page as u64, "page {page}: {found}");
                }
            });
            let rounds = || {
                for round in 1..=ROUNDS {
                    on_pages(svm, p, PAGES, Some(round * 1000))
                        .map_err(|error| format!("{round}: {error}"))?;
                    check(p, PAGES, round * 1000);
                }
                Ok::<_, String>(())
            };
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(rounds));
            while adoptions.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            ends.store(true, Ordering::Relaxed);
            done.unwrap().unwrap();
        });
    });
}
