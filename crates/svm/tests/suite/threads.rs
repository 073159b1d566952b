//! Many at once: the seed says who goes on at every step.

use crate::lab::{Lab, RANGE, WRITE, everywhere, part};
use crate::random::{PLAYGROUND, assert_covered, fault};
use gpusvm_mm::{AddressSpace, IntervalNotifier, Invalidation, Reason, Subscriber};
use gpusvm_mm_sim::{Backing, Options, Prot, Sim};
use gpusvm_types::{ByteSize, Span};
use std::sync::{Arc, Mutex, Weak};

type Body = Box<dyn FnOnce() + Send>;

fn lab(seed: u64, owners: &[u32], late_events: bool) -> Arc<Lab> {
    let options = Options {
        seed,
        late_events,
        ..Options::default()
    };
    Lab::with(options, owners, ByteSize::kib(128))
}

/// Another mirror of the process, which is slow to answer.
#[derive(Debug)]
struct Slow(Weak<Sim>);

impl Subscriber for Slow {
    fn invalidate(&self, _: &IntervalNotifier, _: &Invalidation) {
        let sim = self.0.upgrade().unwrap();
        (0..12).for_each(|_| sim.yield_now());
    }
}

#[test]
fn faults_of_one_address_share_a_range() {
    for seed in 0..200 {
        let lab = lab(seed, &[0], false);
        let block = lab.block();
        let slow = Arc::new(Slow(Arc::downgrade(&lab.sim)));
        let slow = lab.sim.notifiers().subscribe(block, slow);
        let found = Arc::new(Mutex::new(Vec::new()));
        let threads = (0..4).map(|i| {
            let (lab, found) = (Arc::clone(&lab), Arc::clone(&found));
            // The same page, or another of the same chunk.
            let at = part(block, [3, 3, 0, 15][i], 1).start();
            Box::new(move || {
                let range = lab
                    .svm
                    .range_find_or_insert(at, &WRITE, everywhere())
                    .unwrap();
                found.lock().unwrap().push(range);
            }) as Body
        });
        // Who subscribes waits for it, and then all of them do.
        let other = Arc::clone(&lab);
        let invalidates = move || other.invalidate(block, Reason::Protect);
        lab.sim
            .run(threads.chain([Box::new(invalidates) as Body]).collect());
        let found = found.lock().unwrap();
        assert!(found.iter().all(|range| Arc::ptr_eq(range, &found[0])));
        assert_eq!((found.len(), lab.svm.range_count()), (4, 1), "seed {seed}");
        lab.sim.notifiers().unsubscribe(&slow);
        assert_eq!(lab.sim.notifiers().count(), 1, "seed {seed}");
        lab.assert_ends();
    }
}

/// Who serves a range first maps it, and the others find that.
#[test]
fn a_range_is_served_by_one_at_a_time() {
    for seed in 0..100 {
        let lab = lab(seed, &[0], false);
        let block = lab.block();
        let threads = (0..3).map(|_| {
            let lab = Arc::clone(&lab);
            Box::new(move || {
                let range = lab
                    .svm
                    .range_find_or_insert(block.start(), &WRITE, everywhere());
                let range = range.unwrap();
                let serving = range.serve();
                if !range.is_mapped() {
                    assert_eq!(lab.svm.range_arm(&range, &serving), Ok(true));
                    lab.devices[0].migrate(range.span()).unwrap();
                    assert!(lab.map(&range), "seed {}", lab.sim.seed());
                }
            }) as Body
        });
        lab.sim.run(threads.collect());
        let bound = lab.log.take_of_table();
        assert_eq!(bound.len(), 1, "seed {seed}: {bound:?}");
        lab.check_on_gpu(part(block, 0, RANGE));
        lab.assert_ends();
    }
}

/// A mapping goes away while a range is made for it, and everybody has heard of that before the range
/// is there: then nobody would ever take it for garbage, so it must not be made.
#[test]
fn a_range_does_not_outlive_a_mapping_that_went_meanwhile() {
    for seed in 0..600 {
        let lab = lab(seed, &[0], seed % 2 == 1);
        let block = lab.block();
        let at = part(block, 3, 1).start();
        let neighbour = lab.mapped_range(part(block, RANGE, RANGE)).span();
        let (device, program, other) = (Arc::clone(&lab), Arc::clone(&lab), Arc::clone(&lab));
        let faults = move || {
            let _ = device.svm.range_find_or_insert(at, &WRITE, everywhere());
        };
        let unmaps = move || program.sim.munmap(part(block, 8, 8));
        let invalidates = move || other.invalidate(neighbour, Reason::Protect);
        lab.sim.run(vec![
            Box::new(faults),
            Box::new(unmaps),
            Box::new(invalidates),
        ]);
        lab.sim.settle_events();
        assert_covered(&lab);
        lab.svm.collect_garbage();
        assert!(
            fault(&lab, at, &WRITE, Some(0)),
            "seed {seed}: {at} is stuck"
        );
        lab.check(part(block, 0, 8));
        lab.assert_ends();
    }
}

/// Another kind of memory replaces that which the range is made for.
#[test]
fn a_range_is_of_the_memory_that_is_there() {
    for seed in 0..300 {
        let lab = lab(seed, &[0], seed % 2 == 1);
        let span = lab.some(Prot::ReadWrite, Backing::Mirrored);
        let (device, program) = (Arc::clone(&lab), Arc::clone(&lab));
        let faults = move || {
            fault(&device, span.start(), &WRITE, Some(0));
        };
        let replaces = move || {
            let prot = Prot::ReadWrite;
            program.sim.mmap_fixed(span, prot, Backing::Private);
        };
        lab.sim.run(vec![Box::new(faults), Box::new(replaces)]);
        lab.sim.settle_events();
        lab.fill(span);
        for _ in 0..2 {
            lab.svm.collect_garbage();
            fault(&lab, span.start(), &WRITE, Some(0));
        }
        let range = lab.svm.range_find(span.start()).unwrap();
        assert!(!range.can_migrate(), "seed {seed}");
        assert!(range.is_mapped(), "seed {seed}");
        lab.check_on_gpu(span);
        lab.assert_ends();
    }
}

/// The mirror ends while the program takes pages back: what the device may still find is where it was.
#[test]
fn nothing_stale_is_found_while_the_mirror_closes() {
    for seed in 0..100 {
        let lab = lab(seed, &[0], false);
        let block = lab.block();
        for i in 0..3 {
            lab.mapped_range(part(block, i * RANGE, RANGE));
        }
        let (closing, program, watching) = (Arc::clone(&lab), Arc::clone(&lab), Arc::clone(&lab));
        let closes = move || closing.svm.close();
        let touches = move || {
            for i in [2, 1, 0] {
                let at = part(block, i * RANGE, 1).start();
                assert_eq!(program.sim.read_u64(at), Ok(at.get()));
            }
        };
        let watches = move || {
            for _ in 0..200 {
                watching.sim.yield_now();
                watching.assert_not_stale();
            }
        };
        lab.sim
            .run(vec![Box::new(closes), Box::new(touches), Box::new(watches)]);
        lab.assert_ends();
    }
}

/// Devices fault, the program maps, unmaps and writes, memory is evicted, garbage collected: at the
/// end everything is as it must be, and every page that the program has tells the last write.
#[test]
fn a_storm_leaves_everything_in_order() {
    for seed in 0..200 {
        let lab = lab(seed, &[0, 0, 1], seed % 2 == 1);
        let area = part(lab.block(), 0, PLAYGROUND);
        let mut threads: Vec<Body> = Vec::new();
        for device in [0, 1, 2] {
            let lab = Arc::clone(&lab);
            threads.push(Box::new(move || {
                for _ in 0..12 {
                    let page = lab.sim.random(PLAYGROUND);
                    let at = part(area, page, 1).start();
                    fault(&lab, at, &WRITE, Some(device));
                }
            }));
        }
        let program = Arc::clone(&lab);
        threads.push(Box::new(move || run_program(&program, area)));
        let other = Arc::clone(&lab);
        threads.push(Box::new(move || {
            for _ in 0..6 {
                let page = other.sim.random(PLAYGROUND);
                if let Some(range) = other.svm.range_find(part(area, page, 1).start()) {
                    let _ = other.svm.range_evict(&range);
                }
                other.svm.collect_garbage();
            }
        }));
        let watching = Arc::clone(&lab);
        threads.push(Box::new(move || {
            for _ in 0..200 {
                watching.sim.yield_now();
                watching.assert_not_stale();
            }
        }));
        lab.sim.run(threads);
        lab.sim.settle_events();
        assert_covered(&lab);
        lab.assert_sound();
        lab.svm.collect_garbage();
        for page in area.pages() {
            let at = page.start();
            let is_mapped = lab.sim.find_vma(at).unwrap();
            if is_mapped.is_some_and(|vma| vma.span.contains(at)) {
                assert_eq!(lab.sim.read_u64(at), Ok(at.get()), "seed {seed}: {at}");
            }
        }
        lab.assert_ends();
        for device in &lab.devices {
            assert_eq!(device.free_pages(), 1024, "seed {seed}");
        }
    }
}

fn run_program(lab: &Lab, area: Span) {
    for _ in 0..10 {
        let first = lab.sim.random(PLAYGROUND);
        let count = 1 + lab.sim.random(PLAYGROUND - first).min(20);
        let span = part(area, first, count);
        match lab.sim.random(4) {
            0 => lab.sim.munmap(span),
            1 => {
                let prot = Prot::ReadWrite;
                lab.sim.mmap_fixed(span, prot, Backing::Mirrored);
                lab.fill(span);
            }
            2 => lab.sim.bring_home(span).unwrap_or_default(),
            _ => {
                let at = span.start();
                let _ = lab.sim.write_u64(at, at.get());
            }
        }
    }
}
