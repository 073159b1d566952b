//! The program moves memory that is elsewhere, and does something else to it before the engine has
//! done anything about the move.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, Memory, Pages, check_moved, check_zero};
use common::{Meanwhile, OWNER, World, exit_code, forked};
use gpusvm_mm::{AddressSpace, Block, Mirror, MmError, Outbound};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, PageIndex, Span};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

on_userfaultfd_rungs!(
    moved_twice_while_collected,
    dropped_after_it_moved_while_collected,
    dropped_after_it_moved_from_the_device,
    forked_right_after_it_moved,
    moved_from_the_device_onto_memory_that_is_collected,
    what_arrives_while_devices_are_flushed_is_not_taken,
    what_is_written_while_devices_are_flushed_after_it_was_dropped_is_not_lost,
    moved_from_the_device_onto_memory_that_a_unit_works_on,
    new_memory_where_pages_left_while_they_were_unmapped_keeps_its_data,
    memory_that_arrives_stays_registered_when_what_was_there_is_let_go,
    what_is_let_go_on_its_way_is_not_registered_where_it_arrives,
    what_is_mapped_where_memory_passed_through_is_not_registered,
    what_is_mapped_where_memory_went_is_not_armed,
    what_was_where_grown_memory_goes_is_forgotten_as_a_whole,
    what_is_beside_pages_that_are_unmapped_on_the_way_keeps_its_data,
);

/// A mapping of the program's own, filled and armed.
fn own(world: &World, len: ByteSize) -> Memory {
    world.memory(len, Pages::Base)
}

/// Pages are on their way out when the program moves them twice: what comes back goes to the end.
fn moved_twice_while_collected(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    memory.fill(6);
    let (first, second) = (memory::map(BLOCK_SIZE), memory::map(BLOCK_SIZE));
    let mut block = world.process.lock_block(memory.span()).unwrap();
    let collected = block.collect(memory.span(), OWNER, &mut |_, _| false);
    memory::remap(memory.span(), first.start(), false);
    memory::remap(first, second.start(), false);
    drop(collected);
    drop(block);
    world.process.settle_events();
    check_moved(second, memory.span(), 6);
    end_moved(world, second);
}

/// The program moves pages that are on their way out, and then gives them up: nothing comes back.
fn dropped_after_it_moved_while_collected(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    memory.fill(6);
    let there = memory::map(BLOCK_SIZE);
    let mut block = world.process.lock_block(memory.span()).unwrap();
    let collected = block.collect(memory.span(), OWNER, &mut |_, _| false);
    memory::remap(memory.span(), there.start(), false);
    memory::advise(there, libc::MADV_DONTNEED).unwrap();
    drop(collected);
    drop(block);
    world.process.settle_events();
    check_zero(there);
    end_moved(world, there);
}

/// As before, but the pages are on the device, and nothing of the move has been done yet.
fn dropped_after_it_moved_from_the_device(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    memory.fill(6);
    world.out(memory.span());
    let there = memory::map(BLOCK_SIZE);
    let block = world.process.lock_block(memory.span()).unwrap();
    memory::remap(memory.span(), there.start(), false);
    memory::advise(there, libc::MADV_DONTNEED).unwrap();
    drop(block);
    check_zero(there);
    world.process.settle_events();
    assert_eq!(world.device.held(), 0);
    end_moved(world, there);
}

/// The program forks right after it moved pages that are on the device.
fn forked_right_after_it_moved(world: &World) {
    for _ in 0..8 {
        let memory = own(world, ByteSize::mib(16));
        memory.fill(6);
        world.out(memory.span());
        let there = memory::map(ByteSize::mib(16));
        memory::remap(memory.span(), there.start(), false);
        let child = forked(|| {
            let is_right = |page: PageIndex| {
                let offset = page.start().offset_from(there.start());
                memory::load(page.start()) == memory::value(6, memory.at(offset).get())
            };
            i32::from(!there.pages().all(is_right))
        });
        assert_eq!(exit_code(child), 0, "the child has the data");
        check_moved(there, memory.span(), 6);
        end_moved(world, there);
    }
}

/// Ends the sharing of memory that was moved.
fn end_moved(world: &World, there: Span) {
    world.process.settle_events();
    world.process.unadopt(there).unwrap();
    memory::unmap(there);
    world.process.settle_events();
}

/// What is missing at the new place is not a hole of what was there: it is on the device.
fn moved_from_the_device_onto_memory_that_is_collected(world: &World) {
    let (below, above) = (own(world, BLOCK_SIZE), own(world, BLOCK_SIZE));
    below.fill(1);
    above.fill(6);
    world.out(above.span());
    std::thread::scope(|scope| {
        let mut block = world.process.lock_block(below.span()).unwrap();
        let collected = block.collect(below.span(), OWNER, &mut |_, _| false);
        memory::remap(above.span(), below.span().start(), false);
        let reader = scope.spawn(|| check_moved(below.span(), above.span(), 6));
        std::thread::sleep(Duration::from_millis(30));
        drop(collected);
        drop(block);
        reader.join().unwrap();
    });
    end_moved(world, below.span());
}

/// Pages were marked to be taken out, and others are there when they are taken.
fn what_arrives_while_devices_are_flushed_is_not_taken(world: &World) {
    let (below, above) = (own(world, BLOCK_SIZE), own(world, BLOCK_SIZE));
    below.fill(1);
    above.fill(6);
    let (from, to) = (above.span(), below.span());
    let act = move || memory::remap(from, to.start(), false);
    let meanwhile = Meanwhile::new(act);
    let notifiers = world.process.notifiers();
    let notifier = notifiers.subscribe(to, meanwhile);
    assert_eq!(world.out(to), PageCount::ZERO);
    check_moved(to, from, 6);
    world.process.settle_events();
    notifiers.unsubscribe(&notifier);
    assert_eq!(world.out(to), to.page_count());
    check_moved(to, from, 6);
    end_moved(world, to);
}

/// Pages were marked to be taken out, the program drops them, and writes new ones before they are taken.
///
/// Story: the new ones were taken, and given up, because that is what becomes of what was dropped.
#[expect(clippy::disallowed_methods, reason = "a thread of the program's")]
fn what_is_written_while_devices_are_flushed_after_it_was_dropped_is_not_lost(world: &World) {
    let memory = own(world, BLOCK_SIZE);
    let (span, written) = (memory.span(), Arc::new(AtomicBool::new(false)));
    let done = Arc::clone(&written);
    let writer = move || {
        memory::advise(span, libc::MADV_DONTNEED).unwrap();
        memory::store(span.start(), 7);
        done.store(true, Ordering::SeqCst);
    };
    let act = move || {
        std::thread::spawn(writer);
        // It may have to wait for the block.
        std::thread::sleep(Duration::from_millis(100));
    };
    let meanwhile = Meanwhile::new(act);
    let notifiers = world.process.notifiers();
    let notifier = notifiers.subscribe(span, meanwhile);
    world.out(span);
    common::soon("the store is done", || written.load(Ordering::SeqCst));
    notifiers.unsubscribe(&notifier);
    assert_eq!(memory::load(span.start()), 7);
    memory.disarm(&world.process);
    memory.end(&world.process);
}

/// What is missing at the new place is not given to a unit of a device, which must not wait, as zeroes: it
/// is refused, and finds the data later.
///
/// Story: it was given a page of zeroes, which was then taken for newer than the data.
fn moved_from_the_device_onto_memory_that_a_unit_works_on(world: &World) {
    gpusvm_guarded::install().unwrap();
    let (below, above) = (own(world, BLOCK_SIZE), own(world, BLOCK_SIZE));
    above.fill(6);
    world.out(above.span());
    std::thread::scope(|scope| {
        let block = world.process.lock_block(below.span()).unwrap();
        memory::remap(above.span(), below.span().start(), false);
        let unit = scope.spawn(|| {
            let _on_record = gpusvm_guarded::EngineThread::enter().unwrap();
            let at = memory::pointer(below.span().start()).cast::<u64>();
            loop {
                // SAFETY: an address of the test's.
                match unsafe { gpusvm_guarded::load64(at) } {
                    Ok(found) => return found,
                    Err(_) => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        std::thread::sleep(Duration::from_millis(30));
        drop(block);
        let first = above.span().start();
        assert_eq!(unit.join().unwrap(), memory::value(6, first.get()));
    });
    check_moved(below.span(), above.span(), 6);
    end_moved(world, below.span());
}

/// Pages are on their way out when the program unmaps them and maps others there: what is left behind
/// by those that went is not taken from these.
fn new_memory_where_pages_left_while_they_were_unmapped_keeps_its_data(world: &World) {
    for moves in [false, true] {
        let memory = own(world, BLOCK_SIZE);
        let span = memory.span();
        let mut block = world.process.lock_block(span).unwrap();
        let collected = block.collect(span, OWNER, &mut |_, _| false).unwrap();
        if moves {
            let other = memory::map(BLOCK_SIZE);
            memory::store(other.start(), 7);
            memory::remap(other, span.start(), false);
        } else {
            memory::unmap(span);
            memory::map_at(span);
            memory::store(span.start(), 7);
        }
        let taken = world.device.take(span.page_count());
        assert!(world.device.copy_from(taken, collected.sources()));
        collected.commit(&mut |i| world.device.hold(taken, i));
        drop(block);
        assert_eq!(memory::load(span.start()), 7);
        memory::unmap(span);
        world.process.settle_events();
        assert_eq!(world.device.held(), 0);
    }
}

/// A block whose lock keeps the event thread from doing what is read from now on.
fn with_events_undone(world: &World, act: impl FnOnce()) {
    let busy = own(world, BLOCK_SIZE);
    let block = world.process.lock_block(busy.span()).unwrap();
    memory::unmap(busy.span());
    act();
    drop(block);
}

/// Who lets go of a place must not let go of what came there since: it is on the device.
fn memory_that_arrives_stays_registered_when_what_was_there_is_let_go(world: &World) {
    let (here, from) = (own(world, BLOCK_SIZE), own(world, BLOCK_SIZE));
    from.fill(6);
    world.out(from.span());
    with_events_undone(world, || {
        memory::remap(from.span(), here.span().start(), false);
        here.disarm(&world.process);
        assert!(memory::is_registered(here.span().start()));
    });
    check_moved(here.span(), from.span(), 6);
    end_moved(world, here.span());
}

/// The registration goes with the mapping, and somebody has to know of it: or whoever unmaps it after the
/// engine has ended waits for ever.
fn what_is_let_go_on_its_way_is_not_registered_where_it_arrives(world: &World) {
    let from = own(world, BLOCK_SIZE);
    from.fill(6);
    let there = memory::map(BLOCK_SIZE);
    with_events_undone(world, || {
        memory::remap(from.span(), there.start(), false);
        from.disarm(&world.process);
    });
    world.process.settle_events();
    check_moved(there, from.span(), 6);
    world.process.unadopt(there).unwrap();
    assert!(!memory::is_registered(there.start()));
    memory::unmap(there);
}

/// It would tell of an end that nobody waits for.
fn what_is_mapped_where_memory_passed_through_is_not_registered(world: &World) {
    let from = own(world, BLOCK_SIZE);
    from.fill(6);
    world.out(from.span());
    let (here, there) = (memory::map(BLOCK_SIZE), memory::map(BLOCK_SIZE));
    with_events_undone(world, || {
        memory::remap(from.span(), here.start(), false);
        memory::remap(here, there.start(), false);
        memory::map_at(here);
    });
    check_moved(there, from.span(), 6);
    world.process.settle_events();
    assert!(!memory::is_registered(here.start()));
    memory::unmap(here);
    end_moved(world, there);
}

/// Nobody would end what began for it.
fn what_is_mapped_where_memory_went_is_not_armed(world: &World) {
    let memory = Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    let span = memory.span();
    memory.arm(&world.process);
    with_events_undone(world, || {
        memory::unmap(span);
        memory::map_at(span);
        let refused = world.process.arm(span);
        assert_eq!(refused, Err(MmError::NotMirrored { span }));
        assert!(!memory::is_registered(span.start()));
    });
    memory::unmap(span);
    world.process.settle_events();
}

/// A mapping that has grown is heard of as a whole, and mirrored as far as it was before: where it goes,
/// nothing is left of what was there, though nobody heard of its end.
///
/// Story: the rest was marked as unmapped for ever, and every fault of a device there failed.
fn what_was_where_grown_memory_goes_is_forgotten_as_a_whole(world: &World) {
    let (four, eight) = (memory::pages(4), memory::pages(8));
    let from = own(world, four);
    let grown = memory::grow(from.span(), eight);
    let here = memory::map(eight);
    let adopted = world.process.adopt(here.start(), eight);
    assert_eq!(adopted, Ok(here));
    from.fill(6);
    memory::remap(grown, here.start(), false);
    world.process.settle_events();
    let (head, tail) = (
        Span::from_len(here.start(), four).unwrap(),
        Span::from_len(here.start() + four, four).unwrap(),
    );
    check_moved(head, from.span(), 6);
    assert_eq!(world.process.mirrored(head.start()), Mirror::Mapping(head));
    let beyond = world.process.mirrored(tail.start());
    assert!(matches!(beyond, Mirror::Gap(_)), "{beyond:?}");
    world.process.unadopt(head).unwrap();
    memory::unmap(here);
    world.process.settle_events();
}

/// While pages leave a block, the program unmaps some of them: at the start, or in the middle.
///
/// Story: where pages are copied, the kernel lets others in while it drops what was copied. It dropped nothing
/// when the first page was gone by then, so the CPU went on with the copy in RAM and the device with its own;
/// and when one in the middle was gone, it told of the rest twice, and the second time counted as the
/// program's.
fn what_is_beside_pages_that_are_unmapped_on_the_way_keeps_its_data(world: &World) {
    let mut random = 1u64;
    for round in 0..300 {
        let memory = own(world, memory::pages(16));
        memory.fill(round);
        let gone = memory.part(memory::pages(8 * (round % 2)), memory::pages(1));
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        let spins = (random >> 33) % 40_000;
        let locked = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut block = world.process.lock_block(memory.span()).unwrap();
                locked.store(true, Ordering::Release);
                let collected = block.collect(memory.span(), OWNER, &mut |_, _| false);
                let taken = world.device.take(memory.span().page_count());
                match collected {
                    Ok(pages) if world.device.copy_from(taken, pages.sources()) => {
                        pages.commit(&mut |i| world.device.hold(taken, i));
                    }
                    // It was gone before it was copied.
                    _ => {}
                }
                world
                    .device
                    .let_go_unused(taken, memory.span().page_count());
            });
            while !locked.load(Ordering::Acquire) {
                std::thread::yield_now();
            }
            (0..spins).for_each(|_| std::hint::spin_loop());
            memory::unmap(gone);
        });
        for rest in memory.span().without(gone).into_iter().flatten() {
            memory.check_part(rest, round);
            memory::unmap(rest);
        }
        world.process.settle_events();
        assert_eq!(world.device.held(), 0, "round {round}");
    }
}
