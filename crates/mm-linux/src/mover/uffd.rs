//! Pages by userfaultfd: moved where the kernel can, copied where not.
//!
//! Only the destination of a MOVE must be registered, so there are two descriptors: one for the
//! program's memory, which reports faults and events, and one for the staging area, which nobody
//! ever reads because nobody ever touches a missing page there. A third is for memory that is only
//! watched: it reports unmaps and remaps.

mod out; // how they leave
mod again; // and who says that it is too early
mod marks; // what shows where they were

use super::{Filled, Mover, Taken, slot_run};
use crate::region::{Behind, BlockState};
use crate::sys::map;
use crate::sys::pagemap::{Categories, PageMap, Region as PageRegion};
use crate::sys::uffd::{CopyFlags, Features, Progress, RegisterModes, Uffd};
use again::{HASTY, PATIENT, again};
use gpusvm_mm::Source;
use gpusvm_sync::Arc;
use gpusvm_types::{BLOCK_SIZE, ByteSize, PAGE_SIZE, PageCount, Span, VirtAddr};
use out::Errand;
use rustix::io::Errno;
use rustix::mm::MprotectFlags;

/// Pages by userfaultfd.
#[derive(Debug)]
pub(crate) struct UffdMover {
    /// The program's memory. Shared with who reads it.
    program: Arc<Uffd>,
    /// Memory that is only watched, where there is write protection. Shared likewise.
    watcher: Option<Arc<Uffd>>,
    /// The staging area, where pages can be moved.
    staging: Option<Uffd>,
    pages: PageMap,
}

impl UffdMover {
    /// With the descriptors of the program's memory, of what of it is only watched, and, where pages can
    /// be moved, that of staging.
    pub(crate) fn new(
        program: Arc<Uffd>,
        watcher: Option<Arc<Uffd>>,
        staging: Option<Uffd>,
    ) -> Result<Self, Errno> {
        Ok(Self {
            program,
            watcher,
            staging,
            pages: PageMap::open()?,
        })
    }

    fn write_protect(&self, run: Span, on: bool) -> Result<(), Errno> {
        let protected = again(PATIENT, |_| Progress {
            done: ByteSize::ZERO,
            errno: self.program.write_protect(run, on, false).err(),
        });
        protected.errno.map_or(Ok(()), Err)
    }
}

impl Mover for UffdMover {
    fn arm(&self, span: Span, behind: Behind) -> Result<(), Errno> {
        let modes = RegisterModes {
            missing: true,
            wp: self.program.features().contains(Features::WP),
            minor: behind == Behind::File,
        };
        // SAFETY: the handlers serve every fault of mirrored memory.
        match (unsafe { self.program.register(span, modes) }, &self.watcher) {
            (Err(Errno::BUSY), Some(watcher)) => match (watcher.unregister(span), halves(span)) {
                // It was watched. If it is somebody else's, that refuses as well.
                // SAFETY: as above.
                (Ok(()), _) => unsafe { self.program.register(span, modes) },
                // Some of it was, some is registered already.
                (Err(_), Some([low, high])) => {
                    self.arm(low, behind).and_then(|()| self.arm(high, behind))
                }
                (Err(_), None) => Err(Errno::BUSY),
            },
            (registered, _) => registered,
        }
    }

    fn can_watch_files(&self) -> bool {
        let needed = Features::WP | Features::MINOR_SHMEM;
        self.program.features().contains(needed)
    }

    fn watch(&self, span: Span) -> Result<(), Errno> {
        let watcher = self.watcher.as_ref().ok_or(Errno::NOSYS)?;
        let modes = RegisterModes {
            missing: false,
            wp: true,
            minor: false,
        };
        // SAFETY: nothing is ever write-protected by this descriptor, so no touch waits.
        unsafe { watcher.register(span, modes) }
    }

    fn unwatch(&self, span: Span) {
        if let Some(watcher) = &self.watcher {
            unregister(watcher, span);
        }
    }

    fn disarm(&self, span: Span) {
        unregister(&self.program, span);
    }

    fn takes_to_slot(&self) -> bool {
        self.staging.is_some()
    }

    fn is_huge(&self, page: Span) -> bool {
        let mut there = [PageRegion::EMPTY];
        let scanned = self.pages.scan(page, &mut there);
        scanned.is_ok_and(|scanned| {
            scanned.regions == 1 && there[0].categories.contains(Categories::HUGE)
        })
    }

    fn take_out(
        &self,
        run: Span,
        slot: VirtAddr,
        sources: &mut [Source],
        block: &BlockState,
    ) -> Result<Taken, Errno> {
        gpusvm_sync::walk!("take_out");
        sources.fill(Source::Hole);
        self.move_out(run, slot, sources, block)
    }

    /// The kernel lets others in while its event is read: it gives up if the first page was unmapped by
    /// then, and where the mapping was cut it goes on, and tells of the rest once more.
    fn discard(&self, run: Span) -> bool {
        // SAFETY: the bytes live elsewhere now; whoever touches a page waits for the block.
        let dropped = unsafe { map::discard(run) };
        debug_assert!(
            matches!(dropped, Ok(()) | Err(Errno::NOMEM | Errno::PERM)),
            "{run}: {dropped:?}"
        );
        dropped.is_ok()
    }

    fn can_protect(&self) -> bool {
        self.program.features().contains(Features::WP)
    }

    fn fill_gaps(&self, run: Span) -> Result<(), Errno> {
        // A mark of a page that was on a device is none.
        self.unmark_holes(run)?;
        let mut there = [PageRegion::EMPTY; 64];
        let mut rest = Some(run);
        while let Some(left) = rest {
            let scanned = self.pages.scan(left, &mut there)?;
            let mut at = left.start();
            let found = &there[..scanned.regions];
            let ends = found.iter().map(|region| (region.start, region.end));
            for (start, end) in ends.chain([(scanned.until, scanned.until)]) {
                if let Ok(gap) = Span::new(at, start) {
                    self.zero_fill(gap);
                }
                at = end;
            }
            rest = Span::new(scanned.until, run.end()).ok();
        }
        Ok(())
    }

    fn protect(&self, run: Span, sources: &mut [Source]) -> Result<(), Errno> {
        self.write_protect(run, true)?;
        self.unmark_holes(run)?;
        // What was dropped since is missing, and a touch of it is caught as one.
        sources.fill(Source::Hole);
        self.note_holes(run, sources).map(drop)
    }

    fn release(&self, run: Span) {
        if self.write_protect(run, false).is_ok() {
            return;
        }
        // Part of it was unmapped meanwhile, or is another mapping's. The others can be written, and
        // who waits is woken, which the kernel does only where it refuses nothing.
        for page in run.pages() {
            let page = Span::page_of(page.start());
            // Refused: it is not registered, so nobody keeps writers out.
            let _ = self.program.write_protect(page, false, false);
        }
        self.wake(run);
    }

    fn release_at_once(&self, page: Span) {
        // The kernel wakes nobody where it refuses.
        if self.program.write_protect(page, false, false).is_err() {
            self.wake(page);
        }
    }

    fn put_back(&self, run: Span, slot: VirtAddr) -> Filled {
        let errand = Errand {
            to: &self.program,
            dont_wake: false,
            patience: HASTY,
        };
        // SAFETY: the slot holds what the pages are to become, and the run is missing.
        let moved = unsafe { self.move_all(slot_run(run, slot), run.start(), &errand) };
        Filled {
            done: moved.done,
            moved: true,
            errno: moved.errno,
        }
    }

    fn fill(&self, run: Span, slot: VirtAddr) -> Filled {
        gpusvm_sync::walk!("fill");
        if !self.moves_in(run.len()) {
            return self.fill_copy(run, slot);
        }
        // Copies come where marks are; what moves does not.
        let moved = match self.mark(run, false) {
            Ok(()) => self.put_back(run, slot),
            Err(errno) => Filled {
                done: ByteSize::ZERO,
                moved: false,
                errno: Some(errno),
            },
        };
        // Read-only or locked: such memory takes copies only.
        if moved.errno == Some(Errno::INVAL) && moved.done.is_zero() {
            self.fill_copy(run, slot)
        } else {
            moved
        }
    }

    fn fill_copy(&self, run: Span, slot: VirtAddr) -> Filled {
        // SAFETY: the slot holds what the pages are to become, and the run is missing.
        let copied = again(HASTY, |done| unsafe {
            let len = run.len() - done;
            self.program
                .copy(run.start() + done, slot + done, len, CopyFlags::default())
        });
        Filled {
            done: copied.done,
            moved: false,
            errno: copied.errno,
        }
    }

    /// A slot that gives some of its pages away is no longer warm, so only whole blocks move.
    fn moves_in(&self, len: ByteSize) -> bool {
        self.staging.is_some() && len == BLOCK_SIZE
    }

    fn warm_up(&self, from: Span, to: VirtAddr) -> Result<(), Errno> {
        let Some(staging) = &self.staging else {
            return map::populate(slot_run(from, to));
        };
        let moved = self.move_to_slot(staging, from, to);
        moved.errno.map_or(Ok(()), Err)
    }

    fn zero_fill(&self, run: Span) -> bool {
        let mut any = false;
        let mut rest = Some(run);
        while let Some(left) = rest {
            let mut filled = self.program.zeropage(left, false);
            if filled.errno == Some(Errno::NOENT) && filled.done.is_zero() {
                // No one mapping has all of it: pages of it are there all the same.
                filled = self.program.zeropage(Span::page_of(left.start()), false);
            }
            any |= !filled.done.is_zero();
            if filled.errno == Some(Errno::EXIST) && filled.done.is_zero() {
                any |= self.zero_fill_marked(Span::page_of(left.start()));
            }
            let stopped_early = filled.errno == Some(Errno::AGAIN) && filled.done.is_zero();
            if stopped_early {
                // An event must be read first, maybe by this very thread.
                break;
            }
            // A page that is there already is passed over; nothing else can be done about others.
            let passed = if filled.is_complete() || !filled.done.is_zero() {
                ByteSize::ZERO
            } else {
                PAGE_SIZE
            };
            rest = Span::new(left.start() + filled.done + passed, left.end()).ok();
        }
        self.wake(run);
        any
    }

    fn zero_fill_protected(&self, page: Span) {
        if self.copy_zeroes(page, true).errno.is_some() {
            self.wake(page);
        }
    }

    fn fill_from_file(&self, page: Span, protected: bool) -> Option<bool> {
        let filled = again(HASTY, |_| self.program.map_of_file(page, protected));
        match filled.errno {
            // Not there; or not shared memory, or behind the end of the file.
            Some(Errno::FAULT | Errno::INVAL) => None,
            errno => {
                self.wake(page);
                Some(errno != Some(Errno::EXIST))
            }
        }
    }

    fn leaves_markers(&self) -> bool {
        self.has_markers()
    }

    fn mark(&self, run: Span, on: bool) -> Result<(), Errno> {
        self.set_markers(run, on)
    }

    fn wake(&self, span: Span) {
        // Fails when it was unmapped meanwhile: then the kernel wakes them.
        let _ = self.program.wake(span);
    }

    fn poison(&self, page: Span) {
        if self.program.features().contains(Features::POISON) {
            // Where a mark is, no other comes.
            let _ = self.mark(page, false);
            let poison = |_| self.program.poison(page, false);
            let _ = again(PATIENT, poison);
        } else {
            // SAFETY: what the page held is out of reach: who touches it is not to read zeroes.
            let _ = unsafe { map::protect(page, MprotectFlags::empty()) };
        }
        self.wake(page);
    }

    fn end(&self) {
        let others = [self.watcher.as_deref(), self.staging.as_ref()];
        self.program.end();
        others.into_iter().flatten().for_each(Uffd::end);
    }
}

/// Whatever of `span` is registered with `uffd`. What was unmapped meanwhile refuses, or is registered with
/// another, which is the end of it as well; but with it all else refuses too.
fn unregister(uffd: &Uffd, span: Span) {
    if let (Err(_), Some(halves)) = (uffd.unregister(span), halves(span)) {
        halves.into_iter().for_each(|half| unregister(uffd, half));
    }
}

/// Both halves of what is more than a page.
fn halves(span: Span) -> Option<[Span; 2]> {
    let low = PageCount::new(span.page_count().get() / 2);
    let middle = (span.first_page() + low).start();
    let low = Span::new(span.start(), middle).ok()?;
    Some([low, Span::new(middle, span.end()).ok()?])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::map::Request;
    use crate::sys::testing::{self, next_event, pages, started};
    use crate::sys::uffd::Event;
    use std::time::Instant;

    /// Story: the handler that answers at once waited for an event to be read, which was its own to read.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "it is about time")]
    fn who_waits_for_a_page_that_cannot_be_released_yet_tries_again_at_once() {
        let Some(uffd) = testing::uffd(Features::WP | Features::EVENT_REMOVE) else {
            return;
        };
        let uffd = Arc::new(uffd);
        let mover = UffdMover::new(Arc::clone(&uffd), None, None).unwrap();
        let app = Request::new(pages(2)).dont_fork().map().unwrap();
        app.store(ByteSize::ZERO, 1);
        let span = app.span();
        mover.arm(span, Behind::Zeroes).unwrap();
        let page = Span::page_of(span.start());
        mover.write_protect(page, true).unwrap();
        let is_write = |event| matches!(event, Some(Event::Fault { wp: true, .. }));
        let writer = started(move || {
            app.store(ByteSize::ZERO, 2);
            app
        });
        assert!(is_write(next_event(&uffd)));

        let last = Span::new(page.end(), span.end()).unwrap();
        // SAFETY: ours, and never touched.
        let dropped = started(move || unsafe { map::discard(last) });
        while uffd.write_protect(last, true, true) != Err(Errno::AGAIN) {
            std::thread::yield_now();
        }
        // Nobody reads what is about to be dropped. The best of a few: others use the machine.
        let took = (0..3).map(|_| {
            let began = Instant::now();
            mover.release_at_once(page);
            began.elapsed()
        });
        let took = took.min().unwrap();
        assert!(took.as_millis() < 500, "{took:?}");
        let (mut tries_again, mut is_told) = (false, false);
        while !tries_again || !is_told {
            let event = next_event(&uffd);
            assert!(event.is_some(), "woken {tries_again}, told {is_told}");
            tries_again |= is_write(event);
            is_told |= matches!(event, Some(Event::Remove { .. }));
        }
        dropped.recv().unwrap().unwrap();
        mover.release_at_once(page);
        drop(writer.recv().unwrap());
    }
}
