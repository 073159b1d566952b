//! What the library reports of devices that are opened and closed.

use crate::kit::{
    Area, DEVICES, Descriptor, Device, again, assert_child, assert_passes, engine_runs, fork, role,
};
use std::path::PathBuf;

const TEST: &str = "apps::report::each_device_that_ends_is_reported";

fn file(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("gpusvm-hmm-{name}-{}", std::process::id()))
}

/// A line for each device that is opened, in the process and in a child, and one for each that ends: by then nothing
/// is in use.
#[test]
fn each_device_that_ends_is_reported() {
    if role().is_some() {
        let area = Area::new(600);
        let (first, second) = (Device::open(), Device::open());
        let other = Device::number(1);
        area.fill(1);
        first.take(area.all());
        first.close();
        second.take(area.all());
        second.close();
        other.take(area.all());
        let child = fork(|| {
            Device::open().close();
            true
        });
        assert_child(child, "the child");
        assert!(area.is_filled(1));
        return other.close();
    }
    if !gpusvm_testkit::require::require_uffd() {
        return;
    }
    let path = file("report");
    assert_passes(again(TEST, "1").env("GPUSVM_HMM_REPORT", &path));
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
        assert_eq!(Descriptor::open(DEVICES[0], 0), Err(libc::ENOENT));
        assert!(!engine_runs());
        return;
    }
    if !gpusvm_testkit::require::require_uffd() {
        return;
    }
    let mut command = again(
        "apps::report::a_report_that_cannot_be_written_is_an_error",
        "1",
    );
    let output = assert_passes(command.env("GPUSVM_HMM_REPORT", "/nowhere/report"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.contains("GPUSVM_HMM_REPORT: /nowhere/report"),
        "{said}"
    );
}
