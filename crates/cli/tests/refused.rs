//! The main job where privileges are missing: it runs all the same, and says on which rung.

use gpusvm_testkit::launch::{as_nobody, can_become_nobody, without_userfaultfd};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::{env, fs};

/// The command, where a user without rights can run it: target directories are often private.
fn command() -> &'static Path {
    static COPY: OnceLock<PathBuf> = OnceLock::new();
    COPY.get_or_init(|| {
        let there = env::temp_dir().join(format!("gpusvm-test-{}", std::process::id()));
        fs::copy(env!("CARGO_BIN_EXE_gpusvm"), &there).expect("a place for the command");
        fs::set_permissions(&there, fs::Permissions::from_mode(0o755)).expect("its mode");
        there
    })
}

fn bfs(command: &mut Command) -> Output {
    let job = ["run", "bfs", "--scale", "14", "--vram", "2M", "--json"];
    command.args(job).output().expect("the command starts")
}

fn verified(output: &Output) -> Value {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");
    assert_eq!(report["verified"], true, "{report:#}");
    assert_eq!(report["vram_used_bytes_at_exit"], 0, "{report:#}");
    for counter in ["device_faults", "cpu_faults", "evictions"] {
        assert!(
            report[counter].as_u64() > Some(0),
            "{counter} in {report:#}"
        );
    }
    report
}

/// One line on the standard error that says which rung, and how to get a better one.
fn notice(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    lines[0].to_owned()
}

#[test]
fn without_userfaultfd_the_main_job_runs_on_signals() {
    let output = bfs(without_userfaultfd(&mut Command::new(command())));
    let report = verified(&output);
    assert_eq!(report["rung"], 4, "{report:#}");
    let notice = notice(&output);
    assert!(
        notice.contains("rung 4") && notice.contains("userfaultfd"),
        "{notice}"
    );
}

#[test]
fn without_userfaultfd_the_requirement_is_an_error() {
    let mut refused = Command::new(command());
    let job = ["run", "bfs", "--scale", "10", "--require-uffd"];
    let output = without_userfaultfd(&mut refused)
        .args(job)
        .output()
        .expect("it starts");
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("userfaultfd is required"), "{stderr}");
}

#[test]
fn an_unprivileged_user_has_the_rung_of_user_mode() {
    if !can_become_nobody() {
        println!("skipped: only root can become nobody");
        return;
    }
    let output = bfs(as_nobody(&mut Command::new(command())));
    let report = verified(&output);
    let sysctl = fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let expected = if sysctl.is_ok_and(|value| value.trim() == "1") {
        1
    } else {
        3
    };
    assert_eq!(report["rung"], expected, "{report:#}");
    if expected == 3 {
        assert!(notice(&output).contains("rung 3"));
    }
}
