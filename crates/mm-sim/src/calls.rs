//! The program's system calls on its mappings.
//!
//! ```text
//!   enter            one call at a time, as under the kernel's mmap_lock
//!   withdraw         (not with late events) who asks finds the mapping no more; words are marked,
//!                    subscribers told, block by block
//!   change           mappings, pages and words, and a job for the rest: one step
//!   handle_jobs      (not with late events) the rest
//! ```

use crate::Sim;
use crate::events::Job;
use crate::kernel::{Backing, Kernel, Mapping, Prot};
use gpusvm_mm::{PageWord, Reason, VmaKind};
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{BLOCK_SIZE, PageCount, Span, VirtAddr};

/// A system call is being made.
#[derive(Debug)]
pub(crate) struct Call<'a>(&'a Sim);

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.0.in_call.store(false, Ordering::Release);
        self.0.yield_now();
    }
}

impl Sim {
    /// Maps pages at an address that was never used.
    pub fn mmap(&self, pages: PageCount, prot: Prot, backing: Backing) -> Span {
        let span = self.kernel.lock().free_span(pages, false);
        let call = self.enter(format_args!("mmap {span} {prot:?} {backing:?}"));
        self.map(&call, span, prot, backing);
        span
    }

    /// Maps pages at this address, in place of what is there.
    pub fn mmap_fixed(&self, span: Span, prot: Prot, backing: Backing) {
        let call = self.enter(format_args!("mmap fixed {span} {prot:?} {backing:?}"));
        self.unmap(&call, span);
        self.map(&call, span, prot, backing);
    }

    /// Unmaps pages.
    pub fn munmap(&self, span: Span) {
        let call = self.enter(format_args!("munmap {span}"));
        self.unmap(&call, span);
    }

    /// Changes what may be done with pages.
    pub fn mprotect(&self, span: Span, prot: Prot) {
        let call = self.enter(format_args!("mprotect {span} {prot:?}"));
        {
            let mut kernel = self.kernel.lock();
            kernel.change(span, |mapping| Some(Mapping { prot, ..mapping }));
            kernel.jobs.push_back(Job::Protected { span });
        }
        self.finish(&call);
    }

    /// Gives the contents of pages up: they are zero from now on.
    pub fn madvise_dontneed(&self, span: Span) {
        let call = self.enter(format_args!("madvise dontneed {span}"));
        mark(&self.kernel.lock(), span, |word| {
            word.drop_contents();
        });
        self.kernel.lock().jobs.push_back(Job::Removed { span });
        // The engine hears of it before the kernel does it.
        self.finish(&call);
        let mut kernel = self.kernel.lock();
        kernel.zap(span);
        if !self.late_events {
            mark(&kernel, span, PageWord::saw_hole);
        }
    }

    /// Moves a mapping to an address that was never used. With `dontunmap` the old one stays, empty.
    ///
    /// # Panics
    ///
    /// When nothing is mapped in `from`.
    pub fn mremap(&self, from: Span, dontunmap: bool) -> Span {
        let aligned = from.start().is_aligned(BLOCK_SIZE);
        let there = self.kernel.lock().free_span(from.page_count(), aligned);
        let call = self.enter(format_args!("mremap {from} to {there}"));
        self.relocate(&call, (from, there), dontunmap);
        there
    }

    /// As [`Sim::mremap`], to `to`, in place of what is there: `MREMAP_FIXED`.
    ///
    /// # Panics
    ///
    /// When nothing is mapped in `from`, or it overlaps with where it goes.
    pub fn mremap_fixed(&self, from: Span, to: VirtAddr, dontunmap: bool) {
        let there = Span::from_len(to, from.len()).expect("as long as before");
        assert!(!from.overlaps(there), "{from} would move onto itself");
        let call = self.enter(format_args!("mremap {from} fixed to {there}"));
        self.unmap(&call, there);
        self.relocate(&call, (from, there), dontunmap);
    }

    fn relocate(&self, call: &Call<'_>, (from, there): (Span, Span), dontunmap: bool) {
        let told = self.withdraw(call, from);
        let to = there.start();
        {
            let mut kernel = self.kernel.lock();
            let mappings = kernel.mappings_in(from);
            assert!(!mappings.is_empty(), "nothing is mapped in {from}");
            for mapping in mappings {
                let offset = mapping.span.start().offset_from(from.start());
                let span = Span::from_len(to + offset, mapping.span.len());
                let span = span.expect("as long as before");
                kernel.map(Mapping {
                    span,
                    going: false,
                    ..mapping
                });
            }
            kernel.move_pages(from, to);
            mark(&kernel, from, |word| {
                word.unmap();
            });
            kernel.jobs.push_back(Job::Remapped { from, to, told });
            if dontunmap {
                kernel.change(from, |mapping| {
                    Some(Mapping {
                        going: false,
                        ..mapping
                    })
                });
            } else {
                kernel.change(from, |_| None);
                kernel.jobs.push_back(Job::Unmapped { span: from, told });
            }
        }
        self.finish(call);
    }

    /// Waits until no other call is made, and says what this one is.
    pub(crate) fn enter(&self, what: core::fmt::Arguments<'_>) -> Call<'_> {
        self.step(what);
        let is_free = &mut || !self.in_call.swap(true, Ordering::AcqRel);
        self.runtime.wait_until(&"the mmap lock", None, is_free);
        Call(self)
    }

    fn map(&self, call: &Call<'_>, span: Span, prot: Prot, backing: Backing) {
        let kind = match backing {
            Backing::Mirrored | Backing::Private => VmaKind::PrivateAnonymous,
            Backing::Shared => VmaKind::Other,
        };
        if backing == Backing::Mirrored {
            self.settle_events();
        }
        self.kernel.lock().map(Mapping {
            span,
            prot,
            kind,
            going: false,
        });
        if backing == Backing::Mirrored {
            let mirrored = self.mirror(call, span);
            mirrored.expect("a new mapping can be mirrored");
        }
    }

    fn unmap(&self, call: &Call<'_>, span: Span) {
        if self.kernel.lock().mappings_in(span).is_empty() {
            return;
        }
        let told = self.withdraw(call, span);
        {
            let mut kernel = self.kernel.lock();
            kernel.change(span, |_| None);
            kernel.zap(span);
            mark(&kernel, span, |word| {
                word.unmap();
            });
            kernel.jobs.push_back(Job::Unmapped { span, told });
        }
        self.finish(call);
    }

    /// Tells everybody before anything changes, as the kernel's notifiers do. Whether it did.
    fn withdraw(&self, _call: &Call<'_>, span: Span) -> bool {
        if self.late_events {
            return false;
        }
        let going = |mapping| {
            Some(Mapping {
                going: true,
                ..mapping
            })
        };
        self.kernel.lock().change(span, going);
        self.each_gap(span, Reason::Unmap);
        // Not before the block is locked: what is on its way finds home first.
        self.each_block(span, |block, piece| {
            for word in block.region.words_in(piece) {
                word.unmap();
            }
            block.invalidate(piece, Reason::Unmap);
        });
        true
    }

    fn finish(&self, _call: &Call<'_>) {
        if self.late_events {
            self.yield_now();
        } else {
            self.handle_jobs();
        }
    }
}

/// Marks the words of what of `span` is mirrored.
fn mark(kernel: &Kernel, span: Span, act: impl Fn(&PageWord)) {
    for part in kernel.parts.parts_in(span) {
        part.region.words_in(part.span).iter().for_each(&act);
    }
}
