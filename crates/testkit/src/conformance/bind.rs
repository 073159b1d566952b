//! What is bound where in a device address space: the cases of Intel's `xe_exec_system_allocator` that
//! bind and unbind.

use super::{Bench, Kit, Setup};
use crate::mirror::words_of;
use crate::world::{Feature, Kind, Prot, World};
use gpusvm::driver::BindError;
use gpusvm_device::FaultError;
use gpusvm_sync::Arc;
use gpusvm_types::{ByteSize, PageCount, Span};

/// Binds an object over `span`, which the CPU wrote with tag 1, lets the device write it, and puts the
/// mirror back.
fn object_for_a_while<W: World>(bench: &Arc<Bench<W>>, span: Span) {
    let mirror = bench.mirror();
    let object = mirror.region.create_object(span.len()).expect("room");
    assert_eq!(mirror.vm.bind_object(span, &object, ByteSize::ZERO), Ok(()));
    bench.device_expect_zero(0, span);
    assert_eq!(bench.device_fill(0, span, 2), Ok(()));
    bench.check();
    bench.device_expect(0, span, 2);
    bench.expect(span, 1);
    assert_eq!(mirror.region.stats().objects, 1);
    drop(object);
    assert_eq!(mirror.vm.bind_mirror(span), Ok(()));
    assert_eq!(mirror.region.stats().objects, 0);
    bench.device_expect(0, span, 1);
}

/// An object over memory that no device touched, then the mirror: each sees its own.
pub fn bo_map<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(64);
        bench.fill(span, 1);
        object_for_a_while(bench, span);
    });
}

/// The same over memory that the device had, and the CPU took back.
pub fn bo_unmap<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(512);
        bench.fill(span, 1);
        bench.device_expect(0, span, 1);
        bench.expect(span, 1);
        object_for_a_while(bench, span);
    });
}

/// The mirror stays under what is mapped; once that has gone home it can be taken away.
pub fn busy<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let (vm, span) = (&bench.mirror().vm, bench.memory(512));
        bench.fill(span, 1);
        bench.device_expect(0, span, 1);
        let refused = vm.unbind(span);
        let Err(error @ BindError::Busy { span: range }) = refused else {
            panic!("{refused:?}");
        };
        assert_eq!(error.errno(), 16, "EBUSY");
        assert!(span.covers(range), "{range}");
        bench.device_expect(0, span, 1);
        bench.expect(span, 1);
        assert_eq!(vm.unbind(span), Ok(()));
        let at = span.start();
        let hole = bench.mirror().read(&[at]);
        assert_eq!(hole, Err(FaultError::NotBound { at }));
        bench.check();
        assert_eq!(vm.bind_mirror(span), Ok(()));
        bench.device_expect(0, span, 1);
    });
}

/// Memory that nobody mirrors, and what was mapped there before it, is not in the way of an object: no touch
/// of the CPU would unmap it, and nobody tells that it was unmapped.
pub fn bind_over_memory_in_place<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.map(16, Prot::ReadWrite, Kind::Plain);
        bench.fill(span, 1);
        bench.device_expect(0, span, 1);
        object_for_a_while(bench, span);
        if bench.can(&[Feature::Unmap]) {
            bench.world().unmap(span);
            let map_again = |kind| bench.world().map_again(span, Prot::ReadWrite, kind);
            map_again(Kind::Mirrored);
            bench.fill(span, 1);
            object_for_a_while(bench, span);
        }
    });
}

/// A device works on a block while a part of it is bound and unbound.
pub fn bind_racing_faults<W: World>(kit: &Kit) {
    const ROUNDS: u64 = 6;
    kit.race::<W>(&Setup::default(), |bench| {
        let span = bench.memory(16);
        let here = Span::of_pages(span.first_page() + PageCount::new(4), PageCount::new(4));
        let [below, above] = span.without(here);
        let rest: Vec<Span> = [below, above].into_iter().flatten().collect();
        let words: Vec<_> = rest.iter().flat_map(|span| words_of(*span)).collect();
        let wanted = words.clone();
        let adds = move |bench: &Arc<Bench<W>>| {
            for round in 0..ROUNDS {
                let added = bench.mirror().add(&words, 1);
                assert!(added.is_ok(), "round {round}: {added:?}");
            }
        };
        let touches = move |bench: &Arc<Bench<W>>| {
            for at in (0..ROUNDS).flat_map(|_| words_of(here)) {
                let read = bench.mirror().read(&[at]);
                let is_fine = matches!(
                    read,
                    Ok(_) | Err(FaultError::NotBound { .. } | FaultError::NotDeclared { .. })
                );
                assert!(is_fine, "{at}: {read:?}");
            }
        };
        let binds = move |bench: &Arc<Bench<W>>| {
            let (vm, region) = (&bench.mirror().vm, &bench.mirror().region);
            for _ in 0..ROUNDS {
                for at in words_of(span) {
                    assert!(bench.world().fetch_add(at, 0).is_ok());
                }
                let object = region.create_object(here.len()).expect("room");
                for done in [
                    vm.bind_object(here, &object, ByteSize::ZERO),
                    vm.unbind(here),
                ] {
                    assert!(
                        matches!(done, Ok(()) | Err(BindError::Busy { .. })),
                        "{done:?}"
                    );
                    bench.world().pause();
                }
                assert_eq!(vm.bind_mirror(here), Ok(()));
            }
        };
        bench.run(vec![Box::new(adds), Box::new(touches), Box::new(binds)]);
        for at in wanted {
            assert_eq!(bench.world().read(at), Ok(ROUNDS), "{at}");
        }
        bench.expect_zero(here);
    });
}
