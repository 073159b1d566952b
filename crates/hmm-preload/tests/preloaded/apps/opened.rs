//! Programs that have a device open, and do what programs do.

use super::programs::{is_there, run};
use crate::kit::{
    Area, Device, Do, PAGE, Span, again, assert_child, assert_passes, assert_success, engine_runs,
    fork, is_preloaded, library, role,
};
use std::process::Command;

/// The program's heap on the device: it grows, moves, is forked and freed as ever, and what is in it stays.
#[test]
fn a_heap_on_the_device_is_a_heap() {
    if !is_preloaded("apps::opened::a_heap_on_the_device_is_a_heap") {
        return;
    }
    let device = Device::open();
    let mut data = vec![0u8; 1024 * PAGE];
    let is_right = |numbers: &[u64]| numbers.iter().zip(0..).all(|(number, n)| *number == n);
    for round in 0..5u64 {
        let mut numbers: Vec<u64> = (0..(1 << 18) + round * 512).collect();
        for _ in 0..3 {
            let at = numbers.as_mut_ptr().cast::<u8>();
            let skip = at.align_offset(PAGE);
            let at = at.wrapping_add(skip);
            let pages = ((numbers.len() * 8 - skip) / PAGE).min(1024);
            let pages = Span { at, pages };
            device.run(Do::MigrateToDev, pages, &mut data).unwrap();
            // It grows, and with it moves, while pages of it are on the device.
            let len = numbers.len() as u64;
            numbers.extend(len..len * 2);
            assert!(is_right(&numbers));
        }
        let at = numbers.as_mut_ptr().cast::<u8>();
        let at = at.wrapping_add(at.align_offset(PAGE));
        let pages = Span { at, pages: 512 };
        device.run(Do::MigrateToDev, pages, &mut data).unwrap();
        let child = fork(|| {
            let copy = numbers.clone();
            is_right(&numbers) && is_right(&copy)
        });
        assert_child(child, &format!("round {round}"));
        assert!(Command::new("true").status().unwrap().success());
    }
    device.close();
}

const OWN: &str = "apps::opened::one_with_a_device_open";

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
    let device = Device::open();
    let area = Area::new(2048);
    area.fill(7);
    device.take(area.all());
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
            assert_passes(&mut again(OWN, "executed"));
        }
    });
    // A fork brings all home; it can go again.
    assert!(area.is_filled(7));
    device.take(area.all());
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
    assert!(device.has(area.all()), "nobody touched it");
    assert!(area.is_filled(7));
    device.close();
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
