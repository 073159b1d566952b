//! What private mappings of files do with pages that are dropped, and what is heard of it.

use super::{BYTES, MISSING, complete, stopped};
use crate::sys::map;
use crate::sys::pagemap::{Categories, PageMap, Region};
use crate::sys::testing::{self, next_event, pages, started};
use crate::sys::uffd::{CopyFlags, Event, Features, RegisterModes, Uffd};
use gpusvm_types::{ByteSize, PageCount, Span, VirtAddr};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{Errno, pwrite};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, munmap};
use std::os::fd::OwnedFd;

/// What is asked of memory that has shared memory behind it.
const ALL: RegisterModes = RegisterModes {
    missing: true,
    wp: true,
    minor: true,
};

/// A private mapping of eight pages; the file has the first four, all of them threes.
struct Private {
    file: OwnedFd,
    span: Span,
}

impl Private {
    fn new() -> Self {
        let file = memfd_create("gpusvm-facts", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, pages(8).get()).unwrap();
        assert_eq!(pwrite(&file, &[3; 4 * 4096], 0), Ok(4 * 4096));
        let (access, len) = (ProtFlags::READ | ProtFlags::WRITE, pages(8).as_usize());
        let (anywhere, flags) = (core::ptr::null_mut(), MapFlags::PRIVATE);
        // SAFETY: no address is asked for.
        let at = unsafe { mmap(anywhere, len, access, flags, &file, 0) }.unwrap();
        at.expose_provenance();
        let span = Span::from_len(VirtAddr::from(at), pages(8)).unwrap();
        Self { file, span }
    }

    fn page(&self, n: u64) -> Span {
        Span::of_pages(
            self.span.first_page() + PageCount::new(n),
            PageCount::new(1),
        )
    }

    fn load(&self, n: u64) -> u8 {
        load(self.page(n).start())
    }

    fn store(&self, n: u64, value: u8) {
        // SAFETY: our own mapping.
        unsafe { pointer(self.page(n).start()).write_volatile(value) };
    }

    fn drop_page(&self, n: u64) {
        // SAFETY: the page is the test's.
        unsafe { map::discard(self.page(n)) }.unwrap();
    }

    fn register(&self, uffd: &Uffd, modes: RegisterModes) {
        // SAFETY: the tests answer what they touch.
        unsafe { uffd.register(self.span, modes) }.unwrap();
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`.
        let _ = unsafe { munmap(pointer(self.span.start()).cast(), pages(8).as_usize()) };
    }
}

fn pointer(at: VirtAddr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(ByteSize::new(at.get()).as_usize())
}

fn load(at: VirtAddr) -> u8 {
    // SAFETY: a test reads what it mapped.
    unsafe { pointer(at).read_volatile() }
}

fn copy(uffd: &Uffd, page: Span) -> super::Progress {
    let from = VirtAddr::from(&raw const BYTES);
    // SAFETY: sevens may be seen there.
    unsafe { uffd.copy(page.start(), from, page.len(), CopyFlags::default()) }
}

fn seen(page: Span) -> Option<Categories> {
    let mut out = [Region::EMPTY];
    let scanned = PageMap::open().unwrap().scan(page, &mut out).unwrap();
    (scanned.regions == 1).then_some(out[0].categories)
}

fn is_fault(event: Option<Event>) -> bool {
    matches!(event, Some(Event::Fault { wp: false, .. }))
}

/// Registered for missing pages only: what is dropped shows the file's page again, and nobody hears of it.
/// So such memory must not be registered that way.
#[test]
fn facts_a_dropped_page_is_the_files_again_unheard() {
    let Some(uffd) = testing::uffd(Features::NONE) else {
        return;
    };
    let memory = Private::new();
    memory.store(1, 9);
    memory.register(&uffd, MISSING);
    memory.drop_page(1);
    assert_eq!(memory.load(1), 3, "not nine, and no fault");
}

/// Registered for minor faults too: it waits; a copy makes it a page of the program's, and the file is as
/// it was.
#[test]
fn facts_a_dropped_page_is_heard_of_with_minor_faults() {
    let Some(uffd) = testing::uffd(Features::WP | Features::MINOR_SHMEM) else {
        return;
    };
    let memory = Private::new();
    memory.store(1, 9);
    memory.store(6, 9);
    memory.register(&uffd, ALL);
    for n in [1, 6] {
        let page = memory.page(n);
        memory.drop_page(n);
        let read = started(move || load(page.start()));
        assert!(is_fault(next_event(&uffd)), "page {n}");
        assert_eq!(copy(&uffd, page), complete(pages(1)), "page {n}");
        assert_eq!(read.recv(), Ok(7), "page {n}");
        assert!(!seen(page).unwrap().contains(Categories::FILE), "page {n}");
    }
    let mut byte = [0];
    assert_eq!(rustix::io::pread(&memory.file, &mut byte, 4096), Ok(1));
    assert_eq!(byte, [3]);
}

/// A page that the program has not written is answered with the file's; where the file has none, that is
/// refused.
#[test]
fn facts_a_page_of_the_file_is_mapped_on_demand() {
    let Some(uffd) = testing::uffd(Features::WP | Features::MINOR_SHMEM) else {
        return;
    };
    let memory = Private::new();
    memory.register(&uffd, ALL);
    let (page, hole) = (memory.page(2), memory.page(5));
    let read = started(move || load(page.start()));
    assert!(is_fault(next_event(&uffd)));
    assert_eq!(uffd.map_of_file(page, false), complete(pages(1)));
    assert_eq!(read.recv(), Ok(3));
    assert!(seen(page).unwrap().contains(Categories::FILE));
    let nothing = ByteSize::ZERO;
    assert_eq!(
        uffd.map_of_file(page, false),
        stopped(nothing, Errno::EXIST)
    );
    assert_eq!(
        uffd.map_of_file(hole, false),
        stopped(nothing, Errno::FAULT)
    );
    assert_eq!(uffd.zeropage(hole, false), complete(pages(1)));
    assert_eq!(memory.load(5), 0);
    // A write of the file's page makes it the program's.
    memory.store(2, 8);
    assert!(!seen(page).unwrap().contains(Categories::FILE));
}

/// Where there is a file, write protection stays behind when the page goes; it shows as a page, is in
/// nobody's way, and goes when it is asked to.
#[test]
fn facts_protection_outlives_the_page() {
    let Some(uffd) = testing::uffd(Features::WP | Features::MINOR_SHMEM) else {
        return;
    };
    let memory = Private::new();
    memory.store(1, 9);
    memory.register(&uffd, ALL);
    let page = memory.page(1);
    uffd.write_protect(page, true, false).unwrap();
    memory.drop_page(1);
    assert_eq!(seen(page), Some(Categories::SWAPPED));
    uffd.write_protect(page, false, false).unwrap();
    assert_eq!(seen(page), None);
    uffd.write_protect(page, true, false).unwrap();
    assert_eq!(copy(&uffd, page), complete(pages(1)));
    memory.store(1, 5);
    assert_eq!(memory.load(1), 5, "not protected any more");
}

/// Whatever the program may do with it, and unless the file ends before.
#[test]
fn facts_copy_fills_closed_memory_but_not_behind_the_end_of_the_file() {
    let Some(uffd) = testing::uffd(Features::WP | Features::MINOR_SHMEM) else {
        return;
    };
    let memory = Private::new();
    memory.register(&uffd, ALL);
    for (n, access) in [(1, MprotectFlags::READ), (2, MprotectFlags::empty())] {
        // SAFETY: our own, and nobody uses it.
        unsafe { map::protect(memory.span, access) }.unwrap();
        assert_eq!(copy(&uffd, memory.page(n)), complete(pages(1)));
        // SAFETY: as above.
        unsafe { map::protect(memory.span, MprotectFlags::READ) }.unwrap();
        assert_eq!(memory.load(n), 7);
    }
    ftruncate(&memory.file, pages(6).get()).unwrap();
    let behind = copy(&uffd, memory.page(7));
    assert_eq!(behind, stopped(ByteSize::ZERO, Errno::FAULT));
}

/// Other memory has no minor faults: there is no page in a file that is not in the mapping.
#[test]
fn facts_only_shared_memory_has_minor_faults() {
    let Some(uffd) = testing::uffd(Features::WP | Features::MINOR_SHMEM) else {
        return;
    };
    let memory = map::Request::new(pages(1)).dont_fork().map().unwrap();
    // SAFETY: nobody touches it.
    let refused = unsafe { uffd.register(memory.span(), ALL) };
    assert_eq!(refused, Err(Errno::INVAL));
    let program = std::fs::File::open("/proc/self/exe").unwrap();
    let (access, flags) = (ProtFlags::READ, MapFlags::PRIVATE);
    let (anywhere, len) = (core::ptr::null_mut(), pages(1).as_usize());
    // SAFETY: no address is asked for.
    let at = unsafe { mmap(anywhere, len, access, flags, &program, 0) }.unwrap();
    let span = Span::from_len(VirtAddr::from(at), pages(1)).unwrap();
    for modes in [ALL, MISSING] {
        // SAFETY: nobody touches it.
        let refused = unsafe { uffd.register(span, modes) };
        assert_eq!(refused, Err(Errno::INVAL), "{modes:?}");
    }
    // SAFETY: mapped above.
    unsafe { munmap(at, len) }.unwrap();
}
