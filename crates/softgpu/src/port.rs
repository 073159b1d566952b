//! The access path: how a unit reaches memory.
//!
//! ```text
//!   open:  begin (in flight) -> TLB -- hit, permitted -----------------> access -> end
//!            ^                   |                                          |
//!            |                   +-- miss: walk -- found: fill ------> access -> end
//!            |                              |                               |
//!            +--------- replay ------- end, fault, wait          RAM refused: end, fault (stale)
//!                                                                 peer refused: end, fail
//! ```
//!
//! Whatever waits, waits behind `end`: a flush never waits for a fault.
//!
//! # Invariants
//!
//! - Between `open` and `end` there is one access, or one run of them by a tile, and nothing that
//!   can block but RAM itself.
//! - A cancelled launch gets no translation: its address space has new stamps, so its next access
//!   misses, and the miss sees that it was cancelled.

use crate::LaneError;
use crate::counters::add;
use crate::entry::Entry;
use crate::fault::{FaultBuffer, Served};
use crate::flush::{IDLE, Stamps, UnitShared, Units, word};
use crate::launch::LaunchState;
use crate::region::Region;
use crate::table::{Miss, PAGES};
use crate::tlb::{Hit, Refusal, Tlb};
use crate::word::{Word, load_ram, load_vram, store_ram, store_vram};
use gpusvm_device::{Access, FaultError, Verdict};
use gpusvm_sync::Arc;
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{BLOCK_SHIFT, PAGE_SHIFT, VirtAddr};

/// What all units share of the device.
#[derive(Debug)]
pub(crate) struct Board {
    /// `None` when residency is declared.
    pub(crate) faults: Option<FaultBuffer>,
    /// Where VRAM begins, in the process.
    pub(crate) vram: u64,
    /// See `flush`.
    pub(crate) asymmetric: bool,
    /// Keeps VRAM as long as a unit may access it.
    pub(crate) _memory: Arc<Region>,
}

/// One unit's way to the memory of one launch.
#[derive(Debug)]
pub(crate) struct Port<'u> {
    pub(crate) unit: usize,
    pub(crate) shared: &'u UnitShared,
    pub(crate) tlb: &'u mut Tlb,
    pub(crate) launch: &'u LaunchState,
    pub(crate) board: &'u Board,
    // Of the launch and of the board: here for the access path.
    stamps: &'u Stamps,
    asymmetric: bool,
    // Of the last access; counts accesses, and goes on from launch to launch: see `flush`.
    sequence: u64,
    misses: u64,
}

impl<'u> Port<'u> {
    /// The way of unit `unit` to the memory of `launch`.
    pub(crate) fn new(
        unit: usize,
        shared: &'u UnitShared,
        tlb: &'u mut Tlb,
        launch: &'u LaunchState,
        board: &'u Board,
    ) -> Self {
        let sequence = shared.counters.accesses.load(Ordering::Relaxed);
        let (stamps, asymmetric) = (&launch.vm.stamps, board.asymmetric);
        Self {
            unit,
            shared,
            tlb,
            launch,
            board,
            stamps,
            asymmetric,
            sequence,
            misses: 0,
        }
    }

    /// Shows others what was counted so far.
    pub(crate) fn publish_counters(&mut self) {
        self.shared
            .counters
            .accesses
            .store(self.sequence, Ordering::Relaxed);
        add(
            &self.shared.counters.misses,
            std::mem::take(&mut self.misses),
        );
    }

    /// Loads a word.
    #[inline(always)]
    pub(crate) fn load<T: Word>(&mut self, at: u64) -> Result<T, LaneError> {
        aligned::<T>(at)?;
        let hit = self.open(at, Access::Read, 1)?;
        let loaded = if hit.is_system() {
            // SAFETY: aligned as checked; the entry and the address agree on the low bits.
            unsafe { load_ram::<T>(hit.pointer()) }.map_err(|_| hit.refusal())
        } else {
            // SAFETY: as above, and the page table holds places of VRAM only.
            Ok(unsafe { load_vram::<T>(hit.pointer()) })
        };
        self.end();
        match loaded {
            Ok(value) => Ok(value),
            Err(refusal) => self.load_again(at, refusal),
        }
    }

    /// Apart from `load`, whose path must stay straight: what is computed for a loop costs there.
    #[cold]
    #[inline(never)]
    fn load_again<T: Word>(&mut self, at: u64, refusal: Refusal) -> Result<T, LaneError> {
        self.refused(at, Access::Read, refusal)?;
        self.load(at)
    }

    /// Stores a word.
    #[inline(always)]
    pub(crate) fn store<T: Word>(&mut self, at: u64, value: T) -> Result<(), LaneError> {
        aligned::<T>(at)?;
        let hit = self.open(at, Access::Write, 1)?;
        let stored = if hit.is_system() {
            // SAFETY: aligned as checked; who launched vouches for the writes of the kernel.
            unsafe { store_ram(hit.pointer(), value) }.map_err(|_| hit.refusal())
        } else {
            // SAFETY: aligned, and the page table holds places of VRAM only.
            unsafe { store_vram(hit.pointer(), value) };
            Ok(())
        };
        self.end();
        match stored {
            Ok(()) => Ok(()),
            Err(refusal) => self.store_again(at, value, refusal),
        }
    }

    /// As `load_again`.
    #[cold]
    #[inline(never)]
    fn store_again<T: Word>(
        &mut self,
        at: u64,
        value: T,
        refusal: Refusal,
    ) -> Result<(), LaneError> {
        self.refused(at, Access::Write, refusal)?;
        self.store(at, value)
    }

    /// Begins an access to up to `pages` pages from `at` on and translates `at`. When it fails
    /// nothing is in flight.
    #[inline(always)]
    pub(crate) fn open(&mut self, at: u64, access: Access, pages: u64) -> Result<Hit, LaneError> {
        self.begin(at, pages);
        let stamp = self.stamps.of_block(at >> BLOCK_SHIFT);
        match self.tlb.find(at, stamp) {
            Some(hit) if hit.has(Entry::needs(access)) => Ok(hit),
            _ => self.miss(at, access, pages),
        }
    }

    #[inline(always)]
    fn begin(&mut self, at: u64, pages: u64) {
        self.sequence = self.sequence.wrapping_add(1);
        let word = word(at, pages, self.sequence);
        Units::publish(self.asymmetric, &self.shared.in_flight, word);
    }

    /// The access is over.
    #[inline(always)]
    pub(crate) fn end(&self) {
        self.shared.in_flight.store(IDLE, Ordering::Release);
    }

    /// Walks for `at`, and faults until the walk finds something. In flight before and after.
    #[cold]
    #[inline(never)]
    fn miss(&mut self, at: u64, access: Access, pages: u64) -> Result<Hit, LaneError> {
        gpusvm_sync::walk!("miss");
        loop {
            self.misses += 1;
            // In this order: stamp, whether cancelled, entry. See `flush`, and `cancel`.
            let stamp = self.launch.vm.stamps.of_block(at >> BLOCK_SHIFT);
            if self.launch.is_cancelled() {
                self.end();
                return Err(LaneError::Cancelled);
            }
            let miss = match self.launch.vm.table.walk(VirtAddr::new(at).page(), access) {
                Ok(leaf) => return Ok(self.tlb.fill(at, stamp, leaf, self.board)),
                Err(miss) => miss,
            };
            self.end();
            self.missing(VirtAddr::new(at), access, miss)?;
            self.begin(at, pages);
        }
    }

    /// There is no translation: fault and wait, or fail.
    fn missing(&mut self, at: VirtAddr, access: Access, miss: Miss) -> Result<(), LaneError> {
        let board = self.board;
        if at.page().get() >= PAGES {
            return Err(LaneError::Fault(FaultError::Unmapped { at }));
        }
        match (&board.faults, miss) {
            (Some(faults), _) => self.fault(faults, at, access, false),
            (None, Miss::Unmapped) => Err(LaneError::Fault(FaultError::NotDeclared { at })),
            (None, Miss::NotPermitted) => {
                Err(LaneError::Fault(FaultError::NotPermitted { at, access }))
            }
        }
    }

    /// An access through a translation was refused. In RAM it is out of date, and the driver is
    /// asked; no driver brings back a peer.
    #[cold]
    #[inline(never)]
    pub(crate) fn refused(
        &mut self,
        at: u64,
        access: Access,
        refusal: Refusal,
    ) -> Result<(), LaneError> {
        let (at, board) = (VirtAddr::new(at), self.board);
        match (refusal, &board.faults) {
            (Refusal::Peer, _) => Err(LaneError::Fault(FaultError::PeerLost { at })),
            (Refusal::Ram, Some(faults)) => self.fault(faults, at, access, true),
            (Refusal::Ram, None) => Err(LaneError::Fault(FaultError::Unmapped { at })),
        }
    }

    fn fault(
        &mut self,
        faults: &FaultBuffer,
        at: VirtAddr,
        access: Access,
        stale: bool,
    ) -> Result<(), LaneError> {
        gpusvm_sync::walk!("fault");
        self.publish_counters();
        add(&self.shared.counters.faults, 1);
        let fault = (self.launch.vm_id, at, access, stale);
        match faults.report(self.unit, fault, || self.launch.is_cancelled()) {
            Served::Verdict(Verdict::Replay) => Ok(()),
            Served::Cancelled => Err(LaneError::Cancelled),
            Served::Verdict(Verdict::Fail(_)) if self.launch.is_cancelled() => {
                Err(LaneError::Cancelled)
            }
            Served::Verdict(Verdict::Fail(error)) => Err(LaneError::Fault(error)),
        }
    }
}

/// How many pages `len` bytes at `at` touch. Not zero, and not past the end of the space.
pub(crate) fn pages_of(at: u64, len: u64) -> u64 {
    ((at + (len - 1)) >> PAGE_SHIFT) - (at >> PAGE_SHIFT) + 1
}

/// Refuses an address that is not aligned for `T`. An aligned word crosses no page.
#[inline(always)]
pub(crate) fn aligned<T: Word>(at: u64) -> Result<(), LaneError> {
    if at.is_multiple_of(size_of::<T>() as u64) {
        Ok(())
    } else {
        Err(LaneError::Misaligned {
            at: VirtAddr::new(at),
        })
    }
}
