//! What happens to faults that are nobody's: as if this crate were not there.
//!
//! Each case is a child process: this test binary again, told by an environment variable what to do.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use gpusvm_guarded as guarded;
use std::ffi::{c_int, c_void};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::ptr;

const CASE: &str = "GUARDED_CASE";

/// Runs the case in a child.
fn child(case: &str) -> Output {
    let program = std::env::current_exe().unwrap();
    let arguments = ["--exact", "the_child", "--nocapture", "--test-threads=1"];
    Command::new(program)
        .args(arguments)
        .env(CASE, case)
        .output()
        .unwrap()
}

/// Not a test by itself: what a child does.
#[test]
fn the_child() {
    let Ok(case) = std::env::var(CASE) else {
        return;
    };
    match case.as_str() {
        "one argument" => set(libc::SIGSEGV, exit_with_signal as *const () as usize, 0),
        "three arguments" => set(
            libc::SIGSEGV,
            exit_or_repair as *const () as usize,
            libc::SA_SIGINFO,
        ),
        "ignored" | "ignored, sent" => set(libc::SIGSEGV, libc::SIG_IGN, 0),
        "default" | "default, sent" => set(libc::SIGSEGV, libc::SIG_DFL, 0),
        _ => {}
    }
    guarded::install().unwrap();
    // SAFETY: refused, whoever else there is.
    assert!(unsafe { guarded::load8(ptr::null()) }.is_err());
    match case.as_str() {
        "overflow" => {
            overflow(1);
        }
        "default, sent" | "ignored, sent" => {
            // SAFETY: it has no preconditions.
            unsafe { libc::raise(libc::SIGSEGV) };
        }
        "replaced" => {
            set(libc::SIGSEGV, exit_with_signal as *const () as usize, 0);
            guarded::install().unwrap();
            assert!(!guarded::is_installed());
            touch(8);
        }
        "bus" => touch(beyond_a_file()),
        "three arguments" => {
            touch(repairable());
            touch(8);
        }
        _ => touch(8),
    }
    std::process::exit(7);
}

/// A store that is not an accessor's.
fn touch(addr: usize) {
    // SAFETY: it is not, and that is what is tested.
    unsafe { ptr::without_provenance_mut::<u8>(addr).write_volatile(1) };
}

fn set(signal: c_int, handler: usize, flags: c_int) {
    // SAFETY: all zeroes are a valid action.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    // SAFETY: a valid action.
    let got = unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    assert_eq!(got, 0);
}

extern "C" fn exit_with_signal(signal: c_int) {
    // SAFETY: it has no preconditions.
    unsafe { libc::_exit(40 + signal) }
}

/// Where the handler with three arguments maps a page.
const REPAIRABLE: usize = 0x7000_0000;

fn repairable() -> usize {
    REPAIRABLE
}

extern "C" fn exit_or_repair(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: a handler with `SA_SIGINFO` gets one.
    let info = unsafe { &*info };
    // SAFETY: a fault has an address.
    let addr = unsafe { info.si_addr() }.addr();
    // Its own signal must be blocked, as for a handler without `SA_NODEFER`.
    // SAFETY: all zeroes are a valid set.
    let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: valid for the call.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), &raw mut mask) };
    // SAFETY: a valid set.
    let blocked = unsafe { libc::sigismember(&raw const mask, signal) } == 1;
    if addr == REPAIRABLE && blocked && !context.is_null() {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let place = ptr::without_provenance_mut(REPAIRABLE);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: nothing is replaced.
        unsafe { libc::mmap(place, 4096, protection, flags, -1, 0) };
        return;
    }
    // SAFETY: it has no preconditions.
    unsafe { libc::_exit(if addr == 8 && blocked { 60 } else { 61 }) }
}

fn beyond_a_file() -> usize {
    // SAFETY: a valid name.
    let file = unsafe { libc::memfd_create(c"empty".as_ptr(), 0) };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: the kernel chooses the place.
    let map = unsafe { libc::mmap(ptr::null_mut(), 4096, protection, libc::MAP_SHARED, file, 0) };
    map.addr()
}

#[expect(unconditional_recursion, reason = "that is the point")]
fn overflow(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 512]);
    overflow(depth + 1) + std::hint::black_box(frame)[3]
}

fn died_of(output: &Output, signal: c_int) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        output.status.signal(),
        Some(signal),
        "{:?}: {text}",
        output.status
    );
}

#[test]
fn handler_that_was_there_before_is_called() {
    assert_eq!(
        child("one argument").status.code(),
        Some(40 + libc::SIGSEGV)
    );
}

#[test]
fn handler_with_three_arguments_may_repair_and_return() {
    assert_eq!(child("three arguments").status.code(), Some(60));
}

#[test]
fn default_action_kills() {
    died_of(&child("default"), libc::SIGSEGV);
    died_of(&child("default, sent"), libc::SIGSEGV);
    died_of(&child("std's handler"), libc::SIGSEGV);
    died_of(&child("bus"), libc::SIGBUS);
}

#[test]
fn ignored_signal_is_fatal_only_when_it_is_a_fault() {
    died_of(&child("ignored"), libc::SIGSEGV);
    assert_eq!(child("ignored, sent").status.code(), Some(7));
}

#[test]
fn stack_overflow_is_still_told() {
    let output = child("overflow");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("has overflowed its stack"),
        "{:?}: {text}",
        output.status
    );
    died_of(&output, libc::SIGABRT);
}

#[test]
fn handler_that_was_put_in_front_stays_there() {
    assert_eq!(child("replaced").status.code(), Some(40 + libc::SIGSEGV));
}
