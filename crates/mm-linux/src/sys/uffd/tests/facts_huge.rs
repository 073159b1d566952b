//! What the design takes for granted of huge pages, each fact once, with its cost.

use super::{MISSING, ROUNDS, block, median, timed};
use crate::sys::map::{self, Mapping, Request};
use crate::sys::pagemap::{Categories, PageMap, Region};
use crate::sys::testing::{Pair, pages};
use crate::sys::thp::Thp;
use crate::sys::uffd::MoveFlags;
use gpusvm_types::{BLOCK_SIZE, ByteSize, Span};

/// (c), (e) and (f): a huge page goes out on B and back on A, stays huge, and both are cheap.
#[test]
fn facts_huge_page_survives_the_round_trip() {
    let Some(pair) = Pair::new(block().huge(), block().huge()) else {
        return;
    };
    pair.fill();
    if !is_huge(&pair.app) {
        eprintln!("skipped: no huge page (setting: {})", Thp::read());
        return;
    }
    let (mut out, mut back) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        assert!(timed(&mut out, || pair.out(ByteSize::ZERO, BLOCK_SIZE, false)).is_complete());
        assert!(is_huge(&pair.staging));
        assert!(timed(&mut back, || pair.back(ByteSize::ZERO, BLOCK_SIZE, false)).is_complete());
        assert!(is_huge(&pair.app));
    }
    assert!(Pair::is_marked(&pair.app));
    eprintln!(
        "MOVE 2 MiB huge: out {:?}, back {:?}",
        median(out),
        median(back)
    );
}

/// (a): advice on huge pages need not be the same on both sides; what arrives is what was sent.
#[test]
fn facts_huge_advice_may_differ() {
    for (app, staging, name) in [
        (block().huge(), block(), "HUGEPAGE -> none"),
        (block(), block().huge(), "none -> HUGEPAGE"),
        (
            block().huge(),
            block().never_huge(),
            "HUGEPAGE -> NOHUGEPAGE",
        ),
        (
            block().never_huge(),
            block().huge(),
            "NOHUGEPAGE -> HUGEPAGE",
        ),
    ] {
        let Some(pair) = Pair::new(app, staging) else {
            return;
        };
        pair.fill();
        let huge = is_huge(&pair.app);
        assert!(
            pair.out(ByteSize::ZERO, BLOCK_SIZE, false).is_complete(),
            "{name}"
        );
        let there = is_huge(&pair.staging);
        assert!(
            pair.back(ByteSize::ZERO, BLOCK_SIZE, false).is_complete(),
            "{name}"
        );
        assert!(Pair::is_marked(&pair.app));
        eprintln!(
            "{name}: huge at home {huge}, in staging {there}, back {}",
            is_huge(&pair.app)
        );
        assert_eq!((huge, huge), (there, is_huge(&pair.app)), "{name}");
    }
}

/// (e), the other side: a page table left behind at the destination splits the huge page that
/// comes there, even though the table is empty; what takes the table away heals it.
#[test]
fn facts_an_empty_page_table_splits_what_comes() {
    for cure in [None, Some("DONTNEED"), Some("UNREGISTER"), Some("MREMAP")] {
        let Some(pair) = Pair::new(block().huge(), block()) else {
            return;
        };
        pair.fill();
        if !is_huge(&pair.app) {
            eprintln!("skipped: no huge page (setting: {})", Thp::read());
            return;
        }
        // One base page comes to staging and goes again: a table stays.
        let one = Span::from_len(pair.staging.span().start(), pages(1)).unwrap();
        assert!(pair.b.zeropage(one, false).is_complete());
        let other = Request::new(pages(1)).dont_fork().map().unwrap();
        // SAFETY: nobody touches it.
        unsafe { pair.a.register(other.span(), MISSING) }.unwrap();
        // SAFETY: both are ours.
        let gone = unsafe {
            let dst = other.span().start();
            pair.a
                .move_pages(dst, one.start(), pages(1), MoveFlags::default())
        };
        assert!(gone.is_complete());
        let (mut heals, mut times) = (Vec::new(), Vec::new());
        timed(&mut heals, || heal(&pair, cure));
        let done = timed(&mut times, || pair.out(ByteSize::ZERO, BLOCK_SIZE, false));
        assert!(done.is_complete());
        let huge = is_huge(&pair.staging);
        let (heal, time) = (median(heals), median(times));
        eprintln!("MOVE to an empty table: cure {cure:?} {heal:?}, huge {huge}, {time:?}");
        assert!(cure.is_some() || !huge, "split without a cure");
    }
}

/// Tries to make the kernel free the page table of staging.
fn heal(pair: &Pair, cure: Option<&str>) {
    let span = pair.staging.span();
    match cure {
        // SAFETY: ours.
        Some("DONTNEED") => unsafe { map::discard(span) }.unwrap(),
        Some("UNREGISTER") => {
            pair.b.unregister(span).unwrap();
            // SAFETY: nobody touches it.
            unsafe { pair.b.register(span, MISSING) }.unwrap();
        }
        Some("MREMAP") => {
            // A fresh mapping moves over the old one.
            let fresh = Request::new(BLOCK_SIZE)
                .aligned()
                .dont_fork()
                .map()
                .unwrap();
            // SAFETY: both are ours, and `pair.staging` goes on owning the place.
            unsafe { map::remap_away(fresh.span(), span.start()) }.unwrap();
            core::mem::forget(fresh);
            // SAFETY: nobody touches it.
            unsafe { pair.b.register(span, MISSING) }.unwrap();
        }
        _ => {}
    }
}

/// The huge zero page that a read of huge memory brings can be moved, too.
#[test]
fn facts_move_of_the_huge_zero_page() {
    let Some(pair) = Pair::new(block().huge(), block().huge()) else {
        return;
    };
    pair.a.unregister(pair.app.span()).unwrap();
    assert_eq!(pair.app.load(ByteSize::ZERO), 0);
    let huge = is_huge(&pair.app);
    let done = pair.out(ByteSize::ZERO, BLOCK_SIZE, true);
    eprintln!(
        "MOVE of a huge zero page (huge: {huge}): {done:?}, there: {}",
        is_huge(&pair.staging)
    );
    assert!(done.is_complete());
    assert_eq!(pair.staging.load(BLOCK_SIZE - ByteSize::new(1)), 0);
}

fn is_huge(mapping: &Mapping) -> bool {
    let mut out = [Region::EMPTY; 2];
    let found = PageMap::open()
        .unwrap()
        .scan(mapping.span(), &mut out)
        .unwrap();
    found.regions == 1
        && out[0].end.offset_from(out[0].start) == BLOCK_SIZE
        && out[0].categories.contains(Categories::HUGE)
}
