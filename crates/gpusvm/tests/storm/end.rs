//! What must be as before when a storm is over.

use crate::mutator::Mutator;
use crate::table::{Outcome, PAGE};
use crate::touch::{Cpu, read};
use crate::{PAGES, SLICES};
use std::fs;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

impl Mutator {
    /// Looks at every cell once more, and gives everything back.
    pub(crate) fn end(mut self) {
        let storm = std::sync::Arc::clone(&self.storm);
        let prefetches = self.prefetches.drain(..);
        prefetches.for_each(|prefetch| drop(prefetch.wait()));
        (0..storm.table.cells()).for_each(|cell| read(&storm, cell, &mut Cpu));
        // Others may still be on their way out.
        storm.over.store(false, Ordering::Relaxed);
        for page in 0..PAGES {
            if let Some(owned) = self.own(page..page + 1) {
                unmap(owned.at, 1);
                self.give_back(owned, None, Outcome::Gone);
            }
        }
        let left_behind = core::mem::take(&mut self.left_behind);
        left_behind
            .iter()
            .for_each(|(at, pages)| unmap(*at, *pages));
        (0..SLICES).for_each(|i| drop(self.slices[i].take()));
        self.adopted.clear();
        storm.over.store(true, Ordering::Relaxed);
    }
}

fn unmap(at: u64, pages: usize) {
    let at = gpusvm::SvmPtr::<libc::c_void>::new(gpusvm::VirtAddr::new(at)).as_ptr();
    // SAFETY: our own mapping, which nobody uses any more.
    assert_eq!(unsafe { libc::munmap(at, pages * PAGE) }, 0, "munmap");
}

/// What a process has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Before {
    descriptors: usize,
    threads: usize,
    mappings: usize,
}

/// Heaps of threads, and stacks that are kept for the next.
const MORE_MAPPINGS: usize = 64;

impl Before {
    pub(crate) fn look() -> Self {
        // Threads that have been joined may still be on their way out.
        let count = |path| fs::read_dir(path).unwrap().count();
        std::thread::sleep(Duration::from_millis(50));
        Self {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            mappings: fs::read_to_string("/proc/self/maps")
                .unwrap()
                .lines()
                .count(),
        }
    }

    /// Nothing is left behind.
    pub(crate) fn compare(&self) {
        let until = Instant::now() + Duration::from_secs(10);
        let mut now = Self::look();
        // Threads of before that were on their way out may be gone.
        let more = |now: &Self| now.threads > self.threads || now.descriptors > self.descriptors;
        while more(&now) && Instant::now() < until {
            now = Self::look();
        }
        assert!(!more(&now), "{now:?}, was {self:?}");
        assert!(
            now.mappings <= self.mappings + MORE_MAPPINGS,
            "{now:?}, was {self:?}"
        );
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let flags = smaps
            .lines()
            .filter_map(|line| line.strip_prefix("VmFlags:"));
        let watched = |flags: &str| {
            flags
                .split(' ')
                .any(|flag| ["um", "uw", "ui"].contains(&flag))
        };
        assert_eq!(
            flags.filter(|flags| watched(flags)).count(),
            0,
            "registrations"
        );
    }
}
