//! The address space of this process.

use crate::block::{BlockGuard, NotHere};
use crate::delay::Delays;
use crate::discard::Discards;
use crate::events::Events;
use crate::fork::{Birth, Gate};
use crate::handler::Crew;
use crate::let_go::try_often;
use crate::mover::Mover;
use crate::patience::Patience;
use crate::region::Region;
use crate::regions::{Part, Regions};
use crate::source::FaultSource;
use crate::staging::Staging;
use crate::stats::Counters;
use crate::sys::map::Mapping;
use crate::sys::pagemap::{PageMap, Region as PageRegion, Scanned};
use crate::sys::probe::Rung;
use crate::sys::procmap::VmaTable;
use crate::sys::room::Room;
use gpusvm_mm::{AddressSpace, FaultOutcome, Home, Memories, Notifiers, Wanted};
use gpusvm_sync::atomic::{AtomicBool, AtomicI32, Ordering};
use gpusvm_sync::{Arc, Mutex, OneShot};
use gpusvm_types::{ByteSize, PageCount, PageIndex, Span, VirtAddr};
use std::thread::JoinHandle;
use std::time::Instant;

mod start; // how it comes to be, on which rung
mod adopt; // what is mirrored
mod space; // the contract
mod snapshot; // where pages are, for who only looks
mod look; // what the program's page table has, for who reports it
mod protect; // what nobody hears of
mod watch; // hearing of unmaps without more
mod fault_in; // pages that others keep back

pub use adopt::AdoptError;
pub use fault_in::{FaultInError, Wait};
pub use look::{PageLook, RamPage};
pub use protect::Protection;
pub use start::{Options, StartError};

/// The address space of this process, as far as it is mirrored.
///
/// Started with [`Process::start`], ended with [`Process::stop`]; in between its handlers keep it
/// alive.
#[derive(Debug)]
pub struct Process {
    pub(crate) regions: Regions,
    pub(crate) staging: Staging,
    /// Where what is kept of mirrored memory is, apart from the program's holes.
    pub(crate) room: Arc<Room>,
    pub(crate) mover: Box<dyn Mover>,
    pub(crate) source: Box<dyn FaultSource>,
    pub(crate) notifiers: Notifiers,
    pub(crate) memories: Memories<Process>,
    pub(crate) events: Events,
    pub(crate) discards: Discards,
    pub(crate) delays: Delays,
    /// The next block that would come home in a huge page comes in base pages.
    pub(crate) no_huge_page: OneShot,
    pub(crate) crew: Crew,
    pub(crate) gate: Gate,
    birth: Birth,
    pub(crate) counters: Counters,
    rung: Rung,
    vmas: VmaTable,
    pub(crate) pages: PageMap,
    began: Instant,
    stopping: AtomicBool,
    handlers: [AtomicI32; crate::handler::HANDLERS],
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Memory allocated here, to be unmapped.
    owned: Mutex<Vec<Mapping>>,
}

impl Process {
    /// The rung of the capability ladder that it stands on.
    pub fn rung(&self) -> Rung {
        self.rung
    }

    /// What happened so far. In a child of fork: in its parent, before the fork.
    pub fn stats(&self) -> crate::MmStats {
        self.counters.snapshot(self.is_inherited())
    }

    /// The ids of the threads that serve faults.
    pub fn handler_threads(&self) -> Vec<i32> {
        let ids = self.handlers.iter().map(|id| id.load(Ordering::Acquire));
        ids.filter(|id| *id != 0).collect()
    }

    /// How many pages live on devices.
    pub fn pages_on_devices(&self) -> PageCount {
        self.memories.pages_in_use()
    }

    /// The most RAM that the engine keeps between migrations.
    pub fn staging_limit(&self) -> ByteSize {
        Staging::max_idle()
    }

    /// Makes the next block find no huge page that would come home in one: for who wants to see what becomes
    /// of that.
    pub fn no_huge_page(&self) -> &OneShot {
        &self.no_huge_page
    }

    /// How many staging blocks migrations hold right now.
    pub fn staging_in_use(&self) -> usize {
        match self.is_inherited() {
            true => 0,
            false => self.staging.in_use(),
        }
    }

    /// Brings every page of `span` home, for a system call, or another process, to see them.
    /// Timeslices do not hold; leases are waited for.
    ///
    /// # Errors
    ///
    /// The first page that could not come home.
    pub fn bring_home(&self, span: Span) -> Result<(), gpusvm_mm::MmError> {
        // Of an engine that is gone, everything is home.
        if self.is_gone() {
            return Ok(());
        }
        self.bring_parts_home(span, Wanted::Asked)
    }

    /// Brings everything home that is on a device. Devices must have stopped to fault.
    pub fn stop_migrations(&self) {
        if !self.is_gone() {
            self.bring_all_home(Wanted::Asked);
        }
    }

    /// Returns when everything that was done to mirrored mappings before is known, and done: device pages
    /// of what was unmapped or dropped are given back, and no device maps them. For who starts work on a
    /// device.
    ///
    /// Also what other threads did, whose addresses can be this one's by now. If mappings change all the
    /// time, that is waited for up to a second; what this thread did, always.
    pub fn settle_events(&self) {
        if !self.is_gone() {
            self.source.settle();
            self.events.sync();
        }
    }

    /// As [`Process::settle_events`], of what any thread did before to what was in `span`: it can be the
    /// address of something else by now, while that thread has yet to tell. For who begins to mirror it.
    pub(crate) fn settle_ends(&self, span: Span) {
        self.settle_events();
        let mut patience = Patience::new();
        while self.is_an_end_owed(span) && !self.forgive_ends() && patience.wait() {}
        self.settle_events();
    }

    fn is_an_end_owed(&self, span: Span) -> bool {
        let mut is_owed = self.events.is_owed(span);
        self.regions.for_each_in(span, |region, inside| {
            is_owed |= inside.blocks().any(|piece| region.will_end(piece));
        });
        is_owed
    }

    /// Ends that were not read yet never come if the kernel has told everything. Whether it has.
    pub(crate) fn forgive_ends(&self) -> bool {
        self.source.if_all_is_told(&mut || self.events.forgive())
    }

    /// Ends it: what is on a device comes home, handlers end, nothing is registered any more. All
    /// ranges must be gone. What was adopted stays with its owner.
    pub fn stop(&self) {
        if self.is_gone() {
            return;
        }
        // What was unmapped is forgotten first.
        self.settle_events();
        self.bring_all_home(Wanted::Asked);
        for part in self.regions.all() {
            self.refuse_what_stayed(&part);
            self.unmirror(part.span);
        }
        self.stopping.store(true, Ordering::Release);
        self.source.interrupt();
        self.events.stop();
        for thread in core::mem::take(&mut *self.threads.lock()) {
            // A handler that panicked outside of a fault has been reported by the panic itself.
            let _ = thread.join();
        }
        self.mover.end();
    }

    /// Whether everything that was done to mappings before was read, and is marked; `false` when they change
    /// all the time. An event that comes afterwards is of a moment ago at most.
    pub(crate) fn all_is_told(&self) -> bool {
        try_often(|| self.source.if_all_is_told(&mut || ()))
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Whether calls still make sense.
    pub(crate) fn is_gone(&self) -> bool {
        self.is_stopping() || self.is_inherited()
    }

    /// Whether it is an engine of the process that forked this one, or of one before that. Such an engine
    /// does nothing here, for ever; its locks may be held by threads that are not there.
    pub fn is_inherited(&self) -> bool {
        !self.birth.is_here()
    }

    /// Refuses an engine that is not of this process.
    ///
    /// # Errors
    ///
    /// `Gone` when it is [inherited](Process::is_inherited).
    pub fn check_ours(&self) -> Result<(), gpusvm_mm::MmError> {
        match self.is_inherited() {
            true => Err(gpusvm_mm::MmError::Gone),
            false => Ok(()),
        }
    }

    /// How many events were read.
    pub(crate) fn events_told(&self) -> u64 {
        self.counters.events.load(Ordering::Acquire)
    }

    pub(crate) fn handler_started(&self, id: i32) {
        let free = self.handlers.iter().find(|slot| {
            slot.compare_exchange(0, id, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        debug_assert!(free.is_some(), "more handlers than there are");
    }

    /// As far as possible; what could not come home is reported.
    pub(crate) fn bring_all_home(&self, wanted: Wanted) {
        for part in self.regions.all() {
            if let Err(error) = self.bring_parts_home(part.span, wanted) {
                self.report(format_args!("{error}"));
            }
        }
    }

    /// What could not come home is lost with the engine: a bus error for who touches it, never zeroes.
    fn refuse_what_stayed(&self, part: &Part) {
        for page in part.span.pages() {
            let word = part.region.word(page).get();
            if matches!(word.home(), Home::Device(_)) {
                self.mover.poison(Span::page_of(page.start()));
            }
        }
    }

    fn bring_parts_home(&self, span: Span, wanted: Wanted) -> Result<(), gpusvm_mm::MmError> {
        for part in self.regions.parts_in(span) {
            for piece in part.span.blocks() {
                self.bring_block_home(piece, wanted)?;
            }
        }
        Ok(())
    }

    fn bring_block_home(&self, piece: Span, wanted: Wanted) -> Result<(), gpusvm_mm::MmError> {
        loop {
            let block = BlockGuard::lock(self, piece.start());
            let Ok(mut block) = block else { return Ok(()) };
            let outcome = block.bring_home(piece, wanted);
            drop(block);
            match outcome {
                FaultOutcome::Served => return Ok(()),
                FaultOutcome::NotBefore(due) => std::thread::sleep(due.since(self.now())),
                FaultOutcome::Failed => {
                    return Err(gpusvm_mm::MmError::StuckOnDevice { at: piece.start() });
                }
            }
        }
    }

    /// Says something that somebody has to know, on the standard error.
    pub(crate) fn report(&self, what: core::fmt::Arguments<'_>) {
        eprintln!("gpusvm: {what}");
    }

    /// Pages could not be put back to where they came from: the one thing that must not happen.
    pub(crate) fn report_lost(&self, span: Span, errno: rustix::io::Errno) {
        self.report(format_args!("the pages of {span} were lost: {errno}"));
    }

    pub(crate) fn not_mirrored(span: Span) -> impl FnOnce(NotHere) -> gpusvm_mm::MmError {
        move |_| gpusvm_mm::MmError::NotMirrored { span }
    }

    /// Clears the marks of dropped pages of RAM that the kernel has taken by now.
    pub(crate) fn settle_holes(&self, region: &Region, span: Span) {
        let is_dropped = |page| region.word(page).get().dropped;
        for page in span.pages().filter(|page| is_dropped(*page)) {
            if !self.is_in_ram(page) {
                region.word(page).saw_hole();
            }
        }
    }

    /// The runs of pages of `span` that are in RAM, as many as fit.
    pub(crate) fn scan(
        &self,
        span: Span,
        out: &mut [PageRegion],
    ) -> Result<Scanned, rustix::io::Errno> {
        self.pages.scan(span, out)
    }

    /// Whether the page has something in RAM, as the kernel sees it. A mark of ours is nothing.
    pub(crate) fn is_in_ram(&self, page: PageIndex) -> bool {
        let page = Span::page_of(page.start());
        let is_marked = || self.leaves_markers() && self.pages.is_marker(page);
        !self.pages.is_absent(page) && !is_marked()
    }

    fn thread(&self, thread: JoinHandle<()>) {
        self.threads.lock().push(thread);
    }
}

/// The block that holds an address, as an error would name it.
pub(crate) fn piece_of(span: Span, at: VirtAddr) -> Option<Span> {
    span.intersection(Span::block_of(at))
}
