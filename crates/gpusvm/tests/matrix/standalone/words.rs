//! Words that devices and the CPU use, and kernels on them.

use crate::buffer::Buffer;
use crate::engine::{Engine, Machine};
use crate::sections::Flags;
use gpusvm::{Error, Grid, SvmPtr};
use std::sync::atomic::{AtomicU32, Ordering};

/// Words of 32 bits.
pub(super) const WORDS_OF_PAGE: usize = 1024;

/// The words of a buffer.
pub(super) struct Words(pub(super) Buffer);

impl Words {
    pub(super) fn new(machine: &Machine, len: usize) -> Self {
        let buffer = Buffer::malloc(machine.svm(), len, Flags::default());
        Self(buffer)
    }

    pub(super) fn page(machine: &Machine) -> Self {
        Self::new(machine, 2 << 20)
    }

    pub(super) fn at(&self) -> SvmPtr<u32> {
        SvmPtr::from(self.0.at().cast::<u32>())
    }

    pub(super) fn word(&self, i: usize) -> &AtomicU32 {
        assert!(i * 4 < self.0.len());
        // SAFETY: inside the buffer, aligned, and only used by atomics.
        unsafe { AtomicU32::from_ptr(self.0.at().cast::<u32>().wrapping_add(i)) }
    }

    pub(super) fn get(&self) -> u32 {
        self.word(0).load(Ordering::Acquire)
    }

    pub(super) fn set(&self, value: u32) {
        self.word(0).store(value, Ordering::Release);
    }
}

/// One word, by one lane.
pub(super) fn store(engine: Engine<'_>, to: &Words, value: u32) {
    let at = to.at();
    let launch = engine.launch(Grid::new(1), move |lane| lane.store(at, value));
    launch.wait().expect("a store");
}

/// The first word, by an atomic operation of the device.
pub(super) fn increment(engine: Engine<'_>, words: &Words) {
    try_increment(engine, words, 0).expect("an increment");
}

/// As `increment`, of any word, which may be refused.
pub(super) fn try_increment(engine: Engine<'_>, words: &Words, i: usize) -> Result<(), Error> {
    let at = words.at().add(i);
    let kernel = move |lane: &mut gpusvm::Lane<'_>| lane.atomic_add(at, 1u32).map(drop);
    engine.launch(Grid::new(1), kernel).wait().map(drop)
}

/// Increments the first word of every page, a lane for each, by stores.
pub(super) fn touch(engine: Engine<'_>, words: &Words, atomic: bool) {
    let at = words.at();
    let launch = engine.launch(Grid::new(words.0.len() / 4096), move |lane| {
        let word = at.add(lane.id() * WORDS_OF_PAGE);
        if atomic {
            return lane.atomic_add(word, 1u32).map(drop);
        }
        let value = lane.load(word)?;
        lane.store(word, value + 1)
    });
    launch.wait().expect("all pages");
}

/// That the first word of every page is `value`.
pub(super) fn check(words: &Words, value: u32) {
    for page in 0..words.0.len() / 4096 {
        let found = words.word(page * WORDS_OF_PAGE).load(Ordering::Acquire);
        assert_eq!(found, value, "page {page}");
    }
}

/// Copies a page for each lane.
pub(super) fn copy(engine: Engine<'_>, from: &Words, to: &Words, pages: usize) {
    let (from, to) = (from.at(), to.at());
    let launch = engine.launch(Grid::new(pages), move |lane| {
        let mut page = [0u32; WORDS_OF_PAGE];
        let by = lane.id() * WORDS_OF_PAGE;
        lane.load_tile(from.add(by), &mut page)?;
        lane.store_tile(to.add(by), &page)
    });
    launch.wait().expect("a copy");
}
