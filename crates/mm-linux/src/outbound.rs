//! RAM to device, step by step.
//!
//! ```text
//!   mark the words -> invalidate -> take the pages out -> (copy) -> commit: words name device pages
//!                                        |                  |
//!                                        `----- drop -------'---> put back, words say System
//! ```

mod pages; // some of the pages of a span
mod of_file; // which of them are a file's
mod coherent; // pages that are taken from nobody

pub(crate) use of_file::{keep_holes, pages_of_file};
pub(crate) use pages::{PageSet, runs};

use crate::block::BlockGuard;
use crate::mover::{Filled, Taken};
use crate::patience::Patience;
use crate::region::Behind;
use crate::staging::{Content, Slot};
use gpusvm_mm::{
    Block, DevicePage, Freed, KeptReason, MmError, Outbound, Place, Reason, Source, WordState,
};
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{OwnerId, PAGES_PER_BLOCK, PageCount, PageIndex, Span, VirtAddr};
use pages::indices;
use rustix::io::Errno;

/// Pages that were taken out of the process.
#[derive(Debug)]
pub struct LinuxOutbound<'b> {
    block: &'b BlockGuard<'b>,
    span: Span,
    // INVARIANT: whatever of RAM is not taken out right now is `Kept`.
    sources: [Source; PAGES_PER_BLOCK],
    /// Those of the pages taken out that are where they were.
    in_place: PageSet,
    slot: Option<Slot<'b>>,
    /// What the slot holds if all of the block went there.
    content: Content,
    settled: bool,
    /// Pages that could not be written, because they were read in copies.
    was_protected: PageSet,
}

impl<'b> LinuxOutbound<'b> {
    pub(crate) fn collect(
        block: &'b BlockGuard<'_>,
        span: Span,
        owner: OwnerId,
        peers: &mut dyn FnMut(PageIndex, DevicePage) -> bool,
    ) -> Result<Self, MmError> {
        gpusvm_sync::walk!("collect");
        assert!(
            block.span().covers(span),
            "{span} is not in the locked {}",
            block.span()
        );
        let mut this = Self {
            block,
            span,
            sources: [Source::Kept(KeptReason::Busy); PAGES_PER_BLOCK],
            in_place: PageSet::default(),
            slot: None,
            content: Content::Some,
            settled: false,
            was_protected: PageSet::default(),
        };
        // What the program gave up before is marked.
        block.process.source.fence();
        let clearing = &block.state().clearing;
        clearing.begin();
        let marked = this.mark(peers);
        if marked != Marked::Nothing {
            block.invalidate(span, Reason::Migrate(Some(owner)));
        }
        clearing.end();
        if marked == Marked::Nothing {
            return Ok(this);
        }
        this.unprotect();
        // From here on, dropping `this` puts everything back.
        let process = block.process;
        if marked == Marked::Ram && process.mover.takes_to_slot() {
            let is_whole = span.page_count().as_usize() == PAGES_PER_BLOCK;
            let huge = is_whole && process.mover.is_huge(Span::page_of(span.start()));
            let slot = process.staging.take_empty(huge);
            this.slot = Some(slot.ok_or(MmError::NoStaging { span })?);
        }
        this.take_marked()?;
        if !this.in_place.is_empty() {
            block.state().copies_in_place(true);
        }
        Ok(this)
    }

    /// Marks the words of the pages that can be taken.
    fn mark(&mut self, peers: &mut dyn FnMut(PageIndex, DevicePage) -> bool) -> Marked {
        let region = &self.block.region;
        let of_file = of_file::pages_of_file(self.block, self.span);
        let mut marked = Marked::Nothing;
        for (i, word) in region.words_in(self.span).iter().enumerate() {
            let page = self.span.first_page() + PageCount::from_usize(i);
            let mut state = word.get();
            if state.dropped && state.place == Place::System {
                self.block
                    .process
                    .settle_holes(region, Span::page_of(page.start()));
                state = word.get();
            }
            let is_wanted = !state.dropped && !state.unmapped;
            self.sources[i] = match state.place {
                Place::Device(device) if is_wanted && peers(page, device) => {
                    word.mark_leaving(device);
                    marked = marked.max(Marked::Devices);
                    Source::Device(device)
                }
                Place::Device(device) | Place::Leaving(device) | Place::Coherent(device) => {
                    Source::Kept(KeptReason::OnDevice(device))
                }
                _ if state.unmapped => Source::Kept(KeptReason::Unmapped),
                _ if state.dropped => Source::Kept(KeptReason::Dropped),
                _ if of_file.contains(i) => Source::Kept(KeptReason::OfFile),
                Place::System | Place::Collected => {
                    if word.mark_collected().protected {
                        self.was_protected.insert(i..i + 1);
                    }
                    marked = Marked::Ram;
                    continue;
                }
            };
        }
        marked
    }

    /// Nobody has copies of them any more; and whoever breaks the sharing of a page writes it.
    fn unprotect(&self) {
        for run in runs(self.span, |i| self.was_protected.contains(i)) {
            self.block.process.mover.release(run);
        }
    }

    /// Takes out what is marked, but for what was unmapped or dropped since: what is there now, if anything, is
    /// another mapping's, or was written after that.
    fn take_marked(&mut self) -> Result<(), MmError> {
        let mut rest = Some(self.span);
        while let Some(left) = rest
            && let Some(run) = self.next_to_take(left)
        {
            self.take_out(run).map_err(|errno| MmError::System {
                call: "taking pages out",
                span: run,
                errno: errno.raw_os_error(),
            })?;
            rest = Span::new(run.end(), left.end()).ok();
        }
        let words = self.block.region.words_in(self.span);
        for (word, source) in words.iter().zip(&mut self.sources) {
            let state = word.get();
            if state.place == Place::Collected && !source.is_collected() {
                *source = match state {
                    WordState { unmapped: true, .. } => Source::Kept(KeptReason::Unmapped),
                    WordState { dropped: true, .. } => Source::Kept(KeptReason::Dropped),
                    _ => *source,
                };
                word.settle_system();
            }
        }
        Ok(())
    }

    /// The next pages of `rest` that are marked, and were not given up since. None if mappings change all the
    /// time: then it is not known what is there.
    fn next_to_take(&self, rest: Span) -> Option<Span> {
        let words = self.block.region.words_in(rest);
        let is_marked = |i: usize| {
            let word = words[i].get();
            word.place == Place::Collected && !word.unmapped && !word.dropped
        };
        // Devices were flushed since the words were marked, which can take long.
        let is_told = self.block.process.all_is_told();
        is_told.then(|| runs(rest, is_marked).next()).flatten()
    }

    fn take_out(&mut self, run: Span) -> Result<(), Errno> {
        let at = self.slot_place(run.start());
        let sources = &mut self.sources[indices(self.span, run)];
        let block = self.block;
        let taken = block
            .process
            .mover
            .take_out(run, at, sources, block.state());
        match taken {
            Ok(Taken::Moved { huge }) => {
                let is_whole = sources.len() == PAGES_PER_BLOCK
                    && sources.iter().all(|s| matches!(s, Source::Page(_)));
                self.content = match (is_whole, huge) {
                    (true, true) => Content::Huge,
                    (true, false) => Content::Base,
                    (false, _) => Content::Some,
                };
            }
            Ok(Taken::InPlace) => self.in_place.insert(indices(self.span, run)),
            Err(_) => sources.fill(Source::Kept(KeptReason::Busy)),
        }
        if block.region.behind() == Behind::File {
            // Gone since it was looked at, without a word: its file was cut off, and it is the file's again.
            of_file::keep_holes(sources);
        }
        // What could not be taken lives where it lived.
        for (word, source) in block.region.words_in(run).iter().zip(sources) {
            if !source.is_collected() {
                word.settle_system();
            }
        }
        taken.map(drop)
    }

    /// What was copied where it was goes. What was not copied after all, or given up and maybe
    /// written again, stays, and can be written; and what is there of an unmapped page is another
    /// mapping's.
    fn settle_in_place(&self) {
        if self.in_place.is_empty() {
            return;
        }
        let (process, words) = (self.block.process, self.block.region.words_in(self.span));
        // What was unmapped before is marked; what others did as well, unless mappings change all the time.
        process.source.fence();
        let _ = process.all_is_told();
        let goes = |i: usize| {
            let word = words[i].get();
            matches!(word.place, Place::Device(_)) && !word.unmapped
        };
        let is_in = |i: usize| self.in_place.contains(i);
        for run in runs(self.span, |i| {
            is_in(i) && self.sources[i].is_collected() && goes(i)
        }) {
            if !self.discard(run) {
                // Of a page, it is all or nothing. What was unmapped is marked.
                process.source.fence();
                let _ = process.all_is_told();
                for page in run.pages().filter(|page| goes(self.span.index_of(*page))) {
                    if !self.discard(Span::page_of(page.start())) {
                        self.stays_after_all(page);
                    }
                }
            }
        }
        for run in runs(self.span, |i| {
            is_in(i) && !(self.sources[i].is_collected() && goes(i))
        }) {
            process.mover.release(run);
        }
    }

    /// The kernel refuses to drop a page, of memory that is sealed: it lives here, as it was, and nobody could write
    /// it meanwhile. Unless it was unmapped: then what is there is another's.
    fn stays_after_all(&self, page: PageIndex) {
        let process = self.block.process;
        process.source.fence();
        let word = self.block.region.word(page);
        if let (Place::Device(device), false) = (word.get().place, word.get().unmapped) {
            word.settle_system();
            Freed::new(&process.memories).push(device);
            process.mover.release(Span::page_of(page.start()));
        }
    }

    /// Drops what is left of pages here. `false` when some of it may be there still.
    fn discard(&self, run: Span) -> bool {
        let (process, behind) = (self.block.process, self.block.region.behind());
        let is_done = process.discard(run, behind);
        if behind == Behind::File {
            // Where there is a file, protection stays behind without a page.
            process.mover.release(run);
        }
        is_done
    }

    fn slot_place(&self, at: VirtAddr) -> VirtAddr {
        self.slot.as_ref().map_or(at, |slot| slot.place_of(at))
    }

    /// What was taken out goes back to where it was, or is now.
    fn put_back(&mut self) {
        let block = self.block;
        let words = block.region.words_in(self.span);
        for run in runs(self.span, |i| self.in_place.contains(i)) {
            block.process.mover.release(run);
        }
        let mut at = Some(self.span);
        while let Some(rest) = at {
            let Some((run, filled)) = self.put_next_back(rest) else {
                break;
            };
            at = Span::new(run.end(), rest.end()).ok();
            if filled.errno.is_some()
                && let Ok(left) = Span::new(run.start() + filled.done, run.end())
            {
                left.pages()
                    .for_each(|page| self.put_page_back(Span::page_of(page.start())));
            }
        }
        for (word, source) in words.iter().zip(&self.sources) {
            if let (Source::Device(device), Place::Leaving(_)) = (source, word.get().place) {
                word.stay_on_device(*device);
            }
        }
        // What was moved by the program goes after it.
        for (i, page) in self.span.pages().enumerate() {
            if self.is_to_go_back(i) && words[i].get().unmapped {
                self.put_page_back(Span::page_of(page.start()));
            }
        }
        for word in words
            .iter()
            .filter(|word| word.get().place == Place::Collected)
        {
            word.settle_system();
        }
    }

    /// Whether the i-th page is in the slot, and still wanted.
    fn is_to_go_back(&self, i: usize) -> bool {
        let page = self.span.first_page() + PageCount::from_usize(i);
        let was_taken = matches!(self.sources[i], Source::Page(_) | Source::Hole);
        let is_away = was_taken && !self.in_place.contains(i);
        is_away && !self.block.region.word(page).get().dropped
    }

    /// Puts the next run of pages back that are to go where they were, in one call.
    fn put_next_back(&self, rest: Span) -> Option<(Span, Filled)> {
        // What the program gave up, or moved, is marked; what it is about to, it does after.
        let _held = self.block.process.source.hold();
        let first = self.span.index_of(rest.first_page());
        let words = self.block.region.words_in(self.span);
        let stays = |i: usize| !words[first + i].get().unmapped;
        let run = runs(rest, |i| self.is_to_go_back(first + i) && stays(i)).next()?;
        let slot = self.slot_place(run.start());
        Some((run, self.block.process.mover.put_back(run, slot)))
    }

    /// The page may have been unmapped, or protected, or moved, since it was taken: in the last case
    /// it goes to where it is now, which becomes known as soon as the event is read.
    fn put_page_back(&self, page: Span) {
        let process = self.block.process;
        let i = self.span.index_of(page.first_page());
        let from = self.slot_place(page.start());
        let is_there = matches!(self.sources[i], Source::Page(_));
        let mut patience = Patience::new();
        let last = loop {
            let held = process.source.hold();
            let moved_to = process.events.moved_to(page);
            let is_unmapped = self.block.region.word(page.first_page()).get().unmapped;
            if !self.is_to_go_back(i) || !is_there {
                return;
            }
            if is_unmapped && moved_to.is_none() {
                // Its end may be a remap that is to be read yet, of which the mark was another's.
                let is_owed = process.events.is_owed(page);
                drop(held);
                if !is_owed || (!process.forgive_ends() && !patience.wait()) {
                    return;
                }
                continue;
            }
            let to = moved_to.unwrap_or(page);
            let filled = match process.mover.put_back(to, from) {
                refused if refused.errno == Some(Errno::INVAL) => process.mover.fill_copy(to, from),
                filled => filled,
            };
            drop(held);
            match filled.errno {
                None => return,
                Some(errno) if !patience.wait() => break errno,
                Some(_) => {}
            }
        };
        process.report_lost(page, last);
    }
}

impl Outbound for LinuxOutbound<'_> {
    fn span(&self) -> Span {
        self.span
    }

    fn sources(&self) -> &[Source] {
        &self.sources[..self.span.page_count().as_usize()]
    }

    fn commit(mut self, home: &mut dyn FnMut(usize) -> DevicePage) {
        gpusvm_sync::walk!("commit");
        let (process, state) = (self.block.process, self.block.state());
        // Pages that were given up, or unmapped, meanwhile live nowhere.
        let mut freed = Freed::new(&process.memories);
        let words = self.block.region.words_in(self.span).iter();
        for (i, (word, page)) in words.zip(self.span.pages()).enumerate() {
            if !self.sources[i].is_collected() {
                continue;
            }
            let device = home(i);
            process.memories.of(device).rmap.set(device.pfn, page);
            let settled = match self.sources[i] {
                Source::InPlace => word.settle_coherent(device),
                _ => word.settle_device(device),
            };
            if settled.is_err() {
                freed.push(device);
            }
            if let Source::Device(left) = self.sources[i] {
                freed.push(left);
            }
        }
        drop(freed);
        self.settle_in_place();
        self.block.leave_markers(self.span);
        // Where marks are, no huge page arrives as one.
        let left_huge = self.content == Content::Huge && !process.leaves_markers();
        state.left_huge.store(left_huge, Ordering::Relaxed);
        self.settled = true;
    }
}

impl Drop for LinuxOutbound<'_> {
    fn drop(&mut self) {
        if !self.in_place.is_empty() {
            self.block.state().copies_in_place(false);
        }
        let content = if self.settled {
            // The slot keeps its pages for the next block that comes home, if it has all of them.
            self.content
        } else {
            self.put_back();
            Content::Some
        };
        if let Some(slot) = &mut self.slot {
            slot.holds(content);
        }
    }
}

/// What there is to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Marked {
    Nothing,
    /// Pages of other devices only.
    Devices,
    /// Pages of RAM, and maybe of other devices.
    Ram,
}
