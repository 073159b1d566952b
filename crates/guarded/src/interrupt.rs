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

use core::ffi::{c_int, c_void};
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

/// Lets the access of a thread of this process to the page of `addr` end, refused, if that is what it
/// does now, in an accessor. Nothing happens otherwise. Whether the signal was sent.
///
/// For threads whose accesses may be refused without need: whoever made the access looks again.
pub fn interrupt(tid: i32, addr: usize) -> bool {
    // SAFETY: they have no preconditions.
    let (pid, uid) = unsafe { (libc::getpid(), libc::getuid()) };
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
    // SAFETY: a thread of our own, if it is still there, and information that is valid for the call. The
    // handler is installed: else the signal would end the process.
    let sent = crate::is_installed()
        && unsafe { libc::syscall(call, pid, tid, libc::SIGSEGV, &raw const queued) } == 0;
    sent
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
