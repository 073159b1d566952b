//! Which bus addresses are memory of a device: the apertures of this process.
//!
//! ```text
//!   bus address = address in the process:   ... RAM ... [ VRAM of A ] ... RAM ... [ VRAM of B ] ...
//!                                                 ^---- torn ----^      ^- peer -^
//! ```
//!
//! A bus address is an address of the process, so that the VRAM of a peer can be reached exactly as
//! RAM is. What hardware would refuse is refused by looking here: another fabric, and ranges that
//! reach past the end of VRAM into whatever the process has there.
//!
//! # Locking
//!
//! None. A look-up runs while a CPU fault is served, and in children of a fork, where a thread that
//! held a lock would be missing. Each slot has a version, which counts its states in turn: free,
//! filling, live. Who looks takes a live slot only, and takes it again if the version has changed.
//!
//! # Invariants
//!
//! - A device withdraws its aperture before it unmaps its VRAM.
//! - A slot counts only in the process that filled it: in a child, other things are there, and the slot is
//!   anybody's who needs one.

use gpusvm_device::Fabric;
use gpusvm_sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use gpusvm_types::{ByteSize, DmaAddr};

/// The most devices with a fabric at a time, in a process.
pub(crate) const MOST_APERTURES: usize = 64;

/// What lies at a range of bus addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// No device's memory: RAM, if anything.
    Ram,
    /// Memory of one device of this fabric.
    Device(Fabric),
    /// In part a device's memory, in part not, or of several devices.
    Torn,
}

impl Whose {
    /// What lies at `len` bytes from `at` on.
    pub(crate) fn find(at: DmaAddr, len: ByteSize) -> Self {
        let (start, end) = (at.get(), at.get().saturating_add(len.get()));
        let touches = |found: &Found| start < found.end && found.start < end;
        let mine = |found: &Found| found.owner == std::process::id();
        let found = SLOTS.iter().filter_map(Slot::read);
        match found.filter(touches).find(mine) {
            None => Self::Ram,
            Some(found) if found.start <= start && end <= found.end => Self::Device(found.fabric),
            Some(_) => Self::Torn,
        }
    }
}

/// The aperture of one device: known to others as long as the value lives.
#[derive(Debug)]
pub(crate) struct Aperture {
    slot: &'static Slot,
    start: DmaAddr,
    /// The process that opened it.
    owner: u32,
}

impl Aperture {
    /// Makes `len` bytes at `start` known as memory of a device of `fabric`. `None` when there are
    /// too many apertures.
    pub(crate) fn open(fabric: Fabric, start: DmaAddr, len: ByteSize) -> Option<Self> {
        let end = start.checked_add(len)?;
        let slot = SLOTS.iter().find(|slot| slot.claim())?;
        let owner = std::process::id();
        slot.fill(&Found {
            start: start.get(),
            end: end.get(),
            fabric,
            owner,
        });
        Some(Self { slot, start, owner })
    }

    /// Where it begins.
    pub(crate) fn start(&self) -> DmaAddr {
        self.start
    }
}

impl Drop for Aperture {
    fn drop(&mut self) {
        // In a child of fork, the slot may be another's by now.
        if self.owner == std::process::id() {
            self.slot.version.fetch_add(1, Ordering::Release);
        }
    }
}

static SLOTS: [Slot; MOST_APERTURES] = [const { Slot::new() }; MOST_APERTURES];

/// The states of a slot: its version, modulo three.
const FREE: u64 = 0;
const LIVE: u64 = 2;
const STATES: u64 = 3;

/// Room for what is known of one aperture.
#[derive(Debug)]
struct Slot {
    version: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
    fabric: AtomicU32,
    owner: AtomicU32,
}

/// What a slot held at one moment.
#[derive(Clone, Copy, Debug)]
struct Found {
    start: u64,
    end: u64,
    fabric: Fabric,
    // The process that has it.
    owner: u32,
}

impl Slot {
    const fn new() -> Self {
        Self {
            version: AtomicU64::new(FREE),
            start: AtomicU64::new(0),
            end: AtomicU64::new(0),
            fabric: AtomicU32::new(0),
            owner: AtomicU32::new(0),
        }
    }

    /// Makes a free slot one that the caller fills. What a process left in it that forked this one is
    /// nothing here.
    fn claim(&self) -> bool {
        let version = self.version.load(Ordering::Acquire);
        let is_ours = || self.owner.load(Ordering::Relaxed) == std::process::id();
        let filling = match version % STATES {
            FREE => version + 1,
            LIVE if !is_ours() => version + 2,
            _ => return false,
        };
        let order = (Ordering::Acquire, Ordering::Relaxed);
        self.version
            .compare_exchange(version, filling, order.0, order.1)
            .is_ok()
    }

    /// Fills a claimed slot, and makes it live.
    fn fill(&self, what: &Found) {
        // Who sees one of these sees the claim as well, and drops what it read.
        fence(Ordering::Release);
        self.start.store(what.start, Ordering::Relaxed);
        self.end.store(what.end, Ordering::Relaxed);
        self.fabric.store(what.fabric.0, Ordering::Relaxed);
        self.owner.store(what.owner, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// What it holds, if it is live.
    fn read(&self) -> Option<Found> {
        loop {
            let version = self.version.load(Ordering::Acquire);
            if version % STATES != LIVE {
                return None;
            }
            let found = Found {
                start: self.start.load(Ordering::Relaxed),
                end: self.end.load(Ordering::Relaxed),
                fabric: Fabric(self.fabric.load(Ordering::Relaxed)),
                owner: self.owner.load(Ordering::Relaxed),
            };
            fence(Ordering::Acquire);
            if self.version.load(Ordering::Relaxed) == version {
                return Some(found);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_sync::Mutex;

    // One test uses up the slots.
    static ALONE: Mutex<()> = Mutex::new(());

    // Where no process has memory: no device of another test is here.
    const START: u64 = 1 << 60;
    const LEN: u64 = 1 << 20;

    fn open(fabric: u32, start: u64) -> Option<Aperture> {
        Aperture::open(Fabric(fabric), DmaAddr::new(start), ByteSize::new(LEN))
    }

    fn find(start: u64, len: u64) -> Whose {
        Whose::find(DmaAddr::new(start), ByteSize::new(len))
    }

    #[test]
    fn ranges_in_across_and_beside_an_aperture() {
        let _alone = ALONE.lock();
        let aperture = open(7, START).unwrap();
        let inside = Whose::Device(Fabric(7));
        for (start, len, want) in [
            (START, LEN, inside),
            (START, 1, inside),
            (START + LEN - 1, 1, inside),
            (START - 1, 1, Whose::Ram),
            (START + LEN, 1, Whose::Ram),
            (START + 1, 0, inside),
            (START - 1, 2, Whose::Torn),
            (START + LEN - 1, 2, Whose::Torn),
            (START - 1, LEN + 2, Whose::Torn),
            (START, u64::MAX, Whose::Torn),
        ] {
            assert_eq!(find(start, len), want, "{len} bytes at {start:#x}");
        }
        drop(aperture);
        assert_eq!(find(START, LEN), Whose::Ram);
    }

    #[test]
    fn slots_are_used_again_while_others_look() {
        let _alone = ALONE.lock();
        let at = START + (1 << 50);
        let done = AtomicU32::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..100_000 {
                    drop(open(round % 5, at + u64::from(round % 3) * LEN).unwrap());
                }
                done.store(1, Ordering::Relaxed);
            });
            while done.load(Ordering::Relaxed) == 0 {
                for third in 0..3 {
                    let found = find(at + third * LEN, LEN);
                    assert_ne!(found, Whose::Torn, "a slot that was half filled");
                }
            }
        });
        assert_eq!(find(at, 3 * LEN), Whose::Ram);
    }

    /// A child has room for as many, and what it drops of its parent's is not one of its own.
    #[test]
    fn a_child_of_fork_has_all_the_slots() {
        let _alone = ALONE.lock();
        let at = START + (3 << 50);
        let open_all = |at: u64| {
            let all = (0..MOST_APERTURES as u64).map_while(|i| open(1, at + i * LEN));
            all.collect::<Vec<_>>()
        };
        let apertures = open_all(at);
        assert_eq!(apertures.len(), MOST_APERTURES);
        // SAFETY: the child allocates, which glibc lets it, and ends.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let own = open_all(at + (1 << 50));
            drop(apertures);
            let mine = find(at + (1 << 50), LEN) == Whose::Device(Fabric(1));
            let ok = own.len() == MOST_APERTURES && mine && find(at, LEN) == Whose::Ram;
            drop(own);
            let ok = ok && open_all(at).len() == MOST_APERTURES;
            // SAFETY: it has no preconditions.
            unsafe { libc::_exit(i32::from(!ok)) };
        }
        let mut status = 0;
        // SAFETY: a child of ours.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0);
        assert_eq!(find(at, LEN), Whose::Device(Fabric(1)));
    }

    #[test]
    fn there_is_an_end_to_apertures() {
        let _alone = ALONE.lock();
        let at = START + (2 << 50);
        let all = (0..).map_while(|i| open(1, at + i * LEN));
        assert_eq!(all.collect::<Vec<_>>().len(), MOST_APERTURES);
        assert!(open(1, at).is_some());
    }
}
