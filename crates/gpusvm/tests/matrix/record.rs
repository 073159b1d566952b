//! A record: a list of commands that the device reads, in the buffer itself, and the words that it
//! writes.
//!
//! ```text
//!   list     14 words    store at value | increment at _ | end, read by the device as it goes
//!   fence     1 word     written last, if no other place was named
//!   data     32 bits     what the device writes
//!   expected 32 bits     what the CPU wrote for comparison
//! ```

use core::mem::offset_of;
use gpusvm::{Lane, LaneError, SvmPtr, VirtAddr};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What the device writes when a list is done.
pub(crate) const FENCE: u64 = 0xdead_beef_dead_beef;
/// How many places one list can write to.
pub(crate) const PLACES: usize = 4;

const STORE: u64 = 1;
const INCREMENT: u64 = 2;
const END: u64 = 3;

/// One exec: 128 bytes, so that none lies in two pages.
#[repr(C)]
struct Layout {
    list: [u64; 14],
    fence: u64,
    data: u32,
    expected: u32,
}

/// How large a record is.
pub(crate) const SIZE: usize = size_of::<Layout>();
/// Where the word is that the device writes.
pub(crate) const DATA: usize = offset_of!(Layout, data);

/// A record in memory that the device and other threads use as well: every access is atomic.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record(*mut Layout);

/// What a command does to a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    Store,
    /// An atomic increment of what is one too little.
    Increment,
}

impl Record {
    /// The record at `at`, which must stay mapped while it is used.
    pub(crate) fn at(at: *mut u8) -> Self {
        assert_eq!(at.addr() % align_of::<Layout>(), 0, "a record is aligned");
        Self(at.cast())
    }

    /// A command for each of `places`, to write `value` there.
    pub(crate) fn write_list(self, places: &[*mut u8], value: u32, write: Write) {
        assert!(places.len() <= PLACES);
        self.word32(offset_of!(Layout, expected))
            .store(value, Ordering::Relaxed);
        let mut word = 0;
        let mut push = |value: u64| {
            self.word64(word * 8).store(value, Ordering::Relaxed);
            word += 1;
        };
        for place in places {
            let code = match write {
                Write::Store => STORE,
                Write::Increment => INCREMENT,
            };
            push(code);
            push(place.expose_provenance() as u64);
            push(u64::from(value));
        }
        push(END);
        let before = match write {
            Write::Store => 0,
            Write::Increment => value.wrapping_sub(1),
        };
        self.word32(DATA).store(before, Ordering::Release);
    }

    /// The word that the device writes.
    pub(crate) fn data(self) -> u32 {
        self.word32(DATA).load(Ordering::Acquire)
    }

    pub(crate) fn expected(self) -> u32 {
        self.word32(offset_of!(Layout, expected))
            .load(Ordering::Acquire)
    }

    /// Where the word is that the device writes.
    pub(crate) fn data_at(self) -> *mut u8 {
        self.0.cast::<u8>().wrapping_add(DATA)
    }

    /// The fence in the record itself.
    pub(crate) fn fence(self) -> Fence {
        Fence(
            self.0
                .cast::<u8>()
                .wrapping_add(offset_of!(Layout, fence))
                .cast(),
        )
    }

    /// Where the device begins to read.
    pub(crate) fn list(self) -> SvmPtr<u64> {
        SvmPtr::from(self.0.cast::<u64>())
    }

    fn word32(&self, offset: usize) -> &AtomicU32 {
        let at = self.0.cast::<u8>().wrapping_add(offset).cast();
        // SAFETY: inside the record, which is mapped and aligned, and only used by atomics.
        unsafe { AtomicU32::from_ptr(at) }
    }

    fn word64(&self, offset: usize) -> &AtomicU64 {
        let at = self.0.cast::<u8>().wrapping_add(offset).cast();
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(at) }
    }
}

/// A word in memory that says that an exec is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fence(pub(crate) *mut u64);

impl Fence {
    pub(crate) fn clear(self) {
        self.word().store(0, Ordering::Release);
    }

    pub(crate) fn is_signalled(self) -> bool {
        self.word().load(Ordering::Acquire) == FENCE
    }

    pub(crate) fn pointer(self) -> SvmPtr<u64> {
        SvmPtr::from(self.0)
    }

    fn word(&self) -> &AtomicU64 {
        // SAFETY: mapped and aligned as long as the fence is used, and only used by atomics.
        unsafe { AtomicU64::from_ptr(self.0) }
    }
}

/// What the device does: reads commands and obeys, then signals the fence.
pub(crate) fn execute(
    lane: &mut Lane<'_>,
    list: SvmPtr<u64>,
    fence: SvmPtr<u64>,
) -> Result<(), LaneError> {
    let mut at = list;
    loop {
        let command = lane.load(at)?;
        if command == END {
            break;
        }
        let place = SvmPtr::<u32>::new(VirtAddr::new(lane.load(at.add(1))?));
        let value = u32::try_from(lane.load(at.add(2))?).expect("a value of 32 bits");
        match command {
            STORE => lane.store(place, value)?,
            INCREMENT => lane.atomic_add(place, 1u32).map(drop)?,
            other => panic!("{other:#x} is no command"),
        }
        at = at.add(3);
    }
    std::sync::atomic::fence(Ordering::Release);
    lane.store(fence, FENCE)
}
