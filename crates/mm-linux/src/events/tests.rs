//! The queue, and messages in the orders in which threads make them.

use super::queue::JOBS;
use super::*;
use crate::process::Options;
use crate::sys::map::{Mapping, Request};
use crate::sys::testing;
use crate::sys::uffd::Features;
use core::cell::Cell;
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Time};
use gpusvm_types::BLOCK_SIZE;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A job that need not wait.
fn next(events: &Events) -> Option<Job> {
    events.next(|| Time::START, || panic!("nobody waits"))
}

#[test]
fn jobs_come_out_in_order_and_pending_ones_are_seen() {
    let events = Events::new();
    let page = |p: u64| Span::page_of(VirtAddr::new(p << 12));
    let from = page(1).union(page(4));
    let push = |job| drop(events.push(events.queue.lock(), job, true));
    push(Job::Unmapped { span: page(9) });
    assert!(!events.is_remapping());
    push(Job::Remapped {
        from,
        to: VirtAddr::new(0x10_0000),
        number: 0,
    });
    assert!(events.is_remapping());
    assert_eq!(
        events.moved_to(page(3)).map(Span::start),
        Some(VirtAddr::new(0x10_2000))
    );
    assert_eq!(events.moved_to(page(5)), None);
    let first = Job::Unmapped { span: page(9) };
    assert_eq!(next(&events), Some(first));
    events.done(first);
    let second = Job::Remapped {
        from,
        to: VirtAddr::new(0x10_0000),
        number: 0,
    };
    assert_eq!(next(&events), Some(second));
    events.done(second);
    events.stop();
    assert_eq!(next(&events), None);
    events.sync();
}

/// Moved twice, then given up in part, then unmapped.
#[test]
fn a_page_is_followed_to_where_it_is_or_is_no_more() {
    let events = Events::new();
    let page = |p: u64| Span::page_of(VirtAddr::new(p << 12));
    let pages = |first: u64, last| page(first).union(page(last));
    let push = |job| drop(events.push(events.queue.lock(), job, true));
    let to = |p: u64| VirtAddr::new(p << 12);
    push(Job::Removed { span: page(1) });
    push(Job::Remapped {
        from: pages(1, 4),
        to: to(11),
        number: 0,
    });
    assert_eq!(events.moved_to(page(1)), Some(page(11)), "given up before");
    push(Job::Remapped {
        from: pages(12, 14),
        to: to(22),
        number: 0,
    });
    assert_eq!(events.moved_to(page(1)), Some(page(11)));
    assert_eq!(events.moved_to(page(2)), Some(page(22)));
    push(Job::Removed { span: page(23) });
    push(Job::Unmapped { span: page(24) });
    let found = [1, 2, 3, 4, 5].map(|p| events.moved_to(page(p)));
    assert_eq!(found, [Some(page(11)), Some(page(22)), None, None, None]);
}

#[test]
fn a_full_queue_asks_for_a_sweep_and_still_takes_remaps() {
    let events = Events::new();
    let span = Span::page_of(VirtAddr::new(0x5000));
    let push = |job, is_needed| drop(events.push(events.queue.lock(), job, is_needed));
    (0..2 * JOBS).for_each(|_| push(Job::Removed { span }, false));
    let to = VirtAddr::new(0x9000);
    push(
        Job::Remapped {
            from: span,
            to,
            number: 0,
        },
        true,
    );
    assert!(events.is_remapping());
    let mut taken = 0;
    while let Some(job) = next(&events).filter(|job| *job != Job::Sweep) {
        taken += 1;
        events.done(job);
    }
    assert_eq!(taken, JOBS + 1);
    events.done(Job::Sweep);
    events.sync();
}

/// Story: who began work on a device waited for as long as another thread unmapped things.
#[test]
#[expect(clippy::disallowed_methods, reason = "how long is too long")]
fn who_waits_for_what_was_read_does_not_wait_for_what_is_read_later() {
    let events = Events::new();
    let push = |p| {
        let span = pages(p, p + 1);
        drop(events.push(events.queue.lock(), Job::Unmapped { span }, true));
    };
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        push(0);
        let waiter = scope.spawn(|| {
            events.sync();
            assert!(
                is_done.load(Ordering::SeqCst),
                "for what was read before, it does"
            );
        });
        let began = std::time::Instant::now();
        for p in 1.. {
            assert!(
                began.elapsed() < Duration::from_secs(30),
                "it waits for ever"
            );
            // There is always one.
            push(p);
            let job = next(&events).unwrap();
            is_done.store(true, Ordering::SeqCst);
            events.done(job);
            if waiter.is_finished() {
                break;
            }
        }
        // What is left is nobody's to wait for: so it ends, if it did not.
        events.stop();
    });
}

/// The same for marks that found no room in a queue that is never empty; but remaps come first.
#[test]
fn a_sweep_comes_although_there_is_always_something_to_do() {
    let events = Events::new();
    let span = pages(5, 6);
    let push = || drop(events.push(events.queue.lock(), Job::Removed { span }, false));
    let step = || {
        push();
        let job = next(&events).unwrap();
        events.done(job);
        job
    };
    remap(&events, pages(X, X + 8), pages(Y, Y + 8));
    (0..2 * JOBS).for_each(|_| push());
    let steps: Vec<_> = (0..2 * JOBS).map(|_| step()).collect();
    assert!(matches!(steps[0], Job::Remapped { .. }));
    let sweep = steps.iter().position(|job| *job == Job::Sweep);
    assert_eq!(sweep, Some(JOBS), "after so many others");

    // One that meets the marks of a remap is made again.
    while next(&events).is_some_and(|job| job != Job::Sweep) {
        events.done(Job::Removed { span });
    }
    events.sweep_again();
    events.done(Job::Sweep);
    assert_eq!(next(&events), Some(Job::Sweep));
    events.done(Job::Sweep);
    while !done(&events).is_empty() {}
    events.sync();
}

fn pages(first: u64, end: u64) -> Span {
    Span::new(VirtAddr::new(first << 12), VirtAddr::new(end << 12)).unwrap()
}

/// A remap, as it is read.
fn remap(events: &Events, from: Span, to: Span) {
    drop(events.remap(events.queue.lock(), from, to.start()));
}

/// An unmap, as it is read.
fn unmap(events: &Events, span: Span) {
    drop(events.unmap(events.queue.lock(), span));
}

/// What is done now, before more is read: the first page that goes, and the first to which it does.
fn done(events: &Events) -> Vec<(u64, Option<u64>)> {
    let page = |at: VirtAddr| at.get() >> 12;
    let mut all = Vec::new();
    loop {
        let queue = events.queue.lock();
        let first = queue.pending().next();
        let Some(job) = first.filter(|job| queue.waits_for(*job).is_none()) else {
            return all;
        };
        drop(queue);
        all.push(match job {
            Job::Remapped { from, to, .. } => (page(from.start()), Some(page(to))),
            Job::Unmapped { span } => (page(span.start()), None),
            Job::Removed { span } => (page(span.start()), None),
            Job::Sweep => panic!("not queued"),
        });
        events.done(job);
    }
}

const X: u64 = 0;
const Y: u64 = 100;
const Z: u64 = 200;
const W: u64 = 300;

/// One thread moves X to Y, another Z to X before the first has told that X is unmapped.
#[test]
fn an_unmap_that_is_read_late_is_not_of_what_came_since() {
    let events = Events::new();
    let [x, y, z] = [X, Y, Z].map(|first| pages(first, first + 8));
    remap(&events, x, y);
    remap(&events, z, x);
    assert_eq!(done(&events), [(X, Some(Y))], "the place is not free");
    unmap(&events, z);
    assert_eq!(done(&events), []);
    unmap(&events, x);
    assert_eq!(done(&events), [(X, None), (Z, Some(X)), (Z, None)]);
    // The next is of what came.
    unmap(&events, x);
    assert_eq!(done(&events), [(X, None)]);
    assert!(!events.has_ends());
}

/// As before, and the other thread tells everything before the first says a word.
#[test]
fn a_remap_that_is_read_late_is_done_before_the_arrival_that_it_made_room_for() {
    let events = Events::new();
    let [x, y, z] = [X, Y, Z].map(|first| pages(first, first + 8));
    {
        // X is mirrored, and messages tell of its end.
        let mut queue = events.queue.lock();
        let number = queue.ends.last() + 1;
        queue.ends.owe(x, number);
    }
    remap(&events, z, x);
    unmap(&events, z);
    assert_eq!(done(&events), []);
    remap(&events, x, y);
    assert_eq!(done(&events), [(X, Some(Y))]);
    unmap(&events, x);
    assert_eq!(done(&events), [(X, None), (Z, Some(X)), (Z, None)]);
    assert!(!events.has_ends());
}

/// Three generations at one place, and unmaps of parts of it.
#[test]
fn ends_are_those_of_the_oldest_first() {
    let events = Events::new();
    let [x, y, z, w] = [X, Y, Z, W].map(|first| pages(first, first + 8));
    remap(&events, x, y);
    remap(&events, z, x);
    remap(&events, w, x);
    unmap(&events, pages(X, X + 4));
    assert_eq!(done(&events), [(X, Some(Y)), (X, None)]);
    unmap(&events, pages(X + 4, X + 8));
    assert_eq!(done(&events), [(X + 4, None), (Z, Some(X))]);
    unmap(&events, z);
    unmap(&events, x);
    assert_eq!(done(&events), [(X, None), (W, Some(X)), (Z, None)]);
    unmap(&events, w);
    assert_eq!(done(&events), [(W, None)]);
}

/// `MREMAP_DONTUNMAP`: nothing is owed, and the kernel says so.
#[test]
fn what_never_ends_holds_nothing_up_once_all_is_told() {
    let events = Events::new();
    let [x, y, z] = [X, Y, Z].map(|first| pages(first, first + 8));
    remap(&events, x, y);
    remap(&events, z, x);
    assert_eq!(done(&events), [(X, Some(Y))]);
    let mut asked = 0;
    let ask = || {
        asked += 1;
        if asked == 3 {
            events.forgive();
        }
        asked == 3
    };
    let next = events.next(|| Time::START, ask);
    assert_eq!((asked, next.is_some()), (3, true));
    assert_eq!(done(&events), [(Z, Some(X))]);
}

/// Two remaps, each to a place that is owed an end.
fn two_that_wait(events: &Events) {
    let places = [X, Y, Z, W].map(|first| pages(first, first + 8));
    let [x, y, z, w] = places;
    {
        let mut queue = events.queue.lock();
        let number = queue.ends.last() + 1;
        queue.ends.owe(x, number);
        queue.ends.owe(y, number);
    }
    remap(events, z, x);
    remap(events, w, y);
}

/// Story: wake-ups were counted, so where many things happened the time was up at once.
#[test]
fn who_waits_for_an_end_waits_however_often_it_is_woken() {
    let events = Events::new();
    two_that_wait(&events);
    let mut asked = 0;
    let ask = || {
        asked += 1;
        if asked == 20_000 {
            unmap(&events, pages(X, X + 8));
        }
        // Something was read meanwhile: look again.
        true
    };
    let next = events.next(|| Time::START, ask);
    let unmapped = Job::Unmapped {
        span: pages(X, X + 8),
    };
    assert_eq!((next, asked), (Some(unmapped), 20_000));
}

/// One arrival has waited for long enough: another, for another place, has not.
#[test]
fn an_end_that_is_not_told_holds_its_arrival_up_for_so_long() {
    let events = Events::new();
    two_that_wait(&events);
    let clock = Cell::new(Time::START);
    let ask = || {
        clock.set(clock.get().after(Duration::from_millis(100)));
        true
    };
    assert!(events.next(|| clock.get(), ask).is_some());
    assert_eq!(clock.get().since(Time::START), Duration::from_secs(1));
    assert_eq!(done(&events), [(Z, Some(X))], "the other waits");
    assert!(events.next(|| clock.get(), ask).is_some());
    assert_eq!(clock.get().since(Time::START), Duration::from_secs(2));
    assert_eq!(done(&events), [(W, Some(Y))]);
}

/// X moves to Y, and something else to X: the place is not empty when the first is done, though nothing
/// was read of its unmap.
#[test]
fn a_place_that_was_left_is_not_empty_where_something_arrives() {
    let events = Events::new();
    remap(&events, pages(X, X + 8), pages(Y, Y + 8));
    remap(&events, pages(Z, Z + 4), pages(X, X + 4));
    let queue = events.queue.lock();
    let is_ended = |page| queue.is_ended(pages(page, page + 1));
    assert_eq!([X, X + 3, X + 4].map(is_ended), [true, true, false]);
    assert!(is_ended(Z) && !is_ended(Y));
}

/// A process with two mirrored mappings: one of two blocks, of which touches of the first are heard of, and
/// of the other only its end; and one of a block.
fn two_mappings() -> Option<(Arc<Process>, [Mapping; 2])> {
    testing::uffd(Features::WP | Features::EVENT_UNMAP | Features::EVENT_REMAP)?;
    let process = Process::start(Options::default()).unwrap();
    let mapped = [2, 1].map(|blocks| {
        let len = ByteSize::new(blocks * BLOCK_SIZE.get());
        let mapping = Request::new(len).aligned().dont_fork().map().unwrap();
        let span = mapping.span();
        assert_eq!(process.adopt(span.start(), span.len()), Ok(span));
        mapping
    });
    let both = mapped[0].span();
    process.watch(both).unwrap();
    process.arm(both.blocks().next().unwrap()).unwrap();
    Some((process, mapped))
}

/// A thread unmaps memory that two descriptors hear of, and before it tells of it for the second time,
/// another has moved something there.
///
/// Story: what had arrived was taken for unmapped.
#[test]
fn what_arrives_between_two_tellings_of_an_unmap_stays() {
    let Some((process, [gone, from])) = two_mappings() else {
        return;
    };
    let (start, end) = (gone.span().start(), gone.span().end());
    let unmap = Event::Unmap { start, end };
    let remap = Event::Remap {
        from: from.span().start(),
        to: start,
        len: from.span().len(),
    };
    let unmap_old = Event::Unmap {
        start: from.span().start(),
        end: from.span().end(),
    };
    // Nothing was done to any of it: this is what is read, before any of it is done.
    let block = process.lock_block(Span::block_of(start)).unwrap();
    for event in [unmap, remap, unmap, unmap_old] {
        process.events.arrive(&process, event);
    }
    drop(block);
    process.events.sync();
    let there = process.regions.find(start).expect("what has arrived");
    assert_eq!(
        there.span,
        Span::from_len(start, from.span().len()).unwrap()
    );
    assert!(!there.region.word(start.page()).get().unmapped);
    assert!(process.regions.find(from.span().start()).is_none());
    process.stop();
}
