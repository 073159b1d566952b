//! Fork in the middle of everything.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, Pages, pages};
use common::{Meanwhile, OWNER, World, exit_code, forked, forked_to_work};
use gpusvm_mm::{AddressSpace, Block, Mirror, MmError, Outbound};
use gpusvm_mm_linux::{AdoptError, Allocation, Options, Process};
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
    what_moves_while_pages_come_home_for_a_child_is_in_it,
    a_child_has_an_engine_of_its_own,
    a_grandchild_sees_the_data_and_has_an_engine_of_its_own,
    a_child_goes_on_with_its_parents_memory,
    what_is_inherited_ends_in_a_child,
    what_had_ended_before_the_fork_goes_in_a_child,
    children_begin_one_after_the_other,
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

/// Pages are brought home for a child, and the program moves others that are on the device meanwhile, to
/// where nobody looks any more.
fn what_moves_while_pages_come_home_for_a_child_is_in_it(world: &World) {
    if world.is_signals() {
        return;
    }
    let memory = world.memory(ByteSize::mib(4), Pages::Base);
    world.out(memory.span());
    let [first, last] = [0, 2].map(|mib| memory.part(ByteSize::mib(mib), BLOCK_SIZE));
    let there = memory::map(BLOCK_SIZE);
    let meanwhile = Meanwhile::new(move || memory::remap(last, there.start(), false));
    let notifiers = world.process.notifiers();
    let notifier = notifiers.subscribe(first, meanwhile);
    let wanted = memory::value(1, last.start().get());
    let child = forked(|| i32::from(memory::load(there.start()) != wanted));
    assert_eq!(exit_code(child), 0, "the child reads something else");
    notifiers.unsubscribe(&notifier);
    assert_eq!(memory::load(there.start()), wanted);
    memory::unmap(first);
    memory::unmap(there);
    world.process.settle_events();
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

/// Memory goes out and comes home, by a touch and at the end.
fn works(world: &World) {
    world.each_kind(ByteSize::mib(4), |memory| {
        for seed in 2..4 {
            memory.fill(seed);
            assert_eq!(world.out(memory.span()), PageCount::new(1024));
            assert!(world.is_on_device(memory.at(BLOCK_SIZE)));
            memory.check(seed);
            assert!(!world.is_on_device(memory.at(BLOCK_SIZE)));
        }
    });
}

/// While the parent's goes on.
fn a_child_has_an_engine_of_its_own(world: &World) {
    let memory = world.memory(ByteSize::mib(4), Pages::Base);
    world.out(memory.span());
    let child = forked_to_work(|| {
        memory.check(1);
        let own = World::in_child(world.rung);
        works(&own);
        own.end();
        // It ended: there is room for another.
        let second = World::in_child(world.rung);
        works(&second);
        assert!(world.process.is_inherited() && !second.process.is_inherited());
        assert_eq!(
            world.process.lock_block(memory.span()).map(drop),
            Err(MmError::Gone),
            "for ever"
        );
        second.end();
    });
    let mut seed = 1;
    let code = loop {
        assert_eq!(world.out(memory.span()), PageCount::new(1024));
        memory.check(seed);
        seed += 1;
        memory.fill(seed);
        if let Some(code) = exit_code_now(child) {
            break code;
        }
    };
    assert_eq!(code, 0);
    world.out(memory.span());
    memory.check(seed);
}

/// Pages are on the device of the child's engine when the child forks.
fn a_grandchild_sees_the_data_and_has_an_engine_of_its_own(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Huge);
    world.out(memory.span());
    let child = forked_to_work(|| {
        let own = World::in_child(world.rung);
        let kept = own.memory(BLOCK_SIZE, Pages::Base);
        kept.fill(5);
        assert_eq!(own.out(kept.span()), PageCount::new(512));
        let grandchild = forked_to_work(|| {
            memory.check(1);
            kept.check(5);
            kept.fill(6);
            assert!(world.process.is_inherited() && own.process.is_inherited());
            assert_eq!(own.process.arm(kept.span()).map(drop), Err(MmError::Gone));
            let third = World::in_child(world.rung);
            works(&third);
            third.end();
            kept.check(6);
        });
        assert!(own.out(kept.span()) > PageCount::ZERO);
        kept.check(5);
        assert_eq!(exit_code(grandchild), 0);
        assert_eq!(own.out(kept.span()), PageCount::new(512));
        kept.check(5);
        kept.disarm(&own.process);
        kept.end(&own.process);
        own.end();
    });
    assert_eq!(exit_code(child), 0);
    memory.check(1);
}

/// What the parent's engine mirrored is the program's own in the child: its engine can have it.
fn a_child_goes_on_with_its_parents_memory(world: &World) {
    if world.is_signals() {
        // There is no adopting on this rung.
        return;
    }
    let memory = world.memory(ByteSize::mib(4), Pages::Base);
    world.out(memory.span());
    let child = forked_to_work(|| {
        let own = World::in_child(world.rung);
        let span = memory.span();
        assert_eq!(own.process.adopt(span.start(), span.len()), Ok(span));
        let token = own.process.arm(span).unwrap();
        assert_eq!(own.out(span), PageCount::new(1024), "it is shared at first");
        memory.check(1);
        memory.fill(2);
        own.out(span);
        own.process.disarm(span, token);
        own.process.unadopt(span).unwrap();
        memory.check(2);
        own.end();
    });
    assert_eq!(exit_code(child), 0);
    memory.check(1);
    assert_eq!(world.out(memory.span()), PageCount::new(1024));
    memory.check(1);
}

/// Handles are used and dropped, with an engine of the child's at work or without: nobody waits, and nothing
/// of the child's own goes.
fn what_is_inherited_ends_in_a_child(world: &World) {
    let slice = Allocation::<u64>::new(&world.process, 1 << 18).unwrap();
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    world.out(memory.span());
    for starts in [false, true] {
        let child = forked_to_work(|| {
            let own = starts.then(|| World::in_child(world.rung));
            let kept = own.as_ref().map(|own| own.memory(BLOCK_SIZE, Pages::Base));
            let out = || {
                if let (Some(own), Some(kept)) = (&own, &kept) {
                    assert_eq!(own.out(kept.span()), PageCount::new(512));
                }
            };
            out();
            let (span, process) = (memory.span(), &world.process);
            assert_eq!(process.bring_home(span), Ok(()));
            assert_eq!(process.adoption_of(span.start()), None);
            assert!(process.stats().events < u64::MAX && process.is_readable(span.start()));
            assert_eq!(process.allocate(BLOCK_SIZE), Err(AdoptError::Gone));
            assert!(matches!(process.mirrored(span.start()), Mirror::Gap(_)));
            memory.disarm(process);
            process.stop_migrations();
            process.settle_events();
            process.stop();
            // SAFETY: it is not used in this process any more, which ends before it would be dropped again.
            drop(unsafe { core::ptr::read(&raw const slice) });
            // SAFETY: as above.
            drop(unsafe { core::ptr::read(&raw const world.process) });
            if let Some(kept) = &kept {
                kept.check(1);
            }
            memory.check(1);
            out();
            if let (Some(own), Some(kept)) = (own, kept) {
                kept.check(1);
                kept.disarm(&own.process);
                kept.end(&own.process);
                own.end();
            }
        });
        assert_eq!(exit_code(child), 0);
        memory.check(1);
        world.out(memory.span());
    }
    assert!(slice.iter().all(|value| *value == 0));
}

/// Nobody but the forking thread has it, so that it is dropped in the child, down to the mappings that a
/// child does not get: in their place is something else by then.
fn what_had_ended_before_the_fork_goes_in_a_child(world: &World) {
    let rung = world.rung;
    world.process.stop();
    let ended = Process::start(Options {
        rung: Some(rung),
        ..Options::default()
    })
    .unwrap();
    let slice = Allocation::<u64>::new(&ended, 1 << 20).unwrap();
    ended.stop();
    let child = forked_to_work(|| {
        let own = World::in_child(rung);
        let kept: Vec<_> = (0..4)
            .map(|_| own.memory(ByteSize::mib(4), Pages::Base))
            .collect();
        for memory in &kept {
            assert_eq!(own.out(memory.span()), PageCount::new(1024));
        }
        // SAFETY: it is not used in this process any more, which ends before it would be dropped again.
        drop(unsafe { core::ptr::read(&raw const slice) });
        // SAFETY: as above.
        drop(unsafe { core::ptr::read(&raw const ended) });
        for memory in &kept {
            memory.check(1);
            assert_eq!(own.out(memory.span()), PageCount::new(1024));
            memory.check(1);
            memory.disarm(&own.process);
            memory.end(&own.process);
        }
        works(&own);
        own.end();
    });
    assert_eq!(exit_code(child), 0);
}

fn children_begin_one_after_the_other(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Huge);
    for _ in 0..5 {
        world.out(memory.span());
        let child = forked_to_work(|| {
            let own = World::in_child(world.rung);
            works(&own);
            own.end();
        });
        assert_eq!(exit_code(child), 0);
    }
    memory.check(1);
}

/// What a child ended with, if it has.
fn exit_code_now(pid: libc::pid_t) -> Option<i32> {
    let mut status = 0;
    // SAFETY: our own child, and a status of our own.
    let ended = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
    assert!(ended == 0 || ended == pid);
    assert!(ended == 0 || libc::WIFEXITED(status), "killed: {status:#x}");
    (ended == pid).then(|| libc::WEXITSTATUS(status))
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
