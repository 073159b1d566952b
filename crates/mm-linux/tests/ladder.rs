//! What the ladder comes to when privileges are taken away.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::World;
use common::memory::{self, Pages};
use gpusvm_mm_linux::{Capabilities, Options, Process, Rung, StartError};
use gpusvm_testkit::launch::{as_nobody, can_become_nobody, without_userfaultfd};
use gpusvm_testkit::unavailable;
use gpusvm_types::{BLOCK_SIZE, PageCount};
use std::process::Command;

const LAUNCHED: &str = "GPUSVM_TEST_LAUNCHED";

fn again(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([name, "--exact", "--nocapture"])
        .env(LAUNCHED, "1");
    // What is taken away on purpose may be missing.
    command.env_remove(gpusvm_testkit::require::REQUIRE);
    command
}

fn launched() -> bool {
    std::env::var_os(LAUNCHED).is_some()
}

fn round_trip(rung: Rung) {
    let world = World::start(rung).expect("it is offered");
    for pages in [Pages::Huge, Pages::Base] {
        let memory = world.memory(BLOCK_SIZE, pages);
        for seed in 0..20 {
            memory.fill(seed);
            assert_eq!(world.out(memory.span()), PageCount::new(512));
            memory.check(seed);
        }
        memory.disarm(&world.process);
        memory.end(&world.process);
    }
    world.end();
}

fn is_refused(rung: Rung) {
    let refused = Process::start(Options {
        rung: Some(rung),
        ..Options::default()
    });
    assert!(
        matches!(refused, Err(StartError::NoRung { .. })),
        "{rung:?}"
    );
}

#[test]
fn without_any_userfaultfd_there_are_signals() {
    if !launched() {
        let mut command = again("without_any_userfaultfd_there_are_signals");
        let status = without_userfaultfd(&mut command).status().unwrap();
        assert!(status.success());
        return;
    }
    assert_eq!(Capabilities::probe().best_rung(), Rung::Signals);
    [
        Rung::Move,
        Rung::Copy,
        Rung::UserMode { moves: true },
        Rung::UserMode { moves: false },
    ]
    .into_iter()
    .for_each(is_refused);
    assert_eq!(
        Process::start(Options::default()).map(|p| p.rung()).ok(),
        Some(Rung::Signals)
    );
}

#[test]
fn the_last_rung_carries_without_userfaultfd() {
    if !launched() {
        let mut command = again("the_last_rung_carries_without_userfaultfd");
        assert!(
            without_userfaultfd(&mut command)
                .status()
                .unwrap()
                .success()
        );
        return;
    }
    round_trip(Rung::Signals);
}

#[test]
fn nobody_stands_on_the_third_rung() {
    if !launched() {
        if !can_become_nobody() {
            unavailable("not root");
            return;
        }
        let mut command = again("nobody_stands_on_the_third_rung");
        assert!(as_nobody(&mut command).status().unwrap().success());
        return;
    }
    let best = Capabilities::probe().best_rung();
    let Rung::UserMode { .. } = best else {
        unavailable(&format!(
            "userfaultfd is open to everybody, or to nobody: {best:?}"
        ));
        return;
    };
    [Rung::Move, Rung::Copy].into_iter().for_each(is_refused);
    round_trip(best);
    system_calls_fail_on_pages_that_are_away(best);
}

/// Said in the rung's description; bringing memory home first is the cure.
fn system_calls_fail_on_pages_that_are_away(rung: Rung) {
    let world = World::start(rung).expect("it is offered");
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    world.out(memory.span());
    let write = || {
        let null = std::fs::File::options()
            .write(true)
            .open("/dev/urandom")
            .unwrap();
        let at = memory::pointer(memory.span().start()).cast();
        // SAFETY: mapped; what is not there is refused.
        unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&null), at, 64) }
    };
    assert_eq!(write(), -1);
    let error = std::io::Error::last_os_error();
    assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    world.process.bring_home(memory.span()).unwrap();
    assert_eq!(write(), 64);
    memory.disarm(&world.process);
    memory.end(&world.process);
    world.end();
}

/// Signals have one handler: one engine at a time, and another after it.
#[test]
fn one_engine_at_a_time_on_the_last_rung() {
    let rung = Some(Rung::Signals);
    let first = Process::start(Options {
        rung,
        ..Options::default()
    })
    .unwrap();
    let second = Process::start(Options {
        rung,
        ..Options::default()
    });
    assert!(matches!(second, Err(StartError::SignalsTaken)));
    first.stop();
    let third = Process::start(Options {
        rung,
        ..Options::default()
    })
    .unwrap();
    third.stop();
}
