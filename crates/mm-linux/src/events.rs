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
//! empty if it was kept, has no marks.
//!
//! # Locking
//!
//! The queue's lock is held for a few instructions, and for the marks of a remap. The event thread
//! takes one block at a time.

use crate::block::BlockGuard;
use crate::memories::Freed;
use crate::outbound::runs;
use crate::process::Process;
use crate::region::Region;
use crate::regions::Part;
use crate::stats::Counters;
use crate::sys::uffd::Event;
use gpusvm_mm::{Block, Place, Reason, WordState};
use gpusvm_sync::atomic::Ordering;
use gpusvm_sync::{Arc, Condvar, Mutex};
use gpusvm_types::{ByteSize, PageCount, PageIndex, Span, VirtAddr};
use std::os::fd::{FromRawFd, OwnedFd};

/// How many jobs can wait. When there are more, marks in the words are all that is left of a removal
/// or an unmapping, and the event thread sweeps for them.
const JOBS: usize = 4096;
/// How many of them only a remap may take, which a mark cannot replace.
const KEPT_FOR_REMAPS: usize = 2048;

/// What the event thread has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Removed { span: Span, late: bool },
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
                mark(process, span, |region, page| {
                    region.word(page).unmap();
                });
                self.push(Job::Unmapped { span });
            }
            Event::Remap { from, to, len } => {
                let Ok(from) = Span::from_len(from, len) else {
                    return;
                };
                // Who sees the mark finds the reason; who takes the job finds the mark.
                self.push_and(Job::Remapped { from, to }, || {
                    mark(process, from, |region, page| {
                        region.word(page).unmap();
                    });
                });
            }
            Event::Fork { fd } => {
                // Never asked for. A descriptor that came all the same is closed.
                // SAFETY: the kernel installed it for whoever reads the message.
                drop(unsafe { OwnedFd::from_raw_fd(fd) });
            }
            Event::Fault { .. } | Event::Unknown { .. } => {}
        }
    }

    /// Marks what the program gave up. What a remap that is still queued will make known is marked
    /// then.
    fn removed(&self, process: &Process, span: Span) {
        let remapping = self.is_remapping();
        let (mut any, mut unknown) = (false, span.start());
        let late = |from: VirtAddr, to: VirtAddr| {
            if let (true, Ok(span)) = (remapping, Span::new(from, to)) {
                self.push(Job::Removed { span, late: true });
            }
        };
        process.regions.for_each_in(span, |region, inside| {
            late(unknown, inside.start());
            unknown = inside.end();
            for page in inside.pages() {
                if !region.block(page.start()).take_own_remove(page) {
                    region.word(page).drop_contents();
                    any = true;
                }
            }
        });
        late(unknown, span.end());
        if any {
            self.push(Job::Removed { span, late: false });
        }
    }

    /// Whether a remap was read whose new place is not known to the region table yet.
    pub(crate) fn is_remapping(&self) -> bool {
        self.queue
            .lock()
            .pending()
            .any(|job| matches!(job, Job::Remapped { .. }))
    }

    /// Where a run is now that was remapped a moment ago.
    pub(crate) fn moved_to(&self, run: Span) -> Option<Span> {
        let queue = self.queue.lock();
        queue.pending().find_map(|job| match job {
            Job::Remapped { from, to } if from.covers(run) => translate(run, from, to),
            _ => None,
        })
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

    fn push(&self, job: Job) {
        self.push_and(job, || {});
    }

    /// Queues a job, and does what belongs to it before anybody can see it.
    fn push_and(&self, job: Job, act: impl FnOnce()) {
        let mut queue = self.queue.lock();
        let is_remap = matches!(job, Job::Remapped { .. });
        if !is_remap && queue.len >= JOBS - KEPT_FOR_REMAPS {
            queue.overflowed = true;
            return;
        }
        while queue.len == JOBS {
            queue = self.changed.wait(queue);
        }
        let at = (queue.first + queue.len) % JOBS;
        queue.jobs[at] = Some(job);
        queue.len += 1;
        act();
        drop(queue);
        self.changed.notify_all();
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
    fn pending(&self) -> impl Iterator<Item = Job> + '_ {
        (0..self.len).filter_map(|i| self.jobs[(self.first + i) % JOBS])
    }
}

/// The event thread.
pub(crate) fn run(process: &Process) {
    while let Some(job) = process.events.next() {
        match job {
            Job::Removed { span, late } => removed(process, span, late),
            Job::Unmapped { span } => unmapped(process, span),
            Job::Remapped { from, to } => remapped(process, from, to),
            Job::Sweep => sweep(process),
        }
        process.events.done(job);
    }
}

fn removed(process: &Process, span: Span, late: bool) {
    if late {
        // A remap that came just before has made the region known only now.
        mark(process, span, |region, page| {
            region.word(page).drop_contents();
        });
    }
    each_block(process, span, |block, piece| block.release_dropped(piece));
}

fn unmapped(process: &Process, span: Span) {
    each_block(process, span, |block, piece| {
        block.invalidate(piece, Reason::Unmap);
        block.release_unmapped(piece);
    });
    process.regions.remove(span);
}

/// Looks at every word for marks that found no room in the queue.
fn sweep(process: &Process) {
    for Part { span, region } in process.regions.all() {
        let marked = |wanted: fn(WordState) -> bool| {
            let first = span.first_page();
            let region = &region;
            runs(span, move |i| {
                wanted(region.word(first + PageCount::from_usize(i)).get())
            })
        };
        for run in marked(|word| word.unmapped) {
            if process.events.is_remapping() {
                // The marks may be those of a remap: that comes first.
                process.events.queue.lock().overflowed = true;
                return;
            }
            unmapped(process, run);
        }
        marked(|word| word.dropped).for_each(|run| removed(process, run, false));
    }
}

/// The pages went to another address: those in RAM by the kernel, the others by name.
fn remapped(process: &Process, from: Span, to: VirtAddr) {
    for part in process.regions.parts_in(from) {
        let Some(there) = translate(part.span, from, to) else {
            continue;
        };
        let Ok(region) = Region::new(there).map(Arc::new) else {
            process.report_lost(part.span, rustix::io::Errno::NOMEM);
            continue;
        };
        // Nobody gets at the new place before everything is in it.
        there
            .blocks()
            .for_each(|piece| region.block(piece.start()).lock());
        each_block(process, part.span, |block, piece| {
            block.invalidate(piece, Reason::Unmap);
            hand_over(process, block, piece, &region, translate(piece, from, to));
        });
        // Registration went with the mapping.
        for piece in there.blocks() {
            let registered = process.mover.arm(piece).is_ok();
            let state = region.block(piece.start());
            state.registered.store(registered, Ordering::Relaxed);
        }
        if let Err(other) = process.regions.insert(Arc::clone(&region)) {
            process.report(format_args!(
                "{there} was remapped onto {other}, which is mirrored"
            ));
        }
        for piece in there.blocks() {
            region.block(piece.start()).unlock();
            process.mover.wake(piece);
        }
    }
}

fn hand_over(
    process: &Process,
    block: &BlockGuard<'_>,
    piece: Span,
    region: &Region,
    there: Option<Span>,
) {
    let Some(there) = there else { return };
    let mut freed = Freed::new(&process.memories);
    for (old, new) in piece.pages().zip(there.pages()) {
        let (old, word) = (block.region.word(old), block.region.word(old).get());
        if word.dropped {
            region.word(new).drop_contents();
        }
        if let Place::Device(device) = word.place {
            process.memories.of(device).rmap.set(device.pfn, new);
            // Given up as well as moved; or a hole that was collected after the page had gone.
            let is_stale = process.is_in_ram(new);
            if is_stale || region.word(new).settle_device(device).is_err() {
                freed.push(device);
            }
        }
        // What was not unmapped with it is there, empty, as new; else the next event says so.
        old.map_again();
    }
}

fn each_block(process: &Process, span: Span, act: impl Fn(&mut BlockGuard<'_>, Span)) {
    for Part { span, .. } in process.regions.parts_in(span) {
        for piece in span.blocks() {
            let Ok(mut block) = BlockGuard::lock(process, piece.start()) else {
                continue;
            };
            if let Some(piece) = piece.intersection(block.span()) {
                act(&mut block, piece);
            }
        }
    }
}

fn mark(process: &Process, span: Span, mut act: impl FnMut(&Region, PageIndex)) {
    process.regions.for_each_in(span, |region, inside| {
        inside.pages().for_each(|page| act(region, page));
    });
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
        events.push(Job::Unmapped { span: page(9) });
        assert!(!events.is_remapping());
        events.push(Job::Remapped {
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

    #[test]
    fn a_full_queue_asks_for_a_sweep_and_still_takes_remaps() {
        let events = Events::new();
        let span = Span::page_of(VirtAddr::new(0x5000));
        (0..2 * JOBS).for_each(|_| events.push(Job::Removed { span, late: false }));
        events.push(Job::Remapped {
            from: span,
            to: VirtAddr::new(0x9000),
        });
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
