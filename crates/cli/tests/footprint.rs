//! Nothing is doubly resident: a run larger than device memory needs its data, device memory, and the
//! staging pool, and hardly more.

use serde_json::Value;
use std::io::Read;
use std::process::{Command, Stdio};

/// What the command, its code, its threads and the verification may need besides.
const SMALL_CONSTANT: u64 = 24 << 20;
/// Idle staging blocks, and one for each migration under way.
const STAGING: u64 = 16 << 20;

fn run(args: &[&str]) -> (Value, u64) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_gpusvm"))
        .args(["run", "--json"])
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    let mut output = String::new();
    let mut stdout = child.stdout.take().expect("its output");
    stdout.read_to_string(&mut output).expect("its output");
    let peak = peak_rss_of(child);
    (
        serde_json::from_str(&output).expect("one JSON object"),
        peak,
    )
}

/// Waits for the child, and says the most memory it ever had, as `/usr/bin/time -v` does.
fn peak_rss_of(child: std::process::Child) -> u64 {
    let pid = libc::pid_t::try_from(child.id()).expect("a process id");
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: our own child, and two places to write to.
    let waited = unsafe { libc::wait4(pid, &mut status, 0, usage.as_mut_ptr()) };
    assert_eq!((waited, status), (pid, 0));
    // SAFETY: zeroes are a usage, and `wait4` wrote it.
    let usage = unsafe { usage.assume_init() };
    u64::try_from(usage.ru_maxrss).expect("kilobytes") << 10
}

#[test]
fn an_oversubscribed_run_holds_each_page_once() {
    for rung in ["1", "4"] {
        let args = ["triad", "--size", "256M", "--vram", "64M", "--rung", rung];
        let (report, peak) = run(&args);
        assert_eq!(report["verified"], true);
        assert!(report["evictions"].as_u64() > Some(0), "{report:#}");
        let sum = report["working_set_bytes"].as_u64().unwrap()
            + report["vram_bytes"].as_u64().unwrap()
            + STAGING
            + SMALL_CONSTANT;
        assert!(
            peak < sum,
            "rung {rung}: a peak of {peak} bytes, at most {sum} expected"
        );
        println!(
            "rung {rung}: peak {} MiB of at most {} MiB",
            peak >> 20,
            sum >> 20
        );
    }
}
