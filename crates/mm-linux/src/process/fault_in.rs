//! Pages that are not there yet, brought there for devices that read them in place: `hmm_range_fault`, of
//! memory that nobody mirrors.
//!
//! ```text
//!   missing --> read through /proc/self/mem, which waits for nobody --> there
//!                    | kept back: another userfaultfd has the mapping
//!                    |--> Wait::Never        the address is told
//!                    `--> Wait::ForHandler   a thread touches it and sleeps; the caller looks, now and
//!                                            then, whether that is still of use, and wakes it if not
//! ```
//!
//! A device must not meet such a page: its access would be in flight for as long as the program's handler
//! takes, and whoever flushes the device would wait for both.
//!
//! # Locking
//!
//! None is held, nor may the caller hold one.
//!
//! # Differences from the kernel
//!
//! There a thread that waits for a userfaultfd sleeps on when the mapping goes away under it, unless
//! somebody listens to its events. Here it is `Gone`, whoever unmapped it, and however.

use super::Process;
use crate::Protection;
use crate::sys::futex;
use crate::sys::procmem::ProcMem;
use core::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use core::time::Duration;
use gpusvm_mm::{AddressSpace, Mirror, MmError};
use gpusvm_types::{ByteSize, PageIndex, Span, VirtAddr};
use rustix::io::Errno;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};

/// Whether to wait for who keeps a page back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// For nobody.
    Never,
    /// For the handler of another userfaultfd, as long as it takes.
    ForHandler,
}

/// Why a page is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultInError {
    /// Another userfaultfd keeps it back; or there is none, as behind the end of a file.
    #[error(
        "the page of {at} is kept back, by a userfaultfd of the program, or is not in its file"
    )]
    KeptBack {
        /// Its address.
        at: VirtAddr,
    },
    /// The mapping went away, or may not be read any more, while its page was waited for.
    #[error("{at} was unmapped, or protected, while its page was waited for")]
    Gone {
        /// The address.
        at: VirtAddr,
    },
    /// The address space refused.
    #[error(transparent)]
    Mm(#[from] MmError),
}

/// How often who waits looks whether that is still of use.
const LOOK_EVERY: Duration = Duration::from_millis(5);

impl Process {
    /// Which pages of `span` no touch of a device may meet: the mapping can be read, nobody mirrors it, and
    /// there is no page yet, or none that is sure to be there. What is mirrored is served by this engine, which keeps no device waiting.
    ///
    /// # Errors
    ///
    /// As [`Process::page_looks`].
    pub fn missing_in_place(&self, span: Span) -> Result<Vec<PageIndex>, MmError> {
        let looks = self.page_looks(span)?;
        let is_missing = |page: &PageIndex| {
            let look = looks[span.index_of(*page)];
            let can_be_read = !matches!(look.protection, None | Some(Protection::None));
            can_be_read && (look.ram.is_none() || look.swapped) && self.is_in_gap(page.start())
        };
        Ok(span.pages().filter(is_missing).collect())
    }

    /// Makes the missing pages of `span` be there, as a read of the CPU would.
    ///
    /// # Errors
    ///
    /// `KeptBack` for the first that cannot be had, without waiting or at all; `Gone`; `Mm`.
    pub fn fault_in(&self, span: Span, wait: Wait) -> Result<(), FaultInError> {
        let missing = self.missing_in_place(span)?;
        if missing.is_empty() {
            return Ok(());
        }
        let memory = ProcMem::open().map_err(refused("opening the memory of the process", span))?;
        let is_kept = |page: &PageIndex| {
            let at = page.start();
            // Or somebody mirrors it by now.
            !is_there(&memory, at) && self.is_in_gap(at)
        };
        let mut kept = missing.into_iter().filter(is_kept);
        match wait {
            Wait::Never => match kept.next() {
                Some(page) => Err(FaultInError::KeptBack { at: page.start() }),
                None => Ok(()),
            },
            Wait::ForHandler => {
                let kept: Vec<_> = kept.collect();
                match kept.is_empty() {
                    true => Ok(()),
                    false => self.wait_for(span, &kept, &memory),
                }
            }
        }
    }

    fn is_in_gap(&self, at: VirtAddr) -> bool {
        matches!(self.mirrored(at), Mirror::Gap(_))
    }

    /// Has a thread of its own touch the pages, one after the other: the program's handler hears of each.
    fn wait_for(
        &self,
        span: Span,
        pages: &[PageIndex],
        memory: &ProcMem,
    ) -> Result<(), FaultInError> {
        let sleeper = Sleeper::default();
        let (done, result) = mpsc::channel();
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("gpusvm-touch".to_owned());
            let touch = || {
                // The caller listens until it comes.
                let _ = done.send(self.touch(span, pages, memory, &sleeper));
            };
            let started = thread.spawn_scoped(scope, touch);
            let started =
                started.map_err(|_| refused("starting a thread for pages", span)(Errno::AGAIN))?;
            let result = self.watch_over(&sleeper, memory, &result);
            // Its stack is given back when it is joined. A panic, it has reported.
            let _ = started.join();
            result
        })
    }

    /// The thread that sleeps.
    fn touch(
        &self,
        span: Span,
        pages: &[PageIndex],
        memory: &ProcMem,
        sleeper: &Sleeper,
    ) -> Result<(), FaultInError> {
        // On record, it can be interrupted.
        let _on_record = gpusvm_guarded::EngineThread::enter();
        let _on_record =
            _on_record.map_err(|_| refused("keeping a thread on record", span)(Errno::AGAIN))?;
        sleeper.tid.store(futex::gettid(), Ordering::Release);
        for page in pages {
            let at = page.start();
            sleeper.at.store(at.get(), Ordering::Release);
            loop {
                // SAFETY: a load that may be refused, of a byte that nobody looks at.
                let touched = unsafe { gpusvm_guarded::load8(pointer(at)) };
                if touched.is_ok() || is_there(memory, at) {
                    break;
                }
                if !self.can_be_read(at) {
                    return Err(FaultInError::Gone { at });
                }
                // Refused by the kernel: there is no page to wait for.
                if !sleeper.is_woken.swap(false, Ordering::AcqRel) {
                    return Err(FaultInError::KeptBack { at });
                }
            }
        }
        Ok(())
    }

    /// Wakes the thread that sleeps when that is of no use any more, until it is done.
    fn watch_over(
        &self,
        sleeper: &Sleeper,
        memory: &ProcMem,
        result: &Receiver<Result<(), FaultInError>>,
    ) -> Result<(), FaultInError> {
        loop {
            match result.recv_timeout(LOOK_EVERY) {
                Ok(result) => return result,
                Err(RecvTimeoutError::Timeout) => {}
                // It panicked, which it reported.
                Err(RecvTimeoutError::Disconnected) => return Err(MmError::Gone.into()),
            }
            let at = VirtAddr::new(sleeper.at.load(Ordering::Acquire));
            let tid = sleeper.tid.load(Ordering::Acquire);
            if tid != 0 && (!self.can_be_read(at) || is_there(memory, at)) {
                sleeper.is_woken.store(true, Ordering::Release);
                gpusvm_guarded::interrupt(tid, pointer(at).addr());
            }
        }
    }

    fn can_be_read(&self, at: VirtAddr) -> bool {
        let vma = self.find_vma(at).ok().flatten();
        vma.is_some_and(|vma| vma.span.contains(at) && vma.readable)
    }
}

/// A thread that touches pages, and where it is.
#[derive(Debug, Default)]
struct Sleeper {
    tid: AtomicI32,
    at: AtomicU64,
    /// Somebody ended its touch: it looks again.
    is_woken: AtomicBool,
}

/// Whether the page can be read without waiting; then it is there.
fn is_there(memory: &ProcMem, at: VirtAddr) -> bool {
    memory.read(at, &mut [0]) == Ok(1)
}

fn pointer(at: VirtAddr) -> *const u8 {
    core::ptr::with_exposed_provenance(ByteSize::new(at.get()).as_usize())
}

fn refused(call: &'static str, span: Span) -> impl FnOnce(Errno) -> MmError {
    move |errno| MmError::System {
        call,
        span,
        errno: errno.raw_os_error(),
    }
}
