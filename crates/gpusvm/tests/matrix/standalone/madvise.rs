//! Advice: where memory shall live, and where atomic operations work.
//!
//! # Differences from the suite
//!
//! There, where pages went is not looked at. Here it is: a buffer that is preferred in RAM is there, and
//! what is to be on the device is on it. Names are with the spelling of the suite.

use super::Test;
use super::words::{self, WORDS_OF_PAGE, Words};
use crate::Skip;
use crate::buffer::Buffer;
use crate::engine::{Engine, Machine};
use crate::exec;
use crate::objects::Bound;
use crate::sections::Flags;
use gpusvm::{Advice, Atomics, ByteSize, Error, FaultError, LaneError, LaunchError, Preferred};

const MIB: usize = 1 << 20;
/// How many pages a MiB has.
const PAGES: u64 = 256;
/// What memory is filled with.
const FILLED: u32 = 0x0505_0505;
const IN_RAM: Advice = Advice::PreferredLocation(Preferred::Ram);
const ON_DEVICE: Advice = Advice::PreferredLocation(Preferred::Device(0));

/// What it does, and how many faults are refused.
type Case = fn(&Machine) -> u64;

const CASES: &[(&str, Case)] = &[
    ("atomic-inc", atomic_inc),
    ("preffered-loc-sram-migrate-pages", migrate_to_ram),
    ("preffered-loc-atomic-vram", |machine| {
        atomics(machine, Atomics::Device, true)
    }),
    ("preffered-loc-atomic-gl", |machine| {
        atomics(machine, Atomics::Global, false)
    }),
    ("preffered-loc-atomic-cpu", atomics_of_the_cpu),
    ("preffered-loc-atomic-und", |machine| {
        atomics(machine, Atomics::Undefined, false)
    }),
    ("multi-vma", multi_vma),
    ("split-vma", split_vma),
    ("atomic-vma", atomic_vma),
    ("split-vma-with-mapping", split_vma_with_mapping),
    ("range-invalidate-change-attr", other_advice),
    ("no-range-invalidate-same-attr", same_advice),
];

pub(super) fn tests() -> Vec<Test> {
    let test = |(name, case): &(&str, Case)| {
        let case = *case;
        Test::quick(format!("madvise-{name}"), move || {
            let _no_fork = exec::no_fork();
            let machine = Machine::new(1)?;
            let refused = case(&machine);
            machine.finish(refused);
            Ok(())
        })
    };
    CASES.iter().map(test).collect()
}

fn advise(machine: &Machine, words: &Words, part: (usize, usize), advice: Advice) {
    let at = words.0.at().wrapping_add(part.0);
    let advised = machine.engine(0).advise(at, part.1, advice);
    advised.expect("memory that is shared");
}

fn advise_all(machine: &Machine, words: &Words, advice: Advice) {
    advise(machine, words, (0, words.0.len()), advice);
}

fn on_device(machine: &Machine) -> u64 {
    machine.stats().pages_on_devices
}

/// Each increment takes the page from the CPU.
fn atomic_inc(machine: &Machine) -> u64 {
    let words = Words::page(machine);
    advise_all(machine, &words, Advice::Atomics(Atomics::Device));
    words.set(0);
    for i in 0..32 {
        words::increment(machine.engine(0), &words);
        assert!(on_device(machine) > 0);
        assert_eq!(words.get(), i + 1);
    }
    0
}

/// Pages on the device go to RAM by the next fault of the device, when they are preferred there.
fn migrate_to_ram(machine: &Machine) -> u64 {
    let (words, engine) = (Words::page(machine), machine.engine(0));
    words::touch(engine, &words, false);
    assert_eq!(on_device(machine), 2 * PAGES);
    advise_all(machine, &words, IN_RAM);
    words::touch(engine, &words, false);
    assert_eq!(on_device(machine), 0);
    assert_eq!(machine.stats().cpu_faults, 0, "the device did that");
    words::check(&words, FILLED + 2);
    0
}

/// Preferred in RAM, and atomics of the device: on the device, or in RAM.
fn atomics(machine: &Machine, atomics: Atomics, moves: bool) -> u64 {
    let words = Words::page(machine);
    advise_all(machine, &words, IN_RAM);
    advise_all(machine, &words, Advice::Atomics(atomics));
    for i in 1..8 {
        words::touch(machine.engine(0), &words, true);
        let pages = if moves { 2 * PAGES } else { 0 };
        assert_eq!(on_device(machine), pages);
        words::check(&words, FILLED + i);
    }
    0
}

/// Atomics of the device are refused; those of the CPU are not, nor are stores of the device.
fn atomics_of_the_cpu(machine: &Machine) -> u64 {
    let (words, engine) = (Words::page(machine), machine.engine(0));
    advise_all(machine, &words, IN_RAM);
    advise_all(machine, &words, Advice::Atomics(Atomics::Cpu));
    words.set(7);
    let refused = words::try_increment(engine, &words, 0);
    assert!(is_refused(&refused), "{refused:?}");
    words
        .word(0)
        .fetch_add(1, std::sync::atomic::Ordering::AcqRel);
    assert_eq!(words.get(), 8);
    words::store(engine, &words, 9);
    assert_eq!(words.get(), 9);
    1
}

fn is_refused(ended: &Result<(), Error>) -> bool {
    let fault =
        |error: &LaneError| matches!(error, LaneError::Fault(FaultError::NotPermitted { .. }));
    matches!(ended, Err(Error::Launch(LaunchError::Lanes { first, .. })) if fault(first))
}

/// One piece of advice for several mappings, each shared by itself.
fn multi_vma(machine: &Machine) -> u64 {
    const PART: usize = 2 * MIB;
    let (svm, engine) = (machine.svm(), machine.engine(0));
    let words = Words(Buffer::unshared(svm, 4 * PART));
    let adopt = |part| {
        let at = words.0.at().wrapping_add(part * PART);
        svm.adopt(at.cast_const(), ByteSize::from_usize(PART))
    };
    let adopted = [0, 1, 2, 3].map(|part| adopt(part).expect("memory of the program"));
    for (round, (advice, pages)) in [(IN_RAM, 0), (ON_DEVICE, 8 * PAGES)]
        .into_iter()
        .enumerate()
    {
        advise_all(machine, &words, advice);
        words::touch(engine, &words, false);
        assert_eq!(on_device(machine), pages);
        words::check(&words, u32::try_from(round).expect("small") + 1);
    }
    drop(adopted);
    0
}

/// Advice for the middle of a mapping, and other advice for the rest.
fn split_vma(machine: &Machine) -> u64 {
    let words = split(machine, ON_DEVICE, IN_RAM);
    words::touch(machine.engine(0), &words, false);
    assert_eq!(on_device(machine), 2 * PAGES, "all but the middle");
    words::check(&words, FILLED + 1);
    0
}

/// Atomics of the device in the middle of what is preferred in RAM.
fn atomic_vma(machine: &Machine) -> u64 {
    let words = split(machine, IN_RAM, Advice::Atomics(Atomics::Device));
    words::touch(machine.engine(0), &words, true);
    assert_eq!(on_device(machine), 2 * PAGES, "the middle");
    words::check(&words, FILLED + 1);
    0
}

/// 4 MiB, of which the middle 2 MiB are advised something more.
fn split(machine: &Machine, all: Advice, middle: Advice) -> Words {
    let words = Words(Buffer::map(machine.svm(), 4 * MIB, Flags::MMAP));
    advise_all(machine, &words, all);
    advise(machine, &words, (MIB, 2 * MIB), middle);
    let (at, len) = (words.0.at().cast_const(), ByteSize::from_usize(4 * MIB));
    let advised = machine.svm().advice(at, len).expect("memory");
    assert_eq!(advised.len(), 3, "{advised:?}");
    words
}

/// A device object is bound over the middle: advice is of the memory below it, and of the rest.
fn split_vma_with_mapping(machine: &Machine) -> u64 {
    let (svm, engine) = (machine.svm(), machine.engine(0));
    let words = split(machine, ON_DEVICE, IN_RAM);
    let middle = Buffer::borrowed_part(&words.0, MIB, 2 * MIB);
    let bound = Bound::over(engine, &middle);
    words::touch(engine, &words, false);
    assert_eq!(on_device(machine), 2 * PAGES, "objects are not counted");
    assert!(svm.stats().vram_object_bytes == 2 * MIB as u64);
    advise_all(machine, &words, IN_RAM);
    words::touch(engine, &words, false);
    assert_eq!(on_device(machine), 0);
    let bytes = bound.bytes();
    for page in bytes.chunks(4096) {
        assert_eq!(page[..4], 2u32.to_ne_bytes(), "of the object");
    }
    drop(bound);
    middle.check_untouched(0, 2 * MIB);
    words::touch(engine, &words, false);
    for page in 0..4 * MIB / 4096 {
        let is_middle = (256..768).contains(&page);
        let word = words.word(page * WORDS_OF_PAGE);
        let found = word.load(std::sync::atomic::Ordering::Acquire);
        assert_eq!(found, FILLED + if is_middle { 1 } else { 3 }, "page {page}");
    }
    0
}

/// Faults of the device, and ranges that went for advice.
fn counts(engine: Engine<'_>) -> (u64, u64) {
    let stats = engine.stats();
    (stats.faults, stats.reconsidered)
}

/// Other advice: the device faults again.
fn other_advice(machine: &Machine) -> u64 {
    let (words, engine) = (Words::page(machine), machine.engine(0));
    for (round, advice) in [ON_DEVICE, IN_RAM, ON_DEVICE].into_iter().enumerate() {
        let before = counts(engine);
        advise_all(machine, &words, advice);
        words::touch(engine, &words, false);
        let after = counts(engine);
        assert!(after.0 > before.0, "round {round}: {before:?} {after:?}");
        assert_eq!(after.1 > before.1, round > 0, "{before:?} {after:?}");
    }
    words::check(&words, FILLED + 3);
    0
}

/// The same advice again changes nothing: the device goes on without a fault.
fn same_advice(machine: &Machine) -> u64 {
    let (words, engine) = (Words::page(machine), machine.engine(0));
    for advice in [ON_DEVICE, IN_RAM] {
        advise_all(machine, &words, advice);
        words::touch(engine, &words, false);
        let before = (counts(engine), engine.stats().flushes);
        for _ in 0..4 {
            advise_all(machine, &words, advice);
            words::touch(engine, &words, false);
        }
        assert_eq!((counts(engine), engine.stats().flushes), before);
    }
    words::check(&words, FILLED + 10);
    0
}

/// The device copies memory that moves to memory that does not, and that to an object of its own.
pub(super) fn copy() -> Result<(), Skip> {
    const LEN: usize = 2 * MIB;
    let _no_fork = exec::no_fork();
    for advice in [ON_DEVICE, IN_RAM] {
        let machine = Machine::new(1)?;
        let (svm, engine) = (machine.svm(), machine.engine(0));
        let from = Words::new(&machine, LEN);
        let user = Words(Buffer::unshared(svm, LEN));
        let over = Words(Buffer::unshared(svm, LEN));
        let bytes: Vec<u8> = (0..=250u8).cycle().take(LEN).collect();
        from.0.set(&bytes);
        advise_all(&machine, &from, advice);
        let bound = Bound::over(engine, &over.0);
        words::copy(engine, &from, &user, LEN / 4096);
        words::copy(engine, &user, &over, LEN / 4096);
        let pages = if advice == IN_RAM { 0 } else { 2 * PAGES };
        assert_eq!(on_device(&machine), pages);
        assert!(bound.bytes() == bytes, "what is in the object");
        assert!(user.0.bytes() == bytes, "what the device wrote in place");
        drop(bound);
        over.0.check_untouched(0, LEN);
        drop((from, user, over));
        machine.finish(0);
    }
    Ok(())
}
