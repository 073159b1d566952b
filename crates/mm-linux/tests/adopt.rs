//! What is mirrored, what is watched, and what costs nothing.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, Memory, Pages, check_zero, is_registered, pages};
use common::{World, soon};
use gpusvm_mm::{AddressSpace, Block, MmError};
use gpusvm_mm_linux::AdoptError;
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, Span, VirtAddr};

on_userfaultfd_rungs!(
    each_refusal_names_what_is_wrong,
    memory_of_another_userfaultfd_is_taken,
    the_later_adoption_counts,
    unadopted_memory_is_plain,
    arming_is_counted_by_block,
    memory_that_is_not_armed_faults_natively,
    a_token_of_a_mapping_that_is_gone_does_nothing,
    a_block_is_let_go_though_its_first_page_was_unmapped,
    memory_that_was_replaced_unheard_is_taken_over,
    a_move_onto_memory_that_is_gone_unheard_loses_nothing,
    pages_leave_armed_memory_only,
    armed_memory_that_was_never_touched_is_zeroes,
);
on_rungs!(
    rung_4_signals,
    gpusvm_mm_linux::Rung::Signals,
    nothing_is_adopted_without_events
);

fn each_refusal_names_what_is_wrong(world: &World) {
    let adopt = |at: VirtAddr, len| world.process.adopt(at, len);
    let span = memory::map(ByteSize::mib(4));
    let (at, len) = (span.start(), span.len());

    let inside = VirtAddr::new(at.get() + 5);
    let little = ByteSize::new(4096);
    let refused = Err(AdoptError::Empty {
        at: inside,
        len: little,
    });
    assert_eq!(adopt(inside, little), refused);
    let nothing = Err(AdoptError::Empty {
        at,
        len: ByteSize::ZERO,
    });
    assert_eq!(adopt(at, ByteSize::ZERO), nothing);

    let hole = Span::from_len(at + pages(100), pages(3)).unwrap();
    memory::unmap(hole);
    assert_eq!(
        adopt(at, len),
        Err(AdoptError::Unmapped { at: hole.start() })
    );
    memory::map_at(hole);

    memory::protect(hole, libc::PROT_NONE);
    assert_eq!(
        adopt(at, len),
        Err(AdoptError::NotReadable { mapping: hole })
    );
    memory::unmap(hole);

    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    let place = memory::pointer(hole.start()).cast();
    // SAFETY: nothing that is there is replaced.
    let shared = unsafe { libc::mmap(place, hole.len().as_usize(), access, flags, -1, 0) };
    assert_eq!(shared, place);
    assert_eq!(
        adopt(at, len),
        Err(AdoptError::NotAnonymous { mapping: hole })
    );
    memory::unmap(hole);
    assert!(!is_registered(at), "nothing of it is left");
    memory::unmap(span);
    assert_eq!(
        world.process.allocate(ByteSize::ZERO),
        Err(AdoptError::Empty {
            at: VirtAddr::new(0),
            len: ByteSize::ZERO
        })
    );
    let too_much = ByteSize::new(u64::MAX);
    assert_eq!(
        world.process.allocate(too_much),
        Err(AdoptError::NoMemory { len: too_much })
    );
    world.process.stop();
    assert_eq!(adopt(at, len), Err(AdoptError::Gone));
    assert_eq!(world.process.allocate(BLOCK_SIZE), Err(AdoptError::Gone));
}

fn nothing_is_adopted_without_events(world: &World) {
    let span = memory::map(BLOCK_SIZE);
    let refused = world.process.adopt(span.start(), span.len());
    assert_eq!(refused, Err(AdoptError::NotOnThisRung));
    memory::unmap(span);
}

/// A second engine is as foreign as the program's own userfaultfd.
fn memory_of_another_userfaultfd_is_taken(world: &World) {
    let options = gpusvm_mm_linux::Options {
        rung: Some(world.rung),
        ..gpusvm_mm_linux::Options::default()
    };
    let other = gpusvm_mm_linux::Process::start(options).unwrap();
    let span = memory::map(ByteSize::mib(4));
    let theirs = Span::from_len(span.start() + BLOCK_SIZE, BLOCK_SIZE).unwrap();
    assert_eq!(other.adopt(theirs.start(), theirs.len()), Ok(theirs));
    let token = other.arm(theirs).unwrap();
    let refused = world.process.adopt(span.start(), span.len());
    assert_eq!(refused, Err(AdoptError::Taken { span: theirs }));
    assert!(
        !is_registered(span.start()),
        "what was registered is let go"
    );
    assert!(is_registered(theirs.start()), "what is theirs is not");
    other.disarm(theirs, token);
    assert_eq!(world.process.adopt(span.start(), span.len()), Ok(span));
    world.process.unadopt(span).unwrap();
    other.stop();
    memory::unmap(span);
}

/// Part of the memory is adopted again while all of it is on the device.
fn the_later_adoption_counts(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    memory.fill(2);
    world.out(memory.span());
    world.device.set_window(ByteSize::kib(4));
    let token = |at| world.process.adoption_of(memory.at(pages(at))).unwrap();
    let first = token(0);
    let part = memory.part(pages(3), pages(9));
    assert_eq!(world.process.adopt(part.start(), part.len()), Ok(part));
    assert_eq!(world.on_device(memory.span()), 503, "that part came home");
    assert!(token(3) != first && token(12) == first);
    memory.check_part(part, 2);
    world.process.unadopt_if(part, first).unwrap();
    assert!(world.process.adoption_of(part.start()).is_some());
    world.process.unadopt(part).unwrap();
    assert!(world.process.adoption_of(part.start()).is_none());
    memory.check(2);
    memory.disarm(&world.process);
    memory.end(&world.process);
}

fn unadopted_memory_is_plain(world: &World) {
    let memory = world.memory(ByteSize::mib(4), Pages::Base);
    memory.fill(3);
    world.out(memory.span());
    world.process.unadopt(memory.span()).unwrap();
    assert!(!is_registered(memory.span().start()));
    let faults = world.process.stats().cpu_faults;
    memory.check(3);
    memory::advise(memory.span(), libc::MADV_DONTNEED).unwrap();
    check_zero(memory.span());
    assert_eq!(world.process.stats().cpu_faults, faults);
    let refused = world
        .process
        .lock_block(memory.part(pages(0), pages(1)))
        .map(drop);
    assert!(matches!(refused, Err(MmError::NotMirrored { .. })));
    memory::unmap(memory.span());
}

fn arming_is_counted_by_block(world: &World) {
    let memory = Memory::new(&world.process, ByteSize::mib(6), Pages::Base);
    let (low, mid) = (
        memory.part(pages(0), pages(700)),
        memory.part(pages(600), pages(600)),
    );
    let registered = || [0, 2, 4].map(|mib| is_registered(memory.at(ByteSize::mib(mib))));
    assert_eq!(registered(), [false; 3]);
    let first = world.process.arm(low).unwrap();
    assert_eq!(registered(), [true, true, false]);
    let second = world.process.arm(mid).unwrap();
    assert_eq!(registered(), [true; 3]);
    world.process.disarm(low, first);
    assert_eq!(registered(), [false, true, true]);
    // Pages that are away keep it.
    memory.fill_part(mid, 3);
    world.out(mid.blocks().next().unwrap());
    world.process.disarm(mid, second);
    assert_eq!(registered(), [false, true, false]);
    memory.check_part(mid, 3);
    // And the next range that lets go ends it.
    let third = world.process.arm(mid).unwrap();
    world.process.disarm(mid, third);
    assert_eq!(registered(), [false; 3]);
    memory.end(&world.process);
}

fn memory_that_is_not_armed_faults_natively(world: &World) {
    let memory = Memory::new(&world.process, ByteSize::mib(8), Pages::Base);
    memory.fill(1);
    memory.check(1);
    memory::advise(memory.span(), libc::MADV_DONTNEED).unwrap();
    check_zero(memory.span());
    let stats = world.process.stats();
    assert_eq!(
        (stats.zero_fills, stats.cpu_faults, stats.events),
        (0, 0, 0)
    );
    memory.end(&world.process);
    let huge = Memory::new(&world.process, BLOCK_SIZE, Pages::Huge);
    huge.fill(1);
    assert_eq!(world.process.stats().zero_fills, 0);
    huge.end(&world.process);
}

fn a_token_of_a_mapping_that_is_gone_does_nothing(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let old = world.process.arm(memory.span()).unwrap();
    world.process.unadopt(memory.span()).unwrap();
    assert!(!is_registered(memory.span().start()));
    let span = world
        .process
        .adopt(memory.span().start(), BLOCK_SIZE)
        .unwrap();
    let token = world.process.arm(span).unwrap();
    world.process.disarm(span, old);
    assert!(is_registered(span.start()));
    world.process.disarm(span, token);
    assert!(!is_registered(span.start()));
    memory.end(&world.process);
}

fn a_block_is_let_go_though_its_first_page_was_unmapped(world: &World) {
    let memory = Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    let token = world.process.arm(memory.span()).unwrap();
    memory::unmap(memory.part(pages(0), pages(1)));
    world.process.settle_events();
    let rest = memory.part(pages(1), pages(511));
    assert!(is_registered(rest.start()));
    world.process.disarm(memory.span(), token);
    assert!(!is_registered(rest.start()));
    world.process.unadopt(rest).unwrap();
    memory::unmap(rest);
}

/// Nobody uses the memory on a device, so nobody hears that it is unmapped.
fn memory_that_was_replaced_unheard_is_taken_over(world: &World) {
    let memory = Memory::new(&world.process, ByteSize::mib(4), Pages::Base);
    let (span, before) = (
        memory.span(),
        world.process.adoption_of(memory.at(BLOCK_SIZE)),
    );
    memory::unmap(span);
    memory::map_at(span);
    memory.fill(3);
    let upper = memory.part(BLOCK_SIZE, BLOCK_SIZE);
    assert_eq!(world.process.adopt(upper.start(), upper.len()), Ok(upper));
    let token = world.process.arm(upper).unwrap();
    assert_eq!(world.out(upper), PageCount::new(512));
    // Whoever adopted it before has nothing to say any more.
    let lower = world.process.adoption_of(span.start());
    assert_eq!(lower, before);
    world.process.unadopt_if(upper, before.unwrap()).unwrap();
    assert_eq!(world.on_device(upper), 512);
    memory.check(3);
    world.process.disarm(upper, token);
    memory.end(&world.process);
}

fn a_move_onto_memory_that_is_gone_unheard_loses_nothing(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    memory.fill(5);
    let stale = Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    memory::unmap(stale.span());
    world.out(memory.span());
    memory::remap(memory.span(), stale.span().start(), false);
    memory::check_moved(stale.span(), memory.span(), 5);
    world.process.settle_events();
    let token = world.process.arm(stale.span()).unwrap();
    assert_eq!(world.out(stale.span()), PageCount::new(512));
    memory::check_moved(stale.span(), memory.span(), 5);
    world.process.disarm(stale.span(), token);
    stale.end(&world.process);
}

fn pages_leave_armed_memory_only(world: &World) {
    let memory = Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    memory.fill(1);
    let mut block = world.process.lock_block(memory.span()).unwrap();
    let refused = block
        .collect(memory.span(), common::OWNER, &mut |_, _| false)
        .map(drop);
    assert_eq!(
        refused,
        Err(MmError::NotArmed {
            span: memory.span()
        })
    );
    drop(block);
    memory.check(1);
    memory.end(&world.process);
}

fn armed_memory_that_was_never_touched_is_zeroes(world: &World) {
    let memory = Memory::new(&world.process, ByteSize::mib(4), Pages::Base);
    memory.arm(&world.process);
    check_zero(memory.span());
    // They are counted after whoever waits is woken.
    let is_64 = || world.process.stats().zero_fills == 64;
    soon("64 KiB for each", is_64);
    memory.fill(5);
    assert!(is_64());
    assert_eq!(world.out(memory.span()), PageCount::new(1024));
    memory.check(5);
    memory.disarm(&world.process);
    memory.end(&world.process);
}
