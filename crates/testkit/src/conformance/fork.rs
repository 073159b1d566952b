//! Children: what they see, and what they must not change.

use super::bench::value;
use super::{Bench, Kit, Setup};
use crate::mirror::{Snap, words_of};
use crate::world::{Cpu, Feature, Kind, Prot, World};
use gpusvm_sync::Arc;
use gpusvm_types::{BLOCK_SIZE, Span};

/// Whether a CPU reads what `fill` wrote.
fn is_filled(cpu: &dyn Cpu, span: Span, tag: u64) -> bool {
    let mut words = words_of(span).into_iter();
    words.all(|at| cpu.read(at) == Ok(value(tag, at)))
}

fn fills(cpu: &dyn Cpu, span: Span, tag: u64) -> bool {
    let mut words = words_of(span).into_iter();
    words.all(|at| cpu.write(at, value(tag, at)).is_ok())
}

/// A child sees its parent's values, in base and huge pages, on the device or not; what it writes is
/// its own.
pub fn anon_write_child<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        for kind in [Kind::Mirrored, Kind::Huge] {
            for migrated in [false, true] {
                let pages = BLOCK_SIZE.whole_pages().get();
                let span = bench.map(pages, Prot::ReadWrite, kind);
                writes_in_child(bench, span, migrated);
            }
        }
    });
}

fn writes_in_child<W: World>(bench: &Arc<Bench<W>>, span: Span, migrated: bool) {
    bench.fill(span, 1);
    if migrated {
        bench.to_device(0, span);
    }
    let passed = bench.world().fork(&mut |child| {
        is_filled(child, span, 1) && fills(child, span, 2) && is_filled(child, span, 2)
    });
    assert!(passed, "the child of {span}, migrated: {migrated}");
    bench.device_expect(0, span, 1);
    bench.expect(span, 1);
    assert_eq!(bench.device_fill(0, span, 3), Ok(()));
    bench.expect(span, 3);
    bench.check();
}

/// Shared memory is shared by a child, its parent and the parent's device.
pub fn anon_write_child_shared<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        if !bench.can(&[Feature::SharedWithChild]) {
            return;
        }
        let span = bench.map(256, Prot::ReadWrite, Kind::Shared);
        assert_eq!(bench.device_fill(0, span, 1), Ok(()));
        let passed = bench
            .world()
            .fork(&mut |child| is_filled(child, span, 1) && fills(child, span, 2));
        assert!(passed, "the child");
        bench.expect(span, 2);
        bench.device_expect(0, span, 2);
    });
}

/// Pages are on a device when the program forks: the parent writes them, and all are its own again.
pub fn hmm_cow_in_device<W: World>(kit: &Kit) {
    kit.once::<W>(&Setup::default(), |bench| {
        let span = bench.memory(512);
        bench.fill(span, 1);
        bench.to_device(0, span);
        let passed = bench.world().fork(&mut |child| is_filled(child, span, 1));
        assert!(passed, "the child");
        bench.fill(span, 2);
        let writable = true;
        let snaps = bench.mirror().snapshot(span);
        let mut snaps = snaps.iter();
        assert!(snaps.all(|snap| *snap == Snap::System { writable }));
        bench.device_expect(0, span, 2);
    });
}

/// Words that a device works on alone are forked: parent, child and device count on their own.
pub fn exclusive_cow<W: World>(kit: &Kit) {
    let setup = Setup {
        atomics_on_ram: false,
        ..Setup::default()
    };
    kit.once::<W>(&setup, |bench| {
        let span = bench.memory(64);
        let words = words_of(span);
        words.iter().for_each(|at| {
            assert_eq!(bench.world().write(*at, 10), Ok(()));
        });
        let added = bench.mirror().add(&words, 1);
        assert!(added.is_ok(), "{added:?}");
        let passed = bench.world().fork(&mut |child| {
            let mut in_child = words.iter();
            in_child.all(|at| child.fetch_add(*at, 5) == Ok(11) && child.read(*at) == Ok(16))
        });
        assert!(passed, "the child");
        for at in &words {
            assert_eq!(bench.world().fetch_add(*at, 1), Ok(11));
        }
        assert_eq!(bench.mirror().add(&words, 1), Ok(vec![12; words.len()]));
    });
}
