//! The program's loads and stores.
//!
//! ```text
//!   touch -- the kernel has the page ------------------> done
//!     ^  `-- no mapping, no permission ----------------> Segv
//!     |  `-- the page is lost -------------------------> Bus
//!     |  `-- nothing there, and the block is watched: fault::serve, and again
//!     `------------------------------------------------------'
//! ```

use crate::Sim;
use crate::fault::Urgency;
use crate::frame::PAGE_BYTES;
use crate::kernel::Refused;
use gpusvm_types::{ByteSize, VirtAddr};

/// What a thread gets that touches memory it must not, or that is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// `SIGSEGV`: nothing is mapped, or not for this.
    Segv,
    /// `SIGBUS`: the page is lost.
    Bus,
}

/// An access that faults more often than this makes no progress.
const MOST_FAULTS: u32 = 100_000;

impl Sim {
    /// A load of a program's thread.
    ///
    /// # Errors
    ///
    /// The signal that the thread gets.
    ///
    /// # Panics
    ///
    /// When `at` is not a multiple of eight.
    pub fn read_u64(&self, at: VirtAddr) -> Result<u64, Signal> {
        self.note(format_args!("read {at}"));
        self.access(at, false, |word| u64::from_le_bytes(*word))
    }

    /// A store.
    ///
    /// # Errors
    ///
    /// The signal that the thread gets.
    ///
    /// # Panics
    ///
    /// When `at` is not a multiple of eight.
    pub fn write_u64(&self, at: VirtAddr, value: u64) -> Result<(), Signal> {
        self.note(format_args!("write {at}"));
        self.access(at, true, |word| *word = value.to_le_bytes())
    }

    /// An atomic addition; what was there before comes back.
    ///
    /// # Errors
    ///
    /// The signal that the thread gets.
    ///
    /// # Panics
    ///
    /// When `at` is not a multiple of eight.
    pub fn fetch_add_u64(&self, at: VirtAddr, by: u64) -> Result<u64, Signal> {
        self.note(format_args!("add {at}"));
        self.access(at, true, |word| {
            let before = u64::from_le_bytes(*word);
            *word = before.wrapping_add(by).to_le_bytes();
            before
        })
    }

    fn access<T>(
        &self,
        at: VirtAddr,
        write: bool,
        act: impl Fn(&mut [u8; 8]) -> T,
    ) -> Result<T, Signal> {
        for _ in 0..MOST_FAULTS {
            self.yield_now();
            let touched = self
                .kernel
                .lock()
                .touch(at, write, |page| act(word_at(page, at)));
            match touched {
                Ok(value) => return Ok(value),
                Err(Refused::Segv) => return Err(Signal::Segv),
                Err(Refused::Bus) => return Err(Signal::Bus),
                Err(Refused::Missing) => {}
            }
            match self.serve_fault(at) {
                Urgency::Done => {}
                Urgency::Later(due) => self.wait_for_page(due),
            }
        }
        panic!(
            "seed {}: an access of {at} faulted {MOST_FAULTS} times",
            self.seed()
        );
    }
}

/// The aligned word at an address, in its page.
pub(crate) fn word_at(page: &mut [u8; PAGE_BYTES], at: VirtAddr) -> &mut [u8; 8] {
    assert!(at.is_aligned(ByteSize::new(8)), "{at} is not aligned");
    let offset = at.page_offset().as_usize();
    let word = &mut page[offset..offset + 8];
    word.try_into().expect("eight bytes")
}
