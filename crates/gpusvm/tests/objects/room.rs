//! How long an object lives, and what makes room for it.

use crate::common::{built, engine, within};
use crate::{WORDS, bind_error, block, fill, is_filled, words_of};
use gpusvm::driver::{BindError, ObjectError};
use gpusvm::{ByteSize, DeviceVm, Error, FaultError, Grid, SoftGpu, Span, Svm, SvmPtr};
use gpusvm_types::{PAGE_SIZE, PageCount};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

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
