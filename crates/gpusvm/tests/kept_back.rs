//! Pages that a userfaultfd of the program keeps back: devices never meet them, and who asks for them is told,
//! or waits by itself.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{InPlace, Map, can_adopt, two_devices, within};
use gpusvm::{Access, AdoptError, ByteSize, Error, FaultError, Span, Svm, VirtAddr};
use gpusvm_testkit::own_uffd::OwnUffd;
use std::time::Duration;

const PAGE: usize = 4096;
/// What is kept back of a mapping: these pages.
const FIRST: usize = 8;
const PAGES: usize = 4;

fn bytes(pages: usize) -> ByteSize {
    ByteSize::from_usize(pages * PAGE)
}

fn engine() -> Svm {
    two_devices(ByteSize::mib(8), false, InPlace(None))
}

/// A mapping of 64 pages with a part that is kept back; `None` where there is no userfaultfd.
fn kept_back(svm: &Svm) -> Option<(Map, OwnUffd)> {
    let uffd = can_adopt(svm).then(OwnUffd::open).flatten()?;
    let map = Map::new(64 * PAGE, false);
    uffd.register(page(&map, FIRST), PAGES).unwrap();
    Some((map, uffd))
}

fn page(map: &Map, n: usize) -> *mut u8 {
    map.at.wrapping_add(n * PAGE)
}

fn at(map: &Map, n: usize) -> VirtAddr {
    VirtAddr::from(page(map, n).cast_const())
}

fn mapped(svm: &Svm, map: &Map, n: usize) -> Option<Access> {
    let pages = svm.vm(0).unwrap().snapshot(page(map, n), bytes(1));
    pages.unwrap()[0].mapped
}

/// The page is named, nothing waits and no handler hears of it; once the page is there, all is as ever.
#[test]
fn memory_that_is_kept_back_is_not_populated() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        let Some((map, uffd)) = kept_back(&svm) else {
            return;
        };
        let vm = svm.vm(0).unwrap();
        for access in [Access::Read, Access::Write] {
            vm.populate(map.at, bytes(FIRST), access).unwrap();
            let refused = vm.populate(map.at, bytes(64), access);
            assert!(
                matches!(&refused, Err(Error::Populate { error: FaultError::KeptBack { at: found }, .. })
                    if *found == at(&map, FIRST)),
                "{refused:?}"
            );
            assert_eq!(refused.unwrap_err().errno(), libc::EFAULT);
        }
        // A range is mapped whole; but what it would meet there is no page.
        assert!(mapped(&svm, &map, 0) >= Some(Access::Write));
        assert_eq!(mapped(&svm, &map, FIRST), None);
        assert_eq!(uffd.next_fault(0), None);
        (FIRST..FIRST + PAGES).for_each(|n| uffd.fill(page(&map, n), 7).unwrap());
        vm.populate(map.at, bytes(64), Access::Write).unwrap();
        assert!(mapped(&svm, &map, FIRST) >= Some(Access::Write));
        let mut read = [0; 9];
        // SAFETY: nobody writes it meanwhile.
        unsafe { vm.read(page(&map, FIRST), &mut read) }.unwrap();
        assert_eq!(read, [7; 9]);
    });
}

/// A page that is missing, and marked as protected, looks like one that was swapped out: it is not there.
#[test]
fn a_mark_in_the_place_of_a_page_is_no_page() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        let Ok(Some(uffd)) = OwnUffd::open_protecting() else {
            println!("skipped: no userfaultfd here that protects pages that are missing");
            return;
        };
        let map = Map::new(64 * PAGE, false);
        uffd.register_and_protect(page(&map, FIRST), PAGES).unwrap();
        let vm = svm.vm(0).unwrap();
        vm.populate(map.at, bytes(FIRST), Access::Read).unwrap();
        assert!(mapped(&svm, &map, 0) >= Some(Access::Read));
        assert_eq!(mapped(&svm, &map, FIRST), None);
        let refused = vm.populate(map.at, bytes(64), Access::Read);
        assert!(
            matches!(&refused, Err(Error::Populate { error: FaultError::KeptBack { at: found }, .. })
                if *found == at(&map, FIRST)),
            "{refused:?}"
        );
        assert_eq!(uffd.next_fault(0), None);
    });
}

/// Who may wait, waits; who waits for what is protected meanwhile is told.
#[test]
fn who_may_wait_gets_what_the_handler_makes() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        let Some((map, uffd)) = kept_back(&svm) else {
            return;
        };
        let vm = svm.vm(0).unwrap();
        let all = &map;
        let wait = || vm.populate_unlocked(page(all, 0), bytes(64), Access::Read);
        std::thread::scope(|scope| {
            let waits = scope.spawn(wait);
            assert_eq!(uffd.next_fault(20_000), Some(page(&map, FIRST)));
            // SAFETY: permissions of our own memory, which nobody refers to.
            let done = unsafe { libc::mprotect(map.at.cast(), map.len, libc::PROT_NONE) };
            assert_eq!(done, 0);
            let told = waits.join().unwrap();
            assert_eq!(told.unwrap_err().errno(), libc::EFAULT);
        });
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: as above.
        assert_eq!(unsafe { libc::mprotect(map.at.cast(), map.len, access) }, 0);
        std::thread::scope(|scope| {
            let waits = scope.spawn(wait);
            for n in FIRST..FIRST + PAGES {
                // Who waited before may have asked for the first page a second time.
                while uffd.next_fault(20_000) != Some(page(&map, n)) {}
                uffd.fill(page(&map, n), 1).unwrap();
            }
            waits.join().unwrap().unwrap();
        });
        assert!(mapped(&svm, &map, FIRST) >= Some(Access::Read));
    });
}

/// What no handler can make is no reason to wait.
#[test]
fn nobody_waits_for_what_is_not_in_its_file() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        // SAFETY: a C string.
        let fd = unsafe { libc::memfd_create(c"short".as_ptr(), libc::MFD_CLOEXEC) };
        // SAFETY: a descriptor of our own.
        assert_eq!(unsafe { libc::ftruncate(fd, 4096) }, 0);
        let (access, flags) = (libc::PROT_READ, libc::MAP_SHARED);
        let nowhere = std::ptr::null_mut();
        // SAFETY: no address is asked for.
        let file = unsafe { libc::mmap(nowhere, 2 * PAGE, access, flags, fd, 0) };
        assert_ne!(file, libc::MAP_FAILED);
        let file = file.cast::<u8>();
        let vm = svm.vm(0).unwrap();
        vm.populate_unlocked(file, bytes(1), Access::Read).unwrap();
        let behind = vm.populate_unlocked(file, bytes(2), Access::Read);
        assert!(
            matches!(
                behind,
                Err(Error::Populate {
                    error: FaultError::KeptBack { .. },
                    ..
                })
            ),
            "{behind:?}"
        );
        // SAFETY: ours, and nobody uses it any more.
        unsafe { libc::munmap(file.cast(), 2 * PAGE) };
        // SAFETY: as above.
        unsafe { libc::close(fd) };
    });
}

/// There can be one userfaultfd for a mapping: the error says which mapping has another.
#[test]
fn memory_of_another_userfaultfd_is_not_adopted() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        let Some((map, uffd)) = kept_back(&svm) else {
            return;
        };
        let kept = Span::new(at(&map, FIRST), at(&map, FIRST + PAGES)).unwrap();
        let refused = svm.adopt(map.at, bytes(64)).unwrap_err();
        assert!(
            matches!(refused, Error::Memory(AdoptError::Taken { span }) if span == kept),
            "{refused:?}"
        );
        let told = refused.to_string();
        assert!(
            told.contains(&kept.to_string()) && told.contains("userfaultfd"),
            "{told}"
        );
        // Nothing of it is registered, or shared; and what is not taken can be.
        uffd.register(map.at, 64).unwrap();
        uffd.unregister(map.at, 64).unwrap();
        uffd.register(page(&map, FIRST), PAGES).unwrap();
        let adopted = svm.adopt_all(map.at, bytes(64)).unwrap();
        let adopted: Vec<_> = adopted.iter().map(|part| part.span()).collect();
        let parts = Span::new(at(&map, 0), at(&map, 64)).unwrap().without(kept);
        assert_eq!(adopted, parts.map(Option::unwrap));
    });
}
