//! Accessors on good memory and on every kind of bad memory.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]
#![expect(clippy::cast_possible_truncation, reason = "bytes of a pattern")]

use gpusvm_guarded as guarded;
use gpusvm_guarded::Refused;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

const PAGE: usize = 4096;

/// A mapping of its own.
struct Map {
    base: *mut u8,
    len: usize,
}

impl Map {
    fn anonymous(pages: usize) -> Self {
        Self::new(pages * PAGE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
    }

    /// Two pages of a file that has one.
    fn beyond_the_end_of_a_file() -> Self {
        // SAFETY: a valid name.
        let file = unsafe { libc::memfd_create(c"short".as_ptr(), 0) };
        // SAFETY: a file of ours.
        assert_eq!(unsafe { libc::ftruncate(file, 4096) }, 0);
        let map = Self::new(2 * PAGE, libc::MAP_SHARED, file);
        // SAFETY: ours, and mapped already.
        unsafe { libc::close(file) };
        map
    }

    fn new(len: usize, flags: i32, file: i32) -> Self {
        guarded::install().unwrap();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses the place.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, file, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        Self {
            base: base.cast(),
            len,
        }
    }

    fn at(&self, offset: usize) -> *mut u8 {
        self.base.wrapping_add(offset)
    }

    fn protect(&self, page: usize, protection: i32) {
        // SAFETY: a page of ours, without references into it.
        let result = unsafe { libc::mprotect(self.at(page * PAGE).cast(), PAGE, protection) };
        assert_eq!(result, 0);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: ours, without references into it.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// Whether every accessor, of every width, refuses `at` and says so.
fn refuses_everything(at: *mut u8, writes_only: bool) {
    let refused = Refused { addr: at.addr() };
    macro_rules! check {
        ($word:ty, $load:ident, $store:ident, $cas:ident) => {
            if !writes_only {
                // SAFETY: aligned, and refused.
                assert_eq!(unsafe { guarded::$load(at.cast::<$word>()) }, Err(refused));
            }
            // SAFETY: aligned, and refused.
            let got = unsafe { guarded::$store(at.cast::<$word>(), 1) };
            assert_eq!(got, Err(refused));
            // SAFETY: aligned, and refused.
            let got = unsafe { guarded::$cas(at.cast::<$word>(), 0, 1) };
            assert_eq!(got, Err(refused));
        };
    }
    check!(u8, load8, store8, compare_exchange8);
    check!(u16, load16, store16, compare_exchange16);
    check!(u32, load32, store32, compare_exchange32);
    check!(u64, load64, store64, compare_exchange64);
    // SAFETY: aligned, and refused.
    assert_eq!(unsafe { guarded::fetch_add32(at.cast(), 1) }, Err(refused));
    // SAFETY: aligned, and refused.
    assert_eq!(unsafe { guarded::fetch_add64(at.cast(), 1) }, Err(refused));
}

#[test]
fn good_memory_behaves_as_memory() {
    let map = Map::anonymous(1);
    macro_rules! check {
        ($word:ty, $load:ident, $store:ident, $cas:ident) => {{
            let at = map.base.cast::<$word>();
            // SAFETY: in the map.
            assert_eq!(unsafe { guarded::$store(at, <$word>::MAX - 1) }, Ok(()));
            // SAFETY: in the map.
            assert_eq!(unsafe { guarded::$load(at) }, Ok(<$word>::MAX - 1));
            // SAFETY: in the map.
            assert_eq!(unsafe { guarded::$cas(at, 3, 4) }, Ok(<$word>::MAX - 1));
            // SAFETY: in the map.
            let got = unsafe { guarded::$cas(at, <$word>::MAX - 1, 4) };
            assert_eq!(got, Ok(<$word>::MAX - 1));
            // SAFETY: in the map.
            assert_eq!(unsafe { guarded::$load(at) }, Ok(4));
        }};
    }
    check!(u8, load8, store8, compare_exchange8);
    check!(u16, load16, store16, compare_exchange16);
    check!(u32, load32, store32, compare_exchange32);
    check!(u64, load64, store64, compare_exchange64);
    // SAFETY: in the map.
    let got = unsafe { guarded::fetch_add32(map.base.cast(), u32::MAX) };
    assert_eq!(got, Ok(4));
    // SAFETY: in the map.
    assert_eq!(unsafe { guarded::fetch_add64(map.base.cast(), 7) }, Ok(3));
}

#[test]
fn bad_memory_is_reported() {
    guarded::install().unwrap();
    refuses_everything(ptr::null_mut(), false);
    refuses_everything(ptr::without_provenance_mut(8), false);
    refuses_everything(ptr::without_provenance_mut(1 << 63), false);
    refuses_everything(ptr::without_provenance_mut(0xdead_0000_0000_0000), false);
    let map = Map::anonymous(2);
    map.protect(1, libc::PROT_NONE);
    refuses_everything(map.at(PAGE + 64), false);
    map.protect(1, libc::PROT_READ);
    refuses_everything(map.at(PAGE + 64), true);
    // Canonical, and far from where the kernel puts mappings: nothing is there.
    refuses_everything(ptr::without_provenance_mut(1 << 40), false);
    refuses_everything(Map::beyond_the_end_of_a_file().at(PAGE), false);
}

#[test]
fn copies_of_all_lengths_and_alignments() {
    let (from, to) = (Map::anonymous(2), Map::anonymous(2));
    let fill = |map: &Map, seed: usize| {
        for i in 0..2 * PAGE {
            // SAFETY: in the map, of which there are no references.
            unsafe { map.at(i).write(((i * 31 + seed) % 251) as u8) };
        }
    };
    fill(&from, 7);
    type Copy = unsafe fn(*mut u8, *const u8, usize) -> Result<(), Refused>;
    for copy in [guarded::copy as Copy, guarded::copy_streaming] {
        for len in (0..300).chain([511, 512, 513, 1000, 4096, 4099, 8000]) {
            for (skip_to, skip_from) in [(0, 0), (1, 0), (0, 3), (7, 64), (63, 63), (65, 1)] {
                fill(&to, 99);
                // SAFETY: both are in their maps.
                unsafe { copy(to.at(skip_to), from.at(skip_from), len) }.unwrap();
                for i in 0..len + 2 {
                    let index = if i < len { skip_from + i } else { skip_to + i };
                    let seed = if i < len { 7 } else { 99 };
                    // SAFETY: in the map.
                    let got = unsafe { to.at(skip_to + i).read() };
                    assert_eq!(got, ((index * 31 + seed) % 251) as u8, "byte {i} of {len}");
                }
            }
        }
    }
}

#[test]
fn copies_stop_at_the_page_that_refuses() {
    type Copy = unsafe fn(*mut u8, *const u8, usize) -> Result<(), Refused>;
    let (whole, broken) = (Map::anonymous(3), Map::anonymous(3));
    broken.protect(1, libc::PROT_NONE);
    let edge = Err(Refused {
        addr: broken.at(PAGE).addr(),
    });
    for copy in [guarded::copy as Copy, guarded::copy_streaming] {
        for (start, len) in [(0, 3 * PAGE), (PAGE - 8, 16), (PAGE - 256, 512), (PAGE, 64)] {
            // SAFETY: in the maps.
            let got = unsafe { copy(whole.base, broken.at(start), len) };
            assert_eq!(got, edge, "from {start}");
            // SAFETY: in the maps.
            let got = unsafe { copy(broken.at(start), whole.base, len) };
            assert_eq!(got, edge, "to {start}");
        }
        // SAFETY: refused.
        let null = unsafe { copy(ptr::null_mut(), whole.base, 300) };
        assert_eq!(null, Err(Refused { addr: 0 }));
        let high = ptr::without_provenance_mut(1 << 63);
        // SAFETY: refused.
        let got = unsafe { copy(high, whole.base, 300) };
        assert_eq!(got, Err(Refused { addr: 1 << 63 }));
        // SAFETY: refused.
        let got = unsafe { copy(whole.base, high, 300) };
        assert_eq!(got, Err(Refused { addr: 1 << 63 }));
    }
    let file = Map::beyond_the_end_of_a_file();
    // SAFETY: in the maps.
    let copied = unsafe { guarded::copy(whole.base, file.base, 2 * PAGE) };
    assert_eq!(
        copied,
        Err(Refused {
            addr: file.at(PAGE).addr()
        })
    );
}

#[test]
fn clears_what_it_says_and_nothing_else() {
    let map = Map::anonymous(2);
    for (start, len) in [
        (64, PAGE),
        (1, 5),
        (1, 63),
        (60, 200),
        (0, 0),
        (63, 4033),
        (7, 8000),
    ] {
        // SAFETY: in the map.
        unsafe { map.base.write_bytes(1, 2 * PAGE) };
        // SAFETY: in the map.
        unsafe { guarded::clear_streaming(map.at(start), len) }.unwrap();
        for i in 0..2 * PAGE {
            let want = u8::from(i < start || i >= start + len);
            // SAFETY: in the map.
            let got = unsafe { map.at(i).read() };
            assert_eq!(got, want, "byte {i} of {len} at {start}");
        }
    }
    map.protect(1, libc::PROT_READ);
    let refused = Err(Refused {
        addr: map.at(PAGE).addr(),
    });
    // SAFETY: in the map.
    let got = unsafe { guarded::clear_streaming(map.base, 2 * PAGE) };
    assert_eq!(got, refused);
}

/// Threads access a page while another takes it away and gives it back: each access succeeds or is
/// reported, and no addition is lost.
#[test]
fn hammering_while_the_page_comes_and_goes() {
    let map = Map::anonymous(1);
    let base = map.base.expose_provenance();
    let done = AtomicU64::new(0);
    let refused = AtomicU64::new(0);
    let running = AtomicU32::new(3);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..100_000 {
                    // SAFETY: the map outlives the scope.
                    match unsafe { guarded::fetch_add64(ptr::with_exposed_provenance_mut(base), 1) }
                    {
                        Ok(_) => done.fetch_add(1, Ordering::Relaxed),
                        Err(_) => refused.fetch_add(1, Ordering::Relaxed),
                    };
                }
                running.fetch_sub(1, Ordering::Release);
            });
        }
        while running.load(Ordering::Acquire) != 0 {
            map.protect(0, libc::PROT_NONE);
            map.protect(0, libc::PROT_READ | libc::PROT_WRITE);
        }
    });
    assert_eq!(
        done.load(Ordering::Relaxed) + refused.load(Ordering::Relaxed),
        300_000
    );
    // SAFETY: in the map.
    let got = unsafe { guarded::load64(map.base.cast()) };
    assert_eq!(got, Ok(done.load(Ordering::Relaxed)));
}

#[test]
fn errno_survives() {
    guarded::install().unwrap();
    // SAFETY: it has no preconditions.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the thread's own.
    unsafe { errno.write(77) };
    // SAFETY: refused.
    unsafe { guarded::load8(ptr::null()) }.unwrap_err();
    // SAFETY: the thread's own.
    assert_eq!(unsafe { errno.read() }, 77);
}
