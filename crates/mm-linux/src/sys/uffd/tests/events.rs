//! What is heard of, and by whom.

use super::MISSING;
use crate::sys::map::{self, Request};
use crate::sys::testing::{self, Ended, Forks, Pair, finishes, next_event, pages, started};
use crate::sys::uffd::{Event, Features, Flavour, Message, Uffd};
use gpusvm_types::{ByteSize, Span};
use rustix::io::Errno;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn a_touch_while_out_waits_until_moved_back() {
    let Some(pair) = Pair::of_pages(pages(4)) else {
        return;
    };
    pair.fill();
    assert!(pair.out(ByteSize::ZERO, pages(4), false).is_complete());
    let pair = Arc::new(pair);
    let toucher = Arc::clone(&pair);
    let touched = started(move || toucher.app.load(pages(2)));
    let event = next_event(&pair.a);
    let want = pair.app.span().start() + pages(2);
    assert!(
        matches!(event, Some(Event::Fault { at, write: false, wp: false, tid: Some(_) }) if at == want),
        "{event:?}"
    );
    assert!(touched.try_recv().is_err(), "still waits");
    assert!(pair.back(ByteSize::ZERO, pages(4), false).is_complete());
    assert_eq!(
        touched.recv_timeout(std::time::Duration::from_secs(1)),
        Ok(testing::mark(2))
    );
}

#[test]
fn faults_name_the_byte_and_the_thread() {
    let Some(pair) = Pair::of_pages(pages(1)) else {
        return;
    };
    let pair = Arc::new(pair);
    let toucher = Arc::clone(&pair);
    let wrote = started(move || {
        toucher.app.store(ByteSize::new(0x123), 1);
        crate::sys::futex::gettid()
    });
    let Some(Event::Fault { at, write, wp, tid }) = next_event(&pair.a) else {
        panic!("a fault")
    };
    assert_eq!(at, pair.app.span().start() + ByteSize::new(0x123));
    assert!(write && !wp);
    assert!(pair.a.zeropage(pair.app.span(), false).is_complete());
    assert_eq!(
        wrote.recv_timeout(std::time::Duration::from_secs(1)).ok(),
        tid
    );
}

#[test]
fn a_read_of_an_empty_queue_does_not_wait() {
    let Some(pair) = Pair::of_pages(pages(1)) else {
        return;
    };
    let read = finishes(move || pair.a.read(&mut [Message::EMPTY; 4]));
    assert_eq!(read, Some(Err(Errno::AGAIN)));
}

#[test]
fn unmap_remove_and_remap_are_heard_of() {
    let wanted = Features::EVENT_UNMAP | Features::EVENT_REMOVE | Features::EVENT_REMAP;
    let Some(uffd) = testing::uffd(wanted) else {
        return;
    };
    let app = Request::new(pages(16)).dont_fork().map().unwrap();
    let target = Request::new(pages(16))
        .dont_fork()
        .reserved()
        .map()
        .unwrap();
    let span = app.span();
    // SAFETY: nobody touches it.
    unsafe { uffd.register(span, MISSING) }.unwrap();
    let part = move |n, count| Span::from_len(span.start() + pages(n), pages(count)).unwrap();
    let to = target.span().start();

    // SAFETY: ours, and never touched.
    let discarded = started(move || unsafe { map::discard(part(0, 2)) });
    let (start, end) = (part(0, 2).start(), part(0, 2).end());
    assert_eq!(next_event(&uffd), Some(Event::Remove { start, end }));
    discarded.recv().unwrap().unwrap();

    // Kept: a hole would be filled by whoever maps next, and `app` would unmap it with the rest.
    let moved = started(move || {
        // SAFETY: ours, and never touched; `target` goes on owning the new place.
        unsafe { map::remap_fixed(part(4, 4), to) }
    });
    let from = part(4, 4).start();
    assert_eq!(
        next_event(&uffd),
        Some(Event::Remap {
            from,
            to,
            len: pages(4)
        })
    );
    moved.recv().unwrap().unwrap();

    let dropped = started(move || drop(app));
    // Its pieces may be told apart or at once.
    while dropped.try_recv().is_err() {
        if let Some(event) = next_event(&uffd) {
            let Event::Unmap { start, end } = event else {
                panic!("{event:?}")
            };
            assert!(span.covers(Span::new(start, end).unwrap()), "{event:?}");
        }
    }
    drop(uffd);
}

/// Story: this test hung. `fork` of the C library takes every lock of malloc, and then waits in the
/// kernel until the event is read: a reader that allocates meanwhile, be it at the start of its
/// thread, waits for the fork, which waits for it. So the reader is up before the fork, and
/// allocates nothing.
#[test]
fn fork_is_heard_of_and_the_child_has_a_descriptor() {
    let forks = Forks::lock();
    let Some(uffd) = testing::full_uffd(Features::EVENT_FORK) else {
        return;
    };
    let app = Request::new(pages(1)).map().unwrap();
    // SAFETY: the touch of the child is answered through its descriptor.
    unsafe { uffd.register(app.span(), MISSING) }.unwrap();
    let reading = AtomicBool::new(false);
    let ended = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            reading.store(true, Ordering::Release);
            let Some(Event::Fork { fd }) = next_event(&uffd) else {
                return None;
            };
            // SAFETY: of this event.
            let child = unsafe { uffd.of_child(fd) };
            let fault = next_event(&child)?;
            child
                .zeropage(app.span(), false)
                .is_complete()
                .then_some(fault)
        });
        while !reading.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let ended = forks.child(|| i32::from(app.load(ByteSize::ZERO)));
        assert!(matches!(
            reader.join().unwrap(),
            Some(Event::Fault { write: false, .. })
        ));
        ended
    });
    assert_eq!(ended, Ended::Exit(0));
}

/// As the least of users: what opens, what is said of what does not, and what a system call on a
/// missing page then does.
#[test]
fn without_privileges_there_is_the_user_mode_flavour() {
    if testing::full_uffd(Features::NONE).is_none() {
        return;
    }
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    if rustix::process::geteuid().as_raw() != 0 || sysctl.is_ok_and(|text| text.trim() == "1") {
        eprintln!("skipped: not root, or userfaultfd is open to everybody");
        return;
    }
    let ended = Forks::lock().child(|| {
        // SAFETY: only the child gives its rights up.
        unsafe { libc::setresuid(65534, 65534, 65534) };
        let Err(error) = Uffd::open(Flavour::Full, Features::NONE) else {
            return 1;
        };
        let said = error
            .attempts
            .map(|attempt| attempt.map(|attempt| attempt.errno));
        if said != [Some(Errno::ACCESS), Some(Errno::PERM)] {
            return 2;
        }
        let wanted = Features::EVENT_FORK | Features::EVENT_UNMAP;
        let Ok(uffd) = Uffd::open(Flavour::UserModeOnly, wanted) else {
            return 3;
        };
        if uffd.features() != Features::EVENT_UNMAP {
            return 4;
        }
        let Ok(app) = Request::new(pages(2)).map() else {
            return 5;
        };
        // SAFETY: only the kernel touches it.
        if unsafe { uffd.register(app.span(), MISSING) }.is_err() {
            return 6;
        }
        if map::populate_write(app.span()) != Err(Errno::FAULT) {
            return 7;
        }
        drop(uffd);
        0
    });
    assert_eq!(ended, Ended::Exit(0));
}
