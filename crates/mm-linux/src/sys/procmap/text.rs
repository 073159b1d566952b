//! The lines of `/proc/self/maps`, for kernels without `PROCMAP_QUERY`.
//!
//! ```text
//! 7f12a4600000-7f12a4800000 rw-p 00000000 00:00 0        [anon:name]
//! start        end          access offset dev  inode     name, may be long
//! ```
//!
//! The file is read in pieces of a fixed size; a line is kept up to where nothing in it matters
//! any more, and the rest of it is passed over.

use super::{RawVma, is_anonymous};
use gpusvm_types::{Span, VirtAddr};
use rustix::fd::AsFd;
use rustix::io::Errno;

/// What is read at once.
const PIECE: usize = 1024;
/// What is kept of a line: all up to the name, and the longest name that matters.
const KEPT: usize = 256;

/// The mapping that holds `at`, or the next above, or none.
pub(super) fn find(maps: impl AsFd, at: VirtAddr) -> Result<Option<RawVma>, Errno> {
    let mut piece = [0; PIECE];
    let mut line = Line::default();
    let mut offset = 0u64;
    loop {
        let got = rustix::io::pread(maps.as_fd(), &mut piece, offset)?;
        if got == 0 {
            return Ok(None);
        }
        offset += got as u64;
        if let Some(vma) = line.feed(&piece[..got], |vma| vma.span.end() > at) {
            return Ok(Some(vma));
        }
    }
}

/// The line that is being read.
struct Line {
    kept: [u8; KEPT],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            kept: [0; KEPT],
            len: 0,
        }
    }
}

impl Line {
    /// Takes in the next piece; the first mapping whose line ends in it and that is `wanted`.
    fn feed(&mut self, piece: &[u8], wanted: impl Fn(&RawVma) -> bool) -> Option<RawVma> {
        for byte in piece {
            if *byte != b'\n' {
                if let Some(free) = self.kept.get_mut(self.len) {
                    *free = *byte;
                    self.len += 1;
                }
                continue;
            }
            let vma = parse(&self.kept[..self.len]);
            self.len = 0;
            if vma.as_ref().is_some_and(&wanted) {
                return vma;
            }
        }
        None
    }
}

/// The mapping of a line, or `None` for a line that is none of ours.
fn parse(line: &[u8]) -> Option<RawVma> {
    let mut fields = line.splitn(6, |byte| *byte == b' ');
    let mut range = fields.next()?.splitn(2, |byte| *byte == b'-');
    let span = Span::new(address(range.next()?)?, address(range.next()?)?).ok()?;
    let access = fields.next()?;
    let (_offset, _device) = (fields.next()?, fields.next()?);
    let inode = number(fields.next()?, 10)?;
    let name = fields.next().unwrap_or(b"").trim_ascii_start();
    // A page of the kernel's, above every process: find_vma does not know it.
    if name == b"[vsyscall]" {
        return None;
    }
    let [read, write, exec, sharing, ..] = *access else {
        return None;
    };
    let shared = sharing == b's';
    let hugetlb = name.starts_with(b"/anon_hugepage");
    Some(RawVma {
        span,
        read: read == b'r',
        write: write == b'w',
        exec: exec == b'x',
        shared,
        anonymous_private: is_anonymous(shared, inode, name),
        private_file: !shared && inode != 0 && !hugetlb,
        hugetlb,
        is_stack: name == b"[stack]",
        is_heap: name == b"[heap]",
    })
}

fn address(digits: &[u8]) -> Option<VirtAddr> {
    number(digits, 16).map(VirtAddr::new)
}

fn number(digits: &[u8], radix: u32) -> Option<u64> {
    u64::from_str_radix(str::from_utf8(digits).ok()?, radix).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> RawVma {
        parse(line.as_bytes()).unwrap()
    }

    #[test]
    fn lines_table() {
        for (rest, anonymous, write) in [
            ("rw-p 00000000 00:00 0", true, true),
            ("rw-p 00000000 00:00 0 ", true, true),
            ("rw-p 00000000 00:00 0          [heap]", true, true),
            ("rw-p 00000000 00:00 0          [stack]", true, true),
            (
                "rw-p 00000000 00:00 0          [anon:glibc: malloc arena]",
                true,
                true,
            ),
            ("r--p 00000000 00:00 0          [vvar]", false, false),
            ("r-xp 00000000 00:00 0          [vdso]", false, false),
            (
                "rw-s 00000000 00:01 9          /dev/zero (deleted)",
                false,
                true,
            ),
            (
                "rw-p 00001000 fe:00 131        /usr/lib/with a blank.so",
                false,
                true,
            ),
            (
                "rw-p 00000000 00:0f 77         /anon_hugepage (deleted)",
                false,
                true,
            ),
        ] {
            let vma = parsed(&format!("7f0000000000-7f0000002000 {rest}"));
            assert_eq!(vma.anonymous_private, anonymous, "{rest}");
            assert_eq!(vma.write, write, "{rest}");
            assert_eq!(vma.hugetlb, rest.contains("hugepage"), "{rest}");
        }
        let vsyscall = b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]";
        assert_eq!(parse(vsyscall), None);
        assert_eq!(parse(b""), None);
    }

    /// A line of any length, cut anywhere, is one mapping.
    #[test]
    fn lines_longer_than_any_buffer_are_one_mapping_each() {
        let long = "x".repeat(5000);
        let text = format!(
            "1000-2000 r--p 0 fe:00 1 /{long}\n3000-4000 rw-p 0 00:00 0 \n5000-6000 rw-p 0 00:00 0 [heap]\n"
        );
        for cut in [1, 7, 64, 1024, 100_000] {
            let found = std::cell::RefCell::new(Vec::new());
            let mut line = Line::default();
            for piece in text.as_bytes().chunks(cut) {
                let none = line.feed(piece, |vma| {
                    found.borrow_mut().push(vma.span.start().get());
                    false
                });
                assert_eq!(none, None);
            }
            assert_eq!(*found.borrow(), [0x1000, 0x3000, 0x5000], "pieces of {cut}");
        }
    }
}
