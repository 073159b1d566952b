//! The kernel's HMM self-tests, on our engine.
//!
//! ```text
//!   source package -> extract, under target/ -> gcc ---------------.
//!   cargo build, the library that is preloaded --------------------+--> run, in a private mount namespace
//!   a huge page of hugetlbfs; transparent huge pages as asked -----'       |
//!                                                                         TAP -> table -> exit status
//! ```

use crate::kernel_source::{self, NoSource};
use crate::setting::Setting;
use crate::table;
use crate::tap::{self, Run};
use clap::{Args, ValueEnum};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// How to run them.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How often to run all of them.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// When the system makes huge pages by itself. As it is, unless named; it is put back afterwards.
    #[arg(long)]
    thp: Option<Thp>,
    /// Only this test, of one fixture or all, by the harness's own selection.
    #[arg(long)]
    test: Option<String>,
    /// Build the engine with optimisation.
    #[arg(long)]
    release: bool,
    /// Print what the tests print.
    #[arg(long)]
    verbose: bool,
}

/// Transparent huge pages.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Thp {
    /// Where the program asks for them.
    Madvise,
    /// Everywhere.
    Always,
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    /// The source is not to be had.
    #[error(transparent)]
    NoSource(#[from] NoSource),
    /// Something could not be run.
    #[error("{what}: {error}")]
    Run {
        /// What.
        what: &'static str,
        /// What the system said.
        error: std::io::Error,
    },
    /// Something that was run failed.
    #[error("{what} failed: {status}")]
    Status {
        /// What.
        what: &'static str,
        /// How.
        status: std::process::ExitStatus,
    },
}

/// The status for what was not tested: that of other test harnesses.
const NOT_TESTED: u8 = 77;
/// Longer than all tests together take; each has a limit of its own.
const LIMIT: &str = "900";
const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const HUGETLB: &str = "/proc/sys/vm/nr_hugepages";

/// Runs them, and says what came of it.
pub(crate) fn run(options: &Options) -> ExitCode {
    match try_run(options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(Failed::NoSource(error)) => {
            eprintln!("hmm-selftests: NOT TESTED: {error}");
            ExitCode::from(NOT_TESTED)
        }
        Err(error) => {
            eprintln!("hmm-selftests: {error}");
            ExitCode::from(2)
        }
    }
}

fn try_run(options: &Options) -> Result<bool, Failed> {
    let target = target();
    let test = kernel_source::build(&target.join("hmm-selftests"))?;
    let library = build_library(&target, options.release)?;
    let thp = options.thp.map(|thp| match thp {
        Thp::Madvise => "madvise",
        Thp::Always => "always",
    });
    let _thp = thp.map(|thp| Setting::set(THP, thp)).transpose()?;
    let _hugetlb = Setting::at_least(HUGETLB, 1)?;
    let mut runs = Vec::new();
    for number in 1..=options.repeat {
        let run = run_once((&test.binary, &library), options)?;
        if options.repeat > 1 {
            println!("run {number}: {}", table::line(&run));
        }
        runs.push(run);
    }
    println!("{}, huge pages: {}", test.package, Setting::read(THP)?);
    print!("{}", table::table(&runs));
    Ok(runs.iter().all(Run::is_good))
}

/// Where cargo builds.
fn target() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    named.unwrap_or_else(|| root.join("target"))
}

fn build_library(target: &Path, release: bool) -> Result<PathBuf, Failed> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--quiet", "--package", "gpusvm-hmm-preload"]);
    if release {
        cargo.arg("--release");
    }
    done("building the library", &mut cargo)?;
    let profile = if release { "release" } else { "debug" };
    let library = target.join(profile).join("libgpusvm_hmm.so");
    let library = library.canonicalize();
    library.map_err(|error| Failed::Run {
        what: "finding the library",
        error,
    })
}

/// In a mount namespace of its own, so that the tests' files are on tmpfs; preloaded into nothing else.
fn run_once((test, library): (&Path, &Path), options: &Options) -> Result<Run, Failed> {
    // Both are opened first: what is built may be in the folder that the tests' files are put over.
    let script = r#"exec 3<"$1" 4<"$2" && mount -t tmpfs tmpfs /tmp && \
        LD_PRELOAD=/proc/self/fd/3 exec /proc/self/fd/4 ${3:+-t "$3"} 2>&1"#;
    let mut command = Command::new("timeout");
    command.args([LIMIT, "unshare", "--mount", "sh", "-c", script, "sh"]);
    command.arg(library).arg(test);
    command.args(&options.test);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| Failed::Run {
            what: "running the tests",
            error,
        })?;
    let said = String::from_utf8_lossy(&output.stdout);
    // What kept the tests from running at all, and what our library says.
    eprint!("{}", String::from_utf8_lossy(&output.stderr));
    let is_ours = |line: &&str| options.verbose || line.starts_with("gpusvm");
    for line in said.lines().filter(is_ours) {
        eprintln!("{line}");
    }
    let mut run = tap::parse(&said);
    if run.tests.is_empty() {
        return Err(Failed::Status {
            what: "running the tests",
            status: output.status,
        });
    }
    // It exits otherwise when a test failed, or when it was ended.
    run.is_complete &= output.status.code().is_some_and(|code| code <= 1);
    Ok(run)
}

/// Runs a command that has to succeed.
pub(crate) fn done(what: &'static str, command: &mut Command) -> Result<(), Failed> {
    let status = command.stdin(Stdio::null()).status();
    let status = status.map_err(|error| Failed::Run { what, error })?;
    match status.success() {
        true => Ok(()),
        false => Err(Failed::Status { what, status }),
    }
}
