//! Markers on pages that are not there: what they look like, what gets past them, and what they cost.

use super::{ROUNDS, median, timed};
use crate::sys::map::{self, Request};
use crate::sys::pagemap::{Categories, PageMap, Region};
use crate::sys::testing::{self, next_event, pages, started};
use crate::sys::uffd::{CopyFlags, Event, Features, MoveFlags, RegisterModes, Uffd};
use gpusvm_types::{BLOCK_SIZE, ByteSize, Span, VirtAddr};
use rustix::io::Errno;

const BOTH: RegisterModes = RegisterModes {
    missing: true,
    wp: true,
    minor: false,
};

/// What there is at a page, if anything.
fn kind(pagemap: &PageMap, page: Span) -> Option<Categories> {
    let mut out = [Region::EMPTY];
    let found = pagemap.scan(page, &mut out).unwrap();
    (found.regions == 1).then_some(out[0].categories)
}

fn open() -> Option<Uffd> {
    testing::full_uffd(Features::WP | Features::WP_UNPOPULATED | Features::MOVE | Features::POISON)
}

/// A marked hole shows as swapped and not present; a touch finds it missing all the same, and a copy fills it.
#[test]
fn facts_a_marked_hole_is_missing_and_looks_swapped() {
    let Some(uffd) = open() else { return };
    let app = Request::new(pages(3))
        .never_huge()
        .dont_fork()
        .map()
        .unwrap();
    let span = app.span();
    // SAFETY: answered below.
    unsafe { uffd.register(span, BOTH) }.unwrap();
    uffd.write_protect(span, true, false).unwrap();
    let pagemap = PageMap::open().unwrap();
    let [first, second, third] = [0, 1, 2].map(|n| {
        let at = span.start() + pages(n);
        Span::page_of(at)
    });
    let found = kind(&pagemap, first).unwrap();
    assert!(found.contains(Categories::SWAPPED) && !found.contains(Categories::PRESENT));

    assert!(pagemap.is_marker(first));

    // Everything but a copy refuses to come there.
    assert_eq!(uffd.zeropage(first, false).errno, Some(Errno::EXIST));
    assert_eq!(uffd.poison(first, false).errno, Some(Errno::EXIST));
    let reader = started(move || (app.load(ByteSize::ZERO), app));
    let event = next_event(&uffd);
    assert!(
        matches!(event, Some(Event::Fault { wp: false, .. })),
        "{event:?}"
    );
    let from = VirtAddr::from(super::BYTES.as_ptr());
    // SAFETY: bytes of our own, to a page of our own.
    let filled = unsafe { uffd.copy(first.start(), from, pages(1), CopyFlags::default()) };
    assert!(filled.is_complete());
    let (read, _app) = reader.recv().unwrap();
    assert_eq!(read, 7);
    assert!(!pagemap.is_marker(first));

    // It does not move, and goes with the protection.
    let move_to = |from: Span, to: Span| {
        // SAFETY: pages of our own.
        unsafe { uffd.move_pages(to.start(), from.start(), pages(1), MoveFlags::default()) }
    };
    assert_eq!(move_to(first, second).errno, Some(Errno::EXIST));
    uffd.write_protect(second, false, true).unwrap();
    assert_eq!(kind(&pagemap, second), None);
    assert!(!pagemap.is_marker(second));
    assert_eq!(move_to(third, second).errno, Some(Errno::FAULT));
    assert!(move_to(first, second).is_complete());
    // Dropped, it is gone.
    // SAFETY: ours.
    unsafe { map::discard(third) }.unwrap();
    assert_eq!(kind(&pagemap, third), None);
    uffd.write_protect(third, true, false).unwrap();
    uffd.unregister(span).unwrap();
    assert_eq!(kind(&pagemap, third), None, "nor stays it behind");
}

/// What a block of them costs, and what comes to where they were: a huge page no more as one.
#[test]
fn facts_markers_of_a_block() {
    let (Some(uffd), Some(other)) = (open(), open()) else {
        return;
    };
    let block = |huge: bool| {
        let request = Request::new(BLOCK_SIZE).aligned().dont_fork();
        let request = if huge {
            request.huge()
        } else {
            request.never_huge()
        };
        request.map().unwrap()
    };
    for (name, huge) in [("huge", true), ("base", false)] {
        let (app, staging) = (block(huge), block(huge));
        let (there, away) = (app.span(), staging.span());
        // SAFETY: the test touches no page that is missing.
        unsafe { uffd.register(there, BOTH) }.unwrap();
        // SAFETY: as above.
        unsafe { other.register(away, super::MISSING) }.unwrap();
        uffd.unregister(there).unwrap();
        map::populate(there).unwrap();
        // SAFETY: as above.
        unsafe { uffd.register(there, BOTH) }.unwrap();
        let (mut out, mut back) = (Vec::new(), Vec::new());
        let (mut mark, mut unmark) = (Vec::new(), Vec::new());
        let flags = MoveFlags::default();
        for _ in 0..ROUNDS {
            // SAFETY: pages of our own.
            let moved = timed(&mut out, || unsafe {
                other.move_pages(away.start(), there.start(), BLOCK_SIZE, flags)
            });
            assert!(moved.is_complete(), "{moved:?}");
            timed(&mut mark, || uffd.write_protect(there, true, false)).unwrap();
            timed(&mut unmark, || uffd.write_protect(there, false, true)).unwrap();
            // SAFETY: pages of our own.
            let moved = timed(&mut back, || unsafe {
                uffd.move_pages(there.start(), away.start(), BLOCK_SIZE, flags)
            });
            assert!(moved.is_complete(), "{moved:?}");
        }
        let first = back[0];
        let [out, mark, unmark, back] = [out, mark, unmark, back].map(median);
        eprintln!(
            "2 MiB of {name} pages: MOVE out {out:?}, markers {mark:?}, off {unmark:?}, \
             MOVE back {back:?}, the first time {first:?}"
        );
    }
}
