//! What is taken away is gone, and the rest is there.

use gpusvm_testkit::launch::{as_nobody, can_become_nobody, without_userfaultfd};
use gpusvm_testkit::{require_uffd, unavailable};
use std::process::Command;

/// The name of a test of this file, to be run again by a launcher.
fn again(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command
        .args([name, "--exact", "--nocapture"])
        .env("LAUNCHED", "1");
    command
}

fn launched() -> bool {
    std::env::var_os("LAUNCHED").is_some()
}

#[test]
fn userfaultfd_is_refused_both_ways() {
    if launched() {
        // SAFETY: it takes an integer.
        assert_eq!(unsafe { libc::syscall(libc::SYS_userfaultfd, 1) }, -1);
        assert_eq!(
            std::io::Error::last_os_error().raw_os_error(),
            Some(libc::EPERM)
        );
        // SAFETY: a path that ends, and flags.
        let device = unsafe { libc::open(c"/dev/userfaultfd".as_ptr(), libc::O_RDWR) };
        if device >= 0 {
            // SAFETY: it takes an integer.
            assert_eq!(unsafe { libc::ioctl(device, 0xAA00, 0) }, -1);
            // SAFETY: it takes no argument.
            let others = unsafe { libc::ioctl(device, libc::FIOCLEX) };
            assert_eq!(others, 0, "others work");
        }
        return;
    }
    let mut command = again("userfaultfd_is_refused_both_ways");
    let status = without_userfaultfd(&mut command).status();
    assert!(status.expect("a child").success());
}

#[test]
fn nobody_is_nobody() {
    if launched() {
        // SAFETY: it has no preconditions.
        assert_eq!(unsafe { libc::getuid() }, gpusvm_testkit::launch::NOBODY);
        let status = std::fs::read_to_string("/proc/self/status").expect("proc");
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
        return;
    }
    if !can_become_nobody() {
        unavailable("not root");
        return;
    }
    let mut command = again("nobody_is_nobody");
    assert!(as_nobody(&mut command).status().expect("a child").success());
}

#[test]
fn a_userfaultfd_is_found_or_said_to_be_missing() {
    // Either way it returns; whoever requires one learns of it by a failure.
    let _ = require_uffd();
}
