//! An access that sleeps in the kernel, for a page that is elsewhere, ended by somebody else.
//!
//! ```text
//!   thread: load(addr) --- missing page, sleeps       another: whoever brings the page waits for
//!                              |                               that very thread
//!      Err(Refused { addr }) <-+---- signal, with the address ---- interrupt(tid, addr)
//! ```
//!
//! A compute unit of a device in software can meet a page in place that has gone to a device: its
//! translation is out of date. Whoever brings the page home waits for the unit's access to end. So the
//! access ends, refused, and the unit asks for a translation that is right.

use crate::engine;
use core::ffi::{c_int, c_void};
use core::sync::atomic::Ordering;
use libc::{pid_t, siginfo_t, uid_t};

/// What tells our signal from others that are queued.
const OURS: c_int = 0x6770_7573;

/// A `siginfo_t` of `sigqueue`, as the kernel has it.
#[repr(C)]
struct Queued {
    signal: c_int,
    errno: c_int,
    code: c_int,
    _padding: c_int,
    pid: pid_t,
    uid: uid_t,
    value: *mut c_void,
    _rest: [u64; 12],
}

const _: () = assert!(size_of::<Queued>() == size_of::<siginfo_t>());

/// Lets the access of an engine thread of this process to the page of `addr` end, refused, if that is what
/// it does now, in an accessor. Nothing happens otherwise. Whether a signal is on its way: one at a time,
/// because each is handled inside the one before if that is not done, on a stack that is not endless.
///
/// For threads whose accesses may be refused without need: whoever made the access looks again.
pub fn interrupt(tid: i32, addr: usize) -> bool {
    let Some(interrupted) = engine::interrupted(tid) else {
        return false;
    };
    // Else the signal would end the process.
    if !crate::is_installed() {
        return false;
    }
    if interrupted.swap(true, Ordering::AcqRel) {
        return true;
    }
    // SAFETY: it has no preconditions.
    let pid = unsafe { libc::getpid() };
    // SAFETY: it has no preconditions.
    let uid = unsafe { libc::getuid() };
    let queued = Queued {
        signal: libc::SIGSEGV,
        errno: OURS,
        code: libc::SI_QUEUE,
        _padding: 0,
        pid,
        uid,
        value: core::ptr::without_provenance_mut(addr),
        _rest: [0; 12],
    };
    let call = libc::SYS_rt_tgsigqueueinfo;
    // SAFETY: a thread of our own, if it is still there, and information that is valid for the call.
    let sent = unsafe { libc::syscall(call, pid, tid, libc::SIGSEGV, &raw const queued) } == 0;
    if !sent {
        interrupted.store(false, Ordering::Release);
    }
    sent
}

/// The handler has dealt with an interruption: there may be another.
pub(crate) fn done() {
    if let Some(interrupted) = engine::interrupted(engine::current_tid()) {
        interrupted.store(false, Ordering::Release);
    }
}

/// The address, if the signal is one of [`interrupt`].
///
/// # Safety
///
/// Valid information of a signal.
pub(crate) unsafe fn addr_of(info: *const siginfo_t) -> Option<usize> {
    // SAFETY: as long as a `siginfo_t`; every field is a number, whatever the signal.
    let queued = unsafe { &*info.cast::<Queued>() };
    let is_ours = queued.code == libc::SI_QUEUE
        && queued.errno == OURS
        // SAFETY: it has no preconditions.
        && queued.pid == unsafe { libc::getpid() };
    is_ours.then(|| queued.value.addr())
}

/// A stack for the signal handlers of a thread that can be interrupted: inside one handler, and once more
/// inside that, with all the registers that a processor has.
#[derive(Debug)]
pub(crate) struct Stack {
    // INVARIANT: the thread's alternate stack, until it is given back.
    _memory: Box<[u8]>,
    before: libc::stack_t,
}

const STACK: usize = 128 << 10;

impl Stack {
    /// Takes the place of the calling thread's alternate stack.
    pub(crate) fn enter() -> Self {
        let mut memory = vec![0; STACK].into_boxed_slice();
        let stack = libc::stack_t {
            ss_sp: memory.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: STACK,
        };
        let mut before = libc::stack_t {
            ss_sp: core::ptr::null_mut(),
            ss_flags: libc::SS_DISABLE,
            ss_size: 0,
        };
        // SAFETY: the memory is as long as it says, and lives until the stack before is back.
        unsafe { libc::sigaltstack(&raw const stack, &raw mut before) };
        Self {
            _memory: memory,
            before,
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: what the thread had; no handler runs on ours, because this is not one.
        unsafe { libc::sigaltstack(&raw const self.before, core::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::TURN;
    use std::sync::{PoisonError, mpsc};

    /// A late one meets a thread that does something else: nothing happens, however many there are. They
    /// were once handled one inside the other, until the stack was full.
    #[test]
    fn who_does_something_else_is_not_disturbed() {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        crate::install().unwrap();
        let (told, tid) = mpsc::channel();
        let (stop, stopped) = mpsc::channel::<()>();
        let look = move || {
            let _engine = crate::EngineThread::enter().unwrap();
            // SAFETY: it has no preconditions.
            told.send(unsafe { libc::gettid() }).unwrap();
            let (value, mut found) = (7u64, 7);
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                // SAFETY: a local.
                found = unsafe { crate::load64(&raw const value) }.unwrap();
            }
            found
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(look);
            let tid = tid.recv().unwrap();
            for _ in 0..10_000 {
                assert!(interrupt(tid, 1 << 46));
            }
            drop(stop);
            assert_eq!(thread.join().unwrap(), 7);
        });
    }
}
