//! Pages that a device has for itself: which, and for how long.

use crate::lab::{BLOCK, Lab, part};
use gpusvm_mm::Home;
use gpusvm_pagemap::Cause;
use gpusvm_pagemap::exclusive::make_exclusive;
use gpusvm_pagemap::migrate_back::migrate_back;
use gpusvm_types::{PageCount, Span};

/// How many pages of `span` the device has for itself.
fn exclusive(lab: &Lab, span: Span) -> usize {
    let pages = span.pages().filter(|page| match lab.home(page.start()) {
        Home::Device(device) => lab.device().pagemap().is_exclusive(device),
        _ => false,
    });
    pages.count()
}

fn make(lab: &Lab, span: Span) -> u64 {
    make_exclusive(&lab.device().pagemap(), span).unwrap().get()
}

#[test]
fn pages_are_exclusive_one_by_one_and_only_on_the_device() {
    let lab = Lab::new(&[0, 0]);
    let span = lab.block(2);
    assert_eq!(make(&lab, span), 0, "all of it is in RAM");
    lab.device().migrate(part(span, 0, 64)).unwrap();
    lab.devices[1].migrate(part(span, 64, 64)).unwrap();
    assert_eq!(exclusive(&lab, span), 0, "what came is nobody's alone");
    assert_eq!(make(&lab, part(span, 60, 8)), 4);
    assert_eq!(exclusive(&lab, span), 4);
    assert_eq!(make(&lab, span), 64);
    assert_eq!(exclusive(&lab, span), 64);
    lab.check(span, 2);
    lab.assert_empty();
}

/// However a page leaves, what comes to its place is not exclusive.
#[test]
fn a_page_that_leaves_is_exclusive_no_more() {
    type Leave = fn(&Lab, Span);
    let ways: [Leave; 5] = [
        |lab, span| lab.check(span, 2),
        |lab, span| {
            assert_eq!(
                migrate_back(&lab.device().pagemap(), span, Cause::Asked).unwrap(),
                BLOCK
            )
        },
        |lab, _| lab.device().pagemap().evict_all(Cause::Asked).unwrap(),
        |lab, span| lab.devices[1].migrate(span).map(drop).unwrap(),
        |lab, _| drop(lab.sim.fork()),
    ];
    for (n, leave) in ways.into_iter().enumerate() {
        let lab = Lab::new(&[0, 0]);
        let span = lab.block(2);
        lab.device().migrate(span).unwrap();
        assert_eq!(make(&lab, span), 512);
        leave(&lab, span);
        assert_eq!(lab.device().pagemap().pages_in_use(), PageCount::ZERO);
        for _ in 0..4 {
            lab.device().migrate(span).unwrap();
            assert_eq!(exclusive(&lab, span), 0, "way {n}");
            lab.devices[1].migrate(span).unwrap();
        }
        lab.check(span, 2);
        lab.assert_empty();
    }
}

/// Its neighbours stay what they are.
#[test]
fn one_page_that_leaves_takes_no_mark_of_others() {
    let lab = Lab::new(&[0]);
    let span = lab.block(2);
    lab.device().migrate(span).unwrap();
    assert_eq!(make(&lab, part(span, 0, 100)), 100);
    let pagemap = lab.device().pagemap();
    assert_eq!(
        migrate_back(&pagemap, part(span, 40, 3), Cause::Asked).unwrap(),
        PageCount::new(3)
    );
    assert_eq!(exclusive(&lab, span), 97);
    lab.check(span, 2);
    lab.assert_empty();
}
