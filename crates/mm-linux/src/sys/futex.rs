//! Sleeping on a word and waking who sleeps, and what else a thread asks of the scheduler.
//!
//! All of it may be called from a signal handler: no lock, no allocation.

use core::sync::atomic::AtomicU32;
use core::time::Duration;
use rustix::io::Errno;
use rustix::thread::MembarrierQuery;
use rustix::thread::futex::{Flags, Timespec};

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// Somebody woke us, or nobody did: the word must be looked at again.
    Wake,
    /// The word was not the expected one to begin with.
    Changed,
    /// The time ran out.
    TimedOut,
}

/// Sleeps while `word` is `expected`, until woken or for at most `timeout`.
pub(crate) fn wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> Woken {
    // A time that does not fit is longer than anybody waits.
    let timeout = timeout.and_then(|time| Timespec::try_from(time).ok());
    match rustix::thread::futex::wait(word, Flags::PRIVATE, expected, timeout.as_ref()) {
        Err(Errno::AGAIN) => Woken::Changed,
        Err(Errno::TIMEDOUT) => Woken::TimedOut,
        // EINTR is a wake-up as good as any; nothing else can be said of a word of our own.
        _ => Woken::Wake,
    }
}

/// Wakes up to `count` threads that sleep on `word`; how many were.
pub(crate) fn wake(word: &AtomicU32, count: u32) -> usize {
    // The kernel counts in a signed integer, and `u32::MAX` means everybody.
    let count = count.min(i32::MAX.cast_unsigned());
    rustix::thread::futex::wake(word, Flags::PRIVATE, count).unwrap_or(0)
}

/// The kernel's number of this thread, as fault messages have it.
pub(crate) fn gettid() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Whether `membarrier` can stop the threads of this process, and them only.
pub(crate) fn has_membarrier() -> bool {
    let query = rustix::thread::membarrier_query();
    query.contains(MembarrierQuery::PRIVATE_EXPEDITED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::sync::atomic::Ordering;

    #[test]
    fn waits_end_for_three_reasons() {
        let word = AtomicU32::new(0);
        assert_eq!(wait(&word, 1, None), Woken::Changed);
        let short = Some(Duration::from_millis(5));
        assert_eq!(wait(&word, 0, short), Woken::TimedOut);
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| {
                while word.load(Ordering::Acquire) == 0 {
                    wait(&word, 0, None);
                }
            });
            std::thread::sleep(Duration::from_millis(20));
            word.store(1, Ordering::Release);
            wake(&word, u32::MAX);
            sleeper.join().unwrap();
        });
    }
}
