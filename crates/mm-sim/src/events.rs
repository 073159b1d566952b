//! What the engine does about the program's system calls.
//!
//! ```text
//!   system call: changes mappings and page words in one step --job--> locks blocks, zaps, flushes,
//!                                                                     gives device pages back,
//!                                                                     changes the region table
//! ```
//!
//! A job is done by the thread of the system call before it returns. With
//! [`Options::late_events`](crate::Options) it stays in the queue, and a servant thread does it when the
//! seed says so: then migrations meet pages that are only marked, as they do with userfaultfd.
//!
//! A remap marks its pages as unmapped: nobody brings them home to where they no longer belong. The
//! job names the device pages of their new address, and then the old one, which is gone, or empty if it
//! was kept, has no marks. What the program did to the new address before the engine knew of it, is
//! marked then.

use crate::Sim;
use crate::block::BlockGuard;
use crate::kernel::{Kernel, translate};
use crate::region::{Part, Region};
use crate::stats::Counters;
use gpusvm_mm::{Block, Freed, Invalidation, Place, Reason};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{PageIndex, Span, VirtAddr};
use std::time::Duration;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Job {
    /// Contents were given up.
    Removed { span: Span },
    /// A mapping is gone. `told`: subscribers have been told already.
    Unmapped { span: Span, told: bool },
    /// A mapping is somewhere else.
    Remapped {
        from: Span,
        to: VirtAddr,
        told: bool,
    },
    /// Permissions changed.
    Protected { span: Span },
}

/// How long the servant lets an event wait, at most.
const LATENESS: u64 = 400;

impl Sim {
    /// Returns when everything is done about what the program did to its mappings before.
    pub fn settle_events(&self) {
        if self.runtime.me().is_none() || !self.late_events {
            self.handle_jobs();
            return;
        }
        let is_empty = &mut || self.kernel.lock().jobs.is_empty();
        self.runtime
            .wait_until(&"events to be handled", None, is_empty);
    }

    /// The servant: handles events some time after they happen, until the others have ended.
    pub(crate) fn serve_events(&self) {
        loop {
            let has_work = &mut || {
                let is_empty = self.kernel.lock().jobs.is_empty();
                !is_empty || self.runtime.is_over()
            };
            self.runtime.wait_until(&"an event", None, has_work);
            if self.runtime.is_over() {
                return;
            }
            let late = self.random(LATENESS);
            self.sleep(Duration::from_micros(late));
            self.handle_next();
        }
    }

    /// Does what is queued.
    pub(crate) fn handle_jobs(&self) {
        while self.handle_next() {}
    }

    /// The job stays queued until it is done: who holds a block looks for it there.
    fn handle_next(&self) -> bool {
        let job = self.kernel.lock().jobs.front().copied();
        let Some(job) = job else { return false };
        self.step(format_args!("event {job:?}"));
        Counters::count(&self.counters.events);
        match job {
            Job::Removed { span } => self.removed(span),
            Job::Unmapped { span, told } => self.unmapped(span, told),
            Job::Remapped { from, to, told } => self.remapped(from, to, told),
            Job::Protected { span } => self.tell(span, Reason::Protect),
        }
        self.kernel.lock().jobs.pop_front();
        self.yield_now();
        true
    }

    fn removed(&self, span: Span) {
        self.each_gap(span, Reason::Clear);
        self.each_block(span, |block, piece| {
            if !block.release_dropped(piece) {
                block.invalidate(piece, Reason::Clear);
            }
        });
    }

    fn unmapped(&self, span: Span, told: bool) {
        if !told {
            self.each_gap(span, Reason::Unmap);
        }
        self.each_block(span, |block, piece| {
            if !told {
                block.invalidate(piece, Reason::Unmap);
            }
            block.release_unmapped(piece);
        });
        self.kernel.lock().parts.remove(span);
    }

    /// The pages went to another address: those in RAM by the kernel, the others by name.
    fn remapped(&self, from: Span, to: VirtAddr, told: bool) {
        if !told {
            self.each_gap(from, Reason::Unmap);
        }
        let parts = self.kernel.lock().parts.parts_in(from);
        for part in parts {
            let first = translate(part.span.first_page(), from, to).expect("inside");
            let there = Span::of_pages(first, part.span.page_count());
            let region = self.kernel.lock().new_region(there);
            // Nobody gets at the new place before everything is in it.
            there.blocks().for_each(|piece| {
                region.block(piece.start()).try_lock();
            });
            self.each_block(part.span, |block, piece| {
                if !told {
                    block.invalidate(piece, Reason::Unmap);
                }
                self.hand_over(block, piece, &region, (from, to));
            });
            let mut kernel = self.kernel.lock();
            mark_what_came_after(&kernel, &region, there, (from, to));
            // Copies were of the old place.
            kernel.unprotect(there);
            if let Err(other) = kernel.parts.insert(Arc::clone(&region)) {
                let lost = format!("{there} was remapped onto {other}, which is mirrored");
                kernel.lost.push(lost);
            }
            drop(kernel);
            for piece in there.blocks() {
                let state = region.block(piece.start());
                // Registration goes with the mapping.
                state.registered.store(true, Ordering::Release);
                state.unlock();
            }
        }
    }

    fn hand_over(
        &self,
        block: &BlockGuard<'_>,
        piece: Span,
        region: &Region,
        (from, to): (Span, VirtAddr),
    ) {
        let mut freed = Freed::new(&self.memories);
        for page in piece.pages() {
            let new: PageIndex = translate(page, from, to).expect("inside");
            let (old, word) = (block.region.word(page), block.region.word(page).get());
            if word.dropped {
                region.word(new).drop_contents();
            }
            if let Some(device) = word.device_page() {
                self.memories.of(device).rmap.set(device.pfn, new);
                let is_there = self.kernel.lock().pages.contains_key(&new);
                let settled = match word.place {
                    // Its bytes went with the mapping.
                    Place::Coherent(_) => region.word(new).settle_coherent(device).is_ok(),
                    // Given up as well as moved; or a hole that was collected after the page had gone.
                    _ => !is_there && region.word(new).settle_device(device).is_ok(),
                };
                if !settled {
                    freed.push(device);
                }
            }
            // What was not unmapped with it is there, empty, as new; else the next event says so.
            old.map_again();
        }
    }

    /// Tells subscribers of a change that concerns no page.
    pub(crate) fn tell(&self, span: Span, reason: Reason) {
        self.step(format_args!("invalidate {span} {reason:?}"));
        self.notifiers.invalidate(&Invalidation { span, reason });
    }

    /// Tells subscribers of what of `span` is not mirrored.
    pub(crate) fn each_gap(&self, span: Span, reason: Reason) {
        let gaps = self.kernel.lock().parts.gaps_in(span);
        gaps.into_iter().for_each(|gap| self.tell(gap, reason));
    }

    /// Locks each block of what of `span` is mirrored, one after the other.
    pub(crate) fn each_block(&self, span: Span, act: impl Fn(&mut BlockGuard<'_>, Span)) {
        let parts = self.kernel.lock().parts.parts_in(span);
        for Part { span, .. } in parts {
            for piece in span.blocks() {
                let Ok(mut block) = BlockGuard::lock(self, piece.start()) else {
                    continue;
                };
                if let Some(piece) = piece.intersection(block.span()) {
                    act(&mut block, piece);
                }
            }
        }
    }
}

/// What the program did to the new place of a remap while the engine did not know it.
fn mark_what_came_after(kernel: &Kernel, region: &Region, there: Span, remap: (Span, VirtAddr)) {
    let is_this =
        |job: &&Job| matches!(**job, Job::Remapped { from, to, .. } if (from, to) == remap);
    let after = kernel.jobs.iter().skip_while(|job| !is_this(job)).skip(1);
    for job in after {
        let (span, is_removal) = match *job {
            Job::Removed { span } => (span, true),
            Job::Unmapped { span, .. } => (span, false),
            Job::Remapped { from, .. } => (from, false),
            Job::Protected { .. } => continue,
        };
        let inside = span.intersection(there);
        for page in inside.into_iter().flat_map(Span::pages) {
            let word = region.word(page);
            match is_removal {
                true => drop(word.drop_contents()),
                false => drop(word.unmap()),
            }
        }
    }
}
