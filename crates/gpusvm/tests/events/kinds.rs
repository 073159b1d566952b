//! Memory of other kinds than the usual: that can only be read, and of private mappings of files.

use crate::common::Map;
use crate::load::{check, on_pages, sum_on_device};
use crate::on_rungs;
use crate::protects::is_not_permitted;
use crate::{BLOCK, PAGE};
use gpusvm::{AdoptError, ByteSize, Error, Protection, SvmPtr};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

const PAGES: usize = BLOCK / PAGE;
const LEN: ByteSize = ByteSize::from_usize(BLOCK);

/// What [`on_pages`] writes with zero, added up.
const SUM: u64 = (PAGES * (PAGES - 1) / 2) as u64;

fn protect(map: &Map, access: libc::c_int) {
    // SAFETY: our own mapping, which Rust does not use meanwhile.
    assert_eq!(unsafe { libc::mprotect(map.at.cast(), BLOCK, access) }, 0);
}

/// Its pages go to the device, which reads them, and may write them when the program may.
#[test]
fn a_device_reads_read_only_memory_where_it_is_fast() {
    on_rungs(true, |svm| {
        for huge in [true, false] {
            let map = Map::new(BLOCK, huge);
            let p = SvmPtr::from(map.at.cast::<u64>());
            // Numbers, or what was never touched.
            for touched in [true, false] {
                if touched {
                    for page in 0..PAGES {
                        // SAFETY: our own mapping.
                        unsafe { p.add(page * PAGE / 8).as_ptr().write_volatile(page as u64) };
                    }
                } else {
                    // SAFETY: as above; what it holds is given up.
                    unsafe { libc::madvise(map.at.cast(), BLOCK, libc::MADV_DONTNEED) };
                }
                protect(&map, libc::PROT_READ);
                let adopted = svm.adopt(map.at, LEN).unwrap();
                let sum = if touched { SUM } else { 0 };
                assert_eq!(sum_on_device(svm, p, PAGES), sum);
                assert_eq!(svm.stats().pages_on_devices, PAGES as u64);
                assert!(is_not_permitted(on_pages(svm, p, PAGES, Some(9))));
                assert_eq!(sum_on_device(svm, p, PAGES), sum);
                svm.touch(map.at, LEN).unwrap();
                assert_eq!(svm.stats().pages_on_devices, 0);
                assert_eq!(sum_on_device(svm, p, PAGES), sum);
                svm.protect(map.at, LEN, Protection::ReadWrite).unwrap();
                on_pages(svm, p, PAGES, Some(5)).unwrap();
                check(p, PAGES, 5);
                drop(adopted);
            }
        }
    });
}

/// What nobody may read, no device may: it is said at once.
#[test]
fn memory_that_nobody_may_read_is_not_adopted() {
    on_rungs(true, |svm| {
        let map = Map::new(BLOCK, false);
        protect(&map, libc::PROT_NONE);
        let refused = svm.adopt(map.at, LEN).unwrap_err();
        assert_eq!(refused.errno(), libc::EFAULT);
        assert!(matches!(
            refused,
            Error::Memory(AdoptError::NotReadable { .. })
        ));
        protect(&map, libc::PROT_READ);
        svm.adopt(map.at, LEN).unwrap();
    });
}

/// Brought to the device before it asks: memory that was never touched and can only be read, and the program's
/// pages of a file.
#[test]
fn memory_of_other_kinds_is_prefetched() {
    on_rungs(true, |svm| {
        let map = Map::new(BLOCK, true);
        protect(&map, libc::PROT_READ);
        let file = file_of_zeroes();
        let private = private_map(&file);
        private.bytes().fill(7);
        for (map, sum) in [(&map, 0), (&private, 0x0707_0707_0707_0707)] {
            let adopted = svm.adopt(map.at, LEN).unwrap();
            svm.prefetch(0, map.at, LEN).unwrap().wait().unwrap();
            assert_eq!(svm.stats().pages_on_devices, PAGES as u64);
            let p = SvmPtr::from(map.at.cast::<u64>());
            assert_eq!(sum_on_device(svm, p, 1), sum);
            // SAFETY: our own mapping.
            assert_eq!(unsafe { p.as_ptr().read_volatile() }, sum);
            drop(adopted);
            assert_eq!(svm.stats().pages_on_devices, 0);
        }
    });
}

fn file_of_zeroes() -> File {
    // SAFETY: a name of our own.
    let fd = unsafe { libc::memfd_create(c"gpusvm-kinds".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: just opened, and nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.write_all_at(&vec![0; BLOCK], 0).unwrap();
    file
}

/// A private mapping of a block of the file.
fn private_map(file: &File) -> Map {
    let map = Map::new(BLOCK, false);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    let (at, fd) = (map.at.cast(), file.as_raw_fd());
    // SAFETY: over memory of our own, which is empty.
    let mapped = unsafe { libc::mmap(at, BLOCK, access, flags, fd, 0) };
    assert_eq!(mapped, at);
    map
}

/// A private mapping of a file in memory: what the program has written migrates, the file is as it was.
#[test]
fn private_pages_of_a_file_go_to_the_device() {
    on_rungs(true, |svm| {
        let file = file_of_zeroes();
        let map = private_map(&file);
        let p = SvmPtr::from(map.at.cast::<u64>());
        let adopted = svm.adopt(map.at, LEN).unwrap();
        // Nothing is written yet: it is used in place.
        assert_eq!(sum_on_device(svm, p, PAGES), 0);
        assert_eq!(svm.stats().pages_on_devices, 0);
        // Some by the program, the rest by the device, in place.
        for page in 0..100 {
            // SAFETY: our own mapping.
            unsafe { p.add(page * PAGE / 8).as_ptr().write_volatile(7) };
        }
        on_pages(svm, p, PAGES, Some(1)).unwrap();
        check(p, PAGES, 1);
        // Now all of it is the program's; but it is mapped in place, and the device asks for nothing.
        drop(adopted);
        let adopted = svm.adopt(map.at, LEN).unwrap();
        on_pages(svm, p, PAGES, Some(3)).unwrap();
        assert_eq!(svm.stats().pages_on_devices, PAGES as u64);
        svm.protect(map.at, LEN, Protection::Read).unwrap();
        assert!(is_not_permitted(on_pages(svm, p, PAGES, Some(9))));
        check(p, PAGES, 3);
        drop(adopted);
        check(p, PAGES, 3);
        let mut bytes = [9; 8];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [0; 8]);
    });
}
