//! Real programs, with the library and without: not a byte of what they say differs.

use crate::kit::library;
use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A folder of a test's own, that goes with it.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = format!("gpusvm-hmm-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // It is in a folder for what is temporary.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) fn is_there(program: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok();
    if !there {
        println!("skipped: no {program} here");
    }
    there
}

pub(super) fn run(program: &str, args: &[&OsStr], library: Option<&Path>) -> Output {
    let mut command = Command::new(program);
    command.args(args).env("LC_ALL", "C").stdin(Stdio::null());
    if let Some(library) = library {
        command.env("LD_PRELOAD", library);
    }
    command.output().unwrap()
}

/// Runs a program with and without the library. What it says, and how it ends, is the same.
fn assert_unaffected<S: AsRef<OsStr>>(program: &str, args: &[S]) -> Output {
    let args: Vec<_> = args.iter().map(AsRef::as_ref).collect();
    let without = run(program, &args, None);
    let with = run(program, &args, Some(&library()));
    let differ = with.stdout.iter().zip(&without.stdout);
    let first = differ
        .into_iter()
        .position(|(with, without)| with != without);
    assert_eq!(first, None, "{program}: the first byte that differs");
    assert_eq!(with.stdout.len(), without.stdout.len(), "{program}");
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(said(&with), said(&without), "{program}");
    assert_eq!(with.status, without.status, "{program}");
    without
}

/// So many lines of no order, 40 bytes each.
fn write_lines(path: &Path, lines: u64) {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path).unwrap());
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for line in 0..lines {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(line | 1);
        writeln!(
            file,
            "{:016x} {line:010} {:011}",
            state >> 7,
            state % 99_999_999_977
        )
        .unwrap();
    }
    file.flush().unwrap();
}

/// A program that opens no device does what it does without the library.
#[test]
fn a_program_without_a_device_is_not_disturbed() {
    let script = "import os,hashlib\n\
        d=[str(i)*50 for i in range(100000)]\n\
        r,w=os.pipe()\n\
        if os.fork()==0:\n os.write(w,hashlib.md5(''.join(d).encode()).hexdigest().encode()); os._exit(0)\n\
        os.wait(); print(os.read(r,99)); os.execvp('sh',['sh','-c','seq 200000 | sort -r | cksum'])\n";
    if is_there("python3") {
        let done = assert_unaffected("python3", &["-c", script]);
        assert!(done.status.success());
    }
}

/// Much memory, threads, temporary files, and programs that compress them.
#[test]
fn sort_of_a_large_file() {
    if !is_there("sort") {
        return;
    }
    let folder = Folder::new("sort");
    let path = folder.0.join("lines");
    write_lines(&path, 400_000);
    let (path, folder) = (path.to_str().unwrap(), folder.0.to_str().unwrap());
    let sorted = assert_unaffected("sort", &["--parallel=4", path]);
    assert!(sorted.status.success());
    assert_eq!(
        sorted.stdout.len() as u64,
        std::fs::metadata(path).unwrap().len()
    );
    let small = ["--parallel=4", "-S", "4M", "-T", folder, path];
    let with_files = assert_unaffected("sort", &small);
    assert!(with_files.stdout == sorted.stdout && with_files.status.success());
    if is_there("gzip") {
        let compressed = [&["--compress-program=gzip"], &small[..]].concat();
        let compressed = assert_unaffected("sort", &compressed);
        assert!(compressed.stdout == sorted.stdout && compressed.status.success());
    }
    let refused = assert_unaffected("sort", &["-n", "/nowhere/at/all"]);
    assert_eq!(refused.status.code(), Some(2));
}

/// A pool of children that were forked, threads, and other programs.
#[test]
fn python_with_children_threads_and_programs() {
    let script = "
import multiprocessing as mp, threading, subprocess, hashlib, mmap, os, sys

def digest(n):
    rows = [str(n * i) * 20 for i in range(5000)]
    return hashlib.md5(''.join(sorted(rows)).encode()).hexdigest()

if __name__ == '__main__':
    mp.set_start_method('fork')
    with mp.Pool(4) as pool:
        print(pool.map(digest, range(8)))
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: digest(n)})) for n in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(sorted(found.items()))
    for close_fds in (True, False):
        done = subprocess.run(['sh', '-c', 'seq 1000 | tail -n 1; exit 7'], capture_output=True,
                              close_fds=close_fds)
        print(done.stdout, done.stderr, done.returncode)
    memory = mmap.mmap(-1, 8 << 20)
    memory[:] = bytes(range(256)) * (32 << 10)
    if os.fork() == 0:
        memory[5] = 99
        os._exit(memory[:4096].count(99) != 17)
    print(os.wait()[1], memory[5], hashlib.md5(memory).hexdigest())
    sys.stdout.flush()
    os.execvp('sh', ['sh', '-c', 'echo executed; exit 5'])
";
    if is_there("python3") {
        let done = assert_unaffected("python3", &["-c", script]);
        assert_eq!(done.status.code(), Some(5));
        let said = String::from_utf8_lossy(&done.stdout);
        assert!(
            said.contains("b'1000\\n' b'' 7\nb'1000\\n' b'' 7\n0 99 "),
            "{said}"
        );
    }
}

/// Children that are forked and executed, pipes, and ends of all kinds.
#[test]
fn shells_and_pipelines() {
    let script = "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo $i $(echo $i | tr 1-9 a-i); done;
        seq 300000 | sort -r | sed -n 's/7/x/gp' | uniq | cksum;
        (exit 4) || echo status $?; exec 5>/dev/null; echo gone >&5; ls /nowhere";
    let done = assert_unaffected("sh", &["-c", script]);
    assert!(!done.status.success() && !done.stderr.is_empty());
    for end in ["exit 3", "kill -KILL $$", "kill -SEGV $$", "true"] {
        assert_unaffected("sh", &["-c", end]);
    }
}
