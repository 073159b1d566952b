//! Fork in the middle of everything.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, Pages, pages};
use common::{OWNER, World, exit_code, forked};
use gpusvm_mm::{AddressSpace, Block, MmError, Outbound};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount};
use std::ffi::{CStr, CString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

on_every_rung!(
    a_child_sees_the_data,
    calls_in_a_child_are_gone,
    shared_pages_move_after_the_sharing_is_broken,
    fork_waits_for_a_migration,
    a_fork_in_a_migration_loop,
    two_threads_fork,
    nobody_listens_after_the_end_nor_in_a_child,
);

fn a_child_sees_the_data(world: &World) {
    world.each_kind(ByteSize::mib(4), |memory| {
        memory.fill(1);
        world.out(memory.part(ByteSize::ZERO, BLOCK_SIZE));
        let child = forked(|| {
            let seen = memory.is_filled(1);
            // Its memory is its own.
            memory.fill(2);
            i32::from(!(seen && memory.is_filled(2)))
        });
        memory.check(1);
        assert_eq!(exit_code(child), 0);
        memory.fill(3);
        assert_eq!(world.out(memory.span()), PageCount::new(1024));
        memory.check(3);
    });
}

fn calls_in_a_child_are_gone(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Huge);
    world.out(memory.span());
    let child = forked(|| {
        let gone = [
            world.process.lock_block(memory.span()).map(drop) == Err(MmError::Gone),
            world.process.arm(memory.span()).map(drop) == Err(MmError::Gone),
            world.process.find_vma(memory.span().start()).map(drop) == Err(MmError::Gone),
            world.process.unadopt(memory.span()) == Err(MmError::Gone),
            world.process.pages_on_devices() == PageCount::ZERO,
        ];
        world.process.settle_events();
        world.process.stop();
        i32::from(gone.contains(&false))
    });
    assert_eq!(exit_code(child), 0);
}

/// While the child lives, and after it died.
fn shared_pages_move_after_the_sharing_is_broken(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(1);
        let go_on = pipe();
        let child = forked(|| {
            wait_byte(go_on.0);
            i32::from(!memory.is_filled(1))
        });
        for seed in 2..5 {
            assert_eq!(world.out(memory.span()), PageCount::new(512), "all of it");
            memory.check(seed - 1);
            memory.fill(seed);
        }
        send_byte(go_on.1);
        assert_eq!(exit_code(child), 0, "it keeps what it had");
        memory.check(4);
        let child = forked(|| 0);
        assert_eq!(exit_code(child), 0);
        assert_eq!(world.out(memory.span()), PageCount::new(512));
        memory.check(4);
        [go_on.0, go_on.1].into_iter().for_each(close);
    });
}

fn fork_waits_for_a_migration(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let out = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (out, memory) = (&out, &memory);
        scope.spawn(move || {
            let mut block = world.process.lock_block(memory.span()).unwrap();
            let collected = block
                .collect(memory.span(), OWNER, &mut |_, _| false)
                .unwrap();
            out.store(true, Ordering::Release);
            std::thread::sleep(Duration::from_millis(100));
            let taken = world.device.take(memory.span().page_count());
            assert!(world.device.copy_from(taken, collected.sources()));
            collected.commit(&mut |i| world.device.hold(taken, i));
        });
        while !out.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        let child = forked(|| i32::from(!memory.is_filled(1)));
        assert_eq!(exit_code(child), 0);
    });
    memory.check(1);
}

/// Story: the gate was passed with a block locked, and the fork waited for that block.
fn a_fork_in_a_migration_loop(world: &World) {
    let memory = world.memory(ByteSize::mib(4), Pages::Base);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                world.out(memory.span());
            }
        });
        for seed in 0..20 {
            memory.fill(seed);
            let child = forked(|| i32::from(!memory.is_filled(seed)));
            memory.check(seed);
            assert_eq!(exit_code(child), 0);
        }
        stop.store(true, Ordering::Relaxed);
    });
}

fn two_threads_fork(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Huge);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                world.out(memory.part(pages(1), pages(511)));
            }
        });
        let forks = || {
            for _ in 0..20 {
                assert_eq!(exit_code(forked(|| i32::from(!memory.is_filled(1)))), 0);
            }
        };
        let threads = [scope.spawn(forks), scope.spawn(forks)];
        for thread in threads {
            thread.join().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    memory::load(memory.span().start());
    memory.check(1);
}

/// Or whoever unmaps what stayed registered, of which nobody knew, waits for ever.
fn nobody_listens_after_the_end_nor_in_a_child(world: &World) {
    let listening = userfaultfds();
    assert_eq!(listening.is_empty(), world.is_signals());
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    world.out(memory.span());
    let child = forked(|| i32::from(listening.iter().any(|fd| is_userfaultfd(fd))));
    assert_eq!(
        exit_code(child),
        0,
        "the child hears of its parent's memory"
    );
    memory.check(1);
    world.process.stop();
    assert!(userfaultfds().is_empty());
    memory.check(1);
}

/// Where the descriptors that hear of memory are to be found.
fn userfaultfds() -> Vec<CString> {
    let numbers = 0..256;
    let paths = numbers.map(|fd| CString::new(format!("/proc/self/fd/{fd}")).unwrap());
    paths.filter(|path| is_userfaultfd(path)).collect()
}

fn is_userfaultfd(path: &CStr) -> bool {
    const NAME: &[u8] = b"anon_inode:[userfaultfd]";
    let mut target = [0u8; NAME.len() + 1];
    // SAFETY: a string, and room for so many bytes.
    let len = unsafe { libc::readlink(path.as_ptr(), target.as_mut_ptr().cast(), target.len()) };
    usize::try_from(len).is_ok_and(|len| &target[..len] == NAME)
}

fn pipe() -> (i32, i32) {
    let mut ends = [0; 2];
    // SAFETY: room for two.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    (ends[0], ends[1])
}

fn wait_byte(end: i32) {
    let mut byte = 0u8;
    // SAFETY: room for one.
    unsafe { libc::read(end, (&raw mut byte).cast(), 1) };
}

fn send_byte(end: i32) {
    // SAFETY: one byte.
    assert_eq!(unsafe { libc::write(end, (&raw const end).cast(), 1) }, 1);
}

fn close(end: i32) {
    // SAFETY: of `pipe`.
    unsafe { libc::close(end) };
}
