//! Where a page lives: one atomic word per page.
//!
//! ```text
//!   System ---mark_collected---> Collected ---settle_device---> Device
//!   ^ ^  ^_______settle_system______/                             |
//!   | |                                                      mark_leaving
//!   | +----------settle_system---------- Leaving <----------------+
//!   |                                       \__stay_on_device_____^
//!   |
//!   `-- settle_system -- Coherent <-- settle_coherent -- System
//!
//!   flags, set at any time by events, without a lock:
//!     dropped   the program gave the contents up (MADV_DONTNEED)
//!     unmapped  the mapping is gone
//!
//!   flag of a page in RAM, set and cleared by the holder of the block lock, cleared by every mark_*:
//!     protected the CPU cannot write the page: devices may have copies of it to read
//! ```
//!
//! Only the holder of the block lock changes the state; events only add flags. So a state change is
//! one compare-and-swap loop that keeps, and returns, the flags.
//!
//! # Invariants
//!
//! A word names a device page exactly as long as that page holds, or has just held, the only copy of
//! the page's bytes. Where bytes are in RAM and in copies on devices, the word says `System` and
//! `protected`, and nobody can write any of them before it does not.
//!
//! A coherent page is the exception that is none: the CPU and devices use the same bytes, at the address
//! where the program has them, and the word names the device page that it takes up. So nothing is copied
//! when it comes or goes, no touch waits for it, and whoever maps it maps that address.
//!
//! # Differences from the kernel
//!
//! There a coherent page (`MEMORY_DEVICE_COHERENT`) is a page frame of the device, which a migration copies
//! to. What maps it then is the same: an ordinary page table entry.

use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{DevicePfn, PageCount};

/// Which device memory of an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceMemoryId(pub u8);

/// One page of device memory that stands in for a page of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevicePage {
    /// In which memory.
    pub memory: DeviceMemoryId,
    /// Which page of it.
    pub pfn: DevicePfn,
}

/// Consecutive pages of one device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRun {
    /// The first page.
    pub first: DevicePage,
    /// How many.
    pub count: PageCount,
}

impl DeviceRun {
    /// Whether `page` is the next page behind the run.
    pub fn continues_with(&self, page: DevicePage) -> bool {
        page.memory == self.first.memory && page.pfn == self.first.pfn.offset(self.count)
    }
}

/// Where a page lives, for who only wants to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// RAM, or nowhere yet: the CPU's kernel decides.
    System,
    /// RAM, as `System`, but the CPU cannot write it, and no device may: there may be copies of it.
    Protected,
    /// A device.
    Device(DevicePage),
    /// A device whose memory the CPU uses in place: CPU and devices reach it at its address, as RAM.
    Coherent(DevicePage),
    /// On the move: ask again.
    Moving,
    /// The mapping is gone.
    Unmapped,
}

impl Home {
    /// The device page that it takes up, if any.
    pub const fn device_page(self) -> Option<DevicePage> {
        match self {
            Self::Device(page) | Self::Coherent(page) => Some(page),
            Self::System | Self::Protected | Self::Moving | Self::Unmapped => None,
        }
    }
}

/// The word of one page, decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WordState {
    /// Where the page is.
    pub place: Place,
    /// The program gave the contents up since the page got there.
    pub dropped: bool,
    /// The mapping is gone.
    pub unmapped: bool,
    /// In RAM, write-protected, because devices may have copies.
    pub protected: bool,
}

/// The state part of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In RAM or nowhere.
    System,
    /// Taken out of RAM, not yet on a device.
    Collected,
    /// On a device.
    Device(DevicePage),
    /// On a device, and about to come home.
    Leaving(DevicePage),
    /// On a device, and where the program has it.
    Coherent(DevicePage),
}

impl Place {
    /// Whether the CPU has the page where the program has it, if there is one: whoever misses it there
    /// finds a hole.
    pub const fn is_in_place(self) -> bool {
        matches!(self, Self::System | Self::Coherent(_))
    }
}

impl WordState {
    /// What the page looks like from outside.
    pub const fn home(self) -> Home {
        match (self.unmapped, self.place) {
            (true, _) => Home::Unmapped,
            // What was given up is not there to be read any more, and copies of it are about to go.
            (_, Place::System) if self.protected && self.dropped => Home::Moving,
            (_, Place::System) if self.protected => Home::Protected,
            (_, Place::System) => Home::System,
            (_, Place::Device(page)) if !self.dropped => Home::Device(page),
            (_, Place::Coherent(page)) if !self.dropped => Home::Coherent(page),
            _ => Home::Moving,
        }
    }

    /// The device page the word names, if any.
    pub const fn device_page(self) -> Option<DevicePage> {
        match self.place {
            Place::Device(page) | Place::Leaving(page) | Place::Coherent(page) => Some(page),
            Place::System | Place::Collected => None,
        }
    }
}

const SYSTEM: u64 = 0;
const COLLECTED: u64 = 1;
const DEVICE: u64 = 2;
const LEAVING: u64 = 3;
const STATE: u64 = 3;
const DROPPED: u64 = 1 << 2;
const UNMAPPED: u64 = 1 << 3;
const PROTECTED: u64 = 1 << 4;
/// Of the state `DEVICE`: the CPU has the page too.
const COHERENT: u64 = 1 << 5;
/// Those that a change of the state keeps.
const FLAGS: u64 = DROPPED | UNMAPPED;
const MEMORY_SHIFT: u32 = 8;
const PFN_SHIFT: u32 = 32;

/// The atomic word of one page. All-zero bytes are a page in RAM.
#[derive(Debug, Default)]
#[repr(transparent)]
pub struct PageWord(AtomicU64);

impl PageWord {
    /// The word, decoded.
    pub fn get(&self) -> WordState {
        decode(self.0.load(Ordering::Acquire))
    }

    /// The page was taken out of RAM. For the holder of the block lock.
    pub fn mark_collected(&self) -> WordState {
        self.transition(COLLECTED)
    }

    /// The page lives in RAM. It stays `dropped` if it is: the kernel may still be about to take
    /// its page, until [`PageWord::saw_hole`]. For the holder of the block lock.
    pub fn settle_system(&self) -> WordState {
        self.transition(SYSTEM)
    }

    /// The page lives on a device. For the holder of the block lock. An unmapped page does so too,
    /// until the handler of the unmapping gives it back: it may have been moved, not dropped.
    ///
    /// # Errors
    ///
    /// The state of the word, when the contents were given up since the page was collected: the word
    /// then says `System`, and the device page was not taken.
    pub fn settle_device(&self, page: DevicePage) -> Result<(), WordState> {
        self.settle(DEVICE | encode(page))
    }

    /// The page lives on a device, where it is. For the holder of the block lock, and pages in RAM. As
    /// [`PageWord::settle_device`] otherwise.
    ///
    /// # Errors
    ///
    /// As [`PageWord::settle_device`].
    pub fn settle_coherent(&self, page: DevicePage) -> Result<(), WordState> {
        self.settle(DEVICE | COHERENT | encode(page))
    }

    fn settle(&self, state: u64) -> Result<(), WordState> {
        let before = decode(self.update(|word| match word & DROPPED {
            0 => (word & FLAGS) | state,
            _ => (word & FLAGS) | SYSTEM,
        }));
        if before.dropped { Err(before) } else { Ok(()) }
    }

    /// The device page is about to come home. For the holder of the block lock.
    pub fn mark_leaving(&self, page: DevicePage) -> WordState {
        self.transition(LEAVING | encode(page))
    }

    /// The device page stays after all. For the holder of the block lock.
    pub fn stay_on_device(&self, page: DevicePage) -> WordState {
        self.transition(DEVICE | encode(page))
    }

    /// Writes of the page are caught from now on: it is about to be read in copies. Whether that is
    /// news. For the holder of the block lock, and pages in RAM.
    pub fn protect(&self) -> bool {
        let before = self.0.fetch_or(PROTECTED, Ordering::AcqRel);
        debug_assert_eq!(before & STATE, SYSTEM, "protected, and not in RAM");
        before & PROTECTED == 0
    }

    /// No copy can be read any more, and writes are not caught. For the holder of the block lock.
    pub fn unprotect(&self) {
        self.0.fetch_and(!PROTECTED, Ordering::AcqRel);
    }

    /// The program gave the contents up. At any time.
    pub fn drop_contents(&self) -> WordState {
        decode(self.0.fetch_or(DROPPED, Ordering::AcqRel))
    }

    /// A fault proved that the kernel has dropped the page of RAM. At any time.
    pub fn saw_hole(&self) {
        let clear = |word| (word & STATE == SYSTEM).then_some(word & !DROPPED);
        // A failed update means that the page is not in RAM: its flag is not ours to clear.
        let _ = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, clear);
    }

    /// The mapping is gone. At any time.
    pub fn unmap(&self) -> WordState {
        decode(self.0.fetch_or(UNMAPPED, Ordering::AcqRel))
    }

    /// A new mapping is there. For the holder of the block lock.
    pub fn map_again(&self) {
        self.0.store(SYSTEM, Ordering::Release);
    }

    fn transition(&self, state: u64) -> WordState {
        decode(self.update(|word| (word & FLAGS) | state))
    }

    fn update(&self, change: impl Fn(u64) -> u64) -> u64 {
        let mut word = self.0.load(Ordering::Acquire);
        loop {
            let exchange = self.0.compare_exchange_weak(
                word,
                change(word),
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match exchange {
                Ok(before) => return before,
                Err(now) => word = now,
            }
        }
    }
}

fn encode(page: DevicePage) -> u64 {
    (u64::from(page.pfn.get()) << PFN_SHIFT) | (u64::from(page.memory.0) << MEMORY_SHIFT)
}

fn decode(word: u64) -> WordState {
    let [_, memory, ..] = word.to_le_bytes();
    let pfn = u32::try_from(word >> PFN_SHIFT).unwrap_or(u32::MAX);
    let page = DevicePage {
        memory: DeviceMemoryId(memory),
        pfn: DevicePfn::new(pfn),
    };
    let place = match word & STATE {
        SYSTEM => Place::System,
        COLLECTED => Place::Collected,
        DEVICE if word & COHERENT != 0 => Place::Coherent(page),
        DEVICE => Place::Device(page),
        _ => Place::Leaving(page),
    };
    WordState {
        place,
        dropped: word & DROPPED != 0,
        unmapped: word & UNMAPPED != 0,
        protected: word & PROTECTED != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: DevicePage = DevicePage {
        memory: DeviceMemoryId(3),
        pfn: DevicePfn::new(0xdead_beef),
    };

    #[test]
    fn a_word_remembers_its_device_page() {
        let word = PageWord::default();
        word.mark_collected();
        assert_eq!(word.get().home(), Home::Moving);
        assert_eq!(word.settle_device(PAGE), Ok(()));
        assert_eq!(word.get().home(), Home::Device(PAGE));
        word.mark_leaving(PAGE);
        assert_eq!(word.get().device_page(), Some(PAGE));
        assert_eq!(word.get().home(), Home::Moving);
        word.settle_system();
        assert_eq!(word.get().home(), Home::System);
    }

    #[test]
    fn contents_dropped_while_collected_do_not_reach_the_device() {
        let word = PageWord::default();
        word.mark_collected();
        word.drop_contents();
        assert!(word.settle_device(PAGE).is_err());
        assert_eq!(word.get().home(), Home::System);
        word.saw_hole();
        assert!(!word.get().dropped);
    }

    #[test]
    fn an_unmapped_page_stays_unmapped_until_mapped_again() {
        let word = PageWord::default();
        word.mark_collected();
        word.unmap();
        assert_eq!(word.settle_device(PAGE), Ok(()));
        assert_eq!(word.get().home(), Home::Unmapped);
        assert_eq!(
            word.get().device_page(),
            Some(PAGE),
            "still to be given back"
        );
        word.settle_system();
        assert_eq!(word.get().home(), Home::Unmapped);
        word.map_again();
        assert_eq!(word.get().home(), Home::System);
    }

    #[test]
    fn a_coherent_page_is_on_a_device_and_in_place() {
        let word = PageWord::default();
        assert_eq!(word.settle_coherent(PAGE), Ok(()));
        assert_eq!(word.get().home(), Home::Coherent(PAGE));
        assert_eq!(word.get().device_page(), Some(PAGE));
        assert!(word.get().place.is_in_place());
        word.unmap();
        assert_eq!(word.get().home(), Home::Unmapped);
        assert_eq!(word.get().place, Place::Coherent(PAGE));
        word.settle_system();
        word.map_again();
        word.drop_contents();
        assert!(word.settle_coherent(PAGE).is_err(), "given up before");
        assert_eq!(word.get().place, Place::System);
        word.saw_hole();
        assert_eq!(word.settle_device(PAGE), Ok(()));
        assert!(!word.get().place.is_in_place());
    }

    #[test]
    fn a_hole_clears_dropped_only_in_ram() {
        let word = PageWord::default();
        word.drop_contents();
        word.saw_hole();
        assert!(!word.get().dropped);
        word.mark_collected();
        word.settle_device(PAGE).unwrap();
        word.drop_contents();
        word.saw_hole();
        assert!(
            word.get().dropped,
            "the device page still has to be given back"
        );
    }

    #[test]
    fn a_page_is_protected_until_it_is_taken_or_given_up() {
        let word = PageWord::default();
        assert!(word.protect());
        assert!(!word.protect(), "it was");
        assert_eq!(word.get().home(), Home::Protected);
        word.drop_contents();
        assert_eq!(word.get().home(), Home::Moving, "copies of it are to go");
        word.saw_hole();
        assert_eq!(word.get().home(), Home::Protected);
        word.unprotect();
        assert_eq!(word.get().home(), Home::System);
        word.protect();
        word.mark_collected();
        word.settle_system();
        assert_eq!(word.get().home(), Home::System);
    }
}
