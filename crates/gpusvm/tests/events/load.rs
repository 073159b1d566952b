//! Launches, and what they leave.

use crate::{BLOCK, PAGE};
use gpusvm::{Error, Grid, Svm, SvmPtr};
use std::sync::atomic::{AtomicBool, Ordering};

/// As long as `act` takes, devices and a thread work on other memory, which goes to and fro.
pub(crate) fn under_load(svm: &Svm, act: impl FnOnce()) {
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let other = svm.alloc_slice::<u64>(BLOCK / 8).unwrap();
    let (p, n) = (other.device_ptr(), BLOCK / PAGE);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0.. {
                if ended.load(Ordering::Relaxed) {
                    break;
                }
                on_pages(svm, p, n, Some(round)).unwrap();
                check(p, n, round);
            }
        });
        let _ends = Ends(&ended);
        act();
    });
}

/// Runs a kernel on `n` pages from `p` on, one lane each, and waits for it.
pub(crate) fn on_pages(
    svm: &Svm,
    p: SvmPtr<u64>,
    n: usize,
    write: Option<u64>,
) -> Result<(), Error> {
    // SAFETY: nobody else uses the memory until it has ended, but by atomics.
    let launch = unsafe {
        svm.launch(Grid::new(n), move |lane| {
            let at = p.add(lane.id() * PAGE / 8);
            match write {
                Some(value) => lane.store(at, value + lane.id() as u64),
                None => lane.load(at).map(drop),
            }
        })
    };
    launch.unwrap().wait().map(drop)
}

/// What a kernel finds in `n` pages.
pub(crate) fn sum_on_device(svm: &Svm, p: SvmPtr<u64>, n: usize) -> u64 {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    let sum = Arc::new(AtomicU64::new(0));
    let total = Arc::clone(&sum);
    // SAFETY: reads only.
    let launch = unsafe {
        svm.launch(Grid::new(n), move |lane| {
            let found = lane.load(p.add(lane.id() * PAGE / 8))?;
            total.fetch_add(found, Ordering::Relaxed);
            Ok(())
        })
    };
    launch.unwrap().wait().unwrap();
    sum.load(Ordering::Relaxed)
}

/// Whether the CPU finds what [`on_pages`] wrote.
pub(crate) fn check(p: SvmPtr<u64>, n: usize, value: u64) {
    for page in 0..n {
        // SAFETY: mapped, and nobody writes it now.
        let found = unsafe { p.add(page * PAGE / 8).as_ptr().read_volatile() };
        assert_eq!(found, value + page as u64, "page {page}");
    }
}
