//! CPU faults: many at once, too early, and in vain.

#![allow(
    clippy::allow_attributes,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test may panic, and look at the clock"
)]

mod common;

use common::memory::{self, Pages, pages};
use common::{World, soon};
use gpusvm_mm::{AddressSpace, Block, Home};
use gpusvm_mm_linux::Rung;
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

on_every_rung!(
    two_threads_fault_on_one_block,
    the_last_fault_is_served_as_well,
    who_is_waited_for_is_answered_whoever_else_waits,
    many_threads_fault_on_many_blocks,
    a_fault_in_a_timeslice_sleeps,
    who_sleeps_behind_another_of_its_block_is_woken_whatever_becomes_of_that,
    more_blocks_wait_than_there_is_room,
    a_fault_on_a_busy_block_is_served_when_it_is_free,
    a_handler_that_panics_is_a_signal_and_no_hang,
    a_failed_copy_is_a_signal_and_no_zeroes,
    a_poisoned_page_heals,
);

fn two_threads_fault_on_one_block(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        for seed in 0..50 {
            memory.fill(seed);
            world.device.set_slow(Duration::from_micros(seed * 10));
            world.out(memory.span());
            std::thread::scope(|scope| {
                for part in 0..2 {
                    let part = memory.part(pages(part * 256), pages(256));
                    scope.spawn(move || memory.check_part(part, seed));
                }
            });
        }
        world.device.set_slow(Duration::ZERO);
    });
}

fn many_threads_fault_on_many_blocks(world: &World) {
    let memory = world.memory(ByteSize::mib(32), Pages::Base);
    for window in [2048, 64] {
        world.device.set_window(ByteSize::kib(window));
        for seed in 0..4 {
            memory.fill(seed);
            assert_eq!(world.out(memory.span()), PageCount::new(16 * 512));
            std::thread::scope(|scope| {
                for start in 0..16 {
                    let memory = &memory;
                    scope.spawn(move || {
                        for block in 0..16 {
                            let block = (start + block) % 16;
                            memory.check_part(
                                memory.part(ByteSize::mib(2 * block), BLOCK_SIZE),
                                seed,
                            );
                        }
                    });
                }
            });
        }
    }
    assert_eq!(world.process.stats().failed_faults, 0);
}

/// More threads fault than handlers serve, and then nobody does, whose fault would have somebody look.
fn the_last_fault_is_served_as_well(world: &World) {
    const THREADS: u64 = 8; // and this one
    if world.is_signals() {
        // A dropped page is no fault there.
        return;
    }
    let memory = world.memory(ByteSize::mib(2 * THREADS), Pages::Base);
    let (round, is_over) = (Barrier::new(9), AtomicBool::new(false));
    let touch = |thread: u64| {
        loop {
            round.wait();
            if is_over.load(Ordering::Relaxed) {
                return;
            }
            let found = memory::load(memory.at(ByteSize::mib(2 * thread)));
            assert_eq!(found, 0);
            round.wait();
        }
    };
    std::thread::scope(|scope| {
        let touch = &touch;
        for thread in 0..THREADS {
            scope.spawn(move || touch(thread));
        }
        let end = Instant::now() + Duration::from_millis(1500);
        while Instant::now() < end {
            memory::advise(memory.span(), libc::MADV_DONTNEED).unwrap();
            round.wait();
            round.wait();
        }
        is_over.store(true, Ordering::Relaxed);
        round.wait();
    });
    assert_eq!(world.process.stats().failed_faults, 0);
}

/// Whoever serves a fault waits for an engine thread, whose own fault is one of many.
fn who_is_waited_for_is_answered_whoever_else_waits(world: &World) {
    const THREADS: u64 = 8;
    if world.is_signals() {
        // A dropped page is no fault there.
        return;
    }
    let memory = world.memory(ByteSize::mib(2 * (THREADS + 1)), Pages::Base);
    let away = memory.part(ByteSize::ZERO, ByteSize::mib(2 * THREADS));
    let dropped = ByteSize::mib(2 * THREADS);
    for seed in 1..60 {
        memory.fill_part(away, seed);
        world.out(away);
        memory::advise(memory.part(dropped, pages(1)), libc::MADV_DONTNEED).unwrap();
        world.process.settle_events();
        world.device.waits.store(true, Ordering::Release);
        let together = Barrier::new(9);
        std::thread::scope(|scope| {
            let (memory, together) = (&memory, &together);
            for thread in 0..THREADS {
                scope.spawn(move || {
                    together.wait();
                    let at = ByteSize::mib(2 * thread);
                    memory.check_part(memory.part(at, pages(16)), seed);
                });
            }
            let _engine = gpusvm_guarded::EngineThread::enter().unwrap();
            together.wait();
            assert_eq!(memory::load(memory.at(dropped)), 0);
            world.device.waits.store(false, Ordering::Release);
        });
    }
    assert_eq!(world.device.waited_in_vain.load(Ordering::Relaxed), 0);
}

/// How much of the processor this thread had.
fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: room for the answer.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    let (secs, nanos) = (time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned());
    Duration::from_secs(secs) + Duration::from_nanos(nanos)
}

fn a_fault_in_a_timeslice_sleeps(world: &World) {
    const SLICE: Duration = Duration::from_millis(200);
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(1);
        world.out(memory.span());
        world.device.set_timeslice(world.process.now(), SLICE);
        let (began, cpu) = (Instant::now(), cpu_time());
        std::thread::scope(|scope| {
            // A second one, of the same block, is woken with the first.
            scope.spawn(|| memory::load(memory.at(pages(400))));
            memory::load(memory.at(pages(3)));
        });
        let (took, used) = (began.elapsed(), cpu_time() - cpu);
        assert!(took >= SLICE - Duration::from_millis(10), "{took:?}");
        assert!(took < SLICE * 20, "long after its timeslice: {took:?}");
        assert!(used < Duration::from_millis(10), "it was busy for {used:?}");
        memory.check(1);
    });
    assert!(world.process.stats().delayed_faults >= 2);
}

/// The table of delays has one entry for a block. The page of that entry is dropped while it sleeps.
fn who_sleeps_behind_another_of_its_block_is_woken_whatever_becomes_of_that(world: &World) {
    if world.is_signals() {
        // Nobody hears there of what is dropped.
        return;
    }
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    memory.fill(1);
    let (first, second) = (pages(3), pages(400));
    let expected = memory::load(memory.at(second));
    world.out(memory.span());
    let slice = Duration::from_millis(300);
    world.device.set_timeslice(world.process.now(), slice);
    let delayed = |count| world.process.stats().delayed_faults >= count;
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(memory::load(memory.at(first)), 0));
        soon("the first sleeps", || delayed(1));
        scope.spawn(|| assert_eq!(memory::load(memory.at(second)), expected));
        soon("the second sleeps", || delayed(2));
        memory::advise(memory.part(first, pages(1)), libc::MADV_DONTNEED).unwrap();
    });
}

/// The table of delays has room for 256 blocks: the others fault again and again until the time.
fn more_blocks_wait_than_there_is_room(world: &World) {
    const BLOCKS: u64 = 300;
    if world.is_signals() {
        // 128 threads can wait there at all; the others retry in the signal handler.
        return;
    }
    let memory = world.memory_of_one_page_each(BLOCKS);
    world
        .device
        .set_timeslice(world.process.now(), Duration::from_millis(500));
    std::thread::scope(|scope| {
        for block in 0..BLOCKS {
            let at = memory.at(ByteSize::mib(2 * block));
            let thread = std::thread::Builder::new().stack_size(64 << 10);
            let touch = move || assert_eq!(memory::load(at), block + 1);
            thread.spawn_scoped(scope, touch).unwrap();
        }
    });
    memory.disarm(&world.process);
    memory.end(&world.process);
}

fn a_fault_on_a_busy_block_is_served_when_it_is_free(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        memory.fill(2);
        world.out(memory.span());
        let block = world.process.lock_block(memory.span()).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| memory.check(2));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!thread.is_finished());
            assert!(matches!(
                block.home(memory.span().first_page()),
                Home::Device(_)
            ));
            drop(block);
            thread.join().unwrap();
        });
    });
}

/// What a child of the test dies of, which is the test once more, told what to do.
fn dies_of(test: &str, rung: Rung) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    let module = match rung {
        Rung::Move => "rung_1_move",
        Rung::Copy => "rung_2_copy",
        Rung::UserMode { moves: true } => "rung_3_user_moves",
        Rung::UserMode { moves: false } => "rung_3_user_copies",
        Rung::Signals => "rung_4_signals",
    };
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    let name = format!("{module}::{test}");
    child
        .args([name.as_str(), "--exact", "--nocapture"])
        .env(DIE, "1");
    child.stderr(std::process::Stdio::null());
    child.stdout(std::process::Stdio::null());
    child.status().unwrap().signal()
}

const DIE: &str = "GPUSVM_TEST_DIES";

fn is_to_die() -> bool {
    std::env::var_os(DIE).is_some()
}

/// A bus error; where there is no userfaultfd, the segmentation fault that it is.
fn expected_death(world: &World) -> i32 {
    if world.is_signals() {
        libc::SIGSEGV
    } else {
        libc::SIGBUS
    }
}

fn a_handler_that_panics_is_a_signal_and_no_hang(world: &World) {
    let name = "a_handler_that_panics_is_a_signal_and_no_hang";
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    world.out(memory.span());
    if is_to_die() {
        world.device.panicking.store(true, Ordering::Release);
        memory::load(memory.at(pages(5)));
        std::process::exit(1);
    }
    assert_eq!(dies_of(name, world.rung), Some(expected_death(world)));
    memory.check(1);
}

fn a_failed_copy_is_a_signal_and_no_zeroes(world: &World) {
    let name = "a_failed_copy_is_a_signal_and_no_zeroes";
    let memory = world.memory(BLOCK_SIZE, Pages::Huge);
    world.out(memory.span());
    if is_to_die() {
        world.device.fails.store(true, Ordering::Release);
        memory::load(memory.at(pages(5)));
        std::process::exit(1);
    }
    assert_eq!(dies_of(name, world.rung), Some(expected_death(world)));
    memory.check(1);
}

/// One page of a block is refused to the CPU, and comes home when its neighbours do.
fn a_poisoned_page_heals(world: &World) {
    if world.is_signals() {
        // Nothing is poisoned there: whoever touches the page is refused each time.
        return;
    }
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    world.out(memory.span());
    world.device.fails.store(true, Ordering::Release);
    let at = memory.at(pages(100));
    let mut byte = 0u8;
    let mut touch = || {
        // A guarded load: a bus error is an answer.
        // SAFETY: a load has no side effect.
        unsafe { gpusvm_guarded::copy(&raw mut byte, memory::pointer(at), 1) }
    };
    assert!(touch().is_err());
    world.device.fails.store(false, Ordering::Release);
    for part in memory.span().without(gpusvm_types::Span::page_of(at)) {
        memory.check_part(part.unwrap(), 1);
    }
    // The device had its bytes all the time: with the others it came home, and is healed.
    assert!(touch().is_ok());
    memory.check(1);
    assert_eq!(world.on_device(memory.span()), 0);
    let stats = world.process.stats();
    assert_eq!((stats.failed_faults, stats.panics), (1, 0));
    memory.disarm(&world.process);
    memory::unmap(memory.span());
    world.process.settle_events();
}
