//! Advice, on this process, and on one whose memory goes at any time.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Map, add_one, can_adopt, engine, two_devices, within};
use gpusvm::{
    Advice, AdviseError, Atomics, ByteSize, Error, FaultMode, MigrateOnTouch, Preferred, Priority,
    Svm, SvmPtr,
};
use gpusvm_testkit::conformance::{Kit, Model, Part, Setup};
use gpusvm_testkit::world::{Simulated, World};
use gpusvm_types::{PageCount, Span};
use std::time::Duration;

const BLOCK: usize = 2 << 20;
const IN_RAM: Advice = Advice::PreferredLocation(Preferred::Ram);

/// How many pieces of the memory have advice.
fn pieces(svm: &Svm, memory: &Map) -> usize {
    let advised = svm.advice(memory.at, ByteSize::from_usize(memory.len));
    let advised = advised.unwrap();
    advised.iter().filter(|it| it.by.is_some()).count()
}

/// Unmapped and mapped again at once, by one system call.
fn replace(memory: &Map) {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: over our own mapping.
    let at = unsafe { libc::mmap(memory.at.cast(), memory.len, access, flags, -1, 0) };
    assert_eq!(at, memory.at.cast());
}

#[test]
fn memory_that_no_device_touched_forgets_with_its_mapping() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(8));
        if !can_adopt(&svm) {
            return;
        }
        let memory = Map::new(3 * BLOCK, false);
        let len = ByteSize::from_usize(memory.len);
        for round in 0..20u8 {
            let adopted = svm.adopt(memory.at, len).unwrap();
            svm.advise(memory.at, len, IN_RAM).unwrap();
            assert_eq!(pieces(&svm, &memory), 1);
            if round % 2 == 0 {
                memory.bytes().fill(round);
            }
            replace(&memory);
            assert_eq!(pieces(&svm, &memory), 0, "nobody has to wait for it");
            let again = svm.adopt(memory.at, len).unwrap();
            assert_eq!(pieces(&svm, &memory), 0);
            let at: SvmPtr<u64> = SvmPtr::from(memory.at.cast::<u64>());
            add_one(&svm, 0, (at, memory.len / 8));
            assert!(
                svm.stats().pages_on_devices > 0,
                "nothing says RAM any more"
            );
            drop((adopted, again));
            assert!(memory.bytes().chunks(8).all(|word| word[0] == 1));
            replace(&memory);
        }
    });
}

/// Moved, and advised at once at its new place: watched, or on a device, of which it was touched in part.
#[test]
fn memory_that_moves_can_be_advised_and_move_again() {
    within(Duration::from_secs(60), || {
        let svm = engine(ByteSize::mib(8));
        if !can_adopt(&svm) {
            return;
        }
        // A new place each time: where it was before, others map something meanwhile.
        let new_place = || std::mem::ManuallyDrop::new(Map::new(BLOCK, false)).at;
        let len = ByteSize::from_usize(BLOCK);
        let mut from = new_place();
        let _adopted = svm.adopt(from, len).unwrap();
        let preferred = |round| match round % 2 {
            0 => Preferred::Ram,
            _ => Preferred::Device(0),
        };
        for round in 0..100 {
            let to = new_place();
            let advice = Advice::PreferredLocation(preferred(round));
            svm.advise(from, len, advice).unwrap();
            let word: SvmPtr<u64> = SvmPtr::from(from.wrapping_add(BLOCK / 2).cast::<u64>());
            add_one(&svm, 0, (word, 1));
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: our own mapping, to a place of our own.
            let moved = unsafe { libc::mremap(from.cast(), BLOCK, BLOCK, flags, to) };
            assert_eq!(moved, to.cast(), "{}", std::io::Error::last_os_error());
            from = to;
        }
        let word = from.wrapping_add(BLOCK / 2).cast::<u64>();
        // SAFETY: our own memory, and no device uses it.
        assert_eq!(unsafe { word.read() }, 100);
    });
}

#[test]
fn what_is_refused_says_why() {
    let svm = engine(ByteSize::mib(8));
    let slice = svm.alloc_slice::<u64>(100).unwrap();
    let (at, len) = (slice.as_ptr(), ByteSize::new(800));
    let errno = |refused: Result<(), Error>| refused.unwrap_err().errno();
    let by = |device| Advice::AccessedBy { device, on: true };
    assert_eq!(errno(svm.advise(at, len, by(1))), 19);
    let size = ByteSize::kib(3);
    let refused = svm.advise(at, len, Advice::Granularity(Some(size)));
    assert!(matches!(
        refused,
        Err(Error::Advise(AdviseError::Granularity { .. }))
    ));
    assert_eq!(errno(refused), 22);
    assert_eq!(errno(svm.advise(at, ByteSize::ZERO, IN_RAM)), 22);
    let own = Map::new(BLOCK, false);
    assert_eq!(errno(svm.advise(own.at, ByteSize::mib(2), IN_RAM)), 2);
    // Part of a page means all of it.
    svm.advise(at, len, by(0)).unwrap();
    let advised = svm.advice(at, ByteSize::new(1)).unwrap();
    assert_eq!((advised.len(), advised[0].span), (1, slice.span()));
    assert_eq!(advised[0].by.map(|by| by.device), Some(0));
    svm.advise_slice(&slice, Advice::Nothing).unwrap();
    assert_eq!(svm.advice(at, len).unwrap()[0].by, None);
}

/// Everything is advised at some time, while two devices and the CPU count.
#[test]
fn advice_changes_under_launches() {
    const WORDS: usize = BLOCK / 8;
    within(Duration::from_secs(120), || {
        for fabric in [true, false] {
            let svm = two_devices(ByteSize::mib(4), fabric, MigrateOnTouch::default());
            let mut numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
            let all = [
                IN_RAM,
                Advice::PreferredLocation(Preferred::Device(0)),
                Advice::PreferredLocation(Preferred::Device(1)),
                Advice::AccessedBy {
                    device: 1,
                    on: true,
                },
                Advice::Granularity(Some(ByteSize::kib(64))),
                Advice::EvictionPriority(Priority::Pinned),
                Advice::Atomics(Atomics::Global),
                Advice::Atomics(Atomics::Device),
                Advice::Nothing,
            ];
            let mut added = 0;
            for advice in all {
                let p = numbers.device_ptr();
                std::thread::scope(|scope| {
                    let adds = [0, 1].map(|device| {
                        let svm = &svm;
                        scope.spawn(move || add_one(svm, device, (p, WORDS)))
                    });
                    svm.advise_slice(&numbers, advice).unwrap();
                    adds.into_iter().for_each(|add| add.join().unwrap());
                });
                numbers.iter_mut().for_each(|x| *x += 1);
                added += 3;
            }
            assert!(numbers.iter().all(|x| *x == added), "fabric: {fabric}");
            drop(numbers);
            let stats = svm.shutdown().unwrap();
            assert_eq!((stats.failed_faults, stats.vram_used_bytes), (0, 0));
        }
    });
}

/// Half of the memory goes while all of it is advised, which fails. Once nobody was told then of what was
/// advised of the other half, and the device went on as before.
#[test]
fn what_is_left_of_memory_that_goes_is_advised_in_earnest() {
    let kit = Kit::new(Model::Dmirror, FaultMode::Replayable);
    kit.race::<Simulated>(&Setup::default(), |bench| {
        let all = bench.memory(1024);
        let half = PageCount::new(512);
        let [left, goes] = [PageCount::ZERO, half].map(|from| all.first_page() + from);
        let [left, goes] = [left, goes].map(|first| Span::of_pages(first, half));
        let touched = Span::of_pages(left.first_page(), PageCount::new(16));
        bench.fill(touched, 1);
        bench.device_expect(0, touched, 1);
        let advises: Part<Simulated> = Box::new(move |bench| {
            let advised = bench.mirror().vm.advise(all, IN_RAM);
            let is_gone = matches!(advised, Err(AdviseError::NotMirrored { .. }));
            assert!(is_gone || advised == Ok(()), "{advised:?}");
        });
        let unmaps: Part<Simulated> = Box::new(move |bench| bench.world().unmap(goes));
        bench.run(vec![advises, unmaps]);
        let vm = &bench.mirror().vm;
        let advised = vm.advice(left);
        if advised[0].attributes.preferred == Preferred::Ram {
            assert_eq!(advised[0].span, left);
            assert!(!vm.svm().has_mapping(touched), "mapped as before");
        }
        assert!(vm.advice(goes).iter().all(|it| it.by.is_none()));
        bench.device_expect(0, touched, 1);
    });
}
