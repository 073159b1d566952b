//! The SIGSEGV and SIGBUS handler of the process.
//!
//! ```text
//!   raised by the kernel? --no--> ours, of `interrupt`? divert -----+
//!     | yes                                                         |
//!   hook says Retry? --yes--> return: the access runs again         |
//!     | no                                                          v
//!   in an accessor? --yes--> divert: it returns Refused          chain: the handler that was
//!     | no                                                       there before, or death
//!     +----------------------------------------------------------->
//! ```
//!
//! # How it is installed
//!
//! - `SA_SIGINFO`: the address and the registers are needed.
//! - `SA_ONSTACK`: the handler of `std` that tells of stack overflows runs behind ours, and on an
//!   overflowed stack no handler could.
//! - `SA_NODEFER` and an empty mask: a hook may sleep in a futex for long, and may itself use
//!   accessors, or touch memory that is on the move. A fault under a blocked SIGSEGV would be
//!   death. Nested frames lie on the same alternate stack, so a hook must be frugal with it.
//!
//! - `SA_RESTART`: an interruption can come late, in a system call that has nothing to do with it.
//!
//! # Chaining
//!
//! A handler behind ours is called as the kernel would have: with the arguments its flags ask for,
//! and with its mask, and its own signal unless `SA_NODEFER`, blocked. The default action cannot be
//! called: it is restored, and the access, run again, dies of it, with the right core dump. An
//! ignored SIGSEGV of the kernel's making is fatal too; the kernel decides the same.

use crate::arch::Frame;
use crate::interrupt;
use core::ffi::{c_int, c_void};
use core::mem::MaybeUninit;
use core::ptr;
use core::sync::atomic::{AtomicI32, AtomicPtr, Ordering};
use libc::{siginfo_t, sigset_t};
use std::io;

/// What a fault is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultInfo {
    /// The address that was touched; zero when the processor does not tell (not canonical).
    pub addr: usize,
    /// Whether it was a write, as far as is known.
    pub write: bool,
    /// The instruction that touched it.
    pub instruction: usize,
    /// Whether that is an accessor of this crate.
    pub in_accessor: bool,
}

/// What a hook thinks of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HookVerdict {
    /// Not a fault of memory that the hook looks after.
    NotMine,
    /// The access can succeed now: run it again.
    Retry,
}

/// Is asked about every fault first, on the thread that faulted, in the signal handler.
pub type FaultHook = fn(&FaultInfo) -> HookVerdict;

const SIGNALS: [c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// A [`FaultHook`], or null.
static HOOK: AtomicPtr<()> = AtomicPtr::new(ptr::null_mut());
/// What to chain to, for each of `SIGNALS`. Null is the default action. Never freed: a handler may
/// be looking at it.
static PREVIOUS: [AtomicPtr<libc::sigaction>; 2] = [const { AtomicPtr::new(ptr::null_mut()) }; 2];

/// Installs the handler for SIGSEGV and SIGBUS, and remembers those it finds.
///
/// Once per process: later calls do nothing, even when somebody has put another handler in front,
/// because that one probably calls ours, and the two would call each other for ever.
///
/// # Errors
///
/// Those of `sigaction`.
pub fn install() -> io::Result<()> {
    /// Nothing, `DONE`, or the id of the process of which a thread is at it. A child of fork inherits the
    /// number and not the thread: it does again what may be half done.
    static STATE: AtomicI32 = AtomicI32::new(NOT_YET);
    const NOT_YET: c_int = 0;
    const DONE: c_int = -1;
    // SAFETY: it has no preconditions.
    let us = unsafe { libc::getpid() };
    loop {
        let state = STATE.load(Ordering::Acquire);
        if state == DONE {
            return Ok(());
        }
        if state == us {
            std::thread::yield_now();
            continue;
        }
        let claim = STATE.compare_exchange(state, us, Ordering::AcqRel, Ordering::Relaxed);
        if claim.is_ok() {
            let result = install_both();
            let state = if result.is_ok() { DONE } else { NOT_YET };
            STATE.store(state, Ordering::Release);
            return result;
        }
    }
}

fn install_both() -> io::Result<()> {
    for (signal, previous) in SIGNALS.into_iter().zip(&PREVIOUS) {
        // The old action is known before ours can run, and once more when it is replaced.
        remember(previous, current_action(signal)?);
        remember(previous, replace_action(signal, &our_action())?);
    }
    Ok(())
}

/// Whether both signals lead to our handler first.
///
/// Others may install handlers later. Accesses are still guarded when those chain to ours.
pub fn is_installed() -> bool {
    SIGNALS
        .into_iter()
        .all(|signal| current_action(signal).is_ok_and(|action| action.sa_sigaction == our_entry()))
}

/// Sets who is asked first about every fault of the process. There is one: the last call counts.
///
/// The hook runs in a signal handler, on any thread, between any two instructions. It may sleep in
/// a futex, and use this crate's accessors; it must not allocate, and must take no lock that a
/// thread may hold which can fault. `errno` is kept for it. It has the alternate stack of the
/// thread, of which about 4 KiB are left.
pub fn set_fault_hook(hook: FaultHook) {
    HOOK.store(hook as *mut (), Ordering::Release);
}

/// The handler itself.
unsafe extern "C" fn on_fault(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel, or who chains to us, passes a valid `siginfo_t`.
    let code = unsafe { (*info).si_code };
    // Codes of zero and below are of kill, tgkill and sigqueue.
    let by_kernel = code > 0;
    // SAFETY: as above.
    if let Some(addr) = unsafe { interrupt::addr_of(info) } {
        // SAFETY: the handler has not returned yet.
        let mut frame = unsafe { Frame::new(context) };
        if frame.is_about_to_touch(addr) {
            frame.refuse(addr);
        }
        interrupt::done();
        return;
    }
    let errno = errno();
    // SAFETY: the arguments are the handler's own, unchanged.
    if !by_kernel || !unsafe { settle(info, context) } {
        // SAFETY: as above.
        unsafe { chain(signal, info, context, by_kernel) };
    }
    set_errno(errno);
}

/// Lets the hook, or the accessor that faulted, deal with a fault. Whether one did.
///
/// # Safety
///
/// The arguments are those of the handler, for a signal that the kernel raised.
unsafe fn settle(info: *mut siginfo_t, context: *mut c_void) -> bool {
    // SAFETY: the kernel, or who chains to us, passes a valid `siginfo_t`.
    let info = unsafe { &*info };
    // SAFETY: a fault of the kernel's making has an address, maybe zero.
    let addr = unsafe { info.si_addr() }.addr();
    // SAFETY: the handler has not returned yet.
    let mut frame = unsafe { Frame::new(context) };
    let fault = FaultInfo {
        addr,
        write: frame.is_write(),
        instruction: frame.instruction(),
        in_accessor: frame.in_accessor(),
    };
    let hook = HOOK.load(Ordering::Acquire);
    if !hook.is_null() {
        // SAFETY: only `set_fault_hook` stores there, and it stores a `FaultHook`.
        let hook = unsafe { core::mem::transmute::<*mut (), FaultHook>(hook) };
        if hook(&fault) == HookVerdict::Retry {
            return true;
        }
    }
    if fault.in_accessor {
        frame.refuse(addr);
    }
    fault.in_accessor
}

/// Does what would have been done without us.
///
/// # Safety
///
/// The arguments are those of the handler.
unsafe fn chain(signal: c_int, info: *mut siginfo_t, context: *mut c_void, by_kernel: bool) {
    let previous = &PREVIOUS[usize::from(signal == libc::SIGBUS)];
    // SAFETY: null, or an action that is never freed.
    let action = unsafe { previous.load(Ordering::Acquire).as_ref() };
    let Some(action) = action.filter(|action| action.sa_sigaction != libc::SIG_DFL) else {
        return die(signal, by_kernel);
    };
    if action.sa_sigaction == libc::SIG_IGN {
        return if by_kernel {
            die(signal, by_kernel)
        };
    }
    if action.sa_flags & libc::SA_RESETHAND != 0 {
        previous.store(ptr::null_mut(), Ordering::Release);
    }
    let mut mask = action.sa_mask;
    if action.sa_flags & libc::SA_NODEFER == 0 {
        // SAFETY: a valid set and a valid signal.
        unsafe { libc::sigaddset(&raw mut mask, signal) };
    }
    let mut before = MaybeUninit::<sigset_t>::uninit();
    // SAFETY: both sets are valid for the call, which fills the second.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const mask, before.as_mut_ptr()) };
    if action.sa_flags & libc::SA_SIGINFO != 0 {
        type Entry = unsafe extern "C" fn(c_int, *mut siginfo_t, *mut c_void);
        // SAFETY: with `SA_SIGINFO`, it is a function of three arguments.
        let handler = unsafe { core::mem::transmute::<usize, Entry>(action.sa_sigaction) };
        // SAFETY: the arguments are those that the kernel made for such a handler.
        unsafe { handler(signal, info, context) };
    } else {
        type Entry = unsafe extern "C" fn(c_int);
        // SAFETY: without `SA_SIGINFO`, it is a function of one argument.
        let handler = unsafe { core::mem::transmute::<usize, Entry>(action.sa_sigaction) };
        // SAFETY: as the kernel would call it.
        unsafe { handler(signal) };
    }
    // SAFETY: the call above filled the set; a handler that jumps out never comes here.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
}

/// The default action: restored, so that the access, run again, meets it. A signal that was sent
/// is sent once more.
fn die(signal: c_int, by_kernel: bool) {
    let mut action = empty_action();
    action.sa_sigaction = libc::SIG_DFL;
    let _ = replace_action(signal, &action);
    if !by_kernel {
        // SAFETY: it has no preconditions, and the signal is not blocked here.
        unsafe { libc::raise(signal) };
    }
}

fn errno() -> c_int {
    // SAFETY: it has no preconditions.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the thread's own.
    unsafe { *errno }
}

fn set_errno(value: c_int) {
    // SAFETY: it has no preconditions.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: the thread's own.
    unsafe { *errno = value };
}

fn our_entry() -> usize {
    on_fault as *const () as usize
}

fn our_action() -> libc::sigaction {
    let mut action = empty_action();
    action.sa_sigaction = our_entry();
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER | libc::SA_RESTART;
    action
}

fn empty_action() -> libc::sigaction {
    // SAFETY: all zeroes are the default action with an empty mask.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn remember(previous: &AtomicPtr<libc::sigaction>, action: libc::sigaction) {
    if action.sa_sigaction != our_entry() {
        previous.store(Box::into_raw(Box::new(action)), Ordering::Release);
    }
}

fn current_action(signal: c_int) -> io::Result<libc::sigaction> {
    let mut action = empty_action();
    // SAFETY: null leaves the action as it is; the other is valid for the call.
    let result = unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
    if result == 0 {
        Ok(action)
    } else {
        Err(io::Error::last_os_error())
    }
}

fn replace_action(signal: c_int, new: &libc::sigaction) -> io::Result<libc::sigaction> {
    let mut old = empty_action();
    // SAFETY: both are valid for the call, and the new handler is one that may run at any time.
    let result = unsafe { libc::sigaction(signal, new, &raw mut old) };
    if result == 0 {
        Ok(old)
    } else {
        Err(io::Error::last_os_error())
    }
}
