//! Calls that say `EAGAIN`: mappings are changing, and an event is to be read first.

use crate::sys::uffd::Progress;
use core::time::Duration;
use gpusvm_types::ByteSize;
use rustix::io::Errno;

/// How often a call that says `EAGAIN` is made again by and by: about a second.
pub(super) const PATIENT: u32 = 10_000;
/// As often as it takes to find out that it will not do to wait here.
pub(super) const HASTY: u32 = 3;
/// How many of the tries only yield.
const YIELDS: u32 = 64;
const NAP: Duration = Duration::from_micros(100);

/// Repeats a call from where it got to, as long as it says `EAGAIN`: without bound while it gets on,
/// else so many times.
pub(super) fn again(patience: u32, mut call: impl FnMut(ByteSize) -> Progress) -> Progress {
    let mut done = ByteSize::ZERO;
    let mut stuck = 0;
    loop {
        let progress = call(done);
        done += progress.done;
        stuck = if progress.done.is_zero() {
            stuck + 1
        } else {
            0
        };
        if progress.errno != Some(Errno::AGAIN) || stuck == patience {
            let errno = progress.errno;
            return Progress { done, errno };
        }
        match stuck {
            0 => {}
            1..YIELDS => std::thread::yield_now(),
            _ => std::thread::sleep(NAP),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_types::PAGE_SIZE;

    /// How many calls are made when the first so many get on by a page, and all say `EAGAIN`.
    fn calls(patience: u32, get_on: u32) -> u32 {
        let mut calls = 0;
        let progress = again(patience, |_| {
            calls += 1;
            let done = if calls <= get_on {
                PAGE_SIZE
            } else {
                ByteSize::ZERO
            };
            Progress {
                done,
                errno: Some(Errno::AGAIN),
            }
        });
        assert_eq!(progress.errno, Some(Errno::AGAIN));
        assert_eq!(
            progress.done,
            ByteSize::new(PAGE_SIZE.get() * u64::from(get_on))
        );
        calls
    }

    #[test]
    fn a_call_that_gets_nowhere_is_made_so_often() {
        for patience in [HASTY, PATIENT] {
            assert_eq!(calls(patience, 0), patience);
            assert_eq!(calls(patience, 20), 20 + patience, "what gets on is no try");
        }
    }
}
