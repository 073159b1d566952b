//! Memory accesses that report a fault instead of dying of it, and the fault handler of the process.
//!
//! ```text
//!   load32(addr) --> gpusvm_guarded_load32:  mov eax, [rdi]  --- SIGSEGV --> handler
//!        ^                                   xor edx, edx                      |
//!        |                                   ret                               | 1. hook: Retry?
//!        |                                                                     | 2. RIP in accessor
//!        +-- Err(Refused { addr }) <-- landing: ret <--- RAX, RDX, RIP set ----+    text: divert
//!                                                                              | 3. chain to who
//!                                                                              v    was there before
//! ```
//!
//! A device that works on application memory in place, and an engine that copies it, meet memory
//! that is no longer there: unmapped, protected, or past the end of a file, under their hands. They
//! access it through this crate, and get an error to report.
//!
//! The accessors are functions in one range of text, written in assembler, so that the handler can
//! tell by the instruction pointer alone that a fault is theirs. None of them touches the stack, so
//! wherever they are stopped, a `ret` brings them back to their caller.
//!
//! # Invariants
//!
//! - An accessor's text holds no instruction that may fault for another reason than its operands.
//! - The handler allocates nothing, takes no lock, and keeps `errno`.
//! - There is one handler, of this crate, per process: the last rung of the engine uses it through
//!   [`set_fault_hook`].
//!
//! # Differences from the kernel
//!
//! The kernel has `copy_from_user_nofault` with a table of single instructions
//! (`__ex_table`); here it is one range with one landing place, because a call costs about a
//! nanosecond and a linker section that must survive every linker costs more thought.
//!
//! # Examples
//!
//! ```
//! gpusvm_guarded::install()?;
//! let value = 7u32;
//! if gpusvm_guarded::SUPPORTED {
//!     // Sound: a load has no side effect, and a bad address is reported.
//!     assert_eq!(unsafe { gpusvm_guarded::load32(&value) }, Ok(7));
//!     let refused = unsafe { gpusvm_guarded::load32(std::ptr::null()) };
//!     assert_eq!(refused, Err(gpusvm_guarded::Refused { addr: 0 }));
//! }
//! # Ok::<(), std::io::Error>(())
//! ```

mod access; // what callers use
mod bulk; // copies and clears
#[cfg(target_arch = "x86_64")]
mod x86_64; // the accessors' text, and what a signal frame says
#[cfg(any(test, not(target_arch = "x86_64")))]
#[cfg_attr(
    test,
    expect(
        dead_code,
        unused_imports,
        reason = "built for the tests only on this architecture"
    )
)]
mod fallback; // other architectures: copies by system call
mod engine; // threads that must not be kept waiting
mod interrupt; // accesses that sleep, ended by others
mod handler; // SIGSEGV and SIGBUS

#[cfg(not(target_arch = "x86_64"))]
use fallback as arch;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

pub use access::{
    Refused, compare_exchange8, compare_exchange16, compare_exchange32, compare_exchange64,
    fetch_add32, fetch_add64, load8, load16, load32, load64, store8, store16, store32, store64,
};
pub use bulk::{clear_streaming, copy, copy_streaming};
pub use engine::{EngineThread, RegistryFull, is_engine_thread};
pub use handler::{FaultHook, FaultInfo, HookVerdict, install, is_installed, set_fault_hook};
pub use interrupt::interrupt;

/// Whether a faulting access is reported on this architecture.
///
/// Where it is not, copies are system calls, which report a fault too, and every other accessor
/// refuses: a device must not offer access to RAM in place.
pub const SUPPORTED: bool = cfg!(target_arch = "x86_64");
