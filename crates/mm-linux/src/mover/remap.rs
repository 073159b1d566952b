//! Pages by `mprotect` and `mremap`: where there is no userfaultfd at all.
//!
//! ```text
//!   out    app  RW ----mprotect(NONE)----> app  NONE ----mremap(DONTUNMAP)----> app NONE, no pages
//!                                                                               slot NONE -> RW
//!   in     slot RW, filled ----mremap(DONTUNMAP)----> app RW, whole and at once; slot RW, no pages
//! ```
//!
//! A touch of a closed page is a SIGSEGV; the handler of `gpusvm-guarded` lets the thread sleep until
//! the page is home. Holes are not told from pages: what was never touched is copied as zeroes.

use super::{Filled, Mover, Taken, slot_run};
use crate::region::{Behind, BlockState};
use crate::source::signals;
use crate::sys::map;
use gpusvm_mm::Source;
use gpusvm_types::{ByteSize, DmaAddr, PageCount, Span, VirtAddr};
use rustix::io::Errno;
use rustix::mm::MprotectFlags;

/// Pages by `mprotect` and `mremap`.
#[derive(Debug)]
pub(crate) struct Remapper;

const OPEN: MprotectFlags = MprotectFlags::READ.union(MprotectFlags::WRITE);

impl Mover for Remapper {
    fn arm(&self, _: Span, _: Behind) -> Result<(), Errno> {
        Ok(())
    }

    fn can_watch_files(&self) -> bool {
        // What is mirrored here is the engine's own.
        false
    }

    fn disarm(&self, _: Span) {}

    fn watch(&self, _: Span) -> Result<(), Errno> {
        // Nothing is heard of here; memory ends with `free`, which tells.
        Ok(())
    }

    fn unwatch(&self, _: Span) {}

    fn takes_to_slot(&self) -> bool {
        true
    }

    fn is_huge(&self, _: Span) -> bool {
        // Tables move with the mapping: there is no difference.
        false
    }

    fn take_out(
        &self,
        run: Span,
        slot: VirtAddr,
        sources: &mut [Source],
        _: &BlockState,
    ) -> Result<Taken, Errno> {
        // SAFETY: who touches the run from now on sleeps in the handler until it is open again.
        unsafe { map::protect(run, MprotectFlags::empty()) }?;
        // SAFETY: nobody can touch the run, and the slot is ours and empty.
        let moved = unsafe { remap(run, slot) };
        if let Some(errno) = moved.errno {
            // What moved before the failure comes back; what did not is opened.
            if let Ok(moved) = Span::from_len(slot, moved.done) {
                // SAFETY: as above, the other way round.
                let _ = unsafe { remap(moved, run.start()) };
            }
            // SAFETY: opens what was open.
            unsafe { map::protect(run, OPEN) }?;
            return Err(errno);
        }
        // SAFETY: opens a slot of ours.
        unsafe { map::protect(slot_run(run, slot), OPEN) }?;
        for (page, source) in run.pages().zip(sources.iter_mut()) {
            let place = slot + page.start().offset_from(run.start());
            *source = Source::Page(DmaAddr::new(place.get()));
        }
        Ok(Taken::Moved { huge: false })
    }

    fn discard(&self, _: Span) -> bool {
        true
    }

    fn can_protect(&self) -> bool {
        // A write of a system call would fail, not wait.
        false
    }

    fn fill_gaps(&self, _: Span) -> Result<(), Errno> {
        Ok(())
    }

    fn protect(&self, _: Span, _: &mut [Source]) -> Result<(), Errno> {
        Err(Errno::OPNOTSUPP)
    }

    fn release(&self, _: Span) {}

    fn release_at_once(&self, page: Span) {
        self.wake(page);
    }

    fn put_back(&self, run: Span, slot: VirtAddr) -> Filled {
        self.fill(run, slot)
    }

    fn fill(&self, run: Span, slot: VirtAddr) -> Filled {
        // SAFETY: the slot holds what the pages are to become; the run is closed, without pages.
        let filled = unsafe { remap(slot_run(run, slot), run.start()) };
        self.wake(run);
        filled
    }

    fn fill_copy(&self, run: Span, slot: VirtAddr) -> Filled {
        self.fill(run, slot)
    }

    fn moves_in(&self, _: ByteSize) -> bool {
        true
    }

    fn warm_up(&self, _: Span, _: VirtAddr) -> Result<(), Errno> {
        // The slot's pages appear as the copy touches them.
        Ok(())
    }

    fn zero_fill(&self, run: Span) -> bool {
        // Missing pages of open memory are the kernel's own to fill.
        self.wake(run);
        false
    }

    fn zero_fill_protected(&self, page: Span) {
        self.wake(page);
    }

    fn fill_from_file(&self, _: Span, _: bool) -> Option<bool> {
        None
    }

    fn wake(&self, span: Span) {
        signals::wake(span);
    }

    fn poison(&self, page: Span) {
        signals::refuse(page);
    }

    fn end(&self) {}
}

/// Moves `from` to `to`. The kernel moves one mapping at a time, and a block that came and went in
/// pieces is several: then it is moved in halves.
///
/// # Safety
///
/// As [`map::remap_fixed`].
unsafe fn remap(from: Span, to: VirtAddr) -> Filled {
    let filled = |done, errno| Filled {
        done,
        moved: true,
        errno,
    };
    // SAFETY: as the caller promises.
    match unsafe { map::remap_fixed(from, to) } {
        Ok(()) => return filled(from.len(), None),
        Err(Errno::FAULT | Errno::INVAL) if from.page_count() > PageCount::ONE => {}
        Err(errno) => return filled(ByteSize::ZERO, Some(errno)),
    }
    let half = PageCount::new(from.page_count().get() / 2);
    let low = Span::of_pages(from.first_page(), half);
    let high = Span::new(low.end(), from.end()).expect("a run of two pages and up has two halves");
    // SAFETY: as the caller promises.
    let first = unsafe { remap(low, to) };
    if first.errno.is_some() {
        return first;
    }
    // SAFETY: as the caller promises.
    let second = unsafe { remap(high, to + low.len()) };
    filled(first.done + second.done, second.errno)
}
