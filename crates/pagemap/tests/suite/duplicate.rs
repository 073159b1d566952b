//! Copies for reading: made, failed at each step, and given back once.

use crate::lab::{Lab, word};
use gpusvm_mm::{AddressSpace, Block, Home, MmError};
use gpusvm_pagemap::{Cause, Devmem, Duplicate, MigrateError, duplicate};
use gpusvm_types::{PageCount, Span};
use std::cell::Cell;

const PAGES: PageCount = PageCount::new(16);

fn copy(lab: &Lab, span: Span, begin: impl FnOnce()) -> Result<Duplicate, MigrateError> {
    let device = lab.device();
    let pfns = device.take(span.page_count());
    let pfns = pfns.ok_or(MigrateError::NoSpace { span })?;
    let devmem = Devmem::new(span.page_count(), device.bo(pfns));
    duplicate::duplicate(&device.pagemap(), devmem, span, Cause::Duplicate, begin)
}

fn is_protected(lab: &Lab, span: Span) -> bool {
    span.pages()
        .all(|page| lab.sim.home(page) == Home::Protected)
}

fn part(lab: &Lab) -> Span {
    Span::of_pages(lab.block(1).first_page(), PAGES)
}

#[test]
fn a_duplicate_holds_the_same_bytes_until_it_is_dropped() {
    let lab = Lab::new(&[0]);
    let (span, free) = (part(&lab), lab.device().free_pages());
    let begun = Cell::new(false);
    let begin = || {
        assert!(is_protected(&lab, span), "nobody can write them any more");
        begun.set(true);
    };
    let made = copy(&lab, span, begin).unwrap();
    assert!(begun.get());
    assert_eq!(
        (made.count(), made.size(), made.span()),
        (PAGES, PAGES, span)
    );
    for page in span.pages() {
        let copy = made.copy_of(page).unwrap();
        let mut bytes = [0; 8];
        lab.device().read(copy.pfn.dev_addr(), &mut bytes);
        assert_eq!(u64::from_le_bytes(bytes), word(page.start(), 1));
    }
    assert_eq!(made.copy_of(span.end().page()), None);
    lab.check(span, 1);
    assert!(is_protected(&lab, span), "reads leave it so");
    assert_eq!(lab.device().pagemap().pages_in_use(), PageCount::ZERO);
    lab.fill(span, 2);
    assert!(!is_protected(&lab, span));
    assert_eq!(lab.device().free_pages(), free - PAGES.as_usize());
    drop(made);
    assert_eq!(lab.device().free_pages(), free);
    lab.check(span, 2);
    lab.sim.check().unwrap();
}

/// The n-th step fails, for every n: the memory is given back, and nothing is lost.
#[test]
fn a_duplicate_that_fails_gives_its_memory_back() {
    let mut failures = 0;
    for n in 1.. {
        let lab = Lab::new(&[0]);
        let (span, free) = (part(&lab), lab.device().free_pages());
        lab.bus.injector.fail_nth(n);
        let made = copy(&lab, span, || {});
        let fired = lab.bus.injector.fired();
        lab.bus.injector.disarm();
        if fired.is_none() {
            assert!(made.is_ok());
            break;
        }
        failures += 1;
        assert!(made.is_err(), "{fired:?}");
        assert_eq!(lab.device().free_pages(), free, "{fired:?}");
        lab.sim.check().unwrap();
        lab.check(span, 1);
        lab.fill(span, 2);
        assert!(copy(&lab, span, || {}).is_ok(), "{fired:?}");
    }
    assert!(failures >= 3, "protection, names and the copy can fail");
}

#[test]
fn a_duplicate_is_refused_where_nothing_is_to_be_copied() {
    let lab = Lab::new(&[0]);
    let (span, free) = (part(&lab), lab.device().free_pages());
    lab.device().migrate(span).unwrap();
    let error = copy(&lab, span, || {}).unwrap_err();
    assert_eq!(error, MigrateError::NothingCollected { span });
    lab.check(span, 1);
    lab.device().pagemap().unbind();
    let error = copy(&lab, span, || {}).unwrap_err();
    assert_eq!(error, MigrateError::Unbound { span });
    assert_eq!(lab.device().free_pages(), free);
    let unarmed = lab.sim.mmap(
        PAGES,
        gpusvm_mm_sim::Prot::ReadWrite,
        gpusvm_mm_sim::Backing::Mirrored,
    );
    let mut sources = vec![gpusvm_mm::Source::Hole; PAGES.as_usize()];
    let mut block = lab.sim.lock_block(unarmed).unwrap();
    let refused = block.write_protect(unarmed, &mut sources);
    assert_eq!(refused, Err(MmError::NotArmed { span: unarmed }));
}
