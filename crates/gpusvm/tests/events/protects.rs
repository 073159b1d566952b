//! mprotect, which nobody hears of, and `Svm::protect`, which tells devices.

use crate::common::Map;
use crate::load::{check, on_pages};
use crate::{BLOCK, PAGE, on_rungs};
use gpusvm::{ByteSize, Error, FaultError, LaneError, Protection, SvmPtr};

const PAGES: usize = BLOCK / PAGE;
const LEN: ByteSize = ByteSize::from_usize(BLOCK);

pub(crate) fn is_not_permitted(result: Result<(), Error>) -> bool {
    let Err(Error::Launch(gpusvm::LaunchError::Lanes { first, .. })) = result else {
        return false;
    };
    matches!(first, LaneError::Fault(FaultError::NotPermitted { .. }))
}

/// What a device may no longer do, it does not do, wherever the pages are; the data is what it was.
#[test]
fn a_device_does_not_write_what_was_protected() {
    on_rungs(true, |svm| {
        let map = Map::new(BLOCK, false);
        let _adopted = svm.adopt(map.at, LEN).unwrap();
        let p = SvmPtr::from(map.at.cast::<u64>());
        for round in 0..10 {
            on_pages(svm, p, PAGES, Some(round)).unwrap();
            if round % 2 == 0 {
                check(p, PAGES, round);
            }
            svm.protect(map.at, LEN, Protection::Read).unwrap();
            assert!(is_not_permitted(on_pages(svm, p, PAGES, Some(99))));
            on_pages(svm, p, PAGES, None).unwrap();
            check(p, PAGES, round);
            svm.protect(map.at, LEN, Protection::ReadWrite).unwrap();
        }
    });
}

/// A part of a range changes: the device goes on with the rest of it.
#[test]
fn the_rest_of_a_range_is_written_when_a_part_was_protected() {
    on_rungs(true, |svm| {
        let map = Map::new(BLOCK, true);
        let _adopted = svm.adopt(map.at, LEN).unwrap();
        let p = SvmPtr::from(map.at.cast::<u64>());
        on_pages(svm, p, PAGES, Some(1)).unwrap();
        let part = map.at.wrapping_add(100 * PAGE);
        let len = ByteSize::from_usize(50 * PAGE);
        svm.protect(part, len, Protection::Read).unwrap();
        on_pages(svm, p, 100, Some(1000)).unwrap();
        on_pages(svm, p.add(200 * PAGE / 8), 100, Some(2000)).unwrap();
        let closed = on_pages(svm, p.add(120 * PAGE / 8), 1, Some(9));
        assert!(is_not_permitted(closed));
        check(p, 100, 1000);
        check(p.add(200 * PAGE / 8), 100, 2000);
        check(p.add(100 * PAGE / 8), 50, 101);
    });
}

/// Behind the engine's back: nothing is lost, and what the device wrote before it heard of it is there.
#[test]
fn pages_come_home_to_memory_that_was_protected_behind_the_engines_back() {
    on_rungs(true, |svm| {
        let map = Map::new(BLOCK, false);
        let _adopted = svm.adopt(map.at, LEN).unwrap();
        let p = SvmPtr::from(map.at.cast::<u64>());
        on_pages(svm, p, PAGES, Some(1)).unwrap();
        assert_eq!(svm.stats().pages_on_devices, PAGES as u64);
        let protect = |flags| {
            // SAFETY: our own mapping, which Rust does not write meanwhile.
            assert_eq!(unsafe { libc::mprotect(map.at.cast(), BLOCK, flags) }, 0);
        };
        protect(libc::PROT_READ);
        let value = match on_pages(svm, p, PAGES, Some(2)) {
            Ok(()) => 2,
            Err(_) => 1,
        };
        check(p, PAGES, value);
        // They are in RAM now: the device asks, and is told.
        assert!(is_not_permitted(on_pages(svm, p, PAGES, Some(3))));
        check(p, PAGES, value);
        protect(libc::PROT_READ | libc::PROT_WRITE);
        on_pages(svm, p, PAGES, Some(4)).unwrap();
        check(p, PAGES, 4);
    });
}

/// There, page protection is how pages are watched.
#[test]
fn the_last_rung_refuses_to_protect() {
    on_rungs(false, |svm| {
        let slice = svm.alloc_slice::<u64>(512).unwrap();
        let at = slice.device_ptr().as_ptr();
        let protected = svm.protect(at, ByteSize::kib(4), Protection::Read);
        assert_eq!(protected.is_err(), svm.rung().number() == 4);
        if protected.is_ok() {
            let again = svm.protect(at, ByteSize::kib(4), Protection::ReadWrite);
            again.unwrap();
        }
        drop(slice);
    });
}
