//! Everything else that answers a fault.

use super::{BYTES, MISSING, complete, stopped};
use crate::sys::map::{self, Request};
use crate::sys::testing::{self, Ended, Forks, Pair, next_event, pages, started};
use crate::sys::uffd::{CopyFlags, Event, Features, Flavour, RegisterModes, Uffd};
use gpusvm_types::{ByteSize, Span, VirtAddr};
use rustix::io::Errno;
use std::sync::Arc;

#[test]
fn copy_reports_how_far_it_came() {
    let Some(pair) = Pair::of_pages(pages(8)) else {
        return;
    };
    let source = Request::new(pages(8)).map().unwrap();
    source.store(pages(7), 5);
    let third = Span::from_len(pair.app.span().start() + pages(3), pages(1)).unwrap();
    assert!(pair.a.zeropage(third, false).is_complete());
    let copy = |n, count| {
        let (dst, src) = (
            pair.app.span().start() + pages(n),
            source.span().start() + pages(n),
        );
        // SAFETY: the source is ours, and the destination too.
        unsafe { pair.a.copy(dst, src, pages(count), CopyFlags::default()) }
    };
    assert_eq!(copy(0, 8), stopped(pages(3), Errno::AGAIN));
    assert_eq!(copy(3, 5), stopped(ByteSize::ZERO, Errno::EXIST));
    assert_eq!(copy(4, 4), complete(pages(4)));
    assert_eq!(pair.app.load(pages(7)), 5);
}

#[test]
fn a_write_to_a_protected_page_is_reported_as_such() {
    let Some(uffd) = testing::uffd(Features::WP) else {
        return;
    };
    let app = Arc::new(Request::new(pages(2)).dont_fork().map().unwrap());
    app.store(ByteSize::ZERO, 1);
    // SAFETY: the test answers.
    unsafe {
        uffd.register(
            app.span(),
            RegisterModes {
                missing: false,
                wp: true,
                minor: false,
            },
        )
    }
    .unwrap();
    uffd.write_protect(app.span(), true, false).unwrap();
    assert_eq!(app.load(ByteSize::ZERO), 1, "reads go on");
    let writer = Arc::clone(&app);
    let wrote = started(move || writer.store(ByteSize::ZERO, 2));
    let event = next_event(&uffd);
    assert!(
        matches!(
            event,
            Some(Event::Fault {
                write: true,
                wp: true,
                ..
            })
        ),
        "{event:?}"
    );
    uffd.write_protect(app.span(), false, false).unwrap();
    assert!(
        wrote
            .recv_timeout(std::time::Duration::from_secs(1))
            .is_ok()
    );
    assert_eq!(app.load(ByteSize::ZERO), 2);
}

#[test]
fn wake_makes_the_thread_fault_again() {
    let Some(pair) = Pair::of_pages(pages(1)) else {
        return;
    };
    let pair = Arc::new(pair);
    let toucher = Arc::clone(&pair);
    let touched = started(move || toucher.app.load(ByteSize::ZERO));
    let first = next_event(&pair.a);
    pair.a.wake(pair.app.span()).unwrap();
    assert_eq!(next_event(&pair.a), first, "the same fault again");
    assert!(pair.a.zeropage(pair.app.span(), true).is_complete());
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(touched.try_recv().is_err(), "told not to wake");
    pair.a.wake(pair.app.span()).unwrap();
    assert_eq!(
        touched.recv_timeout(std::time::Duration::from_secs(1)),
        Ok(0)
    );
}

#[test]
fn a_touch_of_a_poisoned_page_is_sigbus() {
    if testing::uffd(Features::POISON).is_none() {
        return;
    }
    let ended = Forks::lock().child(|| {
        let opened = Uffd::open(Flavour::Full, Features::POISON)
            .or_else(|_| Uffd::open(Flavour::UserModeOnly, Features::POISON));
        let (Ok(uffd), Ok(app)) = (opened, Request::new(pages(2)).map()) else {
            return 1;
        };
        // SAFETY: the page is poisoned next.
        if unsafe { uffd.register(app.span(), MISSING) }.is_err() {
            return 2;
        }
        if uffd.poison(app.span(), false) != complete(pages(2)) {
            return 3;
        }
        if map::populate_write(app.span()) != Err(Errno::HWPOISON) {
            return 4;
        }
        // What comes to a poisoned page heals it; what was not healed is a signal.
        let (dst, src) = (
            app.span().start() + pages(1),
            VirtAddr::from(&raw const BYTES),
        );
        // SAFETY: the source is ours.
        let copied = unsafe { uffd.copy(dst, src, pages(1), CopyFlags::default()) };
        if copied != complete(pages(1)) || app.load(pages(1)) != 7 {
            return 5;
        }
        i32::from(app.load(ByteSize::ZERO))
    });
    assert_eq!(ended, Ended::Signal(libc::SIGBUS));
}
