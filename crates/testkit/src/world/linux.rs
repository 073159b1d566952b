//! This very process as a world.
//!
//! # Locking
//!
//! Worlds of this kind exist one after the other: they fork, and on the last rung there is one
//! engine in a process.

use super::{Bus, Cpu, Feature, Kind, NoAnswer, Prot, Signal, Thread, World};
use crate::{Watchdog, require, unavailable};
use core::time::Duration;
use gpusvm_guarded as guarded;
use gpusvm_mm::{AddressSpace, Invalidation, Mirror, Reason};
use gpusvm_mm_linux::{Options, Process, Rung};
use gpusvm_sync::{Arc, Condvar, Mutex};
use gpusvm_types::{BLOCK_SIZE, ByteSize, DmaAddr, PageCount, Span, VirtAddr};

mod memory; // system calls on memory

/// Longer than any case takes on a slow machine.
const HANGS: Duration = Duration::from_secs(60);

/// How often a check looks whether handlers are done.
const LOOKS: u32 = 500;

/// This process, with an engine in it.
#[derive(Debug)]
pub struct Linux {
    process: Arc<Process>,
    mapped: Mutex<Vec<Mapped>>,
    _watchdog: Watchdog,
    _alone: Alone,
}

/// What the program has mapped.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    span: Span,
    /// Of the engine's allocator.
    of_engine: bool,
    file: Option<libc::c_int>,
}

impl World for Linux {
    type Mm = Process;
    const NAME: &'static str = "linux";

    fn start(_seed: u64) -> Option<Arc<Self>> {
        if !require::require_uffd() {
            return None;
        }
        let alone = Alone::wait();
        if let Err(error) = guarded::install() {
            unavailable(&format!("no fault handler: {error}"));
            return None;
        }
        let process = match Process::start(Options::default()) {
            Ok(process) => process,
            Err(error) => {
                unavailable(&error.to_string());
                return None;
            }
        };
        let of = Arc::clone(&process);
        let watchdog = Watchdog::start(HANGS, move || {
            let (rung, on_devices, stats) = (of.rung(), of.pages_on_devices(), of.stats());
            format!("{rung:?}, {on_devices:?} on devices, {stats:?}")
        });
        Some(Arc::new(Self {
            process,
            mapped: Mutex::new(Vec::new()),
            _watchdog: watchdog,
            _alone: alone,
        }))
    }

    fn rounds() -> u64 {
        12
    }

    fn rounds_of_plain_cases() -> u64 {
        1
    }

    fn mm(&self) -> &Arc<Process> {
        &self.process
    }

    fn bus(&self) -> Arc<dyn Bus> {
        Arc::new(ProcessBus)
    }

    fn supports(&self, feature: Feature) -> Result<(), &'static str> {
        let hears = self.process.rung() != Rung::Signals;
        match feature {
            Feature::ExitUnderWay => Err("a process cannot outlive its own exit"),
            Feature::Remap | Feature::DontUnmap | Feature::Unmap | Feature::DropContents
                if !hears =>
            {
                Err("the last rung hears of no unmapping")
            }
            _ => Ok(()),
        }
    }

    fn map(&self, pages: PageCount, prot: Prot, kind: Kind) -> Span {
        let len = pages.bytes();
        let of_engine = matches!(kind, Kind::Mirrored | Kind::Huge) && !self.can_adopt();
        if of_engine {
            let span = self.process.allocate(len).expect("memory");
            self.remember(span, true, None);
            self.protect_fresh(span, prot);
            return span;
        }
        let span = memory::reserve(len);
        self.map_again(span, prot, kind);
        span
    }

    fn map_again(&self, span: Span, prot: Prot, kind: Kind) {
        let file = memory::map_at(span, kind);
        self.remember(span, false, file);
        if matches!(kind, Kind::Mirrored | Kind::Huge) {
            let adopted = self.process.adopt(span.start(), span.len());
            assert_eq!(adopted, Ok(span), "its memory can be adopted");
        }
        self.protect_fresh(span, prot);
    }

    fn unmap(&self, span: Span) {
        self.forget(span);
        memory::unmap(span);
    }

    fn protect(&self, span: Span, prot: Prot) {
        memory::protect(span, prot);
        // No event tells of it. What a program, or a library between it and the kernel, says then:
        let reason = Reason::Protect;
        self.process
            .notifiers()
            .invalidate(&Invalidation { span, reason });
    }

    fn drop_contents(&self, span: Span) {
        memory::advise(span, libc::MADV_DONTNEED);
    }

    fn remap(&self, span: Span, dontunmap: bool) -> Span {
        let to = memory::reserve(span.len());
        if !dontunmap {
            self.forget(span);
        }
        self.remember(to, false, None);
        memory::remap(span, to, dontunmap);
        self.settle();
        // What was not watched moved unheard: whoever wants the new place mirrored says so.
        if let Mirror::Gap(_) = self.process.mirrored(to.start()) {
            let adopted = self.process.adopt(to.start(), to.len());
            assert_eq!(adopted, Ok(to), "moved memory can be adopted");
        }
        to
    }

    fn fork(&self, child: &mut dyn FnMut(&dyn Cpu) -> bool) -> bool {
        // SAFETY: the child touches memory, and ends without running what belongs to the parent.
        match unsafe { libc::fork() } {
            0 => {
                let code = i32::from(!child(self));
                // SAFETY: as said.
                unsafe { libc::_exit(code) }
            }
            pid => {
                assert!(pid > 0, "fork");
                memory::exit_code(pid) == Some(0)
            }
        }
    }

    fn exit(&self) {
        self.process.stop();
    }

    fn behind(&self, at: VirtAddr) -> Option<u64> {
        let mapped = self.mapped.lock();
        let mapped = mapped.iter().find(|mapped| mapped.span.contains(at))?;
        memory::read_file(mapped.file?, at.offset_from(mapped.span.start()))
    }

    fn settle(&self) {
        self.process.settle_events();
    }

    fn run(&self, threads: Vec<Thread>) {
        #[expect(clippy::disallowed_methods, reason = "threads of the program")]
        let spawn = |thread: Thread| std::thread::spawn(thread);
        let running: Vec<_> = threads.into_iter().map(spawn).collect();
        let ended: Vec<_> = running.into_iter().map(|thread| thread.join()).collect();
        for end in ended {
            if let Err(panic) = end {
                std::panic::resume_unwind(panic);
            }
        }
    }

    fn pause(&self) {
        std::thread::sleep(Duration::from_millis(2));
    }

    fn check(&self) -> Result<(), String> {
        // A handler may wake who waited a moment before it is done itself.
        for _ in 0..LOOKS {
            if self.process.staging_in_use() == 0 {
                return Ok(());
            }
            self.pause();
        }
        let held = self.process.staging_in_use();
        Err(format!("{held} staging slots are held, and nothing moves"))
    }

    fn story(&self) -> String {
        format!("{:?}, {:?}", self.process.rung(), self.process.stats())
    }
}

impl Linux {
    fn can_adopt(&self) -> bool {
        self.process.rung() != Rung::Signals
    }

    fn remember(&self, span: Span, of_engine: bool, file: Option<libc::c_int>) {
        self.mapped.lock().push(Mapped {
            span,
            of_engine,
            file,
        });
    }

    /// Part of something may go: what is left is two mappings.
    fn forget(&self, gone: Span) {
        let mut mapped = self.mapped.lock();
        let before = core::mem::take(&mut *mapped);
        for old in before {
            if !old.span.overlaps(gone) {
                mapped.push(old);
                continue;
            }
            let left = old.span.without(gone).into_iter().flatten();
            mapped.extend(left.map(|span| Mapped { span, ..old }));
        }
    }

    fn protect_fresh(&self, span: Span, prot: Prot) {
        if prot != Prot::ReadWrite {
            self.protect(span, prot);
        }
    }
}

impl Drop for Linux {
    fn drop(&mut self) {
        self.process.stop();
        for mapped in self.mapped.lock().drain(..) {
            if !mapped.of_engine {
                memory::unmap(mapped.span);
            }
            if let Some(file) = mapped.file {
                memory::close(file);
            }
        }
    }
}

impl Cpu for Linux {
    fn read(&self, at: VirtAddr) -> Result<u64, Signal> {
        // SAFETY: aligned; what is not there is a refusal.
        unsafe { guarded::load64(memory::pointer(at).cast()) }.map_err(|_| Signal { at })
    }

    fn write(&self, at: VirtAddr, value: u64) -> Result<(), Signal> {
        // SAFETY: aligned; tests write to memory that they mapped.
        unsafe { guarded::store64(memory::pointer(at).cast(), value) }.map_err(|_| Signal { at })
    }

    fn fetch_add(&self, at: VirtAddr, by: u64) -> Result<u64, Signal> {
        // SAFETY: as for `write`.
        unsafe { guarded::fetch_add64(memory::pointer(at).cast(), by) }.map_err(|_| Signal { at })
    }
}

/// A bus address is an address of the process.
#[derive(Debug)]
struct ProcessBus;

impl Bus for ProcessBus {
    fn read(&self, at: DmaAddr, into: &mut [u8]) -> Result<(), NoAnswer> {
        let from = memory::pointer(VirtAddr::new(at.get())).cast_const();
        // SAFETY: `into` is this call's; what is not at `from` is a refusal.
        unsafe { guarded::copy(into.as_mut_ptr(), from, into.len()) }.map_err(|_| NoAnswer)
    }

    fn write(&self, at: DmaAddr, from: &[u8]) -> Result<(), NoAnswer> {
        let to = memory::pointer(VirtAddr::new(at.get()));
        // SAFETY: the engine told the device to write there, or a page table led there.
        unsafe { guarded::copy(to, from.as_ptr(), from.len()) }.map_err(|_| NoAnswer)
    }

    fn fetch_add(&self, at: DmaAddr, by: u64) -> Result<u64, NoAnswer> {
        let to = memory::pointer(VirtAddr::new(at.get())).cast();
        // SAFETY: as for `write`; words are aligned.
        unsafe { guarded::fetch_add64(to, by) }.map_err(|_| NoAnswer)
    }

    fn as_device(&self, work: &mut dyn FnMut()) {
        let _device = guarded::EngineThread::enter().expect("room for another device thread");
        work();
    }
}

/// No other world of this kind exists as long as this does.
#[derive(Debug)]
struct Alone;

static TAKEN: Mutex<bool> = Mutex::new(false);
static FREE: Condvar = Condvar::new();

impl Alone {
    fn wait() -> Self {
        let mut taken = TAKEN.lock();
        while *taken {
            taken = FREE.wait(taken);
        }
        *taken = true;
        Self
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        *TAKEN.lock() = false;
        FREE.notify_one();
    }
}

/// Kept apart from others: what lies between stays unmapped.
const APART: ByteSize = BLOCK_SIZE;
