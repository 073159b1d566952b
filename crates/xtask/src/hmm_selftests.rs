//! The kernel's HMM self-tests, on our engine.
//!
//! ```text
//!   source package -> extract, under target/ -> gcc ---------------.
//!   cargo build, the library that is preloaded --------------------+--> run, in a private mount namespace
//!   a huge page of hugetlbfs; transparent huge pages as asked -----'       |
//!                                              TAP, and what each close leaves in use -> table -> exit status
//! ```
//!
//! It passes when no test failed, every device that was opened was closed and left nothing in use, and the table of
//! the documentation says what came of each test. Where it cannot be run, it says what to do, and that nothing was
//! tested.

use crate::closes;
use crate::documented;
use crate::kernel_source::{self, KNOWN};
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
    /// Where the system's files are, for the tests of this command.
    #[arg(long, hide = true, default_value = "/")]
    root: PathBuf,
    /// A library that was built before, and where to build the tests, for the tests of this command.
    #[arg(long, hide = true, requires = "target")]
    library: Option<PathBuf>,
    #[arg(long, hide = true)]
    target: Option<PathBuf>,
    /// The page with the table of what is expected, for the tests of this command.
    #[arg(long, hide = true)]
    page: Option<PathBuf>,
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
    /// Nothing could be tested here.
    #[error("NOT TESTED: {0}")]
    NotTested(String),
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
const THP: &str = "sys/kernel/mm/transparent_hugepage/enabled";
const HUGETLB: &str = "proc/sys/vm/nr_hugepages";

/// Runs them, and says what came of it.
pub(crate) fn run(options: &Options) -> ExitCode {
    match try_run(options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error @ Failed::NotTested(_)) => {
            eprintln!("hmm-selftests: {error}");
            ExitCode::from(NOT_TESTED)
        }
        Err(error) => {
            eprintln!("hmm-selftests: {error}");
            ExitCode::from(2)
        }
    }
}

fn try_run(options: &Options) -> Result<bool, Failed> {
    check_namespace()?;
    let target = options.target.clone().unwrap_or_else(target);
    let folder = target.join("hmm-selftests");
    let test = kernel_source::build(&folder, &options.root)?;
    let library = match &options.library {
        Some(library) => library.clone(),
        None => build_library(&target, options.release)?,
    };
    let thp = options.thp.map(|thp| match thp {
        Thp::Madvise => "madvise",
        Thp::Always => "always",
    });
    let thp_file = options.root.join(THP);
    let _thp = thp.map(|thp| Setting::set(&thp_file, thp)).transpose()?;
    let _hugetlb = huge_page(options)?;
    let expected = match test.package == KNOWN {
        true => documented::read(&page(options))?,
        false => {
            println!(
                "{}: the table of docs/conformance.md is not of this kernel",
                test.package
            );
            Vec::new()
        }
    };
    let report = folder.join("report");
    let mut runs = Vec::new();
    for number in 1..=options.repeat {
        let mut run = run_once((&test.binary, &library, &report), options)?;
        let is_all = options.test.is_none();
        run.wrong
            .extend(documented::differences(&expected, &run.tests, is_all));
        if options.repeat > 1 {
            println!("run {number}: {}", table::line(&run));
        }
        runs.push(run);
    }
    println!(
        "{}, huge pages: {}",
        test.package,
        Setting::read(&thp_file)?
    );
    print!("{}", table::table(&runs));
    Ok(runs.iter().all(Run::is_good))
}

fn page(options: &Options) -> PathBuf {
    let page = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/conformance.md");
    options.page.clone().unwrap_or_else(page)
}

/// The tests' files are to be on tmpfs, and nobody else's.
fn check_namespace() -> Result<(), Failed> {
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "true"]).stdin(Stdio::null());
    let done = unshare.stderr(Stdio::null()).status();
    let why = match done {
        Ok(status) if status.success() => return Ok(()),
        Ok(_) => "run it as root, or in a container with CAP_SYS_ADMIN",
        Err(_) => "install `unshare`, of util-linux",
    };
    let why = format!("the tests need a mount namespace of their own: {why}");
    Err(Failed::NotTested(why))
}

/// One test maps a page of hugetlbfs.
fn huge_page(options: &Options) -> Result<Setting, Failed> {
    let file = options.root.join(HUGETLB);
    let least = Setting::at_least(&file, 1);
    // The system sets aside what it can.
    let is_there =
        || Setting::read(&file).is_ok_and(|now| now.parse::<u64>().is_ok_and(|now| now > 0));
    least.ok().filter(|_| is_there()).ok_or_else(|| {
        let why = "a test needs a page of hugetlbfs, and none could be set aside: as root, \
            `echo 1 > /proc/sys/vm/nr_hugepages`, with 2 MiB of memory in one piece";
        Failed::NotTested(why.to_owned())
    })
}

/// Where cargo builds.
pub(crate) fn target() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    named.unwrap_or_else(|| root.join("target"))
}

/// The library, built.
pub(crate) fn build_library(target: &Path, release: bool) -> Result<PathBuf, Failed> {
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
fn run_once(
    (test, library, report): (&Path, &Path, &Path),
    options: &Options,
) -> Result<Run, Failed> {
    // All are opened first: what is built may be in the folder that the tests' files are put over.
    let script = r#"exec 3<"$1" 4<"$2" 5>"$3" && mount -t tmpfs tmpfs /tmp && \
        GPUSVM_HMM_REPORT=/proc/self/fd/5 LD_PRELOAD=/proc/self/fd/3 \
        exec /proc/self/fd/4 ${4:+-t "$4"} 2>&1"#;
    let mut command = Command::new("timeout");
    command.args([LIMIT, "unshare", "--mount", "sh", "-c", script, "sh"]);
    command.arg(library).arg(test).arg(report);
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
    let report = std::fs::read_to_string(report).map_err(|error| Failed::Run {
        what: "reading what was left in use",
        error,
    })?;
    (run.closes, run.wrong) = closes::check(&report, &run.tests);
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
