//! What the tests of live migration share: a world on a rung, a device that is only memory, and
//! memory whose bytes are known.
//!
//! Tests of one file run one after the other: they fork, they count, and there is one engine per
//! process on the rung of signals.
#![allow(dead_code, reason = "each test file uses the part that it needs")]
#![allow(
    clippy::disallowed_methods,
    reason = "live tests need threads and clocks"
)]

pub(crate) mod device;
pub(crate) mod memory;

use device::FakeDevice;
use gpusvm_mm::{
    AddressSpace, Block, Home, IntervalNotifier, Invalidation, MmError, Outbound, Reason,
};
use gpusvm_mm::{Source, Subscriber};
use gpusvm_mm_linux::{Options, Process, Rung, StartError};
use gpusvm_testkit::{Watchdog, unavailable};
use gpusvm_types::{ByteSize, OwnerId, PageCount, PageIndex, Span, VirtAddr};
use memory::{Memory, Pages};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) const OWNER: OwnerId = OwnerId(1);
/// Longer than any test takes on a slow machine.
const HANGS: Duration = Duration::from_secs(90);
/// Device memory: 64 MiB.
const DEVICE_PAGES: PageCount = PageCount::new(16 << 10);

/// Makes a test of each function on each rung.
#[macro_export]
macro_rules! on_every_rung {
    ($($(#[$attribute:meta])* $name:ident),* $(,)?) => {
        $crate::on_rungs!(rung_1_move, gpusvm_mm_linux::Rung::Move, $($name),*);
        $crate::on_rungs!(rung_2_copy, gpusvm_mm_linux::Rung::Copy, $($name),*);
        $crate::on_rungs!(
            rung_3_user_moves,
            gpusvm_mm_linux::Rung::UserMode { moves: true },
            $($name),*
        );
        $crate::on_rungs!(
            rung_3_user_copies,
            gpusvm_mm_linux::Rung::UserMode { moves: false },
            $($name),*
        );
        $crate::on_rungs!(rung_4_signals, gpusvm_mm_linux::Rung::Signals, $($name),*);
    };
}

/// As `on_every_rung`, without the last: what needs events, or adopted memory.
#[macro_export]
macro_rules! on_userfaultfd_rungs {
    ($($name:ident),* $(,)?) => {
        $crate::on_rungs!(rung_1_move, gpusvm_mm_linux::Rung::Move, $($name),*);
        $crate::on_rungs!(rung_2_copy, gpusvm_mm_linux::Rung::Copy, $($name),*);
        $crate::on_rungs!(
            rung_3_user_moves,
            gpusvm_mm_linux::Rung::UserMode { moves: true },
            $($name),*
        );
        $crate::on_rungs!(
            rung_3_user_copies,
            gpusvm_mm_linux::Rung::UserMode { moves: false },
            $($name),*
        );
    };
}

/// Runs each test on the rung, in a module of its own.
#[macro_export]
macro_rules! on_rungs {
    ($module:ident, $rung:expr, $($name:ident),*) => {
        mod $module {
            $(
                #[test]
                fn $name() {
                    if let Some(world) = $crate::common::World::start($rung) {
                        super::$name(&world);
                        world.end();
                    }
                }
            )*
        }
    };
}

/// An engine on a rung, and a device.
pub(crate) struct World {
    pub(crate) process: Arc<Process>,
    pub(crate) device: Arc<FakeDevice>,
    pub(crate) rung: Rung,
    _watchdog: Watchdog,
    _alone: Option<MutexGuard<'static, ()>>,
}

impl World {
    /// On `rung`, or `None` after saying why not.
    pub(crate) fn start(rung: Rung) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let process = match Process::start(Options {
            rung: Some(rung),
            ..Options::default()
        }) {
            Ok(process) => process,
            Err(StartError::NoRung { why, .. }) => {
                unavailable(&why);
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        Some(Self::of(process, rung, Some(alone)))
    }

    /// In a child of fork, of a test that has a world: its own.
    pub(crate) fn in_child(rung: Rung) -> Self {
        let process = Process::start(Options {
            rung: Some(rung),
            ..Options::default()
        })
        .unwrap();
        Self::of(process, rung, None)
    }

    fn of(process: Arc<Process>, rung: Rung, alone: Option<MutexGuard<'static, ()>>) -> Self {
        let device = FakeDevice::new(DEVICE_PAGES);
        let ops = Arc::clone(&device);
        let id = process.add_device_memory(DEVICE_PAGES, OWNER, ops).unwrap();
        device.is_added_as(id);
        let (state, of_device) = (Arc::clone(&process), Arc::clone(&device));
        let watchdog = Watchdog::start(HANGS, move || {
            let stats = state.stats();
            format!(
                "{:?}, {:?} on devices, {} slots held, faults {} zero {} delayed {} failed {}, \
                 events {}, panics {}, {of_device:?}",
                state.rung(),
                state.pages_on_devices(),
                state.staging_in_use(),
                stats.cpu_faults,
                stats.zero_fills,
                stats.delayed_faults,
                stats.failed_faults,
                stats.events,
                stats.panics,
            )
        });
        Self {
            process,
            device,
            rung,
            _watchdog: watchdog,
            _alone: alone,
        }
    }

    pub(crate) fn is_signals(&self) -> bool {
        self.rung == Rung::Signals
    }

    /// Memory of `len` bytes on pages of a kind, filled, armed.
    pub(crate) fn memory(&self, len: ByteSize, pages: Pages) -> Memory {
        let memory = Memory::new(&self.process, len, pages);
        memory.fill(1);
        memory.arm(&self.process);
        memory
    }

    /// Memory of many blocks; the first page of each says which, and is on the device.
    pub(crate) fn memory_of_one_page_each(&self, blocks: u64) -> Memory {
        let len = ByteSize::mib(2 * blocks);
        let memory = Memory::new(&self.process, len, Pages::Base);
        memory.arm(&self.process);
        for block in 0..blocks {
            let at = memory.at(ByteSize::mib(2 * block));
            memory::store(at, block + 1);
            self.out(Span::page_of(at));
        }
        memory
    }

    /// Both kinds of pages, one after the other.
    pub(crate) fn each_kind(&self, len: ByteSize, test: impl Fn(&Memory)) {
        for pages in [Pages::Huge, Pages::Base] {
            let memory = self.memory(len, pages);
            test(&memory);
            memory.disarm(&self.process);
            memory.end(&self.process);
        }
    }

    /// Moves what of `span` is in RAM to the device.
    pub(crate) fn out(&self, span: Span) -> PageCount {
        let moved = span.blocks().map(|piece| self.try_out(piece).unwrap());
        moved.fold(PageCount::ZERO, |sum, moved| sum + moved)
    }

    pub(crate) fn try_out(&self, piece: Span) -> Result<PageCount, MmError> {
        let mut block = self.process.lock_block(piece)?;
        let collected = block.collect(piece, OWNER, &mut |_, _| false)?;
        let first = self.device.take(piece.page_count());
        assert!(self.device.copy_from(first, collected.sources()));
        let moved = collected.sources().iter().filter(|s| s.is_collected());
        let moved = PageCount::from_usize(moved.count());
        collected.commit(&mut |i| self.device.hold(first, i));
        self.device.let_go_unused(first, piece.page_count());
        Ok(moved)
    }

    /// Where a page lives.
    pub(crate) fn home(&self, at: VirtAddr) -> Home {
        let block = self.process.lock_block(Span::page_of(at)).unwrap();
        block.home(at.page())
    }

    pub(crate) fn is_on_device(&self, at: VirtAddr) -> bool {
        matches!(self.home(at), Home::Device(_))
    }

    /// How many pages of `span` are on the device.
    pub(crate) fn on_device(&self, span: Span) -> usize {
        let on_device = |page: &PageIndex| self.is_on_device(page.start());
        span.pages().filter(on_device).count()
    }

    /// Nothing is left of what the test did.
    pub(crate) fn end(&self) {
        self.process.stop();
        assert_eq!(self.process.pages_on_devices(), PageCount::ZERO);
        assert_eq!(self.process.staging_in_use(), 0, "slots that are held");
        self.device.check_end();
        assert_eq!(self.process.stats().panics, self.device.panics());
    }
}

/// A test that failed leaves no engine behind: the next one may want the rung of signals.
impl Drop for World {
    fn drop(&mut self) {
        self.process.stop();
    }
}

/// What became of the pages of a collection, for assertions.
pub(crate) fn count(sources: &[Source], which: impl Fn(&Source) -> bool) -> usize {
    sources.iter().filter(|source| which(source)).count()
}

/// Something to do while devices are flushed for the first time.
pub(crate) struct Meanwhile(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl Meanwhile {
    pub(crate) fn new(act: impl FnOnce() + Send + 'static) -> Arc<Self> {
        Arc::new(Self(Mutex::new(Some(Box::new(act)))))
    }
}

impl core::fmt::Debug for Meanwhile {
    fn fmt(&self, out: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        out.write_str("Meanwhile")
    }
}

impl Subscriber for Meanwhile {
    fn invalidate(&self, _: &IntervalNotifier, event: &Invalidation) {
        if matches!(event.reason, Reason::Migrate(_))
            && let Some(act) = self.0.lock().unwrap().take()
        {
            act();
        }
    }
}

/// Polls until `done`, for events that another thread handles.
pub(crate) fn soon(what: &str, done: impl Fn() -> bool) {
    for _ in 0..5_000 {
        if done() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("not soon: {what}");
}

/// Runs `work` in a child, which may make system calls and touch memory, but not allocate.
pub(crate) fn forked(work: impl FnOnce() -> i32) -> libc::pid_t {
    // SAFETY: the child does as little as the test allows, and ends.
    match unsafe { libc::fork() } {
        0 => {
            let code = work();
            // SAFETY: ends the child without running what belongs to the parent.
            unsafe { libc::_exit(code) }
        }
        pid => {
            assert!(pid > 0, "fork");
            pid
        }
    }
}

/// Runs `work` in a child that may do what it likes: allocate, start threads, fail an assertion, which says so
/// and ends the child with 1.
pub(crate) fn forked_to_work(work: impl FnOnce()) -> libc::pid_t {
    forked(|| {
        std::panic::set_hook(Box::new(|panic| {
            let what = format!("in a child: {panic}\n");
            // SAFETY: as many bytes as it has.
            unsafe { libc::write(2, what.as_ptr().cast(), what.len()) };
        }));
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        i32::from(worked.is_err())
    })
}

/// What a child ended with.
pub(crate) fn exit_code(pid: libc::pid_t) -> i32 {
    let mut status = 0;
    // SAFETY: our own child, and a status of our own.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert!(
        libc::WIFEXITED(status),
        "killed by {}",
        libc::WTERMSIG(status)
    );
    libc::WEXITSTATUS(status)
}
