//! Where pages are, for who only looks.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{fill, on_device, seeded, world};
use gpusvm_mm::{AddressSpace, Block, MmError, Seen};
use gpusvm_mm_sim::{Backing, Options, Prot, Sim};
use gpusvm_types::{OwnerId, PageCount, Span};

fn look(sim: &Sim, span: Span) -> Vec<Seen> {
    // What was there before is nothing to a look.
    let mut seen = vec![Seen::Moving; span.page_count().as_usize()];
    sim.snapshot(span, &mut seen).unwrap();
    seen
}

fn part(span: Span, first: u64, count: u64) -> Span {
    let first = span.first_page() + PageCount::new(first);
    Span::of_pages(first, PageCount::new(count))
}

const A: Seen = Seen::Absent;
const S: Seen = Seen::System;
const U: Seen = Seen::Unmapped;

#[test]
fn each_page_is_seen_where_it_is() {
    let (sim, device, span) = world(seeded(1), 8);
    assert_eq!(look(&sim, span), [A; 8]);
    fill(&sim, part(span, 0, 4), 1);
    assert_eq!(sim.read_u64(part(span, 5, 1).start()), Ok(0));
    let seen = look(&sim, span);
    assert_eq!(seen[..4], [S; 4]);
    assert_eq!(seen[5], S, "the page of zeros is a page");
    device.pull(&sim, part(span, 2, 2), None).unwrap();
    let (before, stats) = (on_device(&sim, span), sim.stats());
    let seen = look(&sim, span);
    assert!(matches!(
        seen[..4],
        [S, S, Seen::Device(_), Seen::Device(_)]
    ));
    assert_eq!((on_device(&sim, span), sim.stats()), (before, stats));
    sim.munmap(part(span, 0, 3));
    let seen = look(&sim, span);
    assert!(matches!(seen[..4], [U, U, U, Seen::Device(_)]));
}

#[test]
fn pages_on_the_move_are_seen_and_not_waited_for() {
    let (sim, _device, span) = world(seeded(1), 8);
    fill(&sim, span, 1);
    let mut block = sim.lock_block(span).unwrap();
    let collected = block.collect(part(span, 0, 4), OwnerId(1), &mut |_, _| false);
    let seen = look(&sim, span);
    assert_eq!(
        (&seen[..4], &seen[4..]),
        (&[Seen::Moving; 4][..], &[S; 4][..])
    );
    drop(collected);
    assert_eq!(look(&sim, span), [S; 8]);
}

/// A page that was moved from the device to another address is on its way until the engine has heard.
#[test]
fn a_remap_is_seen_before_it_is_heard_of() {
    let options = Options {
        late_events: true,
        ..seeded(1)
    };
    let (sim, device, span) = world(options, 4);
    fill(&sim, span, 1);
    device.pull(&sim, span, None).unwrap();
    let to = sim.mremap(span, false);
    assert_eq!(look(&sim, span), [U; 4]);
    let early = look(&sim, to);
    assert!(
        early
            .iter()
            .all(|seen| matches!(seen, Seen::Moving | Seen::Device(_))),
        "{early:?}"
    );
    sim.settle_events();
    let late = look(&sim, to);
    assert!(
        late.iter().all(|seen| matches!(seen, Seen::Device(_))),
        "{late:?}"
    );
}

#[test]
fn memory_that_nobody_mirrors_is_seen() {
    let sim = Sim::new(seeded(1));
    for backing in [Backing::Private, Backing::Shared] {
        let span = sim.mmap(PageCount::new(4), Prot::ReadWrite, backing);
        fill(&sim, part(span, 1, 1), 3);
        sim.munmap(part(span, 3, 1));
        sim.mprotect(part(span, 0, 2), Prot::None);
        assert_eq!(look(&sim, span), [A, S, A, U], "{backing:?}");
    }
    let span = sim.mmap(PageCount::new(1), Prot::ReadWrite, Backing::Private);
    sim.exit();
    assert_eq!(sim.snapshot(span, &mut [A]), Err(MmError::Gone));
}
