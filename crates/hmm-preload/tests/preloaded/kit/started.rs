//! Programs with the library preloaded: among them this one, started again to run one test.

use std::path::PathBuf;
use std::process::{Command, Output};

/// Set in the program that was started again: what it is to do.
const ROLE: &str = "GPUSVM_HMM_TEST_ROLE";

/// Cargo builds it for these tests, beside them.
pub(crate) fn library() -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let library = this.with_file_name("libgpusvm_hmm.so");
    assert!(library.exists(), "{} was not built", library.display());
    library
}

/// Whether this is the program with the library; else starts it as `test`, and looks whether that passed.
pub(crate) fn is_preloaded(test: &str) -> bool {
    is_preloaded_with(test, &[])
}

/// As `is_preloaded`, with these variables in the program's environment.
pub(crate) fn is_preloaded_with(test: &str, variables: &[(&str, &str)]) -> bool {
    if role().is_some() {
        return true;
    }
    if gpusvm_testkit::require::require_uffd() {
        assert_passes(again(test, "1").envs(variables.iter().copied()));
    }
    false
}

/// This program, to run `test` alone, as `role`.
pub(crate) fn again(test: &str, role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
    command.env(ROLE, role).env("LD_PRELOAD", library());
    command
}

/// What the started one is to do; `None` in the first.
pub(crate) fn role() -> Option<String> {
    std::env::var(ROLE).ok()
}

/// Runs what `again` made. It has run the test that it was asked for, and not nothing; what it said is said here.
pub(crate) fn assert_passes(started: &mut Command) -> Output {
    let output = started.output().unwrap();
    assert_success(&output);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("1 passed"), "{started:?}\n{said}");
    print!("{}", String::from_utf8_lossy(&output.stderr));
    output
}

pub(crate) fn assert_success(output: &Output) {
    assert!(
        output.status.success(),
        "{}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
