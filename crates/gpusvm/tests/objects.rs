//! Memory of a device, and what is bound where in its address spaces.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{Stop, add_one, built, engine, engine_with, two_devices, within};
use gpusvm::driver::{BindError, ObjectError};
use gpusvm::{
    ByteSize, DeviceVm, Error, FaultError, FaultMode, Grid, LaneError, Launch, LaunchError,
    MigrateOnTouch, Resident, SoftGpu, Span, Svm, SvmPtr,
};
use gpusvm_types::{BLOCK_SIZE, PAGE_SIZE, PageCount};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// 2 MiB.
const WORDS: usize = 1 << 18;

/// Stores `tag` plus its number to every 64th of `n` words. Why the first lane stopped that did.
fn fill(vm: &DeviceVm, p: SvmPtr<u64>, n: usize, tag: u64) -> Result<(), FaultError> {
    fill_resident(vm, (p, n), tag, Resident::new())
}

fn fill_resident(
    vm: &DeviceVm,
    (p, n): (SvmPtr<u64>, usize),
    tag: u64,
    resident: Resident,
) -> Result<(), FaultError> {
    // SAFETY: nobody else uses the words until the launch has ended.
    let launch = unsafe {
        vm.launch_resident(Grid::new(n / 64), resident, move |lane| {
            lane.store(p.add(lane.id() * 64), tag + lane.id() as u64)
        })
    };
    match launch.unwrap().wait() {
        Ok(_) => Ok(()),
        Err(Error::Launch(LaunchError::Lanes {
            first: LaneError::Fault(error),
            ..
        })) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

/// What `fill` stores, of words `from` on.
fn is_filled(words: &[u64], tag: u64, from: usize) -> bool {
    let stored = words.iter().step_by(64).enumerate();
    stored
        .into_iter()
        .all(|(i, x)| *x == tag + (from / 64 + i) as u64)
}

fn words_of(object: &gpusvm::Object) -> Vec<u64> {
    let mut bytes = vec![0xff; object.size().as_usize()];
    object.read(ByteSize::ZERO, &mut bytes).unwrap();
    let words = bytes.chunks_exact(8);
    words
        .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
        .collect()
}

fn block(slice: Span, number: u64) -> Span {
    let start = slice.start() + ByteSize::mib(2 * number);
    Span::from_len(start, BLOCK_SIZE).unwrap()
}

fn bind_error(error: Error) -> BindError {
    match error {
        Error::Bind { error, .. } => error,
        error => panic!("{error}"),
    }
}

#[test]
fn an_object_is_zero_and_then_what_was_written() {
    let svm = engine(ByteSize::mib(8));
    // What was in device memory before does not shine through.
    let numbers = svm.alloc_slice::<u64>(3 * WORDS).unwrap();
    fill(svm.vm(0).unwrap(), numbers.device_ptr(), 3 * WORDS, 7).unwrap();
    drop(numbers);
    let pieces = [0; 7].map(|_| svm.create_object(0, ByteSize::mib(1)).unwrap());
    assert!(
        pieces
            .iter()
            .all(|piece| words_of(piece).iter().all(|x| *x == 0))
    );
    // Device memory is in pieces now, none of which is large enough.
    let [a, _b, c, _d, e, _f, g] = pieces;
    drop((a, c, e, g));
    let object = svm.create_object(0, ByteSize::new((4 << 20) + 1)).unwrap();
    assert_eq!(object.size(), ByteSize::mib(4) + PAGE_SIZE);
    let mut model = vec![0; object.size().as_usize()];
    for (i, (offset, len)) in [
        (0, 1),
        (4095, 2),
        (1 << 20, 3 << 20),
        ((1 << 20) - 3, 600_001),
    ]
    .into_iter()
    .enumerate()
    {
        let tag = u8::try_from(i).unwrap() + 1;
        model[offset..offset + len].fill(tag);
        object
            .write(ByteSize::from_usize(offset), &model[offset..offset + len])
            .unwrap();
        let mut read = vec![0xee; model.len()];
        object.read(ByteSize::ZERO, &mut read).unwrap();
        assert!(read == model, "after {len} at {offset}");
        let mut part = vec![0xee; len];
        object
            .read(ByteSize::from_usize(offset), &mut part)
            .unwrap();
        assert!(part == model[offset..offset + len]);
    }
    let size = object.size();
    let past = object.write(size - ByteSize::new(1), &[1, 2]).unwrap_err();
    assert_eq!(past.errno(), 22, "EINVAL: {past}");
    let mut last = [9];
    object.read(size - ByteSize::new(1), &mut last).unwrap();
    assert_eq!(last, [0], "nothing was written");
    object.read(size, &mut []).unwrap();
    let past = object.read(ByteSize::new(u64::MAX), &mut last).unwrap_err();
    assert_eq!(past.errno(), 22, "EINVAL: {past}");
}

/// How many of `n` words are not zero, as the device sees them.
fn not_zero(vm: &DeviceVm, p: SvmPtr<u64>, n: usize) -> usize {
    let found = Arc::new(AtomicU64::new(0));
    let sum = Arc::clone(&found);
    // SAFETY: it reads.
    let launch = unsafe {
        vm.launch(Grid::new(n / 512), move |lane| {
            for i in 0..512 {
                if lane.load(p.add(lane.id() * 512 + i))? != 0 {
                    sum.fetch_add(1, Ordering::AcqRel);
                }
            }
            Ok(())
        })
    };
    launch.unwrap().wait().unwrap();
    usize::try_from(found.load(Ordering::Acquire)).unwrap()
}

/// Device memory goes from one address space to another, of objects and of the process: nothing of what
/// was there shines through, whether memory is cleared when it is given back or not.
#[test]
fn an_object_shows_nothing_of_what_others_had_there() {
    for scrub in [false, true] {
        let gpu = SoftGpu::with_vram(ByteSize::mib(4)).unwrap();
        let svm = built(Svm::builder().device(gpu).scrub(scrub));
        let (theirs, ours) = (svm.create_vm(0).unwrap(), svm.create_vm(0).unwrap());
        let place = svm.alloc_slice::<u64>(2 * WORDS).unwrap();
        let half = block(place.span(), 0);
        for round in 0..3 {
            // All of the device's memory is written: half of it as an object, half of it as memory of the
            // process, every word.
            let object = svm.create_object(0, ByteSize::mib(2)).unwrap();
            object.write(ByteSize::ZERO, &vec![0xa5; 2 << 20]).unwrap();
            theirs.bind_object(half, &object, ByteSize::ZERO).unwrap();
            fill(&theirs, place.device_ptr(), WORDS, 1 << round).unwrap();
            let mut numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
            numbers.fill(!0);
            fill(&theirs, numbers.device_ptr(), WORDS, 7).unwrap();
            assert_eq!(svm.stats().vram_used_bytes, 4 << 20, "all of it is in use");
            theirs.bind_mirror(half).unwrap();
            drop((object, numbers));

            let object = svm.create_object(0, ByteSize::mib(4)).unwrap();
            ours.bind_object(place.span(), &object, ByteSize::ZERO)
                .unwrap();
            let seen = not_zero(&ours, place.device_ptr(), 2 * WORDS);
            assert_eq!(seen, 0, "scrub {scrub}, round {round}: by the device");
            let read = words_of(&object);
            assert!(read.iter().all(|x| *x == 0), "scrub {scrub}: by a copy");
            // They have a mirror there, and see nothing of it.
            fill(&ours, place.device_ptr(), 2 * WORDS, 9).unwrap();
            assert!(place.iter().all(|x| *x == 0));
            ours.bind_mirror(place.span()).unwrap();
        }
        drop((theirs, ours, place));
        assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
    }
}

#[test]
fn objects_are_counted_and_given_back() {
    for scrub in [false, true] {
        let gpu = SoftGpu::with_vram(ByteSize::mib(4)).unwrap();
        let svm = built(Svm::builder().device(gpu).scrub(scrub));
        let empty = svm.create_object(0, ByteSize::ZERO).unwrap_err();
        assert_eq!(empty.errno(), 22, "EINVAL");
        let all = svm.create_object(0, ByteSize::mib(4)).unwrap();
        let stats = svm.stats();
        assert_eq!(
            (stats.vram_object_bytes, stats.vram_used_bytes),
            (4 << 20, 4 << 20)
        );
        let full = svm.create_object(0, PAGE_SIZE).unwrap_err();
        assert!(matches!(
            full,
            Error::Object {
                error: ObjectError::NoSpace {
                    wanted: PageCount::ONE,
                    ..
                },
                ..
            }
        ));
        assert_eq!(full.errno(), 28, "ENOSPC");
        all.write(ByteSize::ZERO, &[5; 100]).unwrap();
        drop(all);
        let again = svm.create_object(0, ByteSize::mib(4)).unwrap();
        assert!(words_of(&again).iter().all(|x| *x == 0));
        svm.unbind(0).unwrap();
        let unbound = svm.create_object(0, PAGE_SIZE).unwrap_err();
        assert_eq!(unbound.errno(), 19, "ENODEV");
        drop(again);
        let stats = svm.shutdown().unwrap();
        assert_eq!((stats.vram_object_bytes, stats.vram_used_bytes), (0, 0));
        assert_eq!(stats.vram_lost_bytes, 0);
    }
}

#[test]
fn a_kernel_spans_mirror_and_object() {
    for faults in [FaultMode::Replayable, FaultMode::Declared] {
        let svm = engine_with(ByteSize::mib(8), faults);
        let vm = svm.vm(0).unwrap();
        let numbers = svm.alloc_slice::<u64>(4 * WORDS).unwrap();
        let (p, n) = (numbers.device_ptr(), numbers.len());
        let object = svm.create_object(0, ByteSize::mib(3)).unwrap();
        // The second block, and half of the third.
        let here = Span::from_len(block(numbers.span(), 1).start(), ByteSize::mib(3)).unwrap();
        vm.bind_object(here, &object, ByteSize::ZERO).unwrap();
        let declared = Resident::new().writes(&numbers);
        fill_resident(vm, (p, n), 100, declared.clone()).unwrap();
        let seen = words_of(&object);
        assert!(is_filled(&seen, 100, WORDS), "in the object");
        assert!(is_filled(&numbers[..WORDS], 100, 0), "before it");
        let behind = WORDS + WORDS * 3 / 2;
        assert!(is_filled(&numbers[behind..], 100, behind), "behind it");
        assert!(numbers[WORDS..behind].iter().all(|x| *x == 0), "not there");
        // No range reaches over the border.
        assert!(vm.stats().ranges_live > 3);
        // The mirror again, of all of it but a page.
        let [_, rest] = here.without(Span::page_of(here.start()));
        vm.bind_mirror(rest.unwrap()).unwrap();
        fill_resident(vm, (p, n), 200, declared).unwrap();
        assert!(is_filled(&numbers[WORDS + 512..], 200, WORDS + 512));
        assert!(numbers[WORDS..WORDS + 512].iter().all(|x| *x == 0));
        let seen = words_of(&object);
        assert!(is_filled(&seen[..512], 200, WORDS));
        assert!(is_filled(&seen[512..], 100, WORDS + 512), "as it was");
        drop((object, numbers));
        assert_eq!(svm.shutdown().unwrap().vram_used_bytes, 0);
    }
}

#[test]
fn what_is_in_the_way_is_named() {
    let svm = two_devices(ByteSize::mib(8), false, MigrateOnTouch::default());
    let vm = svm.vm(0).unwrap();
    let numbers = svm.alloc_slice::<u64>(2 * WORDS).unwrap();
    let (p, span) = (numbers.device_ptr(), numbers.span());
    let object = svm.create_object(0, ByteSize::mib(4)).unwrap();
    fill(vm, p.add(WORDS), WORDS, 1).unwrap();
    let range = block(span, 1);
    for refused in [
        vm.unbind(span),
        vm.bind_object(span, &object, ByteSize::ZERO),
    ] {
        let error = refused.unwrap_err();
        assert_eq!(error.errno(), 16, "EBUSY: {error}");
        assert_eq!(bind_error(error), BindError::Busy { span: range });
    }
    // Nothing changed; what is beside it is free; and mirror where there is one already is nothing new.
    vm.bind_mirror(span).unwrap();
    vm.unbind(block(span, 0)).unwrap();
    fill(vm, p.add(WORDS), WORDS, 2).unwrap();
    let at = span.start();
    assert_eq!(
        fill(vm, p, 64, 2),
        Err(FaultError::NotBound { at }),
        "a hole"
    );
    // The CPU takes it back: nothing is mapped, and the ranges are no obstacle.
    assert!(is_filled(&numbers[WORDS..], 2, 0));
    assert!(vm.stats().ranges_live > 0);
    vm.bind_object(range, &object, ByteSize::mib(1)).unwrap();
    assert_eq!(vm.stats().ranges_live, 0);
    fill(vm, p.add(WORDS), WORDS, 3).unwrap();
    assert!(is_filled(&words_of(&object)[WORDS / 2..][..WORDS], 3, 0));
    assert!(is_filled(&numbers[WORDS..], 2, 0), "as it was");
    for (offset, span) in [
        (ByteSize::mib(3), range),
        (ByteSize::new(8), range),
        (ByteSize::new(!4095), range),
        (ByteSize::mib(1), span),
    ] {
        let outside = vm.bind_object(span, &object, offset).unwrap_err();
        assert_eq!(outside.errno(), 22, "EINVAL: {outside}");
    }
    let foreign = svm
        .vm(1)
        .unwrap()
        .bind_object(range, &object, ByteSize::ZERO);
    let foreign = foreign.unwrap_err();
    assert_eq!(foreign.errno(), 22, "EINVAL");
    assert_eq!(bind_error(foreign), BindError::OtherDevice { span: range });
    add_one(&svm, 1, (p.add(WORDS), 64));
    assert_eq!(numbers[WORDS], 3, "the other device has a mirror there");
}

#[test]
fn an_object_that_is_bound_to_be_read_is_not_written() {
    let svm = engine(ByteSize::mib(8));
    let vm = svm.create_vm(0).unwrap();
    let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
    let (p, span) = (numbers.device_ptr(), numbers.span());
    let object = svm.create_object(0, ByteSize::mib(2)).unwrap();
    object.write(ByteSize::ZERO, &77u64.to_ne_bytes()).unwrap();
    vm.bind_object_read_only(span, &object, ByteSize::ZERO)
        .unwrap();
    let refused = fill(&vm, p, WORDS, 1);
    assert!(
        matches!(refused, Err(FaultError::NotPermitted { .. })),
        "{refused:?}"
    );
    let sum = Arc::new(AtomicU64::new(0));
    let found = Arc::clone(&sum);
    // SAFETY: it reads.
    let launch = unsafe {
        vm.launch(Grid::new(512), move |lane| {
            found.fetch_add(lane.load(p.add(lane.id() * 512))?, Ordering::AcqRel);
            Ok(())
        })
    };
    launch.unwrap().wait().unwrap();
    assert_eq!(sum.load(Ordering::Acquire), 77);
    assert_eq!(words_of(&object).iter().sum::<u64>(), 77);
    // Bound again, to be written.
    vm.bind_object(span, &object, ByteSize::ZERO).unwrap();
    fill(&vm, p, WORDS, 5).unwrap();
    assert!(is_filled(&words_of(&object), 5, 0));
}

/// 9/8 of device memory in pieces of 8 MiB, every other one an object: `evict-malloc-mix-bo`.
#[test]
fn memory_of_the_process_goes_for_objects_and_objects_stay() {
    const PIECES: usize = 9;
    const PIECE: usize = 4 * WORDS;
    within(Duration::from_secs(120), || {
        let svm = engine(ByteSize::mib(64));
        let vm = svm.vm(0).unwrap();
        let slices: Vec<_> = (0..PIECES)
            .map(|_| svm.alloc_slice::<u64>(PIECE).unwrap())
            .collect();
        let mut objects = Vec::new();
        for (i, slice) in slices.iter().enumerate() {
            if i % 2 == 1 {
                let object = svm.create_object(0, ByteSize::mib(8)).unwrap();
                vm.bind_object(slice.span(), &object, ByteSize::ZERO)
                    .unwrap();
                objects.push(object);
            }
            fill(vm, slice.device_ptr(), PIECE, i as u64 * 1_000_000).unwrap();
        }
        // Twice around, so that everything has to come back once.
        for round in 0..2 {
            for (i, slice) in slices.iter().enumerate() {
                let p = slice.device_ptr();
                let tag = i as u64 * 1_000_000;
                // SAFETY: it reads.
                let launch = unsafe {
                    vm.launch(Grid::new(PIECE / 64), move |lane| {
                        let found = lane.load(p.add(lane.id() * 64))?;
                        assert_eq!(found, tag + lane.id() as u64, "round {round}");
                        Ok(())
                    })
                };
                launch.unwrap().wait().unwrap();
            }
        }
        let stats = svm.stats();
        assert_eq!(stats.vram_object_bytes, 4 * (8 << 20));
        // More objects than there is room for now: memory of the process goes.
        let more: Vec<_> = (0..4)
            .map(|_| svm.create_object(0, ByteSize::mib(8)).unwrap())
            .collect();
        assert!(svm.stats().evictions > 0);
        assert!(
            svm.create_object(0, PAGE_SIZE).is_err(),
            "objects do not go"
        );
        for (i, slice) in slices.iter().enumerate() {
            let tag = i as u64 * 1_000_000;
            match i % 2 {
                0 => assert!(is_filled(slice, tag, 0), "piece {i}"),
                _ => assert!(is_filled(&words_of(&objects[i / 2]), tag, 0), "piece {i}"),
            }
        }
        // Without room the device reaches RAM in place.
        fill(vm, slices[0].device_ptr(), PIECE, 5).unwrap();
        assert!(is_filled(&slices[0], 5, 0));
        drop((more, objects, slices));
        let stats = svm.shutdown().unwrap();
        assert_eq!((stats.vram_used_bytes, stats.vram_object_bytes), (0, 0));
    });
}

#[test]
fn an_object_lives_as_long_as_it_is_bound() {
    let svm = engine(ByteSize::mib(8));
    let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
    let (p, span) = (numbers.device_ptr(), numbers.span());
    let vms = [svm.create_vm(0).unwrap(), svm.create_vm(0).unwrap()];
    let object = svm.create_object(0, ByteSize::mib(2)).unwrap();
    for vm in &vms {
        vm.bind_object(span, &object, ByteSize::ZERO).unwrap();
    }
    drop(object);
    let taken = || svm.stats().vram_object_bytes;
    fill(&vms[0], p, WORDS, 1).unwrap();
    // Half of it is bound no more, the other half is.
    let [_, rest] = span.without(Span::page_of(span.start()));
    vms[0].unbind(rest.unwrap()).unwrap();
    let at = rest.unwrap().start();
    assert_eq!(
        fill(&vms[0], p.add(512), 64, 1),
        Err(FaultError::NotBound { at })
    );
    fill(&vms[0], p, 512, 2).unwrap();
    let [first, second] = vms;
    drop(first);
    assert_eq!(taken(), 2 << 20);
    fill(&second, p, WORDS, 3).unwrap();
    second.bind_mirror(span).unwrap();
    assert_eq!(taken(), 0);
    assert!(
        numbers.iter().all(|x| *x == 0),
        "the process has seen nothing"
    );
    fill(&second, p, WORDS, 4).unwrap();
    // Bound when the engine ends.
    let object = svm.create_object(0, ByteSize::mib(2)).unwrap();
    assert!(is_filled(&numbers, 4, 0));
    second.bind_object(span, &object, ByteSize::ZERO).unwrap();
    let stats = svm.shutdown().unwrap();
    assert_eq!(stats.vram_object_bytes, 2 << 20);
    drop(object);
    let refused = bind_error(second.unbind(span).unwrap_err());
    assert_eq!(refused, BindError::Closed { span });
    assert_eq!(refused.errno(), 2, "ENOENT");
}

/// Adds to the pages of one block until it is told to stop. Counts rounds, and additions in a hole.
fn add_until(
    vm: &DeviceVm,
    p: SvmPtr<u64>,
    stop: &Stop,
    [rounds, failed]: [&Arc<AtomicU64>; 2],
) -> Launch {
    let (stop, rounds, failed) = (stop.clone(), Arc::clone(rounds), Arc::clone(failed));
    // SAFETY: by atomics on both sides; the numbers outlive the launch.
    let launch = unsafe {
        vm.launch(Grid::new(1), move |lane| {
            while !stop.is_set() {
                for i in (0..WORDS).step_by(512) {
                    match lane.atomic_add(p.add(i), 1u64) {
                        Ok(_) => {}
                        Err(LaneError::Fault(FaultError::NotBound { .. })) => {
                            failed.fetch_add(1, Ordering::AcqRel);
                        }
                        Err(error) => return Err(error),
                    }
                }
                rounds.fetch_add(1, Ordering::AcqRel);
            }
            Ok(())
        })
    };
    launch.unwrap()
}

/// Objects and holes come and go, while lanes work there and beside them.
#[test]
fn binding_under_load() {
    const ROUNDS: usize = 60;
    within(Duration::from_secs(120), || {
        let svm = engine(ByteSize::mib(16));
        let vm = svm.vm(0).unwrap();
        let numbers = svm.alloc_slice::<u64>(3 * WORDS).unwrap();
        let (p, span) = (numbers.device_ptr(), numbers.span());
        let stop = Stop::default();
        let [done, rounds, failed, never] = [(); 4].map(|()| Arc::new(AtomicU64::new(0)));
        let launches = [
            add_until(vm, p, &stop, [&done, &never]),
            add_until(vm, p.add(WORDS), &stop, [&rounds, &failed]),
        ];
        let here = block(span, 1);
        let mut objects = 0;
        for round in 0..ROUNDS {
            let object = svm.create_object(0, ByteSize::mib(2)).unwrap();
            // Until it is home for a moment: the device wants it back at once.
            loop {
                svm.touch(numbers[WORDS..].as_ptr(), ByteSize::mib(2))
                    .unwrap();
                match vm.bind_object(here, &object, ByteSize::ZERO) {
                    Ok(()) => break,
                    Err(error) => assert_eq!(error.errno(), 16, "{error}"),
                }
            }
            while words_of(&object)[0] == 0 {
                std::thread::yield_now();
            }
            if round % 2 == 0 {
                let before = failed.load(Ordering::Acquire);
                vm.unbind(here).unwrap();
                while failed.load(Ordering::Acquire) == before {
                    std::thread::yield_now();
                }
            }
            vm.bind_mirror(here).unwrap();
            objects += words_of(&object).iter().sum::<u64>();
        }
        stop.set();
        for launch in launches {
            launch.wait().unwrap();
        }
        assert_eq!(never.load(Ordering::Acquire), 0, "beside it");
        assert!(objects > 0 && failed.load(Ordering::Acquire) > 0);
        let done = done.load(Ordering::Acquire);
        assert!(numbers[..WORDS].iter().step_by(512).all(|x| *x == done));
        drop(numbers);
        let stats = svm.shutdown().unwrap();
        assert_eq!(
            (stats.vram_used_bytes, stats.failed_faults),
            (0, failed.load(Ordering::Acquire))
        );
    });
}

/// A child has no units: it must not wait for what was in flight in its parent.
#[test]
fn a_child_of_fork_takes_an_engine_with_objects_down() {
    within(Duration::from_secs(60), || {
        let svm = std::mem::ManuallyDrop::new(engine(ByteSize::mib(8)));
        let vm = svm.vm(0).unwrap();
        let numbers = svm.alloc_slice::<u64>(WORDS).unwrap();
        let p = numbers.device_ptr();
        let object = svm.create_object(0, ByteSize::mib(2)).unwrap();
        vm.bind_object(numbers.span(), &object, ByteSize::ZERO)
            .unwrap();
        let stop = Stop::default();
        let stopped = stop.clone();
        // SAFETY: by atomics; what is bound outlives the launch.
        let launch = unsafe {
            vm.launch(Grid::new(3), move |lane| {
                while !stopped.is_set() {
                    for i in 0..512 {
                        lane.atomic_add(p.add(i), 1u64)?;
                    }
                }
                Ok(())
            })
        };
        let launch = launch.unwrap();
        while words_of(&object)[511] == 0 {
            std::thread::yield_now();
        }
        for _ in 0..10 {
            // SAFETY: the child takes the engine down, and ends.
            let child = unsafe { libc::fork() };
            if child == 0 {
                drop(std::mem::ManuallyDrop::into_inner(svm));
                // SAFETY: ends the child without running anything of the parent's.
                unsafe { libc::_exit(0) };
            }
            let mut status = 0;
            // SAFETY: our own child.
            assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
            assert_eq!(status, 0);
        }
        stop.set();
        launch.wait().unwrap();
        drop(object);
        drop(numbers);
        assert_eq!(
            std::mem::ManuallyDrop::into_inner(svm)
                .shutdown()
                .unwrap()
                .vram_used_bytes,
            0
        );
    });
}
