//! Real programs, with the library and without: not a byte of what they say differs.

use crate::kit::{
    Area, again, assert_child, assert_success, close, engine_runs, fork, is_preloaded, library,
    open, role,
};
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

fn is_there(program: &str) -> bool {
    let there = Command::new(program).arg("--version").output().is_ok();
    if !there {
        println!("skipped: no {program} here");
    }
    there
}

fn run(program: &str, args: &[&OsStr], library: Option<&Path>) -> Output {
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

const OWN: &str = "programs::one_with_a_device_open";

/// A program that opens the device, migrates, and then does what programs do, with the device open: threads that
/// take and give back memory, children, other programs. What it has on the device stays there, and is right.
#[test]
fn one_with_a_device_open() {
    // Executed.
    if role().is_some_and(|role| role == "executed") {
        let strings: Vec<_> = (0..50_000).map(|n| n.to_string()).collect();
        assert_eq!(strings.concat().len(), 238_890);
        return;
    }
    if !is_preloaded(OWN) {
        return;
    }
    let fd = open(0);
    let area = Area::new(2048);
    area.fill(7);
    area.take(fd);
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || allocate(thread));
        }
        for round in 0..5 {
            let child = fork(|| {
                allocate(round);
                area.is_filled(7) && !engine_runs()
            });
            assert_child(child, "the child");
            let executed = again(OWN, "executed").output().unwrap();
            assert_success(&executed);
        }
    });
    // A fork brings all home; it can go again.
    assert!(area.is_filled(7));
    area.take(fd);
    // Starting a program is no fork of ours: nothing moves.
    let said = Command::new("sh")
        .args(["-c", "seq 100000 | sort | cksum"])
        .output();
    assert_success(&said.unwrap());
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || allocate(thread));
        }
    });
    assert!(area.is_local(fd), "nobody touched it");
    assert!(area.is_filled(7));
    close(fd).unwrap();
    assert!(!engine_runs() && area.is_filled(7));
}

/// Takes and gives back pieces of memory of all sizes. What is in them stays.
fn allocate(seed: usize) {
    let mut state = seed + 1;
    let mut kept: Vec<Vec<usize>> = Vec::new();
    for n in 0..20_000 {
        state = state
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(n | 1);
        let len = match state >> 60 {
            0 => 40_000,
            1..4 => 1000,
            _ => 1 + (state >> 40) % 60,
        };
        kept.push((0..len).map(|word| word ^ len).collect());
        if kept.len() > 200 {
            let piece = kept.swap_remove((state >> 20) % 200);
            assert!((0..).zip(&piece).all(|(n, word)| *word == n ^ piece.len()));
        }
    }
}

/// A child of vfork has its parent's memory, and closes what it inherited: the parent's device stays. So it is
/// whether a program is started with its parent's descriptors or without.
#[test]
fn python_with_a_device_open() {
    let script = "
import ctypes, fcntl, mmap, os, struct, subprocess, threading
fd = os.open('/dev/hmm_dmirror0', os.O_RDWR)
size = 64 * 4096
memory, data = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), bytearray(size)
memory[:] = bytes(range(256)) * (size // 256)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
into = ctypes.addressof(ctypes.c_char.from_buffer(data))
def run(number):
    words = struct.pack('5Q', address, into, 64, 0, 0)
    return struct.unpack('5Q', fcntl.ioctl(fd, 0xc0284800 | number, words))[3]
print(run(2), data == memory[:])
run(2)
def is_local():
    run(4)
    return set(data[:64]) == {0x22}
print(is_local())
for n in range(5):
    for close_fds, inherit in ((True, ()), (False, ()), (True, (fd,))):
        done = subprocess.run(['sh', '-c', 'seq 9 | tail -n 1'], capture_output=True,
                              close_fds=close_fds, pass_fds=inherit)
        assert (done.returncode, done.stdout) == (0, b'9\\n'), done
print(is_local())
subprocess.run(['true'], preexec_fn=lambda: os.closerange(3, 500))
print(is_local(), run(2))
child = os.fork()
if child == 0:
    os._exit(memory[:] != bytes(range(256)) * (size // 256))
print(os.waitpid(child, 0)[1])
os.close(fd)
print(memory[:] == bytes(range(256)) * (size // 256), threading.active_count())
";
    if !is_there("python3") || !gpusvm_testkit::require::require_uffd() {
        return;
    }
    let done = run(
        "python3",
        &["-c".as_ref(), script.as_ref()],
        Some(&library()),
    );
    assert_success(&done);
    // What was forked with Python code in the child brought all home.
    let said = "64 True\nTrue\nTrue\nFalse 64\n0\nTrue 1\n";
    assert_eq!(String::from_utf8_lossy(&done.stdout), said);
    assert_eq!(String::from_utf8_lossy(&done.stderr), "");
}
