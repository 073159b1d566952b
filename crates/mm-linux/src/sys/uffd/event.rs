//! Messages, and the events that they mean.
//!
//! A message is four words as the kernel writes them; nothing in it is a pointer, so that
//! decoding is plain arithmetic.
//!
//! ```text
//!   word 0      1                  2            3
//!   event | -   fault flags        address      thread
//!   event | -   fork: descriptor
//!   event | -   remap: from        to           len
//!   event | -   remove: start      end
//! ```

use gpusvm_types::{ByteSize, VirtAddr};
use linux_raw_sys::general as raw;
use std::os::fd::RawFd;

/// One message of a userfaultfd, as read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Message([u64; 4]);

const _: () = assert!(size_of::<Message>() == size_of::<raw::uffd_msg>());
const _: () = assert!(core::mem::offset_of!(raw::uffd_msg, event) == 0);
const _: () = assert!(core::mem::offset_of!(raw::uffd_msg, arg) == 8);

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A thread touched a page and waits.
    Fault {
        /// The byte with `EXACT_ADDRESS`, else its page.
        at: VirtAddr,
        /// It wants to write. Always so when `wp`.
        write: bool,
        /// The page is there, but write-protected.
        wp: bool,
        /// Who waits, with `THREAD_ID`.
        tid: Option<i32>,
    },
    /// The process forked, and the child's faults come to a descriptor of their own.
    Fork {
        /// The descriptor: open already, owned by whoever read the message.
        fd: RawFd,
    },
    /// A mapping moved.
    Remap {
        /// From here.
        from: VirtAddr,
        /// To here.
        to: VirtAddr,
        /// Its length now.
        len: ByteSize,
    },
    /// Pages are being dropped.
    Remove {
        /// The first byte.
        start: VirtAddr,
        /// The first byte behind.
        end: VirtAddr,
    },
    /// A mapping is gone.
    Unmap {
        /// The first byte.
        start: VirtAddr,
        /// The first byte behind.
        end: VirtAddr,
    },
    /// Something that later kernels say.
    Unknown {
        /// What it is called there.
        event: u8,
    },
}

impl Message {
    /// Room for a message.
    pub(crate) const EMPTY: Self = Self([0; 4]);

    /// What it says.
    pub(crate) fn decode(&self) -> Event {
        let [head, a, b, c] = self.0;
        let event = head.to_ne_bytes()[0];
        match u32::from(event) {
            raw::UFFD_EVENT_PAGEFAULT => fault(a, VirtAddr::new(b), first_half(c)),
            raw::UFFD_EVENT_FORK => Event::Fork {
                fd: first_half(a).cast_signed(),
            },
            raw::UFFD_EVENT_REMAP => Event::Remap {
                from: VirtAddr::new(a),
                to: VirtAddr::new(b),
                len: ByteSize::new(c),
            },
            raw::UFFD_EVENT_REMOVE => Event::Remove {
                start: VirtAddr::new(a),
                end: VirtAddr::new(b),
            },
            raw::UFFD_EVENT_UNMAP => Event::Unmap {
                start: VirtAddr::new(a),
                end: VirtAddr::new(b),
            },
            _ => Event::Unknown { event },
        }
    }

    /// The memory of messages, to be read into.
    pub(super) fn as_bytes(messages: &mut [Self]) -> &mut [u8] {
        let len = size_of_val(messages);
        // SAFETY: a message is four plain words without padding, so every byte of it may be read
        // and any byte may be written; the borrow is handed on.
        unsafe { core::slice::from_raw_parts_mut(messages.as_mut_ptr().cast::<u8>(), len) }
    }
}

fn fault(flags: u64, at: VirtAddr, thread: u32) -> Event {
    let any = |mask: u32| flags & u64::from(mask) != 0;
    Event::Fault {
        at,
        // A protected page only faults on writes: either bit says write.
        write: any(raw::UFFD_PAGEFAULT_FLAG_WP | raw::UFFD_PAGEFAULT_FLAG_WRITE),
        wp: any(raw::UFFD_PAGEFAULT_FLAG_WP),
        tid: (thread != 0).then(|| thread.cast_signed()),
    }
}

/// The 32-bit field that the kernel puts at the start of a word.
fn first_half(word: u64) -> u32 {
    let bytes = word.to_ne_bytes();
    u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(event: u32, words: [u64; 3]) -> Message {
        let head = u64::from_ne_bytes([u8::try_from(event).unwrap(), 0, 0, 0, 0, 0, 0, 0]);
        Message([head, words[0], words[1], words[2]])
    }

    fn in_first_half(value: u32) -> u64 {
        let [a, b, c, d] = value.to_ne_bytes();
        u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0])
    }

    /// `flags & (WP | WRITE) != 0` reads as `flags & ((WP | WRITE) != 0)` in C, which is
    /// `flags & 1`: a pager was bitten by that. All combinations, spelled out.
    #[test]
    fn fault_flags_table() {
        const WRITE: u64 = 1;
        const WP: u64 = 2;
        const MINOR: u64 = 4;
        for (flags, write, wp) in [
            (0, false, false),
            (WRITE, true, false),
            (WP, true, true),
            (WP | WRITE, true, true),
            (MINOR, false, false),
            (MINOR | WRITE, true, false),
            (MINOR | WP, true, true),
            (MINOR | WP | WRITE, true, true),
        ] {
            let at = VirtAddr::new(0x7000_1234);
            let got = message(raw::UFFD_EVENT_PAGEFAULT, [flags, at.get(), 0]).decode();
            assert_eq!(
                got,
                Event::Fault {
                    at,
                    write,
                    wp,
                    tid: None
                },
                "flags {flags:#x}"
            );
        }
    }

    #[test]
    fn the_other_events() {
        let at = VirtAddr::new;
        let tid = message(raw::UFFD_EVENT_PAGEFAULT, [0, 0x1000, in_first_half(4711)]).decode();
        assert!(matches!(
            tid,
            Event::Fault {
                tid: Some(4711),
                ..
            }
        ));
        let fork = message(raw::UFFD_EVENT_FORK, [in_first_half(7), 0, 0]).decode();
        assert_eq!(fork, Event::Fork { fd: 7 });
        let remap = message(raw::UFFD_EVENT_REMAP, [0x1000, 0x9000, 0x2000]).decode();
        let (from, to) = (at(0x1000), at(0x9000));
        assert_eq!(
            remap,
            Event::Remap {
                from,
                to,
                len: ByteSize::kib(8)
            }
        );
        let (start, end) = (at(0x1000), at(0x3000));
        let words = [0x1000, 0x3000, 0];
        assert_eq!(
            message(raw::UFFD_EVENT_REMOVE, words).decode(),
            Event::Remove { start, end }
        );
        assert_eq!(
            message(raw::UFFD_EVENT_UNMAP, words).decode(),
            Event::Unmap { start, end }
        );
        assert_eq!(message(99, words).decode(), Event::Unknown { event: 99 });
    }
}
