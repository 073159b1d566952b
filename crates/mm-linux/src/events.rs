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
//! # Order
//!
//! The messages of one thread come in the order of what it did; those of two threads do not. A place that
//! one of them unmapped, or moved something away from, can be another's by the time that this is read:
//! the unmap that is read then is not of what is there now. So a remap is done only when the place that it
//! goes to is free: every end of what was there before has been read, and done ([`ends`]). An end that is
//! read later than the arrival is queued before it. Who mirrors memory that may be at such a place waits
//! likewise (`Process::settle_ends`).
//!
//! Not put in order are three threads that move things in a circle, each of which the other two overtake
//! between the system call's work and its message.
//!
//! # Locking
//!
//! The queue's lock is held for a few instructions, for the marks of an event, and for the moment in
//! which the new place of a remap appears in the region table: so every later event finds the new place
//! there, or is found in the queue. The event thread takes one block at a time.

mod ends; // which ends of mappings are to be read yet
mod thread; // what the event thread does about them
#[cfg(test)]
mod tests; // messages, in the orders in which threads make them

pub(crate) use thread::run;

use crate::block::BlockGuard;
use crate::outbound::runs;
use crate::process::Process;
use crate::region::Region;
use crate::stats::Counters;
use crate::sys::uffd::Event;
use core::time::Duration;
use ends::Ends;
use gpusvm_sync::{Arc, Condvar, Mutex, MutexGuard};
use gpusvm_types::{ByteSize, PageCount, Span, VirtAddr};
use std::os::fd::{FromRawFd, OwnedFd};

/// How many jobs can wait. When there are more, marks in the words are all that is left of a removal
/// or an unmapping, and the event thread sweeps for them.
const JOBS: usize = 4096;
/// How many of them only a remap may take, which a mark cannot replace.
const KEPT_FOR_REMAPS: usize = 2048;
/// How soon to ask again whether the kernel has more to say.
const ASK_AGAIN: Duration = Duration::from_micros(200);
/// How often, before a remap is done all the same: about a second.
const ASKS: u32 = 5000;

/// What the event thread has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Removed {
        span: Span,
    },
    Unmapped {
        span: Span,
    },
    Remapped {
        from: Span,
        to: VirtAddr,
        /// In the order in which they were read.
        number: u64,
    },
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
    /// What was not read yet.
    ends: Ends,
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
            ends: Ends::new(),
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
                self.unmapped(process, span);
            }
            Event::Remap { from, to, len } => {
                let Ok(from) = Span::from_len(from, len) else {
                    return;
                };
                self.remapped(process, from, to);
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
                if queue.arrives(page.start()) {
                    // What is still known there is not what the program dropped.
                    known = false;
                    continue;
                }
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

    /// Marks what the program unmapped. Who sees the mark finds the reason; who takes the job finds the
    /// mark.
    fn unmapped(&self, process: &Process, span: Span) {
        let queue = self.unmap(self.queue.lock(), span);
        mark(process, span);
        drop(queue);
        self.changed.notify_all();
    }

    /// Queues an unmap: what of it was owed, before the arrival that waits for it.
    fn unmap<'a>(&'a self, mut queue: MutexGuard<'a, Queue>, span: Span) -> MutexGuard<'a, Queue> {
        let Some((paid, number)) = queue.ends.pay(span) else {
            let is_needed = queue.concerns(span);
            return self.push(queue, Job::Unmapped { span }, is_needed);
        };
        queue = self.push_before(queue, Job::Unmapped { span: paid }, number);
        for rest in span.without(paid).into_iter().flatten() {
            queue = self.unmap(queue, rest);
        }
        queue
    }

    /// Marks what the program moved.
    fn remapped(&self, process: &Process, from: Span, to: VirtAddr) {
        let mut queue = self.queue.lock();
        let there = Span::from_len(to, from.len()).ok();
        if let Some(there) = there {
            let number = queue.ends.last() + 1;
            process.regions.for_each_in(there, |region, inside| {
                for piece in inside.blocks().filter(|piece| region.will_end(*piece)) {
                    queue.ends.owe(piece, number);
                }
            });
        }
        queue = self.remap(queue, from, to);
        mark(process, from);
        if let Some(there) = there {
            // What was mirrored there is no more, and nobody may have heard of it.
            mark(process, there);
        }
        drop(queue);
        self.changed.notify_all();
    }

    /// Queues a remap: before the arrival that came to where it is from, if that was read first.
    fn remap<'a>(
        &'a self,
        mut queue: MutexGuard<'a, Queue>,
        from: Span,
        to: VirtAddr,
    ) -> MutexGuard<'a, Queue> {
        let number = queue.ends.number();
        if let Some(there) = Span::from_len(to, from.len()).ok()
            && let Some(there) = queue.stays_at(there)
        {
            queue.ends.owe(there, number);
        }
        let makes_room_for = queue.ends.depart(from, number);
        let job = Job::Remapped { from, to, number };
        self.push_before(queue, job, makes_room_for.unwrap_or(u64::MAX))
    }

    /// Whether an end of what was in `span` was not read yet.
    pub(crate) fn is_owed(&self, span: Span) -> bool {
        self.queue.lock().ends.is_owed(span)
    }

    /// All that the kernel had to say was read. Only for who keeps more from being read.
    pub(crate) fn forgive(&self) {
        self.queue.lock().ends.forgive();
        self.changed.notify_all();
    }

    /// Whether a remap was read whose new place is not known to the region table yet.
    pub(crate) fn is_remapping(&self) -> bool {
        self.queue.lock().is_remapping()
    }

    /// Whether a remap was read whose new place this is, and is not known to the region table yet.
    pub(crate) fn is_arriving(&self, at: VirtAddr) -> bool {
        self.queue.lock().arrives(at)
    }

    /// Calls `each` with the pieces of `span` to which no remap that was read is about to bring something.
    pub(crate) fn each_without_arrival(&self, span: Span, each: &mut dyn FnMut(Span)) {
        let page = |i: usize| span.first_page() + PageCount::from_usize(i);
        let arrives = |job: Job| job.arrives_in(span).is_some();
        if self.queue.lock().pending().any(arrives) {
            runs(span, |i| !self.is_arriving(page(i).start())).for_each(each);
        } else {
            each(span);
        }
    }

    /// Where a page is now that was remapped a moment ago, maybe more than once. `None` when it was not,
    /// or when the program gave it up, or unmapped it, after that.
    pub(crate) fn moved_to(&self, page: Span) -> Option<Span> {
        let queue = self.queue.lock();
        let mut place = None;
        for job in queue.pending() {
            match (job, place) {
                (Job::Remapped { from, to, .. }, _) => {
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
        &'a self,
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

    /// Queues a job that is needed before the first arrival from this one on at where the job is about;
    /// behind all others if there is none.
    fn push_before<'a>(
        &'a self,
        queue: MutexGuard<'a, Queue>,
        job: Job,
        number: u64,
    ) -> MutexGuard<'a, Queue> {
        let (Job::Unmapped { span } | Job::Removed { span } | Job::Remapped { from: span, .. }) =
            job
        else {
            return queue;
        };
        let mut queue = self.push(queue, job, true);
        let waits = |other: Job| match other {
            Job::Remapped { number: at, .. } if at < number => false,
            other => other != job && other.arrives_in(span).is_some(),
        };
        let waiting = queue.pending().position(waits);
        if let Some(first) = waiting {
            // From the end forward, to before the one that waits.
            for i in (first + 1..queue.len).rev() {
                let (one, other) = ((queue.first + i) % JOBS, (queue.first + i - 1) % JOBS);
                queue.jobs.swap(one, other);
            }
        }
        queue
    }

    /// Lets the new place of the remap that is being done appear, marked with what the program did to
    /// it since.
    fn appear(&self, process: &Process, region: &Arc<Region>) -> Result<(), Span> {
        let queue = self.queue.lock();
        for job in queue.after_this() {
            let dropped = job
                .drops()
                .and_then(|span| span.intersection(region.span()));
            let ended = job.ends().into_iter().flatten();
            let ended = ended.filter_map(|span| span.intersection(region.span()));
            for word in dropped.iter().flat_map(|span| region.words_in(*span)) {
                word.drop_contents();
            }
            for word in ended.flat_map(|span| region.words_in(span)) {
                word.unmap();
            }
        }
        process.regions.insert(Arc::clone(region))
    }

    /// The pages of `piece` went elsewhere in the remap that is being done. Those that no later event
    /// unmapped, and to which none brings others, are there, as new.
    fn empty(&self, block: &BlockGuard<'_>, piece: Span) {
        let queue = self.queue.lock();
        for page in piece.pages() {
            if !queue.is_ended(Span::page_of(page.start())) {
                block.region.word(page).map_again();
            }
        }
    }

    /// The next job; it stays queued until `done`. Of one that has to wait, `ask` says whether the kernel
    /// has told everything.
    fn next(&self, mut ask: impl FnMut() -> bool) -> Option<Job> {
        let mut queue = self.queue.lock();
        let mut asks = 0;
        loop {
            let next = queue.pending().next();
            if let Some(job) = next {
                if !queue.has_to_wait(job) {
                    return Some(job);
                }
                asks += 1;
                if asks > ASKS || queue.stopped {
                    queue.ends.forgive();
                    continue;
                }
                drop(queue);
                let is_told = ask();
                queue = self.queue.lock();
                if !is_told && queue.has_to_wait(job) {
                    (queue, _) = self.changed.wait_timeout(queue, ASK_AGAIN);
                }
                continue;
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

    /// Whether an end is owed to anybody.
    fn has_ends(&self) -> bool {
        !self.queue.lock().ends.is_empty()
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
            Job::Remapped { from, .. } => from.overlaps(span) || job.arrives_in(span).is_some(),
            _ => false,
        })
    }

    /// Whether a remap that is queued brings something to `at`.
    fn arrives(&self, at: VirtAddr) -> bool {
        let page = Span::page_of(at);
        self.pending().any(|job| job.arrives_in(page).is_some())
    }

    /// What of `span` a queued remap brings something to that does not end in the queue.
    fn stays_at(&self, span: Span) -> Option<Span> {
        self.pending()
            .fold(None, |there: Option<Span>, job| match job {
                Job::Unmapped { span: gone } => there.filter(|there| !gone.overlaps(*there)),
                Job::Remapped { from, .. } => {
                    let left = there.filter(|there| !from.overlaps(*there));
                    job.arrives_in(span).or(left)
                }
                Job::Removed { .. } | Job::Sweep => there,
            })
    }

    /// Whether what is at `page` when the remap that is being done is done ends in the queue.
    fn is_ended(&self, page: Span) -> bool {
        let mut ended = self.after_this().flat_map(Job::ends).flatten();
        ended.any(|span| span.covers(page))
    }

    /// What comes after the remap that is being done, which is the first.
    fn after_this(&self) -> impl Iterator<Item = Job> + '_ {
        self.pending().skip(1)
    }

    /// Whether the place that a job brings something to is not free yet.
    fn has_to_wait(&self, job: Job) -> bool {
        match job {
            Job::Remapped { from, to, number } => {
                Span::from_len(to, from.len()).is_ok_and(|there| self.ends.holds(there, number))
            }
            _ => false,
        }
    }

    fn pending(&self) -> impl Iterator<Item = Job> + '_ {
        (0..self.len).filter_map(|i| self.jobs[(self.first + i) % JOBS])
    }
}

impl Job {
    /// Where the program gave contents up.
    fn drops(self) -> Option<Span> {
        match self {
            Self::Removed { span } => Some(span),
            Self::Unmapped { .. } | Self::Remapped { .. } | Self::Sweep => None,
        }
    }

    /// Where a mapping ends: it is unmapped, or moves; or another comes in its place, though nothing was
    /// read of its end.
    fn ends(self) -> [Option<Span>; 2] {
        match self {
            Self::Unmapped { span } => [Some(span), None],
            Self::Remapped { from, to, .. } => [Some(from), Span::from_len(to, from.len()).ok()],
            Self::Removed { .. } | Self::Sweep => [None, None],
        }
    }

    /// What of `span` it brings something to.
    fn arrives_in(self, span: Span) -> Option<Span> {
        match self {
            Self::Remapped { from, to, .. } => {
                Span::from_len(to, from.len()).ok()?.intersection(span)
            }
            _ => None,
        }
    }
}

/// Marks the words of what of `span` is mirrored as unmapped.
fn mark(process: &Process, span: Span) {
    process.regions.for_each_in(span, |region, inside| {
        for word in region.words_in(inside) {
            word.unmap();
        }
    });
}

/// Where `piece` of `from` is when `from` is at `to`.
fn translate(piece: Span, from: Span, to: VirtAddr) -> Option<Span> {
    let offset: ByteSize = piece.start().offset_from(from.start());
    Span::from_len(to.checked_add(offset)?, piece.len()).ok()
}
