//! Memory of a device, and what is bound where in its address spaces.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

#[path = "../common/mod.rs"]
mod common;
mod load; // lanes that work meanwhile, and forks
mod room; // how long an object lives, and what makes room for it

use common::{add_one, engine, engine_with, two_devices};
use gpusvm::driver::BindError;
use gpusvm::{
    ByteSize, DeviceVm, Error, FaultError, FaultMode, Grid, LaneError, LaunchError, MigrateOnTouch,
    Resident, Span, SvmPtr,
};
use gpusvm_types::{BLOCK_SIZE, PAGE_SIZE};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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
