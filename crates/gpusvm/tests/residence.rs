//! Where pages are and what a device has mapped, looked at and changed on request.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{InPlace, Map, built, can_adopt, two_devices, within};
use gpusvm::{
    Access, ByteSize, Error, FaultError, PagePlace, PageState, Protection, RamPage, SoftGpu, Svm,
};
use std::sync::Arc;
use std::time::Duration;

const PAGE: usize = 4096;

fn bytes(pages: usize) -> ByteSize {
    ByteSize::from_usize(pages * PAGE)
}

/// Two devices whose faults move nothing.
fn engine() -> Svm {
    two_devices(ByteSize::mib(8), false, InPlace(None))
}

fn state(svm: &Svm, device: usize, at: *const u8) -> PageState {
    svm.vm(device).unwrap().snapshot(at, bytes(1)).unwrap()[0]
}

fn populated(svm: &Svm, at: *const u8, pages: usize, access: Access) -> Result<(), i32> {
    let populated = svm.vm(0).unwrap().populate(at, bytes(pages), access);
    populated.map_err(|error| error.errno())
}

fn protect(at: *mut u8, access: i32) {
    // SAFETY: permissions of our own memory, which nobody refers to.
    assert_eq!(unsafe { libc::mprotect(at.cast(), PAGE, access) }, 0);
}

/// Each page of a mapping in another state: all of them are told, and none changes by being looked at.
#[test]
fn a_snapshot_tells_what_each_page_is() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        if !can_adopt(&svm) {
            return;
        }
        let map = Map::new(8 * PAGE, false);
        let page = |n: usize| map.at.wrapping_add(n * PAGE);
        map.bytes()[3 * PAGE] = 1;
        map.bytes()[4 * PAGE] = 1;
        map.bytes()[5 * PAGE] = 1;
        map.bytes()[6 * PAGE] = 1;
        // SAFETY: our own memory.
        assert_eq!(unsafe { page(2).read_volatile() }, 0);
        let _adopted = svm.adopt_all(map.at, bytes(8)).unwrap();
        svm.vm(0).unwrap().migrate(page(5), bytes(1)).unwrap();
        svm.vm(1).unwrap().migrate(page(6), bytes(1)).unwrap();
        protect(page(0), libc::PROT_NONE);
        protect(page(3), libc::PROT_READ);
        let look = || svm.vm(0).unwrap().snapshot(map.at, bytes(8)).unwrap();
        let seen = look();
        let ram = |zero| {
            PagePlace::Ram(RamPage {
                zero,
                copied_on_write: zero,
                huge: false,
            })
        };
        let wanted = [
            (Protection::None, PagePlace::Nowhere),
            (Protection::ReadWrite, PagePlace::Nowhere),
            (Protection::ReadWrite, ram(true)),
            (Protection::Read, ram(false)),
            (Protection::ReadWrite, ram(false)),
            (Protection::ReadWrite, PagePlace::Device(0)),
            (Protection::ReadWrite, PagePlace::Device(1)),
            (Protection::ReadWrite, PagePlace::Nowhere),
        ];
        for (n, (seen, (protection, place))) in seen.iter().zip(wanted).enumerate() {
            assert_eq!(
                (seen.protection, seen.place),
                (Some(protection), place),
                "page {n}"
            );
            assert_eq!(seen.mapped, None, "page {n}");
        }
        assert_eq!(look(), seen, "looking changes nothing");
        assert_eq!(svm.stats().cpu_faults, 0);
    });
}

/// Nothing moves when memory is populated, also where the policy would move it, and what is mapped is known.
#[test]
fn populated_pages_are_mapped_where_they_are() {
    within(Duration::from_secs(60), || {
        let gpu = SoftGpu::builder().vram(ByteSize::mib(8)).units(1).build();
        let svm = built(Svm::builder().device(gpu.unwrap()));
        let mut slice = svm.alloc_slice::<u8>(4 * PAGE).unwrap();
        slice.fill(7);
        populated(&svm, slice.as_ptr(), 4, Access::Write).unwrap();
        let state = state(&svm, 0, slice.as_ptr());
        assert!(matches!(state.place, PagePlace::Ram(_)), "{state:?}");
        assert!(state.mapped >= Some(Access::Write), "{state:?}");
        let mut copy = vec![0; 4 * PAGE];
        // SAFETY: the slice is only read, here and there.
        unsafe { svm.vm(0).unwrap().read(slice.as_ptr(), &mut copy) }.unwrap();
        assert_eq!(copy, *slice);
        assert_eq!(svm.stats().device_faults, 0, "all of it was mapped");
        assert_eq!(svm.stats().to_device.bytes, 0);
    });
}

/// What may not be done is refused as the kernel refuses it.
#[test]
fn what_cannot_be_populated_says_why() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        let map = Map::new(4 * PAGE, false);
        let page = |n: usize| map.at.wrapping_add(n * PAGE);
        map.bytes().fill(3);
        protect(page(1), libc::PROT_READ);
        protect(page(2), libc::PROT_NONE);
        // SAFETY: a page of our own that nobody uses any more.
        assert_eq!(unsafe { libc::munmap(page(3).cast(), PAGE) }, 0);
        let (eperm, efault) = (1, 14);
        for (access, refused) in [
            (Access::Read, [Ok(()), Ok(()), Err(efault), Err(efault)]),
            (
                Access::Write,
                [Ok(()), Err(eperm), Err(efault), Err(efault)],
            ),
        ] {
            for (n, wanted) in refused.into_iter().enumerate() {
                assert_eq!(
                    populated(&svm, page(n), 1, access),
                    wanted,
                    "{access:?} of {n}"
                );
            }
        }
        let across = svm.vm(0).unwrap().populate(map.at, bytes(3), Access::Read);
        assert!(
            matches!(across, Err(Error::Populate { error: FaultError::NotPermitted { at, .. }, .. })
                if at.get() == page(2).addr() as u64),
            "{across:?}"
        );
        // Before the error, all is mapped; and permissions that come back are seen once they are told.
        assert_eq!(state(&svm, 0, page(1)).mapped, Some(Access::Read));
        protect(page(1), libc::PROT_READ | libc::PROT_WRITE);
        svm.was_protected(page(1), bytes(1)).unwrap();
        assert_eq!(state(&svm, 0, page(1)).mapped, None);
        populated(&svm, page(1), 1, Access::Write).unwrap();
        // SAFETY: nobody refers to the page.
        unsafe { svm.vm(0).unwrap().write(page(1), &[9; 10]) }.unwrap();
        // SAFETY: our own memory.
        assert_eq!(unsafe { page(1).wrapping_add(9).read_volatile() }, 9);
    });
}

/// Atomics that do not work on RAM take pages to the device, and a touch of the CPU takes them back.
#[test]
fn atomics_that_do_not_work_on_ram_make_pages_the_devices_own() {
    within(Duration::from_secs(60), || {
        let gpu = SoftGpu::builder().vram(ByteSize::mib(8)).units(1);
        let gpu = gpu.atomics_on_ram(false).build().unwrap();
        let builder = Svm::builder().device(gpu).policy(Arc::new(InPlace(None)));
        let svm = built(builder);
        let mut slice = svm.alloc_slice::<u8>(4 * PAGE).unwrap();
        slice.fill(1);
        populated(&svm, slice.as_ptr(), 4, Access::Write).unwrap();
        assert_eq!(state(&svm, 0, slice.as_ptr()).mapped, Some(Access::Write));
        populated(&svm, slice.as_ptr(), 4, Access::Atomic).unwrap();
        let there = state(&svm, 0, slice.as_ptr());
        assert_eq!(there.place, PagePlace::Device(0));
        assert_eq!(there.mapped, Some(Access::Atomic));
        slice[5] += 1;
        assert_eq!(state(&svm, 0, slice.as_ptr()).mapped, None);
        assert_eq!(slice[5], 2);
    });
}

/// Just these pages: neighbours of the same range stay, pages of another device too when this one's go home.
#[test]
fn only_the_pages_that_were_named_move() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        let mut slice = svm.alloc_slice::<u8>(512 * PAGE).unwrap();
        slice.fill(5);
        let page = |n: usize| slice.as_ptr().wrapping_add(n * PAGE);
        let on = |device| {
            let pages = svm.vm(0).unwrap().snapshot(page(0), bytes(512)).unwrap();
            let here = |page: &&PageState| page.place == PagePlace::Device(device);
            pages.iter().filter(here).count()
        };
        svm.vm(0).unwrap().migrate(page(100), bytes(3)).unwrap();
        assert_eq!((on(0), on(1)), (3, 0));
        svm.vm(1).unwrap().migrate(page(110), bytes(1)).unwrap();
        assert_eq!((on(0), on(1)), (3, 1));
        // One of those that came together: the others stay.
        let back = |n, pages| svm.vm(0).unwrap().migrate_back(page(n), bytes(pages));
        assert_eq!(back(101, 1).unwrap(), 1);
        assert_eq!((on(0), on(1)), (2, 1));
        assert_eq!(back(101, 1).unwrap(), 0);
        svm.vm(0).unwrap().migrate(page(101), bytes(1)).unwrap();
        assert_eq!((on(0), on(1)), (3, 1));
        assert_eq!(
            svm.vm(0)
                .unwrap()
                .migrate_back(page(0), bytes(512))
                .unwrap(),
            3
        );
        assert_eq!((on(0), on(1)), (0, 1));
        svm.evict(1).unwrap();
        assert_eq!((on(0), on(1)), (0, 0));
        assert_eq!(svm.stats().vram_used_bytes, 0);
        assert!(slice.iter().all(|byte| *byte == 5));
    });
}

/// All that can be shared is, and what is shared already stays with whoever shared it.
#[test]
fn what_can_be_shared_is_and_the_rest_is_used_in_place() {
    within(Duration::from_secs(60), || {
        let svm = engine();
        if !can_adopt(&svm) {
            return;
        }
        let map = Map::new(8 * PAGE, false);
        map.bytes().fill(2);
        let page = |n: usize| map.at.wrapping_add(n * PAGE);
        let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: in the place of two pages of our own.
        let at = unsafe { libc::mmap(page(4).cast(), 2 * PAGE, access, shared, -1, 0) };
        assert_eq!(at, page(4).cast());
        let first = svm.adopt(page(1), bytes(1)).unwrap();
        let rest = svm.adopt_all(map.at, bytes(8)).unwrap();
        let spans: Vec<_> = rest.iter().map(|part| part.span()).collect();
        let number = |at: gpusvm::VirtAddr| (at.get() - map.at.addr() as u64) / PAGE as u64;
        let spans: Vec<_> = spans
            .iter()
            .map(|span| (number(span.start()), number(span.end())))
            .collect();
        assert_eq!(spans, [(0, 1), (2, 4), (6, 8)]);
        assert!(first.is_current() && rest.iter().all(|part| part.is_current()));
        assert!(svm.adopt_all(map.at, bytes(8)).unwrap().is_empty());
        // The shared pages move nowhere, and are written in place.
        assert!(svm.vm(0).unwrap().migrate(page(4), bytes(2)).is_err());
        // SAFETY: nobody refers to the pages.
        unsafe { svm.vm(0).unwrap().write(page(4), &[8; 2 * PAGE]) }.unwrap();
        // SAFETY: our own memory.
        assert_eq!(unsafe { page(5).read_volatile() }, 8);
    });
}

/// Story: a program touched memory that was on the device, and closed the device at once. What the touch had
/// brought home was still being given back, so that nobody could be found to wait for, and closing failed with
/// pages "still on the device".
#[test]
fn everything_is_evicted_right_after_a_touch_of_the_cpu() {
    within(Duration::from_secs(120), || {
        let svm = engine();
        let mut bytes = svm.alloc_slice::<u8>(4 << 20).unwrap();
        let (at, len) = (bytes.as_mut_ptr(), ByteSize::mib(4));
        for round in 0..400u32 {
            let value = u8::try_from(round % 251).unwrap();
            bytes.fill(value);
            svm.vm(0).unwrap().migrate(at, len).unwrap();
            // The last of it is on its way when this goes on.
            for block in 0..2 {
                assert_eq!(bytes[block << 21 | 4096], value);
            }
            assert!(round > 0 || svm.in_use(0).unwrap().1 <= len);
            svm.evict(0).unwrap();
            while svm.in_use(0).unwrap() != (0, ByteSize::ZERO) {
                std::thread::yield_now();
            }
        }
        svm.vm(0).unwrap().migrate(at, len).unwrap();
        assert_eq!(svm.in_use(0).unwrap(), (1024, len));
        assert_eq!(svm.in_use(1).unwrap(), (0, ByteSize::ZERO));
        assert_eq!(svm.in_use(2).unwrap_err().errno(), libc::ENODEV);
    });
}
