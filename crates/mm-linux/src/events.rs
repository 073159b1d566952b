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

mod queue; // what is to be done about them
mod ends; // which ends of mappings are to be read yet
mod thread; // what the event thread does about them
#[cfg(test)]
mod tests; // messages, in the orders in which threads make them

pub(crate) use thread::run;

use crate::outbound::runs;
use crate::process::Process;
use crate::stats::Counters;
use crate::sys::uffd::Event;
use gpusvm_mm::PageWord;
use gpusvm_sync::atomic::Ordering;
use gpusvm_sync::{Condvar, Mutex, MutexGuard};
use gpusvm_types::{ByteSize, PageCount, Span, VirtAddr};
use queue::{Job, Queue};
use std::os::fd::{FromRawFd, OwnedFd};

/// What waits for the event thread.
#[derive(Debug)]
pub(crate) struct Events {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Events {
    pub(crate) fn new() -> Self {
        Self {
            queue: Mutex::new(Queue::new()),
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
        // Once, as a rule: the queue can be long, and a span gigabytes.
        let something_arrives = queue.arrives_in(span);
        process.regions.for_each_in(span, |region, inside| {
            known |= inside == span;
            let ours = process.whose(span, inside, |page| {
                let word = region.find_word(page).map(PageWord::get);
                word.is_none_or(|word| word.dropped || word.unmapped)
            });
            for page in inside.pages() {
                if something_arrives && queue.arrives_in(Span::page_of(page.start())) {
                    // What is still known there is not what the program dropped.
                    known = false;
                    continue;
                }
                if !ours.is_some_and(|ours| ours.contains(page)) {
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
        let mut queue = self.queue.lock();
        let is_of_another = queue.ends.is_owed(span);
        queue = self.unmap(queue, span);
        if !is_of_another && is_told_twice(process, span) {
            // The second comes later, and what arrives meanwhile is not what it is of.
            let number = queue.ends.last() + 1;
            queue.ends.owe(span, number);
        }
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
            if is_told_twice(process, there) {
                queue.ends.owe(there, number);
            }
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

    /// Whether a remap was read that took something from `span`, and whose new place is not known to the
    /// region table yet.
    pub(crate) fn is_departing(&self, span: Span) -> bool {
        let queue = self.queue.lock();
        let departs = |job| matches!(job, Job::Remapped { from, .. } if from.overlaps(span));
        queue.pending().any(departs)
    }

    /// Whether a remap was read whose new place this is, and is not known to the region table yet.
    pub(crate) fn is_arriving(&self, at: VirtAddr) -> bool {
        self.queue.lock().arrives_in(Span::page_of(at))
    }

    /// Calls `each` with the pieces of `span` to which no remap that was read is about to bring something.
    pub(crate) fn each_without_arrival(&self, span: Span, each: &mut dyn FnMut(Span)) {
        let page = |i: usize| span.first_page() + PageCount::from_usize(i);
        if self.queue.lock().arrives_in(span) {
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
}

/// Whether the end of what is in `span` is told of twice, all of it each time: by the descriptor that hears
/// of touches of a part of it, and by that which hears of the end of another.
fn is_told_twice(process: &Process, span: Span) -> bool {
    let (mut of_touches, mut of_its_end) = (false, false);
    process.regions.for_each_in(span, |region, inside| {
        for piece in inside.blocks().filter(|piece| region.will_end(*piece)) {
            let state = region.block(piece.start());
            let is_registered = state.registered.load(Ordering::Relaxed);
            of_touches |= is_registered;
            of_its_end |= !is_registered;
        }
    });
    of_touches && of_its_end
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
