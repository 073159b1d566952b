//! The source of the tests: from the distribution's package of the kernel's source, never from here.

use crate::hmm_selftests::{Failed, done};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The package that the tests are known to pass from.
pub(crate) const KNOWN: &str = "linux-source-6.12";
/// Where Debian's packages put the source.
const SOURCES: &str = "usr/src";
/// The files that the tests are built of.
const FILES: [&str; 4] = [
    "lib/test_hmm*",
    "mm/gup_test.h",
    "tools/testing/selftests/kselftest*",
    "tools/testing/selftests/mm/*",
];

/// The tests, built.
#[derive(Debug)]
pub(crate) struct Test {
    /// Which package they are from.
    pub(crate) package: String,
    /// The program.
    pub(crate) binary: PathBuf,
}

/// Builds the tests in `folder`, unless they are there. The package is one of the system at `root`.
pub(crate) fn build(folder: &Path, root: &Path) -> Result<Test, Failed> {
    let sources = root.join(SOURCES);
    let package = find_or_install(&sources)?;
    let source = folder.join(&package);
    let tests = source.join("tools/testing/selftests/mm");
    let binary = tests.join("hmm-tests");
    if !binary.exists() {
        extract(&sources, &package, folder)?;
        let mut gcc = Command::new("gcc");
        gcc.args(["-O2", "-D_GNU_SOURCE", "-I"]).arg(&source);
        gcc.arg(tests.join("hmm-tests.c")).arg("-o").arg(&binary);
        done("building the tests", gcc.arg("-lpthread"))?;
    }
    let binary = binary.canonicalize().map_err(|error| Failed::Run {
        what: "finding the tests",
        error,
    })?;
    Ok(Test { package, binary })
}

/// The name of the package whose source is there.
fn find_or_install(sources: &Path) -> Result<String, Failed> {
    if let Some(package) = find(sources) {
        return Ok(package);
    }
    // A fresh machine does not know of any package yet. Refused or not there: either way there is no
    // source then.
    if !apt(&["install", "--yes", KNOWN]) && apt(&["update"]) {
        apt(&["install", "--yes", KNOWN]);
    }
    find(sources).ok_or_else(|| {
        Failed::NotTested(format!(
            "no source of the kernel: as root, `apt-get install {KNOWN}` gives it, and it could not be \
            installed here"
        ))
    })
}

/// Whether it was done.
fn apt(args: &[&str]) -> bool {
    let mut apt = Command::new("apt-get");
    apt.args(args).env("DEBIAN_FRONTEND", "noninteractive");
    apt.stdin(Stdio::null());
    apt.stdout(Stdio::null()).stderr(Stdio::null());
    apt.status().is_ok_and(|status| status.success())
}

/// The package that we know, or else the newest of those that are there.
fn find(sources: &Path) -> Option<String> {
    let names = std::fs::read_dir(sources).ok()?;
    let names = names.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let package = |name: String| Some(name.strip_suffix(".tar.xz")?.to_owned());
    let packages = names.filter_map(package);
    let packages = packages.filter(|name| name.starts_with("linux-source-"));
    packages.max_by_key(|name| (name == KNOWN, version(name)))
}

/// The numbers in a name, to compare.
fn version(name: &str) -> Vec<u32> {
    let parts = name.split(|c: char| !c.is_ascii_digit());
    parts.filter_map(|part| part.parse().ok()).collect()
}

fn extract(sources: &Path, package: &str, folder: &Path) -> Result<(), Failed> {
    std::fs::create_dir_all(folder).map_err(|error| Failed::Run {
        what: "making room for the source",
        error,
    })?;
    let mut tar = Command::new("tar");
    tar.arg("xJf")
        .arg(sources.join(format!("{package}.tar.xz")))
        .arg("-C")
        .arg(folder);
    let files = FILES.map(|file| format!("{package}/{file}"));
    done("extracting the source", tar.arg("--wildcards").args(files))
}
