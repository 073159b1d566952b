//! Memory that came to where other memory was, and nobody heard that it went: it was not watched then.

use crate::common::Map;
use crate::load::{check, on_pages};
use crate::{BLOCK, PAGE, on_rungs};
use gpusvm::{ByteSize, SvmPtr};

const PAGES: usize = BLOCK / PAGE;
const PLAIN: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
const OPEN: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// Half of a block went before a device used any of it; then the other half is watched; then new memory
/// comes. It is in a block that is watched, and is not itself: pages that left it came back as zeroes.
#[test]
fn new_memory_in_a_block_that_is_watched_already_keeps_its_data() {
    on_rungs(true, |svm| {
        for _ in 0..5 {
            let map = Map::new(BLOCK, false);
            let _adopted = svm.adopt(map.at, ByteSize::from_usize(BLOCK)).unwrap();
            let upper = map.at.wrapping_add(BLOCK / 2);
            // SAFETY: half of our own mapping.
            assert_eq!(unsafe { libc::munmap(upper.cast(), BLOCK / 2) }, 0);
            let low = SvmPtr::from(map.at.cast::<u64>());
            on_pages(svm, low, PAGES / 2, Some(1)).unwrap();
            // SAFETY: replaces nothing.
            let new = unsafe { libc::mmap(upper.cast(), BLOCK / 2, OPEN, PLAIN, -1, 0) };
            if new != upper.cast() {
                // Another thread's mapping came first.
                continue;
            }
            let high = SvmPtr::from(upper.cast::<u64>());
            on_pages(svm, high, PAGES / 2, Some(5)).unwrap();
            check(high, PAGES / 2, 5);
            check(low, PAGES / 2, 1);
        }
    });
}

/// Memory ends in the middle of what a fault fills at once: what is there of it is filled all the same.
#[test]
fn a_hole_next_to_the_end_of_a_mapping_is_filled() {
    on_rungs(true, |svm| {
        let map = Map::new(BLOCK, false);
        let _adopted = svm.adopt(map.at, ByteSize::from_usize(BLOCK)).unwrap();
        // Nobody watches, so nobody hears of it.
        let cut = map.at.wrapping_add(BLOCK - 3 * PAGE);
        // SAFETY: part of our own mapping.
        assert_eq!(unsafe { libc::munmap(cut.cast(), PAGE) }, 0);
        on_pages(svm, map.at.cast::<u64>().into(), 1, Some(1)).unwrap();
        // SAFETY: as above: watched by now, but never touched.
        unsafe { libc::madvise(map.at.cast(), BLOCK - 3 * PAGE, libc::MADV_DONTNEED) };
        let last = cut.wrapping_sub(PAGE).cast::<u64>();
        // SAFETY: in our own mapping.
        assert_eq!(unsafe { last.read_volatile() }, 0);
    });
}

/// A part of a block went unheard, and nothing came: the other part, adopted on its own, is used as ever.
#[test]
fn a_neighbour_that_went_unheard_keeps_nobody_from_using_the_rest() {
    on_rungs(true, |svm| {
        let map = Map::new(BLOCK, false);
        let _adopted = svm.adopt(map.at, ByteSize::from_usize(BLOCK)).unwrap();
        let hole = map.at.wrapping_add(BLOCK / 4);
        // SAFETY: part of our own mapping. A hole cuts the block in parts, once it is heard of.
        assert_eq!(unsafe { libc::munmap(hole.cast(), BLOCK / 4) }, 0);
        let p = SvmPtr::from(map.at.cast::<u64>());
        on_pages(svm, p, PAGES / 4, Some(1)).unwrap();
        // Heard of by now: two parts, of which the upper is not watched any more.
        let first = map.at.wrapping_add(BLOCK / 2);
        // SAFETY: part of our own mapping.
        assert_eq!(unsafe { libc::munmap(first.cast(), PAGE) }, 0);
        let upper = p.add((BLOCK / 2 + PAGE) / 8);
        on_pages(svm, upper, PAGES / 2 - 1, Some(2)).unwrap();
        check(upper, PAGES / 2 - 1, 2);
        check(p, PAGES / 4, 1);
    });
}

/// Memory that was adopted is freed unheard, and the library gets its address for a slice.
#[test]
fn a_slice_takes_over_an_address_that_was_adopted() {
    on_rungs(true, |svm| {
        for _ in 0..20 {
            let map = Map::new(BLOCK, false);
            let adopted = svm.adopt(map.at, ByteSize::from_usize(BLOCK)).unwrap();
            drop(map);
            // The kernel gives the same address again, as a rule.
            let slice = svm.alloc_slice::<u64>(2 * BLOCK / 8).unwrap();
            on_pages(svm, slice.device_ptr(), PAGES, Some(4)).unwrap();
            check(slice.device_ptr(), PAGES, 4);
            drop(adopted);
        }
    });
}
