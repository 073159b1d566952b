//! What the library reports of devices that are opened and closed.

use crate::kit::{Area, again, assert_child, assert_success, close, fork, open, role};
use std::path::PathBuf;

const TEST: &str = "report::each_device_that_ends_is_reported";

fn file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("gpusvm-hmm-{name}-{}", std::process::id()))
}

/// A line for each device that is opened, in the process and in a child, and one for each that ends: by then nothing
/// is in use.
#[test]
fn each_device_that_ends_is_reported() {
    if role().is_some() {
        let area = Area::new(600);
        let (first, second) = (open(0), open(0));
        // SAFETY: a C string.
        let other = unsafe { libc::open(c"/dev/hmm_dmirror1".as_ptr(), libc::O_RDWR) };
        area.fill(1);
        area.take(first);
        close(first).unwrap();
        area.take(second);
        close(second).unwrap();
        area.take(other);
        let child = fork(|| close(open(0)) == Ok(()));
        assert_child(child, "the child");
        assert!(area.is_filled(1));
        return close(other).unwrap();
    }
    if !gpusvm_testkit::require::require_uffd() {
        return;
    }
    let path = file("report");
    let mut command = again(TEST, "1");
    assert_success(&command.env("GPUSVM_HMM_REPORT", &path).output().unwrap());
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let parent = text.split_whitespace().nth(1).unwrap().to_owned();
    let said: Vec<_> = text
        .lines()
        .map(|line| line.replace(&parent, "parent"))
        .collect();
    let [opened @ .., in_child, child_closed, last] = &said[..] else {
        panic!("{text}");
    };
    let expected = [
        "open parent device=0",
        "open parent device=0",
        "open parent device=1",
        "close parent device=0 shared",
        "close parent device=0 pages=0 bytes=0",
    ];
    assert_eq!(opened, expected);
    assert!(
        in_child.starts_with("open pid=") && child_closed.starts_with("close pid="),
        "{text}"
    );
    assert_eq!(last, "close parent device=1 pages=0 bytes=0");
}

/// A report that cannot be written is no report: the device is not opened.
#[test]
fn a_report_that_cannot_be_written_is_an_error() {
    if role().is_some() {
        // SAFETY: a C string.
        let refused = unsafe { libc::open(crate::kit::DEVICE.as_ptr(), libc::O_RDWR) };
        assert_eq!((refused, crate::kit::errno()), (-1, libc::ENOENT));
        assert!(!crate::kit::engine_runs());
        return;
    }
    if !gpusvm_testkit::require::require_uffd() {
        return;
    }
    let mut command = again("report::a_report_that_cannot_be_written_is_an_error", "1");
    let output = command
        .env("GPUSVM_HMM_REPORT", "/nowhere/report")
        .output()
        .unwrap();
    assert_success(&output);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("GPUSVM_HMM_REPORT: /nowhere/report"),
        "{said}"
    );
}
