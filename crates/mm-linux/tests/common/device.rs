//! A device that is only memory: the least that can own pages.

use gpusvm_mm::AddressSpace;
use gpusvm_mm::{
    Block, CpuFault, DeviceMemoryId, DeviceMemoryOps, DevicePage, DeviceRun, FaultOutcome, Inbound,
    Leaving, Source, Time, Wanted,
};
use gpusvm_mm_linux::{BlockGuard, Process};
use gpusvm_types::{ByteSize, DevicePfn, DmaAddr, PAGE_SIZE, PageCount, Span};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// Memory with an owner, and knobs.
#[derive(Debug)]
pub(crate) struct FakeDevice {
    memory: Mutex<()>,
    at: u64,
    id: OnceLock<DeviceMemoryId>,
    pages: States,
    released_twice: AtomicU64,
    panics: AtomicU64,
    /// Not before this time, in nanoseconds of the address space.
    stays_until: AtomicU64,
    /// How much a fault brings home.
    window: AtomicU64,
    /// The next faults fail, or panic.
    pub(crate) fails: AtomicBool,
    pub(crate) panicking: AtomicBool,
    /// How long every copy takes at least.
    slow: AtomicU64,
    /// Copies wait as long as it is set; how often one waited too long.
    pub(crate) waits: AtomicBool,
    pub(crate) waited_in_vain: AtomicU64,
}

struct States(Vec<AtomicU8>);

impl std::fmt::Debug for States {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let count = |state| {
            let is = |page: &&AtomicU8| page.load(Ordering::Acquire) == state;
            self.0.iter().filter(is).count()
        };
        write!(f, "{} taken, {} held", count(TAKEN), count(HELD))
    }
}

const FREE: u8 = 0;
/// Of an allocation that is being filled.
const TAKEN: u8 = 1;
/// Stands in for a page of the process.
const HELD: u8 = 2;

impl FakeDevice {
    pub(crate) fn new(pages: PageCount) -> Arc<Self> {
        gpusvm_guarded::install().unwrap();
        let len = pages.bytes().as_usize();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: no address is asked for.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: mapped above.
        unsafe { libc::madvise(at, len, libc::MADV_HUGEPAGE) };
        at.expose_provenance();
        Arc::new(Self {
            memory: Mutex::new(()),
            at: at.addr() as u64,
            id: OnceLock::new(),
            pages: States((0..pages.get()).map(|_| AtomicU8::new(FREE)).collect()),
            released_twice: AtomicU64::new(0),
            panics: AtomicU64::new(0),
            stays_until: AtomicU64::new(0),
            window: AtomicU64::new(ByteSize::mib(2).get()),
            fails: AtomicBool::new(false),
            panicking: AtomicBool::new(false),
            slow: AtomicU64::new(0),
            waits: AtomicBool::new(false),
            waited_in_vain: AtomicU64::new(0),
        })
    }

    pub(crate) fn is_added_as(&self, id: DeviceMemoryId) {
        self.id.set(id).unwrap();
    }

    pub(crate) fn set_window(&self, window: ByteSize) {
        self.window.store(window.get(), Ordering::Release);
    }

    pub(crate) fn set_slow(&self, slow: Duration) {
        let nanos = u64::try_from(slow.as_nanos()).unwrap();
        self.slow.store(nanos, Ordering::Release);
    }

    /// From `now` on, the CPU gets nothing back for so long.
    pub(crate) fn set_timeslice(&self, now: Time, slice: Duration) {
        let until = now.after(slice).as_duration().as_nanos();
        self.stays_until
            .store(u64::try_from(until).unwrap(), Ordering::Release);
    }

    /// Takes `count` pages in a row.
    pub(crate) fn take(&self, count: PageCount) -> DevicePfn {
        let _alone = self.memory.lock().unwrap();
        let count = count.as_usize();
        let is_free = |page: &AtomicU8| page.load(Ordering::Acquire) == FREE;
        let first = self.pages.0.windows(count);
        let mut first = first.enumerate().step_by(count.next_power_of_two());
        let (first, pages) = first.find(|(_, run)| run.iter().all(is_free)).unwrap();
        pages
            .iter()
            .for_each(|page| page.store(TAKEN, Ordering::Release));
        DevicePfn::new(u32::try_from(first).unwrap())
    }

    /// The i-th page of what was taken stands in for a page from now on.
    pub(crate) fn hold(&self, first: DevicePfn, i: usize) -> DevicePage {
        let pfn = first.offset(PageCount::from_usize(i));
        assert_eq!(
            self.pages.0[pfn.index()].swap(HELD, Ordering::AcqRel),
            TAKEN
        );
        DevicePage {
            memory: *self.id.get().unwrap(),
            pfn,
        }
    }

    /// Gives back what was taken and not held.
    pub(crate) fn let_go_unused(&self, first: DevicePfn, count: PageCount) {
        for page in &self.pages.0[first.index()..][..count.as_usize()] {
            let _ = page.compare_exchange(TAKEN, FREE, Ordering::AcqRel, Ordering::Acquire);
        }
    }

    /// Copies pages to what was taken; holes become zeroes. Whether that went well: pages that are
    /// copied in place can be unmapped meanwhile.
    #[must_use]
    pub(crate) fn copy_from(&self, first: DevicePfn, sources: &[Source]) -> bool {
        self.dawdle();
        let mut i = 0;
        while i < sources.len() {
            let to = self.dma(first.offset(PageCount::from_usize(i)));
            match sources[i] {
                Source::Page(from) => {
                    let mut next = from.get();
                    let mut follows = |source: &&Source| {
                        next += PAGE_SIZE.get();
                        **source == Source::Page(DmaAddr::new(next))
                    };
                    let run = 1 + sources[i + 1..]
                        .iter()
                        .take_while(|source| follows(source))
                        .count();
                    if !copy(to, from, PageCount::from_usize(run).bytes()) {
                        return false;
                    }
                    i += run;
                    continue;
                }
                Source::Hole => {
                    let (to, len) = (pointer(to), PAGE_SIZE.as_usize());
                    // SAFETY: a page of our own.
                    unsafe { gpusvm_guarded::clear_streaming(to, len) }.unwrap();
                }
                Source::Device(_) | Source::InPlace | Source::Kept(_) => {}
            }
            i += 1;
        }
        true
    }

    /// Copies pages home.
    pub(crate) fn copy_to(&self, leaving: &[Option<Leaving>]) {
        self.dawdle();
        let mut rest = leaving.iter().flatten().peekable();
        while let Some(first) = rest.next() {
            let mut len = PAGE_SIZE;
            let follows = |next: &&Leaving, len: ByteSize| {
                next.to == first.to + len && next.from.pfn == first.from.pfn.offset(len.pages())
            };
            while rest.next_if(|next| follows(next, len)).is_some() {
                len += PAGE_SIZE;
            }
            assert!(copy(first.to, self.dma(first.from.pfn), len));
        }
    }

    /// Reads a byte of device memory, as a device would.
    pub(crate) fn peek(&self, page: DevicePage) -> u8 {
        // SAFETY: a page of our own.
        unsafe { pointer(self.dma(page.pfn)).read_volatile() }
    }

    /// Every page was released as often as it was held.
    pub(crate) fn check_end(&self) {
        assert_eq!(self.released_twice.load(Ordering::Acquire), 0);
        let left = self.held();
        assert_eq!(left, 0, "device pages that nobody released");
    }

    /// How many pages are in use.
    pub(crate) fn held(&self) -> usize {
        let in_use = |page: &&AtomicU8| page.load(Ordering::Acquire) != FREE;
        self.pages.0.iter().filter(in_use).count()
    }

    pub(crate) fn panics(&self) -> u64 {
        self.panics.load(Ordering::Acquire)
    }

    pub(crate) fn dma(&self, pfn: DevicePfn) -> DmaAddr {
        DmaAddr::new(self.at + pfn.dev_addr().get())
    }

    fn dawdle(&self) {
        let until = std::time::Instant::now() + Duration::from_secs(5);
        while self.waits.load(Ordering::Acquire) {
            if std::time::Instant::now() > until {
                self.waited_in_vain.fetch_add(1, Ordering::Relaxed);
                self.waits.store(false, Ordering::Release);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        let slow = self.slow.load(Ordering::Acquire);
        if slow > 0 {
            std::thread::sleep(Duration::from_nanos(slow));
        }
    }
}

impl DeviceMemoryOps<Process> for FakeDevice {
    fn migrate_to_ram(
        &self,
        mm: &Process,
        block: &mut BlockGuard<'_>,
        fault: &CpuFault,
    ) -> FaultOutcome {
        let until = Duration::from_nanos(self.stays_until.load(Ordering::Acquire));
        let until = Time::since_start(until);
        if matches!(fault.wanted, Wanted::Touched | Wanted::Device) && mm.now() < until {
            return FaultOutcome::NotBefore(until);
        }
        if self.panicking.load(Ordering::Acquire) {
            self.panics.fetch_add(1, Ordering::AcqRel);
            panic!("the device panics, as it was told to");
        }
        let window = ByteSize::new(self.window.load(Ordering::Acquire));
        let window = Span::chunk_of(fault.at, window).intersection(block.span());
        let window = window.expect("the fault is in its block");
        let ours = fault.page.memory;
        let collected = block.collect_device(window, &mut |_, page| page.memory == ours);
        let Ok(collected) = collected else {
            return FaultOutcome::Failed;
        };
        if self.fails.load(Ordering::Acquire) {
            return FaultOutcome::Failed;
        }
        self.copy_to(collected.leaving());
        match collected.commit() {
            Ok(()) => FaultOutcome::Served,
            Err(_) => FaultOutcome::Failed,
        }
    }

    fn free_pages(&self, run: DeviceRun) {
        for page in &self.pages.0[run.first.pfn.index()..][..run.count.as_usize()] {
            if page.swap(FREE, Ordering::AcqRel) != HELD {
                self.released_twice.fetch_add(1, Ordering::AcqRel);
            }
        }
    }
}

impl Drop for FakeDevice {
    fn drop(&mut self) {
        let len = PageCount::from_usize(self.pages.0.len()).bytes().as_usize();
        // SAFETY: mapped by `new`.
        unsafe { libc::munmap(pointer(DmaAddr::new(self.at)).cast(), len) };
    }
}

pub(crate) fn copy(to: DmaAddr, from: DmaAddr, len: ByteSize) -> bool {
    // SAFETY: between device memory and staging, or pages that are write-protected.
    unsafe { gpusvm_guarded::copy_streaming(pointer(to), pointer(from), len.as_usize()) }.is_ok()
}

fn pointer(at: DmaAddr) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(ByteSize::new(at.get()).as_usize())
}
