//! What the design takes for granted, each fact once, with its cost where it has one.
//!
//! `cargo test -p gpusvm-mm-linux facts -- --nocapture --test-threads 1` prints the costs: the
//! median of many, one thread, nobody else at work.

use super::{MISSING, ROUNDS, block, median, timed};
use crate::sys::map::{self, Request};
use crate::sys::pagemap::{Categories, PageMap, Region};
use crate::sys::testing::{self, Pair, finishes, next_event, pages, started};
use crate::sys::uffd::{Event, Features, Message, MoveFlags, Uffd};
use gpusvm_types::{BLOCK_SIZE, ByteSize, Span};
use rustix::io::Errno;
use std::time::Duration;

/// (c): the same of 512 base pages.
#[test]
fn facts_move_of_base_pages() {
    let Some(pair) = Pair::of_pages(BLOCK_SIZE) else {
        return;
    };
    pair.fill();
    let (mut out, mut back, mut one) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        assert!(timed(&mut out, || pair.out(ByteSize::ZERO, BLOCK_SIZE, false)).is_complete());
        assert!(timed(&mut back, || pair.back(ByteSize::ZERO, BLOCK_SIZE, false)).is_complete());
        assert!(timed(&mut one, || pair.out(ByteSize::ZERO, pages(1), false)).is_complete());
        assert!(pair.back(ByteSize::ZERO, pages(1), false).is_complete());
    }
    assert!(Pair::is_marked(&pair.app));
    let (out, back, one) = (median(out), median(back), median(one));
    eprintln!("MOVE 512 base pages: out {out:?}, back {back:?}; one page {one:?}");
}

/// (b): both sides are locked in RAM, or none.
#[test]
fn facts_both_locked_or_none() {
    let plain = Request::new(pages(4)).never_huge().dont_fork();
    let invalid = Some(Errno::INVAL);
    for (app, staging, want) in [
        (plain, plain.locked(), invalid),
        (plain.locked(), plain, invalid),
        (plain.locked(), plain.locked(), None),
    ] {
        if let Err(errno) = plain.locked().map() {
            eprintln!("skipped: mlock: {errno}");
            return;
        }
        // Locking brings pages, in staging too: they must go for a page to come.
        let Some(pair) = Pair::new(app, staging) else {
            return;
        };
        pair.fill();
        // SAFETY: ours.
        unsafe { map::discard(pair.staging.span()) }.unwrap();
        assert_eq!(pair.out(ByteSize::ZERO, pages(1), false).errno, want);
    }
}

/// (d): `UFFDIO_ZEROPAGE` takes 2 MiB at once.
#[test]
fn facts_zeropage_of_a_block() {
    for (request, name) in [(block().huge(), "huge"), (block().never_huge(), "base")] {
        let Some(pair) = Pair::new(request, request) else {
            return;
        };
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let done = timed(&mut times, || pair.a.zeropage(pair.app.span(), false));
            assert!(done.is_complete());
            // SAFETY: ours.
            unsafe { map::discard(pair.app.span()) }.unwrap();
        }
        assert!(pair.a.zeropage(pair.app.span(), false).is_complete());
        let pagemap = PageMap::open().unwrap();
        let mut out = [Region::EMPTY; 2];
        let found = pagemap.scan(pair.app.span(), &mut out).unwrap();
        assert!(!found.kinds || out[0].categories.contains(Categories::ZERO));
        let huge = out[0].categories.contains(Categories::HUGE);
        eprintln!(
            "ZEROPAGE 2 MiB, {name}: {:?}, huge zero page: {huge}",
            median(times)
        );
        let (mut move_out, mut back) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let done = timed(&mut move_out, || {
                pair.out(ByteSize::ZERO, BLOCK_SIZE, false)
            });
            assert!(done.is_complete());
            let done = timed(&mut back, || pair.back(ByteSize::ZERO, BLOCK_SIZE, false));
            assert!(done.is_complete());
        }
        let (out, back) = (median(move_out), median(back));
        eprintln!("MOVE of those zero pages: out {out:?}, back {back:?}");
    }
}

/// (g): `MADV_POPULATE_WRITE` waits for missing pages of a registered span, like a touch.
#[test]
fn facts_populate_write_waits_for_missing_pages() {
    let Some(uffd) = testing::full_uffd(Features::NONE) else {
        return;
    };
    let app = Request::new(pages(1)).dont_fork().map().unwrap();
    let span = app.span();
    // SAFETY: answered below.
    unsafe { uffd.register(span, MISSING) }.unwrap();
    let populated = started(move || map::populate_write(span));
    let event = next_event(&uffd);
    assert!(
        matches!(event, Some(Event::Fault { write: true, .. })),
        "{event:?}"
    );
    assert!(populated.try_recv().is_err(), "it waits");
    assert!(uffd.zeropage(span, false).is_complete());
    assert_eq!(populated.recv_timeout(Duration::from_secs(1)), Ok(Ok(())));
}

/// (h): dropping pages of staging sends no event when none was asked for.
#[test]
fn facts_discard_of_staging_is_silent() {
    let Some(pair) = Pair::new(block().huge(), block().huge()) else {
        return;
    };
    let mut times = Vec::new();
    for _ in 0..20 {
        pair.fill();
        assert!(pair.out(ByteSize::ZERO, BLOCK_SIZE, false).is_complete());
        let span = pair.staging.span();
        // SAFETY: ours.
        let done = timed(&mut times, || unsafe { map::discard(span) });
        assert_eq!(done, Ok(()));
        assert_eq!(pair.b.read(&mut [Message::EMPTY]), Err(Errno::AGAIN));
    }
    eprintln!("DONTNEED of a huge page in staging: {:?}", median(times));
    let span = pair.staging.span();
    let again = finishes(move || {
        // SAFETY: ours.
        unsafe { map::discard(span) }
    });
    assert_eq!(again, Some(Ok(())), "holes too");
}

/// (i): one block of a large mapping is registered and let go on its own.
#[test]
fn facts_register_one_block_of_many() {
    let Some(uffd) = testing::uffd(Features::NONE) else {
        return;
    };
    let arena = Request::new(ByteSize::gib(1))
        .aligned()
        .huge()
        .dont_fork()
        .map()
        .unwrap();
    let block = |n: u64| {
        let start = arena.span().start() + ByteSize::mib(2 * n);
        Span::from_len(start, BLOCK_SIZE).unwrap()
    };
    for (name, touched) in [("untouched", false), ("touched", true)] {
        let (mut on, mut off) = (Vec::new(), Vec::new());
        for n in (1..400).step_by(2) {
            if touched {
                arena.store(block(n).start().offset_from(arena.span().start()), 1);
            }
            // SAFETY: nobody touches a page that is missing.
            timed(&mut on, || unsafe { uffd.register(block(n), MISSING) }).unwrap();
        }
        for n in (1..400).step_by(2) {
            timed(&mut off, || uffd.unregister(block(n))).unwrap();
        }
        let (on, off) = (median(on), median(off));
        eprintln!("2 MiB of 1 GiB, {name}: register {on:?}, unregister {off:?}");
    }
    // SAFETY: as above.
    unsafe { uffd.register(arena.span(), MISSING) }.unwrap();
    let mut hole = Vec::new();
    for n in (1..400).step_by(2) {
        timed(&mut hole, || uffd.unregister(block(n))).unwrap();
    }
    eprintln!(
        "unregister 2 MiB out of a registered 1 GiB: {:?}",
        median(hole)
    );
    for when in ["and again", "twice is fine"] {
        // SAFETY: as above.
        let done = unsafe { uffd.register(block(3), MISSING) };
        assert_eq!(done, Ok(()), "{when}");
    }
}

/// (f): staging may be on another userfaultfd, but the destination's must be asked.
#[test]
fn facts_the_destination_decides_whom_to_ask() {
    let Some(pair) = Pair::of_pages(pages(2)) else {
        return;
    };
    pair.fill();
    let (app, staging) = (pair.app.span().start(), pair.staging.span().start());
    let moved = |uffd: &Uffd, dst, src| {
        // SAFETY: both are ours.
        unsafe { uffd.move_pages(dst, src, pages(1), MoveFlags::default()) }
    };
    assert_eq!(
        moved(&pair.a, staging, app).errno,
        Some(Errno::INVAL),
        "B has the destination"
    );
    assert!(moved(&pair.b, staging, app).is_complete());
    assert_eq!(
        moved(&pair.b, app, staging).errno,
        Some(Errno::INVAL),
        "A has the destination"
    );
    assert!(moved(&pair.a, app, staging).is_complete());
}
