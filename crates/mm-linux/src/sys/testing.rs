//! What the tests of this folder share.

use super::map::{Mapping, Request};
use super::uffd::{Event, Features, Flavour, Message, MoveFlags, Progress, RegisterModes, Uffd};
use gpusvm_types::{ByteSize, PageCount};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

/// A userfaultfd with what of `wanted` there is, full if possible; `None` after saying why not.
///
/// # Panics
///
/// When there is none, and `GPUSVM_REQUIRE_UFFD=1` says that there must be.
pub(crate) fn uffd(wanted: Features) -> Option<Uffd> {
    let opened = Uffd::open(Flavour::Full, wanted)
        .or_else(|full| Uffd::open(Flavour::UserModeOnly, wanted).map_err(|_| full));
    match opened {
        Ok(uffd) if uffd.features().contains(wanted) => Some(uffd),
        Ok(uffd) => skip(&format!("only {} of {wanted} are granted", uffd.features())),
        Err(error) => skip(&error.to_string()),
    }
}

/// As [`uffd`], but a full one.
pub(crate) fn full_uffd(wanted: Features) -> Option<Uffd> {
    match Uffd::open(Flavour::Full, wanted) {
        Ok(uffd) if uffd.features().contains(wanted) => Some(uffd),
        Ok(uffd) => skip(&format!("only {} of {wanted} are granted", uffd.features())),
        Err(error) => skip(&error.to_string()),
    }
}

fn skip(reason: &str) -> Option<Uffd> {
    let required = std::env::var_os("GPUSVM_REQUIRE_UFFD").is_some_and(|value| value == "1");
    assert!(!required, "GPUSVM_REQUIRE_UFFD=1, but {reason}");
    eprintln!("skipped: {reason}");
    None
}

/// What `work` returns, or `None` when it has not come back in a second: it then hangs in a
/// thread of its own, and not in the test.
pub(crate) fn finishes<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    started(work).recv_timeout(Duration::from_secs(1)).ok()
}

/// Starts `work` on a thread of its own; what it returns comes through the channel.
pub(crate) fn started<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> mpsc::Receiver<T> {
    let (done, result) = mpsc::channel();
    std::thread::Builder::new()
        .spawn(move || {
            // Nobody listens after the time is up.
            let _ = done.send(work());
        })
        .expect("a thread");
    result
}

/// How a forked child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It returned.
    Exit(i32),
    /// It was killed by a signal.
    Signal(i32),
}

/// Evidence that nobody else forks: who forks with a page or a registration of a test at hand
/// changes what that test sees. Mappings of other tests are `dont_fork`.
pub(crate) struct Forks(#[expect(dead_code, reason = "held, not read")] MutexGuard<'static, ()>);

impl Forks {
    /// Waits until nobody else forks.
    pub(crate) fn lock() -> Self {
        static LOCK: Mutex<()> = Mutex::new(());
        Self(LOCK.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Runs `work` in a forked child and waits for its end.
    ///
    /// The child has one thread and locks that others may have held: `work` may make system
    /// calls and touch memory, but not allocate.
    pub(crate) fn child(&self, work: impl FnOnce() -> i32) -> Ended {
        let pid = fork(work);
        let mut status = 0;
        // SAFETY: our own child, and a status of our own.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        assert_eq!(waited, pid);
        if libc::WIFSIGNALED(status) {
            Ended::Signal(libc::WTERMSIG(status))
        } else {
            Ended::Exit(libc::WEXITSTATUS(status))
        }
    }
}

fn fork(work: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child does as the documentation of `Forks::child` says, and then ends.
    match unsafe { libc::fork() } {
        0 => {
            let code = work();
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(code) }
        }
        pid => {
            assert!(pid > 0, "fork");
            pid
        }
    }
}

/// Memory of an application and a staging area, each registered with a userfaultfd of its own.
pub(crate) struct Pair {
    // Closed before the mappings go: an unmap then sends no event that nobody reads.
    pub(crate) a: Uffd,
    pub(crate) b: Uffd,
    pub(crate) app: Mapping,
    pub(crate) staging: Mapping,
}

impl Pair {
    /// Of the two mappings asked for, or `None` after saying why not.
    pub(crate) fn new(app: Request, staging: Request) -> Option<Self> {
        let wanted = Features::MOVE | Features::EXACT_ADDRESS | Features::THREAD_ID;
        let (a, b) = (uffd(wanted)?, uffd(wanted)?);
        let (app, staging) = (app.map().expect("app"), staging.map().expect("staging"));
        let pair = Self { a, b, app, staging };
        pair.register(&pair.a, &pair.app);
        pair.register(&pair.b, &pair.staging);
        Some(pair)
    }

    /// Of `len` bytes in base pages each.
    pub(crate) fn of_pages(len: ByteSize) -> Option<Self> {
        let request = Request::new(len).aligned().never_huge().dont_fork();
        Self::new(request, request)
    }

    fn register(&self, uffd: &Uffd, mapping: &Mapping) {
        let missing = RegisterModes {
            missing: true,
            wp: false,
            minor: false,
        };
        // SAFETY: the test answers what it touches.
        unsafe { uffd.register(mapping.span(), missing) }.expect("register");
    }

    /// Zeros for every page of the application, then a byte of its number in each.
    pub(crate) fn fill(&self) {
        let _ = self.a.unregister(self.app.span());
        for (n, page) in self.app.span().pages().enumerate() {
            let offset = page.start().offset_from(self.app.span().start());
            self.app.store(offset, mark(n));
        }
        self.register(&self.a, &self.app);
    }

    /// Moves `len` bytes at `offset` from the application to staging.
    pub(crate) fn out(&self, offset: ByteSize, len: ByteSize, allow_holes: bool) -> Progress {
        let (dst, src) = (
            self.staging.span().start() + offset,
            self.app.span().start() + offset,
        );
        // SAFETY: both are ours.
        unsafe {
            self.b.move_pages(
                dst,
                src,
                len,
                MoveFlags {
                    allow_holes,
                    dont_wake: false,
                },
            )
        }
    }

    /// Moves `len` bytes at `offset` from staging to the application.
    pub(crate) fn back(&self, offset: ByteSize, len: ByteSize, allow_holes: bool) -> Progress {
        let (dst, src) = (
            self.app.span().start() + offset,
            self.staging.span().start() + offset,
        );
        // SAFETY: both are ours.
        unsafe {
            self.a.move_pages(
                dst,
                src,
                len,
                MoveFlags {
                    allow_holes,
                    dont_wake: false,
                },
            )
        }
    }

    /// Whether every page of `mapping` has its byte.
    pub(crate) fn is_marked(mapping: &Mapping) -> bool {
        let count = mapping.span().page_count().as_usize();
        (0..count).all(|n| mapping.load(pages(n as u64)) == mark(n))
    }
}

/// `n` pages, in bytes.
pub(crate) const fn pages(n: u64) -> ByteSize {
    PageCount::new(n).bytes()
}

/// The byte that a test puts into page `n`; never zero.
pub(crate) fn mark(n: usize) -> u8 {
    u8::try_from(n % 255).expect("below 255") + 1
}

/// The next event, waiting for at most a second.
pub(crate) fn next_event(uffd: &Uffd) -> Option<Event> {
    for _ in 0..1000 {
        let mut message = [Message::EMPTY];
        if uffd.read(&mut message) == Ok(1) {
            return Some(message[0].decode());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    None
}
