//! Memory of a test's own, and what is in it.

use super::errno;
use std::ops::Deref;

/// The bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// The pages of a huge page.
pub(crate) const HUGE: usize = 512;
pub(crate) const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Pages of a test's own, whose bytes nobody refers to; or address space where there were such.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) at: *mut u8,
    pub(crate) pages: usize,
}

// SAFETY: a place. Its bytes are read and written one by one, and nobody refers to them.
unsafe impl Send for Span {}
// SAFETY: as above.
unsafe impl Sync for Span {}

impl Span {
    /// So many of its pages, and maybe of those behind it.
    pub(crate) fn part(self, first: usize, pages: usize) -> Self {
        let at = self.page(first);
        Self { at, pages }
    }

    /// Where a page begins.
    pub(crate) fn page(self, n: usize) -> *mut u8 {
        self.at.wrapping_add(n * PAGE)
    }

    /// Its size in bytes.
    pub(crate) fn len(self) -> usize {
        self.pages * PAGE
    }

    /// The CPU writes the first byte of a page.
    pub(crate) fn set(self, page: usize, value: u8) {
        // SAFETY: memory of the test's own, which nobody refers to.
        unsafe { self.page(page).write_volatile(value) };
    }

    /// The CPU reads the first byte of a page.
    pub(crate) fn get(self, page: usize) -> u8 {
        // SAFETY: as above.
        unsafe { self.page(page).read_volatile() }
    }

    /// What the CPU reads there.
    pub(crate) fn read(self) -> Vec<u8> {
        let mut bytes = vec![0x5a; self.len()];
        self.copy_to(&mut bytes);
        bytes
    }

    /// As `read`, to there.
    pub(crate) fn copy_to(self, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), self.len());
        // SAFETY: as above, and of the same length.
        unsafe {
            self.at
                .copy_to_nonoverlapping(bytes.as_mut_ptr(), self.len())
        };
    }

    /// The CPU writes the whole pattern number `seed` there.
    pub(crate) fn fill(self, seed: u32) {
        for n in 0..self.len() / 4 {
            let at = self.at.cast::<u32>().wrapping_add(n);
            // SAFETY: as above.
            unsafe { at.write_volatile(word(seed, n)) };
        }
    }

    /// Whether the CPU finds that pattern.
    pub(crate) fn is_filled(self, seed: u32) -> bool {
        self.is_filled_in(0, self.pages, seed)
    }

    /// Whether it finds its part in these pages.
    pub(crate) fn is_filled_in(self, first: usize, pages: usize, seed: u32) -> bool {
        (first * PAGE / 4..(first + pages) * PAGE / 4).all(|n| {
            let at = self.at.cast::<u32>().wrapping_add(n);
            // SAFETY: as above.
            unsafe { at.read_volatile() == word(seed, n) }
        })
    }

    /// Whether the CPU finds zeroes.
    pub(crate) fn is_zero(self) -> bool {
        self.read().iter().all(|byte| *byte == 0)
    }
}

/// Memory that goes when the test is done with it, and with it the address space around it that is its own too.
#[derive(Debug)]
pub(crate) struct Area {
    span: Span,
    room: Span,
}

impl Area {
    /// Private memory, wherever the system has room.
    pub(crate) fn new(pages: usize) -> Self {
        let span = map(pages, READ_WRITE, libc::MAP_PRIVATE);
        Self { span, room: span }
    }

    /// Memory that children would share.
    pub(crate) fn shared(pages: usize) -> Self {
        let span = map(pages, READ_WRITE, libc::MAP_SHARED);
        Self { span, room: span }
    }

    /// Private memory that begins where a huge page does, with such pages or without, and that may be read, or
    /// written too. Nobody has touched it; before it and behind it there is as much room.
    pub(crate) fn aligned(pages: usize, huge: bool, protection: i32) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
        let room = map(3 * pages + HUGE, libc::PROT_NONE, flags);
        let middle = room.page(pages);
        let at = middle.wrapping_add(middle.align_offset(HUGE * PAGE));
        let span = Span { at, pages };
        let len = span.len();
        // SAFETY: pages of our own, which nobody has touched.
        assert_eq!(unsafe { libc::mprotect(at.cast(), len, protection) }, 0);
        let advice = match huge {
            true => libc::MADV_HUGEPAGE,
            false => libc::MADV_NOHUGEPAGE,
        };
        // SAFETY: as above.
        let advised = unsafe { libc::madvise(at.cast(), len, advice) };
        assert!(advised == 0 || !huge_pages(), "{}", errno());
        Self { span, room }
    }

    /// All of it.
    pub(crate) fn all(&self) -> Span {
        self.span
    }
}

impl Deref for Area {
    type Target = Span;

    fn deref(&self) -> &Span {
        &self.span
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: all of it is the test's own, and nobody refers to it.
        let unmapped = unsafe { libc::munmap(self.room.at.cast(), self.room.len()) };
        assert!(unmapped == 0 || std::thread::panicking(), "{}", errno());
    }
}

fn map(pages: usize, protection: i32, flags: i32) -> Span {
    let (nowhere, flags) = (std::ptr::null_mut(), flags | libc::MAP_ANONYMOUS);
    // SAFETY: no address is asked for.
    let at = unsafe { libc::mmap(nowhere, pages * PAGE, protection, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED, "{}", errno());
    let at = at.cast();
    Span { at, pages }
}

/// Whether the system makes huge pages where a program asks for them.
pub(crate) fn huge_pages() -> bool {
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    enabled.is_ok_and(|enabled| !enabled.contains("[never]"))
}

/// The bytes of the pattern number `seed` in these pages.
pub(crate) fn pattern(seed: u32, first: usize, pages: usize) -> Vec<u8> {
    let words = first * PAGE / 4..(first + pages) * PAGE / 4;
    words.flat_map(|n| word(seed, n).to_ne_bytes()).collect()
}

/// Another one in each place, and of each seed.
fn word(seed: u32, n: usize) -> u32 {
    u32::try_from(n).unwrap().wrapping_mul(0x9e37_79b1) ^ seed
}

/// Of long data that is not as wanted, only where it begins to differ.
#[track_caller]
pub(crate) fn assert_same(found: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b);
    assert_eq!(
        differs, None,
        "{what}: the first byte that is not as wanted"
    );
}
