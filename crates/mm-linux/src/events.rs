//! Unmap, remove, remap: what the program does to mirrored memory itself.
//!
//! ```text
//!   kernel --message--> reader: marks the page words (at once, in order) --job--> event thread:
//!                                                                      locks blocks, zaps, flushes,
//!                                                                      gives device pages back,
//!                                                                      changes the region table
//! ```
//!
//! The thread that did the munmap, madvise or mremap waits in the kernel until the reader has read the
//! message; so the marks are there when it goes on, but for the few instructions between the read and
//! the mark. What takes locks or memory is done by the event thread, in the same order.
//!
//! A remap marks its pages as unmapped: nobody brings them home to where they no longer belong. The
//! event thread names the device pages of their new address, and then the old one, which is gone, or
//! empty if it was kept, has no marks. What the program does to the new address before the event thread
//! got there is queued, and marks the new words when they appear.
//!
//! # Locking
//!
//! The queue's lock is held for a few instructions, for the marks of an event, and for the moment in
//! which the new place of a remap appears in the region table: so every later event finds the new place
//! there, or is found in the queue. The event thread takes one block at a time.

mod thread; // what the event thread does about them

pub(crate) use thread::run;

use crate::block::BlockGuard;
use crate::process::Process;
use crate::region::Region;
use crate::stats::Counters;
use crate::sys::uffd::Event;
use gpusvm_sync::{Arc, Condvar, Mutex, MutexGuard};
use gpusvm_types::{ByteSize, Span, VirtAddr};
use std::os::fd::{FromRawFd, OwnedFd};

/// How many jobs can wait. When there are more, marks in the words are all that is left of a removal
/// or an unmapping, and the event thread sweeps for them.
const JOBS: usize = 4096;
/// How many of them only a remap may take, which a mark cannot replace.
const KEPT_FOR_REMAPS: usize = 2048;

/// What the event thread has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Removed { span: Span },
    Unmapped { span: Span },
    Remapped { from: Span, to: VirtAddr },
    Sweep,
}

/// What waits for the event thread.
#[derive(Debug)]
pub(crate) struct Events {
    queue: Mutex<Queue>,
    changed: Condvar,
}

/// A ring of a fixed size: the reader allocates nothing.
#[derive(Debug)]
struct Queue {
    jobs: [Option<Job>; JOBS],
    first: usize,
    len: usize,
    /// Removals or unmappings found no room: their marks are to be swept for.
    overflowed: bool,
    /// They are being swept for.
    sweeping: bool,
    stopped: bool,
}

impl Events {
    pub(crate) const fn new() -> Self {
        let queue = Queue {
            jobs: [None; JOBS],
            first: 0,
            len: 0,
            overflowed: false,
            sweeping: false,
            stopped: false,
        };
        Self {
            queue: Mutex::new(queue),
            changed: Condvar::new(),
        }
    }

    /// An event was read: marks what it changes. Called by the reader, in order.
    pub(crate) fn arrive(&self, process: &Process, event: Event) {
        gpusvm_sync::walk!("arrive");
        Counters::count(&process.counters.events);
        match event {
            Event::Remove { start, end } => {
                let Ok(span) = Span::new(start, end) else {
                    return;
                };
                self.removed(process, span);
            }
            Event::Unmap { start, end } => {
                let Ok(span) = Span::new(start, end) else {
                    return;
                };
                self.unmapped(process, Job::Unmapped { span }, span);
            }
            Event::Remap { from, to, len } => {
                let Ok(from) = Span::from_len(from, len) else {
                    return;
                };
                self.unmapped(process, Job::Remapped { from, to }, from);
            }
            Event::Fork { fd } => {
                // Never asked for. A descriptor that came all the same is closed.
                // SAFETY: the kernel installed it for whoever reads the message.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            Event::Fault { .. } | Event::Unknown { .. } => {}
        }
    }

    /// Marks what the program gave up.
    fn removed(&self, process: &Process, span: Span) {
        let mut queue = self.queue.lock();
        let (mut any, mut known) = (false, false);
        process.regions.for_each_in(span, |region, inside| {
            known |= inside == span;
            for page in inside.pages() {
                if !region.block(page.start()).take_own_remove(page) {
                    region.word(page).drop_contents();
                    any = true;
                }
            }
        });
        // What a remap that is still queued will make known has no words yet: the job is all there is.
        let is_needed = !known && queue.concerns(span);
        if any || is_needed {
            queue = self.push(queue, Job::Removed { span }, is_needed);
        }
        drop(queue);
        self.changed.notify_all();
    }

    /// Marks what the program unmapped, or moved. Who sees the mark finds the reason; who takes the job
    /// finds the mark.
    fn unmapped(&self, process: &Process, job: Job, span: Span) {
        let mark = |span| {
            process.regions.for_each_in(span, |region, inside| {
                for word in region.words_in(inside) {
                    word.unmap();
                }
            });
        };
        let queue = self.queue.lock();
        let is_needed = matches!(job, Job::Remapped { .. }) || queue.concerns(span);
        let queue = self.push(queue, job, is_needed);
        mark(span);
        if let Job::Remapped { from, to } = job
            && let Ok(there) = Span::from_len(to, from.len())
        {
            // What was mirrored there is no more, and nobody may have heard of it.
            mark(there);
        }
        drop(queue);
        self.changed.notify_all();
    }

    /// Whether a remap was read whose new place is not known to the region table yet.
    pub(crate) fn is_remapping(&self) -> bool {
        self.queue.lock().is_remapping()
    }

    /// Whether a remap was read whose new place this is, and is not known to the region table yet.
    pub(crate) fn is_arriving(&self, at: VirtAddr) -> bool {
        let queue = self.queue.lock();
        let arrives = |job| match job {
            Job::Remapped { from, to } => {
                Span::from_len(to, from.len()).is_ok_and(|there| there.contains(at))
            }
            _ => false,
        };
        queue.pending().any(arrives)
    }

    /// Where a page is now that was remapped a moment ago, maybe more than once. `None` when it was not,
    /// or when the program gave it up, or unmapped it, after that.
    pub(crate) fn moved_to(&self, page: Span) -> Option<Span> {
        let queue = self.queue.lock();
        let mut place = None;
        for job in queue.pending() {
            match (job, place) {
                (Job::Remapped { from, to }, _) => {
                    let at = place.unwrap_or(page);
                    if from.covers(at) {
                        place = translate(at, from, to);
                    }
                }
                (Job::Removed { span } | Job::Unmapped { span }, Some(at)) if span.covers(at) => {
                    return None;
                }
                _ => {}
            }
        }
        place
    }

    /// Returns when everything that was read before is done.
    pub(crate) fn sync(&self) {
        let mut queue = self.queue.lock();
        while (queue.len > 0 || queue.overflowed || queue.sweeping) && !queue.stopped {
            queue = self.changed.wait(queue);
        }
    }

    /// Ends the event thread, after what is queued.
    pub(crate) fn stop(&self) {
        self.queue.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Queues a job. One that is not needed may find no room: then its marks are swept for. For one
    /// that is, this waits for room.
    fn push<'a>(
        &self,
        mut queue: MutexGuard<'a, Queue>,
        job: Job,
        is_needed: bool,
    ) -> MutexGuard<'a, Queue> {
        gpusvm_sync::walk!("push");
        if !is_needed && queue.len >= JOBS - KEPT_FOR_REMAPS {
            queue.overflowed = true;
            return queue;
        }
        while queue.len == JOBS {
            queue = self.changed.wait(queue);
        }
        let at = (queue.first + queue.len) % JOBS;
        queue.jobs[at] = Some(job);
        queue.len += 1;
        queue
    }

    /// Lets the new place of the remap that is being done appear, marked with what the program did to
    /// it since.
    fn appear(&self, process: &Process, region: &Arc<Region>) -> Result<(), Span> {
        let queue = self.queue.lock();
        // The first job is the remap itself.
        for job in queue.pending().skip(1) {
            let (span, is_gone) = match job {
                Job::Removed { span } => (span, false),
                Job::Unmapped { span } | Job::Remapped { from: span, .. } => (span, true),
                Job::Sweep => continue,
            };
            let Some(inside) = span.intersection(region.span()) else {
                continue;
            };
            for word in region.words_in(inside) {
                match is_gone {
                    true => word.unmap(),
                    false => word.drop_contents(),
                };
            }
        }
        process.regions.insert(Arc::clone(region))
    }

    /// The pages of `piece` went elsewhere in the remap that is being done. Those that no later event
    /// unmapped are there, as new.
    fn empty(&self, block: &BlockGuard<'_>, piece: Span) {
        let queue = self.queue.lock();
        let is_gone = |page: Span| {
            queue.pending().skip(1).any(|job| match job {
                Job::Unmapped { span } | Job::Remapped { from: span, .. } => span.covers(page),
                Job::Removed { .. } | Job::Sweep => false,
            })
        };
        for page in piece.pages() {
            if !is_gone(Span::page_of(page.start())) {
                block.region.word(page).map_again();
            }
        }
    }

    /// The next job; it stays queued until `done`.
    fn next(&self) -> Option<Job> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.pending().next() {
                return Some(job);
            }
            if core::mem::take(&mut queue.overflowed) {
                queue.sweeping = true;
                return Some(Job::Sweep);
            }
            if queue.stopped {
                return None;
            }
            queue = self.changed.wait(queue);
        }
    }

    fn done(&self, job: Job) {
        let mut queue = self.queue.lock();
        if job == Job::Sweep {
            queue.sweeping = false;
        } else {
            queue.first = (queue.first + 1) % JOBS;
            queue.len -= 1;
        }
        drop(queue);
        self.changed.notify_all();
    }
}

impl Queue {
    fn is_remapping(&self) -> bool {
        self.pending()
            .any(|job| matches!(job, Job::Remapped { .. }))
    }

    /// Whether a remap that is queued takes pages from `span`, or to it.
    fn concerns(&self, span: Span) -> bool {
        self.pending().any(|job| match job {
            Job::Remapped { from, to } => {
                let there = Span::from_len(to, from.len());
                from.overlaps(span) || there.is_ok_and(|there| there.overlaps(span))
            }
            _ => false,
        })
    }

    fn pending(&self) -> impl Iterator<Item = Job> + '_ {
        (0..self.len).filter_map(|i| self.jobs[(self.first + i) % JOBS])
    }
}

/// Where `piece` of `from` is when `from` is at `to`.
fn translate(piece: Span, from: Span, to: VirtAddr) -> Option<Span> {
    let offset: ByteSize = piece.start().offset_from(from.start());
    Span::from_len(to.checked_add(offset)?, piece.len()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        });
        assert!(events.is_remapping());
        assert_eq!(
            events.moved_to(page(3)).map(Span::start),
            Some(VirtAddr::new(0x10_2000))
        );
        assert_eq!(events.moved_to(page(5)), None);
        let first = Job::Unmapped { span: page(9) };
        assert_eq!(events.next(), Some(first));
        events.done(first);
        let second = Job::Remapped {
            from,
            to: VirtAddr::new(0x10_0000),
        };
        assert_eq!(events.next(), Some(second));
        events.done(second);
        events.stop();
        assert_eq!(events.next(), None);
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
        });
        assert_eq!(events.moved_to(page(1)), Some(page(11)), "given up before");
        push(Job::Remapped {
            from: pages(12, 14),
            to: to(22),
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
        push(Job::Remapped { from: span, to }, true);
        assert!(events.is_remapping());
        let mut taken = 0;
        while let Some(job) = events.next().filter(|job| *job != Job::Sweep) {
            taken += 1;
            events.done(job);
        }
        assert_eq!(taken, JOBS - KEPT_FOR_REMAPS + 1);
        events.done(Job::Sweep);
        events.sync();
    }
}
