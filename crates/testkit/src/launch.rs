//! Commands with privileges taken away.
//!
//! ```text
//!   as_nobody            root ---setgroups, setgid, setuid---> 65534, without capabilities
//!   without_userfaultfd  seccomp: userfaultfd(2) and USERFAULTFD_IOC_NEW are EPERM
//! ```
//!
//! A seccomp filter sees numbers and registers, not paths: `/dev/userfaultfd` still opens, but makes
//! no descriptor, which is what a container that hides userfaultfd comes to.

use core::mem::offset_of;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The user and group that own nothing.
pub const NOBODY: u32 = 65534;

/// `USERFAULTFD_IOC_NEW`: `_IO(0xAA, 0x00)`.
const USERFAULTFD_IOC_NEW: u32 = 0xAA00;

/// Whether this process may give itself another user, as [`as_nobody`] does.
pub fn can_become_nobody() -> bool {
    // SAFETY: it has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// Runs the command as the user who owns nothing, without capabilities. Takes root; see
/// [`can_become_nobody`].
pub fn as_nobody(command: &mut Command) -> &mut Command {
    // SAFETY: system calls only, which is what may be done between fork and exec.
    unsafe { command.pre_exec(become_nobody) }
}

/// Runs the command where every way to a userfaultfd answers `EPERM`.
pub fn without_userfaultfd(command: &mut Command) -> &mut Command {
    // SAFETY: system calls only, which is what may be done between fork and exec.
    unsafe { command.pre_exec(deny_userfaultfd) }
}

fn become_nobody() -> io::Result<()> {
    // SAFETY: no groups are passed.
    checked(unsafe { libc::setgroups(0, core::ptr::null()) })?;
    // SAFETY: it has no preconditions.
    checked(unsafe { libc::setresgid(NOBODY, NOBODY, NOBODY) })?;
    // Away from root, the capabilities go with the user.
    // SAFETY: it has no preconditions.
    checked(unsafe { libc::setresuid(NOBODY, NOBODY, NOBODY) })
}

fn deny_userfaultfd() -> io::Result<()> {
    let mut filter = filter();
    let program = libc::sock_fprog {
        len: filter.len().try_into().unwrap_or(u16::MAX),
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: it takes integers.
    checked(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    let mode = libc::SECCOMP_MODE_FILTER;
    // SAFETY: the program is valid for the call.
    checked(unsafe { libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program) })
}

/// ```text
///   0  nr == userfaultfd ? -> 6
///   2  nr == ioctl ?          else 5
///   4  second argument == USERFAULTFD_IOC_NEW ? -> 6
///   5  allow
///   6  EPERM
/// ```
fn filter() -> [libc::sock_filter; 7] {
    let load = |offset: usize| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset as u64);
    let answer = |what: u32| statement(libc::BPF_RET | libc::BPF_K, u64::from(what));
    // The low half of the second argument: the architectures that there are store it first.
    let second_argument = offset_of!(libc::seccomp_data, args) + 8;
    [
        load(offset_of!(libc::seccomp_data, nr)),
        jump_if_equal(libc::SYS_userfaultfd.cast_unsigned(), 4, 0),
        jump_if_equal(libc::SYS_ioctl.cast_unsigned(), 0, 2),
        load(second_argument),
        jump_if_equal(u64::from(USERFAULTFD_IOC_NEW), 1, 0),
        answer(libc::SECCOMP_RET_ALLOW),
        answer(libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned()),
    ]
}

fn jump_if_equal(to: u64, then: u8, or_else: u8) -> libc::sock_filter {
    libc::sock_filter {
        jt: then,
        jf: or_else,
        ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, to)
    }
}

fn statement(code: u32, k: u64) -> libc::sock_filter {
    let code = u16::try_from(code).expect("an operation");
    let k = u32::try_from(k).expect("a 32-bit operand");
    libc::sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

fn checked(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
