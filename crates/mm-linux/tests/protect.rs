//! Pages that are read in copies, on the live kernel: every write is caught, and costs one fault.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, Memory, Pages, pages};
use common::{World, count, exit_code, forked};
use gpusvm_mm::{
    AddressSpace, Block, Home, Intent, IntervalNotifier, Invalidation, KeptReason, MmError, Reason,
    Source, Subscriber,
};
use gpusvm_mm_linux::Rung;
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, Span};
use std::sync::{Arc, Mutex};

on_userfaultfd_rungs!(
    a_write_is_heard_of_before_it_happens,
    a_huge_page_stays_huge,
    untouched_pages_are_caught_at_their_first_write,
    a_device_that_writes_unprotects,
    pages_that_leave_are_not_protected_any_more,
    a_child_of_fork_writes_freely,
    a_remapped_page_is_written_at_once,
    a_dropped_page_is_not_protected_any_more,
    what_is_not_in_ram_is_kept,
    a_system_call_that_writes_waits,
);

/// How much of what is at `span` is huge pages, as the kernel counts it.
fn huge_bytes(span: Span) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let ends = |line: &str| -> Option<(u64, u64)> {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let hex = |text| u64::from_str_radix(text, 16).ok();
        Some((hex(start)?, hex(end)?))
    };
    let (mut inside, mut kib) = (false, 0);
    for line in smaps.lines() {
        if let Some((start, end)) = ends(line) {
            inside = start < span.end().get() && span.start().get() < end;
        } else if let (true, Some(size)) = (inside, line.strip_prefix("AnonHugePages:")) {
            kib += size.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
        }
    }
    kib << 10
}

/// What was heard of.
#[derive(Debug, Default)]
struct Heard(Mutex<Vec<(Span, Reason)>>);

impl Subscriber for Heard {
    fn invalidate(&self, _: &IntervalNotifier, event: &Invalidation) {
        // Handlers allocate nothing: there is room.
        let mut heard = self.0.lock().unwrap();
        if heard.len() < heard.capacity() {
            heard.push((event.span, event.reason));
        }
    }
}

impl Heard {
    fn of(world: &World, window: Span) -> (Arc<Self>, Arc<IntervalNotifier>) {
        let heard = Arc::new(Self(Mutex::new(Vec::with_capacity(64))));
        let notifier = world
            .process
            .notifiers()
            .subscribe(window, Arc::clone(&heard) as _);
        (heard, notifier)
    }

    fn take(&self) -> Vec<(Span, Reason)> {
        self.0.lock().unwrap().drain(..).collect()
    }
}

/// Protects `span`, which is in one block. `None` where the rung does not see all writes, and says so.
fn protect(world: &World, span: Span) -> Option<Vec<Source>> {
    let mut sources = vec![Source::Hole; span.page_count().as_usize()];
    let mut block = world.process.lock_block(span).unwrap();
    let done = block.write_protect(span, &mut sources);
    let watches = matches!(world.rung, Rung::Move | Rung::Copy);
    assert_eq!(world.process.can_watch_writes(), watches);
    if !watches {
        assert_eq!(done, Err(MmError::UnwatchedWrites { span }));
        return None;
    }
    assert_eq!(done, Ok(()));
    Some(sources)
}

fn homes(world: &World, span: Span, home: Home) -> usize {
    span.pages()
        .filter(|page| world.home(page.start()) == home)
        .count()
}

fn end(world: &World, memory: &Memory) {
    memory.disarm(&world.process);
    memory.end(&world.process);
}

/// One write lets the whole run be written; a second protection is heard of only where it is news.
fn a_write_is_heard_of_before_it_happens(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let (heard, notifier) = Heard::of(world, memory.span());
    let span = memory.part(pages(8), pages(32));
    if let Some(sources) = protect(world, span) {
        assert_eq!(
            count(&sources, |source| matches!(source, Source::Page(_))),
            32
        );
        assert_eq!(heard.take(), [(span, Reason::Write)]);
        let more = memory.part(pages(8), pages(40));
        protect(world, more).unwrap();
        assert_eq!(
            heard.take(),
            [(memory.part(pages(40), pages(8)), Reason::Write)]
        );
        memory.check(1);
        let before = world.process.stats().write_faults;
        assert_eq!(heard.take(), [], "reads are not heard of");
        memory::store(memory.at(pages(20)), 7);
        assert_eq!(heard.take(), [(more, Reason::Write)]);
        memory.fill(2);
        assert_eq!(world.process.stats().write_faults, before + 1);
        assert_eq!(homes(world, more, Home::System), 40);
        memory.check(2);
    }
    world.process.notifiers().unsubscribe(&notifier);
    end(world, &memory);
}

/// It costs one fault, and can leave in one piece afterwards.
fn a_huge_page_stays_huge(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Huge);
    let span = memory.span();
    let was_huge = huge_bytes(span);
    if let Some(sources) = protect(world, span) {
        assert_eq!(
            count(&sources, |source| matches!(source, Source::Page(_))),
            512
        );
        assert_eq!(huge_bytes(span), was_huge, "protected");
        let before = world.process.stats().write_faults;
        memory.fill(2);
        assert_eq!(world.process.stats().write_faults, before + 1);
        assert_eq!(huge_bytes(span), was_huge, "written");
        protect(world, span).unwrap();
        assert_eq!(world.out(span), PageCount::new(512));
        memory.check(2);
    }
    end(world, &memory);
}

fn untouched_pages_are_caught_at_their_first_write(world: &World) {
    let memory = Memory::new(&world.process, BLOCK_SIZE, Pages::Base);
    memory.arm(&world.process);
    let span = memory.part(pages(0), pages(64));
    memory.fill_part(memory.part(pages(5), pages(3)), 1);
    if let Some(sources) = protect(world, span) {
        assert!(
            count(&sources, |source| *source == Source::Hole) >= 48,
            "{sources:?}"
        );
        let (heard, notifier) = Heard::of(world, memory.span());
        assert_eq!(memory::load(memory.at(pages(60))), 0);
        assert_eq!(heard.take(), []);
        memory::store(memory.at(pages(61)), 7);
        assert_eq!(heard.take(), [(span, Reason::Write)]);
        world.process.notifiers().unsubscribe(&notifier);
    }
    end(world, &memory);
}

fn a_device_that_writes_unprotects(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let span = memory.part(pages(0), pages(16));
    if protect(world, span).is_some() {
        let mut homes = [Home::Moving; 16];
        let fault =
            |intent, homes: &mut [Home]| world.process.range_fault(span, None, intent, homes);
        fault(Intent::Read, &mut homes).unwrap();
        assert_eq!(homes, [Home::Protected; 16]);
        fault(Intent::Write, &mut homes).unwrap();
        assert_eq!(homes, [Home::System; 16]);
        let before = world.process.stats().write_faults;
        memory.fill(2);
        assert_eq!(
            world.process.stats().write_faults,
            before,
            "no fault is left"
        );
    }
    end(world, &memory);
}

fn pages_that_leave_are_not_protected_any_more(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let span = memory.part(pages(0), pages(16));
    if protect(world, span).is_some() {
        // Collected and put back, then for good.
        let mut block = world.process.lock_block(span).unwrap();
        drop(
            block
                .collect(span, common::OWNER, &mut |_, _| false)
                .unwrap(),
        );
        drop(block);
        assert_eq!(homes(world, span, Home::System), 16);
        memory.fill_part(span, 2);
        assert_eq!(world.process.stats().write_faults, 0);
        protect(world, span).unwrap();
        assert_eq!(world.out(span), PageCount::new(16));
        memory.check_part(span, 2);
        memory.fill_part(span, 3);
        memory.check_part(span, 3);
    }
    end(world, &memory);
}

/// The kernel does not hand protection down to a mapping that nobody registered; and the parent's holds.
fn a_child_of_fork_writes_freely(world: &World) {
    world.each_kind(BLOCK_SIZE, |memory| {
        let Some(_) = protect(world, memory.span()) else {
            return;
        };
        let child = forked(|| {
            let as_before = memory.is_filled(1);
            memory.fill(9);
            i32::from(!(as_before && memory.is_filled(9)))
        });
        assert_eq!(exit_code(child), 0);
        assert_eq!(homes(world, memory.span(), Home::Protected), 512);
        let before = world.process.stats().write_faults;
        memory.check(1);
        memory.fill(2);
        assert_eq!(world.process.stats().write_faults, before + 1);
        memory.check(2);
    });
}

/// Protection goes with the pages; nobody heard of the new place yet.
fn a_remapped_page_is_written_at_once(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let span = memory.part(pages(0), pages(16));
    let Some(_) = protect(world, span) else {
        return end(world, &memory);
    };
    let to = memory::map(BLOCK_SIZE);
    memory::remap(memory.span(), to.start(), false);
    let there = Span::from_len(to.start(), span.len()).unwrap();
    memory::store(there.start(), 7);
    world.process.settle_events();
    assert_eq!(memory::load(there.start()), 7);
    assert_eq!(homes(world, there, Home::System), 16);
    for page in there.pages() {
        memory::store(page.start(), 8);
        assert_eq!(memory::load(page.start()), 8);
    }
    world.process.unadopt(to).unwrap();
    memory::unmap(to);
}

fn a_dropped_page_is_not_protected_any_more(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let span = memory.part(pages(0), pages(16));
    if protect(world, span).is_some() {
        let (heard, notifier) = Heard::of(world, memory.span());
        memory::advise(span, libc::MADV_DONTNEED).unwrap();
        // Before a write of what is zero now, whoever comes first.
        memory::store(span.start(), 7);
        assert!(!heard.take().is_empty());
        world.process.settle_events();
        assert_eq!(homes(world, span, Home::System), 16);
        assert_eq!(memory::load(span.start()), 7);
        assert_eq!(memory::load(memory.at(pages(3))), 0);
        world.process.notifiers().unsubscribe(&notifier);
    }
    end(world, &memory);
}

fn what_is_not_in_ram_is_kept(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    world.out(memory.part(pages(4), pages(4)));
    let span = memory.part(pages(0), pages(16));
    if let Some(sources) = protect(world, span) {
        let on_device = |source: &Source| matches!(source, Source::Kept(KeptReason::OnDevice(_)));
        assert_eq!(count(&sources, on_device), 4);
        assert_eq!(homes(world, span, Home::Protected), 12);
        memory.check(1);
        memory.fill(2);
        memory.check(2);
    }
    end(world, &memory);
}

/// `read` into a protected buffer: the kernel's own write waits for the handler.
fn a_system_call_that_writes_waits(world: &World) {
    let memory = world.memory(BLOCK_SIZE, Pages::Base);
    let span = memory.part(pages(0), pages(16));
    if protect(world, span).is_some() {
        let before = world.process.stats().write_faults;
        let zeroes = std::fs::File::open("/dev/zero").unwrap();
        let to = memory.word(ByteSize::new(8)).as_ptr();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&zeroes);
        // SAFETY: eight bytes of the memory, which nobody else uses.
        let read = unsafe { libc::read(fd, to.cast(), 8) };
        assert_eq!(read, 8, "{}", std::io::Error::last_os_error());
        assert_eq!(world.process.stats().write_faults, before + 1);
        assert_eq!(memory::load(memory.at(ByteSize::new(8))), 0);
    }
    end(world, &memory);
}
