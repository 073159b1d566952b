//! Marks in the program's page table, where pages were that live on devices: for who reads it.
//!
//! ```text
//!   /proc/self/pagemap       RAM    device, marked    device, not marked    never touched
//!   present                   1           0                   0                   0
//!   swapped out               0           1                   0                   0
//! ```
//!
//! Nothing here depends on a mark, and none is where a page is: whoever fills a page takes it off, or fills over
//! it. One that stays behind, because the program gave the page up meanwhile, is taken off by and by.
//!
//! They are made only for who asks: a mark takes an entry of a page table, which keeps a huge page from arriving
//! as one.
//!
//! # Locking
//!
//! With the block locked. Events are not read while a run is marked: what the program unmapped is known by
//! then, or the kernel refuses, and nothing of another mapping is marked.

use crate::block::BlockGuard;
use crate::outbound::runs;
use crate::patience::Patience;
use crate::process::Process;
use crate::region::Behind;
use gpusvm_mm::{Place, WordState};
use gpusvm_types::Span;
use rustix::io::Errno;

impl Process {
    /// Whether pages on devices show as swapped out in `/proc/self/pagemap`: it was asked for, and pages
    /// are moved (Linux 6.8), not copied. In private mappings of files they do not.
    pub fn leaves_markers(&self) -> bool {
        self.mover.leaves_markers()
    }
}

impl BlockGuard<'_> {
    /// Marks the pages of `span` that live on a device now.
    pub(crate) fn leave_markers(&self, span: Span) {
        self.mark(span, true, |word| {
            matches!(word.place, Place::Device(_)) && !word.dropped
        });
    }

    /// Takes the marks of pages of `span` off that the program gave up while they were on a device.
    pub(crate) fn take_markers(&self, span: Span) {
        self.mark(span, false, |word| {
            word.place == Place::System && word.dropped && !word.protected
        });
    }

    fn mark(&self, span: Span, on: bool, which: impl Fn(WordState) -> bool) {
        let process = self.process;
        if !process.leaves_markers() || self.region.behind() == Behind::File {
            return;
        }
        let mut patience = Patience::new();
        let mut rest = Some(span);
        while let Some(left) = rest {
            // What the program unmapped, or gave up, is marked in the words; what it is about to, it does after.
            let held = process.source.hold();
            let words = self.region.words_in(left);
            let is_so = |i: usize| {
                let word = words[i].get();
                !word.unmapped && which(word)
            };
            let Some(run) = runs(left, is_so).next() else {
                return;
            };
            let marked = process.mover.mark(run, on);
            drop(held);
            // An event is to be read first: then look again. What is refused is not ours any more.
            if marked != Err(Errno::AGAIN) || !patience.wait() {
                rest = Span::new(run.end(), left.end()).ok();
            }
        }
    }
}
