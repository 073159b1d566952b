//! Allocations that are made to fail: everything arrives all the same.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{InPlace, two_devices, within};
use gpusvm::{ByteSize, Injection, PagePlace, RamPage, Rung, Svm, SvmSlice};
use std::time::Duration;

const BLOCK: ByteSize = ByteSize::mib(2);

fn engine() -> Svm {
    two_devices(ByteSize::mib(8), false, InPlace(None))
}

/// 2 MiB that begin with a block, each word with another number.
fn block(svm: &Svm) -> SvmSlice<u64> {
    let mut slice = svm.alloc_slice::<u64>(BLOCK.as_usize() / 8).unwrap();
    assert!(slice.as_ptr().addr().is_multiple_of(BLOCK.as_usize()));
    slice.iter_mut().zip(0..).for_each(|(word, n)| *word = n);
    slice
}

fn is_right(slice: &[u64]) -> bool {
    slice.iter().zip(0..).all(|(word, n)| *word == n)
}

/// How many pages of it are where, and how many of them are huge.
fn places(svm: &Svm, slice: &[u64]) -> (usize, usize) {
    let pages = svm.vm(0).unwrap().snapshot(slice.as_ptr(), BLOCK).unwrap();
    let count = |is: fn(&PagePlace) -> bool| pages.iter().filter(|page| is(&page.place)).count();
    (
        count(|place| *place == PagePlace::Device(0)),
        count(|place| matches!(place, PagePlace::Ram(RamPage { huge: true, .. }))),
    )
}

/// The device reads and writes what is in single pages, none next to the other, and it comes home whole.
#[test]
fn memory_that_is_in_pieces_on_the_device_is_whole() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        let mut slice = block(&svm);
        let vm = svm.vm(0).unwrap();
        let on_other = svm.inject(Injection::DeviceMemory(1)).unwrap();
        let injected = svm.inject(Injection::DeviceMemory(0)).unwrap();
        assert!(!injected.has_happened());
        vm.migrate(slice.as_ptr(), BLOCK).unwrap();
        assert!(injected.has_happened());
        assert!(!on_other.has_happened(), "it is for the other device");
        assert_eq!(places(&svm, &slice).0, 512);
        let mut bytes = vec![0; BLOCK.as_usize()];
        // SAFETY: the slice is only read.
        unsafe { vm.read(slice.as_ptr().cast(), &mut bytes) }.unwrap();
        let words = bytes.chunks_exact(8).zip(0u64..);
        assert!(words.clone().all(|(word, n)| word == n.to_ne_bytes()));
        let last = slice.as_mut_ptr().wrapping_add(slice.len() - 1);
        // SAFETY: nobody refers to the slice meanwhile.
        unsafe { vm.write(last.cast(), &7u64.to_ne_bytes()) }.unwrap();
        assert_eq!(vm.migrate_back(slice.as_ptr(), BLOCK).unwrap(), 512);
        let (rest, last) = slice.split_at(slice.len() - 1);
        assert!(is_right(rest) && *last == [7]);
        // From the device in single pages to the other, and home.
        let injected = svm.inject(Injection::DeviceMemory(0)).unwrap();
        vm.migrate(slice.as_ptr(), BLOCK).unwrap();
        assert!(injected.has_happened());
        svm.vm(1).unwrap().migrate(slice.as_ptr(), BLOCK).unwrap();
        assert!(on_other.has_happened());
        svm.evict(1).unwrap();
        assert!(is_right(&slice[..slice.len() - 1]));
        assert_eq!(svm.stats().vram_used_bytes, 0);
    });
}

/// Without a huge page for it, a block comes home in base pages, once.
#[test]
fn a_block_comes_home_without_a_huge_page() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        let slice = block(&svm);
        let vm = svm.vm(0).unwrap();
        let left_huge = places(&svm, &slice).1 == 512;
        let there_and_back = || {
            vm.migrate(slice.as_ptr(), BLOCK).unwrap();
            assert_eq!(vm.migrate_back(slice.as_ptr(), BLOCK).unwrap(), 512);
            assert!(is_right(&slice));
            places(&svm, &slice).1
        };
        there_and_back();
        let injected = svm.inject(Injection::HugePage).unwrap();
        let huge = there_and_back();
        // Where it leaves in a huge page and comes home in one, it did not this time.
        assert_eq!(injected.has_happened(), left_huge && moves(&svm));
        assert!(huge == 0 || !injected.has_happened());
        // What is dropped before it happens does not happen.
        drop(svm.inject(Injection::HugePage).unwrap());
        let injected = svm.inject(Injection::DeviceMemory(0)).unwrap();
        drop(injected);
        there_and_back();
    });
}

fn moves(svm: &Svm) -> bool {
    matches!(svm.rung(), Rung::Move | Rung::UserMode { moves: true })
}

/// There is no such device; and what is asked for twice fails once.
#[test]
fn what_cannot_fail_is_refused() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        assert!(svm.inject(Injection::DeviceMemory(2)).is_err());
        let slice = block(&svm);
        let first = svm.inject(Injection::DeviceMemory(0)).unwrap();
        let second = svm.inject(Injection::DeviceMemory(0)).unwrap();
        svm.vm(0).unwrap().migrate(slice.as_ptr(), BLOCK).unwrap();
        assert!(first.has_happened() && second.has_happened());
        assert!(is_right(&slice));
    });
}
