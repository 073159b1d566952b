//! `cargo xtask hmm-selftests` on other machines than this: with programs of the system that do what a test says,
//! and a source of the kernel whose tests are a few lines.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const PACKAGE: &str = "linux-source-6.12";
/// What the tests say when all is right, and a device for each.
const GOOD: &str = r#"puts("1..2\nok 1 hmm.hmm_device_private.a\nok 2 hmm.hmm_device_coherent.a # SKIP none");
    tell("open pid=1 device=0\nclose pid=1 device=0 pages=0 bytes=0\n");"#;
const TABLE: &str =
    "| test | devices | private | coherent |\n|---|---|---|---|\n| `a` | 1 | pass | skip |\n";

/// Another machine, in a folder that goes with it.
struct Machine {
    folder: PathBuf,
}

impl Machine {
    /// One where everything is there: `unshare` and `mount` do nothing, without privileges.
    fn new(name: &str) -> Self {
        let folder = format!("gpusvm-xtask-{name}-{}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        for part in ["bin", "system/usr/src", "system/proc/sys/vm"] {
            std::fs::create_dir_all(folder.join(part)).unwrap();
        }
        let thp = "system/sys/kernel/mm/transparent_hugepage";
        std::fs::create_dir_all(folder.join(thp)).unwrap();
        let machine = Self { folder };
        machine.write(&format!("{thp}/enabled"), "always [madvise] never\n");
        machine.write("system/proc/sys/vm/nr_hugepages", "0\n");
        machine.write("page.md", TABLE);
        machine.write("library.c", "");
        machine.run("gcc", &["-shared", "-o", "library.so", "library.c"]);
        machine.program("unshare", "shift; exec \"$@\"");
        machine.program("mount", "exit 0");
        machine.program("apt-get", "exit 100");
        machine
    }

    fn write(&self, path: &str, text: &str) {
        std::fs::write(self.folder.join(path), text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.folder.join(path)).unwrap_or_default()
    }

    fn program(&self, name: &str, script: &str) {
        let path = format!("bin/{name}");
        self.write(
            &path,
            &format!("#!/bin/sh\ncd '{}'\n{script}\n", self.folder.display()),
        );
        let path = self.folder.join(path);
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn run(&self, program: &str, args: &[&str]) {
        let mut command = Command::new(program);
        let status = command.args(args).current_dir(&self.folder).status();
        assert!(status.unwrap().success(), "{program} {args:?}");
    }

    /// The package, not installed yet, whose tests do what `main` says.
    fn package(&self, main: &str) {
        let source = format!("package/{PACKAGE}");
        let tests = format!("{source}/tools/testing/selftests");
        for part in ["lib", "mm", "tools/testing/selftests/mm"] {
            std::fs::create_dir_all(self.folder.join(&source).join(part)).unwrap();
        }
        for file in ["lib/test_hmm_uapi.h", "mm/gup_test.h"] {
            self.write(&format!("{source}/{file}"), "");
        }
        self.write(&format!("{tests}/kselftest.h"), "");
        let tell = "static void tell(const char *said) {\
            FILE *report = fopen(getenv(\"GPUSVM_HMM_REPORT\"), \"a\");\
            fputs(said, report); fclose(report); }";
        let text = format!(
            "#include <stdio.h>\n#include <stdlib.h>\n#include \"lib/test_hmm_uapi.h\"\n{tell}\n\
            int main(int count, char **args) {{ (void)count; (void)args; (void)tell;\n{main}\nreturn 0; }}\n"
        );
        self.write(&format!("{tests}/mm/hmm-tests.c"), &text);
        let tar = format!("{PACKAGE}.tar.xz");
        self.run("tar", &["-cJf", &tar, "-C", "package", PACKAGE]);
    }

    /// The package, installed.
    fn install(&self, main: &str) {
        self.package(main);
        let tar = format!("{PACKAGE}.tar.xz");
        self.run("cp", &[&tar, "system/usr/src"]);
    }

    fn selftests(&self, args: &[&str]) -> Output {
        let path = |part: &str| self.folder.join(part);
        let mut command = Command::new(env!("CARGO_BIN_EXE_xtask"));
        command.arg("hmm-selftests").args(args);
        command.arg("--root").arg(path("system"));
        command.arg("--target").arg(path("target"));
        command.arg("--library").arg(path("library.so"));
        command.arg("--page").arg(path("page.md"));
        command.env("PATH", format!("{}:/usr/bin:/bin", path("bin").display()));
        command.output().unwrap()
    }

    /// Runs them, and looks how it ended and what it said.
    fn assert_ends(&self, args: &[&str], status: i32, says: &[&str]) -> String {
        let output = self.selftests(args);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert_eq!(output.status.code(), Some(status), "{said}");
        for text in says {
            assert!(said.contains(text), "{text}, in: {said}");
        }
        // Nothing is claimed that was not tested.
        assert_eq!(said.contains(" passed, "), status < 2, "{said}");
        said
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It is in a folder for what is temporary.
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn has_xz() -> bool {
    let there = Command::new("xz").arg("--version").output().is_ok();
    if !there {
        println!("skipped: no xz here");
    }
    there
}

#[test]
fn a_package_that_cannot_be_had_is_no_pass() {
    let machine = Machine::new("refused");
    machine.program("apt-get", "echo \"$@\" >>asked; exit 100");
    let advice = format!("apt-get install {PACKAGE}");
    machine.assert_ends(&[], 77, &["NOT TESTED", &advice]);
    let install = format!("install --yes {PACKAGE}\n");
    assert_eq!(machine.read("asked"), format!("{install}update\n"));
    std::fs::remove_file(machine.folder.join("bin/apt-get")).unwrap();
    machine.program("apt-get", "echo \"$@\" >>again; [ \"$1\" = update ]");
    machine.assert_ends(&[], 77, &["NOT TESTED", &advice]);
    assert_eq!(machine.read("again"), format!("{install}update\n{install}"));
}

#[test]
fn the_package_is_installed_where_it_can_be() {
    if !has_xz() {
        return;
    }
    for (name, script) in [
        (
            "known",
            "[ \"$1\" = install ] && cp *.tar.xz system/usr/src",
        ),
        (
            "unknown",
            "case \"$1\" in update) touch known;; install) [ -e known ] && cp *.tar.xz system/usr/src;; esac",
        ),
    ] {
        let machine = Machine::new(name);
        machine.package(GOOD);
        machine.program("apt-get", script);
        let says = [
            "hmm.hmm_device_private.a       1/1  pass",
            "hmm.hmm_device_coherent.a      0/1  skip  none",
            "1 passed, 1 skipped, 0 failed; 1 devices closed with nothing in use",
            "linux-source-6.12, huge pages: madvise",
        ];
        machine.assert_ends(&[], 0, &says);
        // It is there, and built: nobody is asked again.
        machine.program("apt-get", "touch asked; exit 100");
        machine.assert_ends(&["--repeat", "2"], 0, &["run 2: 1 passed", "2/2  pass"]);
        assert!(!machine.folder.join("asked").exists());
        assert_eq!(
            machine.read("system/proc/sys/vm/nr_hugepages"),
            "0",
            "put back"
        );
    }
}

/// Whatever is not as it must be fails, though the tests say that all passed.
#[test]
fn what_is_wrong_is_no_pass() {
    if !has_xz() {
        return;
    }
    let close = "close pid=1 device=0 pages=0 bytes=0";
    for (name, from, to, says) in [
        ("fails", "ok 1", "not ok 1", "FAIL"),
        ("ends", "1..2", "1..3", "a run ended early"),
        (
            "leaks",
            "pages=0",
            "pages=7",
            "WRONG: a device was closed and left behind",
        ),
        (
            "holds",
            "bytes=0",
            "bytes=4096",
            "WRONG: a device was closed and left behind",
        ),
        (
            "open",
            close,
            "open pid=1 device=1",
            "WRONG: pid=1 device=0: opened 1 times more",
        ),
        (
            "unknown",
            close,
            "what",
            "WRONG: not a line of a report: what",
        ),
        (
            "skips",
            "_private.a",
            "_private.a # SKIP none",
            "WRONG: docs/conformance.md says pass of",
        ),
        (
            "new",
            "_private.a",
            "_private.b",
            "WRONG: docs/conformance.md says nothing of",
        ),
        (
            "dies",
            "tell(",
            "fflush(stdout); abort(); tell(",
            "a run ended early",
        ),
    ] {
        let machine = Machine::new(name);
        assert!(GOOD.contains(from));
        machine.install(&GOOD.replacen(from, to, 1));
        machine.assert_ends(&[], 1, &[says]);
    }
}

#[test]
fn a_machine_that_cannot_run_them_is_told_what_to_do() {
    if !has_xz() {
        return;
    }
    let machine = Machine::new("plain");
    machine.install(GOOD);
    machine.program("unshare", "echo not permitted >&2; exit 1");
    machine.assert_ends(
        &[],
        77,
        &["NOT TESTED", "mount namespace", "run it as root"],
    );
    machine.program("unshare", "shift; exec \"$@\"");
    std::fs::remove_dir_all(machine.folder.join("system/proc")).unwrap();
    machine.assert_ends(
        &[],
        77,
        &["NOT TESTED", "echo 1 > /proc/sys/vm/nr_hugepages"],
    );
    // Where it cannot be told.
    machine.run("mkdir", &["-p", "system/proc/sys/vm/nr_hugepages"]);
    machine.assert_ends(&[], 77, &["NOT TESTED", "hugetlbfs"]);
    machine.run("rmdir", &["system/proc/sys/vm/nr_hugepages"]);
    machine.write("system/proc/sys/vm/nr_hugepages", "0\n");
    std::fs::remove_file(machine.folder.join("page.md")).unwrap();
    machine.assert_ends(&[], 2, &["docs/conformance.md"]);
}

/// Of a kernel that is not known, the tests count, and the page does not.
#[test]
fn another_kernel_is_tested_too() {
    if !has_xz() {
        return;
    }
    let machine = Machine::new("other");
    machine.install(&GOOD.replace("_private.a", "_private.new"));
    let rename = "cd package && mv linux-source-6.12 linux-source-7.1 && \
        tar -cJf ../system/usr/src/linux-source-7.1.tar.xz linux-source-7.1 && rm ../system/usr/src/*6.12*";
    machine.run("sh", &["-c", rename]);
    let says = [
        "linux-source-7.1: the table",
        "is not of this kernel",
        "private.new",
    ];
    machine.assert_ends(&[], 0, &says);
}

#[test]
fn the_machine_of_a_test_goes_with_it() {
    let folder = Machine::new("gone").folder.clone();
    assert!(!Path::new(&folder).exists());
}
