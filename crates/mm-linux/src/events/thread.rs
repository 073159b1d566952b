//! What the event thread does about each event: locks blocks, zaps, gives device pages back, changes the
//! region table.

use super::queue::Job;
use super::{Events, translate};
use crate::block::BlockGuard;
use crate::let_go::try_often;
use crate::outbound::runs;
use crate::process::Process;
use crate::region::Region;
use crate::regions::Part;
use gpusvm_mm::{AddressSpace, Block, Freed, Place, Reason, WordState};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{PageCount, Span, VirtAddr};

/// The event thread.
pub(crate) fn run(process: &Process) {
    let next = || {
        let (now, ask) = (|| process.now(), || process.forgive_ends());
        process.events.next(now, ask)
    };
    while let Some(job) = next() {
        handle(process, &job);
        process.events.done(job);
        if process.events.has_ends() {
            process.forgive_ends();
        }
    }
}

fn handle(process: &Process, job: &Job) {
    gpusvm_sync::walk!("handle");
    match *job {
        Job::Removed { span } => removed(process, span),
        Job::Unmapped { span } => unmapped(process, span),
        Job::Remapped { from, to, .. } => remapped(process, from, to),
        Job::Sweep => sweep(process),
    }
}

fn removed(process: &Process, span: Span) {
    gpusvm_sync::walk!("removed");
    each_block(process, span, |block, piece| block.release_dropped(piece));
}

fn unmapped(process: &Process, span: Span) {
    gpusvm_sync::walk!("unmapped");
    let mut is_mirrored = false;
    process.regions.for_each_in(span, |_, _| is_mirrored = true);
    each_block(process, span, |block, piece| {
        // Pages of a place that a remap had emptied may have been taken for holes since.
        for word in block.region.words_in(piece) {
            word.unmap();
        }
        block.invalidate(piece, Reason::Unmap);
        block.release_unmapped(piece);
    });
    process.regions.remove(span);
    if is_mirrored {
        // A range that was made meanwhile is either told, or finds it not mirrored.
        process.notifiers.invalidate(&gpusvm_mm::Invalidation {
            span,
            reason: Reason::Unmap,
        });
    }
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
                process.events.sweep_again();
                return;
            }
            unmapped(process, run);
        }
        marked(|word| word.dropped).for_each(|run| removed(process, run));
    }
}

/// The pages went to another address: those in RAM by the kernel, the others by name.
fn remapped(process: &Process, from: Span, to: VirtAddr) {
    gpusvm_sync::walk!("remapped");
    let parts = process.regions.parts_in(from);
    // What was mirrored there before is no more: also where what comes is not mirrored, as what a mapping
    // has grown by.
    if let Ok(there) = Span::from_len(to, from.len()) {
        unmapped(process, there);
    }
    for part in parts {
        let Some(there) = translate(part.span, from, to) else {
            continue;
        };
        let Ok(region) = Region::new(there, part.region.behind(), &process.room).map(Arc::new)
        else {
            lose(process, &part, there);
            continue;
        };
        if part.region.as_one.is_on() {
            region.as_one.begin();
        }
        // Nobody gets at the new place before everything is in it.
        there
            .blocks()
            .for_each(|piece| region.block(piece.start()).lock());
        let is_registered = is_registered(&part);
        let mut words = part.region.words_in(part.span).iter();
        let was_protected = words.any(|word| word.get().protected).then_some(there);
        each_block(process, part.span, |block, piece| {
            block.invalidate(piece, Reason::Unmap);
            hand_over(process, block, piece, &region, translate(piece, from, to));
        });
        // Copies were of the old place, protection went with the pages.
        if let Some(there) = was_protected {
            process.mover.release(there);
        }
        if let Err(other) = process.events.appear(process, &region) {
            process.report(format_args!(
                "{there} was remapped onto {other}, which is mirrored"
            ));
        }
        // Registration went with the mapping.
        let registered = is_registered.unwrap_or_else(|| {
            register(process, &region);
            true
        });
        for piece in there.blocks() {
            let state = region.block(piece.start());
            state.registered.store(registered, Ordering::Relaxed);
        }
        // Devices may have had in place what was there before, unheard of. Afterwards, so that a range
        // that is made meanwhile is either told, or finds it mirrored.
        process.notifiers.invalidate(&gpusvm_mm::Invalidation {
            span: there,
            reason: Reason::Unmap,
        });
        for piece in there.blocks() {
            region.block(piece.start()).unlock();
            process.mover.wake(piece);
        }
    }
}

/// Whether all of it is registered, or none; `None` for some, or if it is only watched, or is about to be
/// registered as one.
fn is_registered(part: &Part) -> Option<bool> {
    let mut blocks = part.span.blocks().map(|piece| {
        let state = part.region.block(piece.start());
        let registered = state.registered.load(Ordering::Relaxed);
        (registered || !state.watched.load(Ordering::Relaxed)).then_some(registered)
    });
    let first = blocks.next().flatten()?;
    // It was heard to move, so it was registered, and not each block may say so yet.
    let is_late = !first && part.region.as_one.is_on();
    (!is_late && blocks.all(|other| other == Some(first))).then_some(first)
}

/// Registers what has arrived, as far as it is there: something else can be at its place by now, which
/// would tell of its own end as if it were this. What refuses is not there any more.
fn register(process: &Process, region: &Region) {
    let mut register = || {
        for piece in region.span().blocks() {
            let words = region.words_in(piece);
            for run in runs(piece, |i| !words[i].get().unmapped) {
                let _ = process.mover.arm(run, region.behind());
            }
        }
    };
    if !try_often(|| process.source.if_all_is_told(&mut register)) {
        register();
    }
}

/// No memory to mirror the new place with: what is on devices is lost, and a bus error from now on.
fn lose(process: &Process, part: &Part, there: Span) {
    for (old, new) in part.span.pages().zip(there.pages()) {
        if let Place::Device(_) = part.region.word(old).get().place {
            process.mover.poison(Span::page_of(new.start()));
        }
    }
    unmapped(process, part.span);
    process.report_lost(part.span, rustix::io::Errno::NOMEM);
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
        if let Some(device) = word.device_page() {
            process.memories.of(device).rmap.set(device.pfn, new);
            let settled = match word.place {
                // Its bytes went with the mapping.
                Place::Coherent(_) => region.word(new).settle_coherent(device).is_ok(),
                // Given up as well as moved; or a hole that was collected after the page had gone.
                _ => !process.is_in_ram(new) && region.word(new).settle_device(device).is_ok(),
            };
            if !settled {
                freed.push(device);
            }
        }
        old.settle_system();
        old.unprotect();
    }
    // What was not unmapped with it is there, empty, as new; else the next event says so, or has.
    process.events.empty(block, piece);
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

impl Events {
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
}
