//! mremap: the data stays where it is, at another address.

use crate::common::Map;
use crate::load::{check, on_pages, sum_on_device};
use crate::{BLOCK, PAGE, on_rungs};
use gpusvm::{ByteSize, Svm, SvmPtr};
use std::mem::ManuallyDrop;

const PAGES: usize = BLOCK / PAGE;

fn move_onto(from: *mut u8, to: *mut u8, len: usize, more: libc::c_int) {
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | more;
    // SAFETY: both are mappings of the test; what is at the target is replaced.
    let moved = unsafe { libc::mremap(from.cast(), len, len, flags, to.cast::<libc::c_void>()) };
    assert_eq!(moved, to.cast(), "{}", std::io::Error::last_os_error());
}

fn unmap(at: *mut u8, len: usize) {
    // SAFETY: a mapping of the test, which nobody uses any more.
    assert_eq!(unsafe { libc::munmap(at.cast(), len) }, 0);
}

/// No byte is copied home for a move, and the device reads it at the new address.
#[test]
fn data_that_moves_stays_on_the_device() {
    on_rungs(true, |svm| {
        for more in [0, libc::MREMAP_DONTUNMAP] {
            let map = ManuallyDrop::new(Map::new(BLOCK, true));
            let there = ManuallyDrop::new(Map::new(BLOCK, true));
            let _adopted = svm.adopt(map.at, ByteSize::from_usize(BLOCK)).unwrap();
            on_pages(svm, map.at.cast::<u64>().into(), PAGES, Some(7)).unwrap();
            let before = svm.stats();
            assert_eq!(before.pages_on_devices, PAGES as u64);
            move_onto(map.at, there.at, BLOCK, more);
            let at = SvmPtr::from(there.at.cast::<u64>());
            let n = PAGES as u64;
            assert_eq!(sum_on_device(svm, at, PAGES), 7 * n + n * (n - 1) / 2);
            let after = svm.stats();
            assert_eq!(after.to_ram.bytes, before.to_ram.bytes);
            assert_eq!(after.pages_on_devices, n);
            check(at, PAGES, 7);
            unmap(there.at, BLOCK);
            if more != 0 {
                // SAFETY: left behind, empty.
                assert_eq!(unsafe { map.at.cast::<u64>().read_volatile() }, 0);
                unmap(map.at, BLOCK);
            }
        }
    });
}

/// A device had memory in place at an address, memory that nobody shares, and nobody heard that it went.
/// Then memory whose pages are on the device moves there. The device's unit sleeps for a page that its
/// own device has, and whoever brings it home waits for the unit.
#[test]
fn data_moves_to_where_a_device_had_other_memory_in_place() {
    on_rungs(true, |svm| {
        for _ in 0..20 {
            let map = ManuallyDrop::new(Map::new(BLOCK, false));
            let there = ManuallyDrop::new(Map::new(BLOCK, false));
            there.bytes().fill(1);
            let at = SvmPtr::from(there.at.cast::<u64>());
            on_pages(svm, at, PAGES, Some(3)).unwrap();
            let _adopted = svm.adopt(map.at, ByteSize::from_usize(BLOCK)).unwrap();
            on_pages(svm, map.at.cast::<u64>().into(), PAGES, Some(7)).unwrap();
            move_onto(map.at, there.at, BLOCK, 0);
            touch_both(svm, at);
            unmap(there.at, BLOCK);
        }
    });
}

fn touch_both(svm: &Svm, at: SvmPtr<u64>) {
    std::thread::scope(|scope| {
        scope.spawn(move || check(at, PAGES, 7));
        on_pages(svm, at, PAGES, None).unwrap();
    });
    check(at, PAGES, 7);
}
