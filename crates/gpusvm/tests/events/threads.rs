//! Threads that end: what they allocated is on a device, or their stack is used in place.

use crate::common::Map;
use crate::load::{check, on_pages, sum_on_device, under_load};
use crate::{BLOCK, PAGE, on_rungs};
use gpusvm::{ByteSize, Svm, SvmPtr};
use std::hint::black_box;

const PAGES: usize = BLOCK / PAGE;
const ROUNDS: u64 = 20;

/// A thread allocates, lets a device work on it, and ends: its memory goes with it, or is another's.
#[test]
fn a_thread_ends_with_its_memory_on_a_device() {
    on_rungs(true, |svm| {
        under_load(svm, || {
            for round in 0..ROUNDS {
                let used = || {
                    let map = Map::new(BLOCK, round % 2 == 0);
                    let len = ByteSize::from_usize(BLOCK);
                    let adopted = svm.adopt(map.at, len).unwrap();
                    let p = SvmPtr::from(map.at.cast::<u64>());
                    on_pages(svm, p, PAGES, Some(round)).unwrap();
                    (map, adopted)
                };
                // Unmapped as the thread ends, while it is on the device.
                std::thread::scope(|scope| scope.spawn(|| drop(used().0)).join().unwrap());
                // Handed over: the data stays where it is, and is the heir's.
                let (map, _adopted) = std::thread::scope(|scope| scope.spawn(used).join().unwrap());
                let (p, n) = (SvmPtr::from(map.at.cast::<u64>()), PAGES as u64);
                let sum = sum_on_device(svm, p, PAGES);
                assert_eq!(sum, round * n + n * (n - 1) / 2);
                check(p, PAGES, round);
            }
        });
    });
}

/// One thread after the other gets the same stack, as a rule; and a device works on each in place.
#[test]
fn stacks_of_threads_that_end_are_used_in_place() {
    on_rungs(false, |svm| {
        under_load(svm, || {
            for round in 0..2 * ROUNDS {
                std::thread::scope(|scope| {
                    scope.spawn(|| on_its_stack(svm, round)).join().unwrap()
                });
            }
        });
    });
}

fn on_its_stack(svm: &Svm, round: u64) {
    const ON_STACK: usize = 8;
    let mut words = black_box([0u64; ON_STACK * PAGE / 8]);
    let p = SvmPtr::from(words.as_mut_ptr());
    on_pages(svm, p, ON_STACK, Some(round)).unwrap();
    check(p, ON_STACK, round);
    // And what the thread writes, the device reads.
    for page in 0..ON_STACK {
        words[page * PAGE / 8] = round;
    }
    let p = SvmPtr::from(black_box(&mut words).as_mut_ptr());
    assert_eq!(sum_on_device(svm, p, ON_STACK), round * ON_STACK as u64);
}

/// Allocations of all sizes, of several threads, that nobody has adopted.
#[test]
fn pointers_into_the_heap_are_used_in_place() {
    on_rungs(false, |svm| {
        under_load(svm, || {
            std::thread::scope(|scope| {
                for thread in 0..2u64 {
                    scope.spawn(move || {
                        for round in 0..ROUNDS {
                            let pages = [1, 3, 20, 100][(round % 4) as usize];
                            let mut words = vec![0u64; pages * PAGE / 8];
                            let value = 1000 * thread + round;
                            let p = SvmPtr::from(black_box(&mut words).as_mut_ptr());
                            on_pages(svm, p, pages, Some(value)).unwrap();
                            check(p, pages, value);
                        }
                    });
                }
            });
        });
    });
}
