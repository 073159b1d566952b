//! The process ends, or becomes another, with work in flight: at once, with the right status.

use crate::HANGS;
use crate::common::{engine, within};
use gpusvm::{ByteSize, Grid};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};

const HOW: &str = "GPUSVM_TEST_ENDS";

/// The child's part, in a process of its own; nothing in the others.
#[test]
fn child() {
    let Ok(how) = std::env::var(HOW) else {
        return;
    };
    let svm = engine(ByteSize::mib(4));
    let memory = svm.alloc_slice::<u64>(1 << 20).unwrap();
    let (p, n) = (memory.device_ptr(), memory.len());
    // SAFETY: by atomics only.
    let launch = unsafe {
        svm.launch(Grid::new(64), move |lane| {
            for i in 0usize.. {
                lane.atomic_add(p.add((lane.id() + i * 512) % n), 1u64)?;
            }
            Ok(())
        })
    };
    let launch = launch.unwrap();
    while svm.stats().device_faults < 4 {
        std::thread::yield_now();
    }
    match how.as_str() {
        "exit" => std::process::exit(3),
        // SAFETY: ends this process.
        "_exit" => unsafe { libc::_exit(4) },
        "abort" => std::process::abort(),
        "exec" => {
            let error = Command::new("/bin/sh").args(["-c", "exit 5"]).exec();
            panic!("{error}");
        }
        "fork and exec" => {
            // SAFETY: the child becomes another at once.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let error = Command::new("/bin/sh").args(["-c", "exit 6"]).exec();
                panic!("{error}");
            }
            let mut status = 0;
            // SAFETY: our own child.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            launch.cancel();
            std::process::exit(libc::WEXITSTATUS(status));
        }
        "return" => drop(memory),
        // Nothing is waited for, nothing taken down: `main` returns in a moment.
        "main returns" => std::mem::forget((svm, memory, launch)),
        other => panic!("{other}"),
    }
}

fn ended(how: &str) -> ExitStatus {
    let mut status = None;
    within(HANGS, || {
        let mut child = Command::new(std::env::current_exe().unwrap());
        let child = child.args(["ends::child", "--exact"]).env(HOW, how);
        let ended = child.stdout(Stdio::null()).stderr(Stdio::null()).status();
        status = Some(ended.unwrap());
    });
    status.unwrap()
}

#[test]
fn exit_ends_it_whatever_devices_do() {
    assert_eq!(ended("exit").code(), Some(3));
    assert_eq!(ended("_exit").code(), Some(4));
}

#[test]
fn abort_ends_it_with_its_signal() {
    assert_eq!(ended("abort").signal(), Some(libc::SIGABRT));
}

#[test]
fn another_program_takes_its_place() {
    assert_eq!(ended("exec").code(), Some(5));
    assert_eq!(ended("fork and exec").code(), Some(6));
}

#[test]
fn returning_takes_the_engine_down() {
    assert_eq!(ended("return").code(), Some(0));
}

#[test]
fn main_returns_whatever_devices_do() {
    assert_eq!(ended("main returns").code(), Some(0));
}
