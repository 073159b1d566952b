//! Launches, and what they leave.

use crate::PAGE;
use gpusvm::{Error, Grid, Svm, SvmPtr};

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
