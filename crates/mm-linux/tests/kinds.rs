//! Memory of other kinds than the usual: that can only be read, and of private mappings of files.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::memory::{self, check_zero, pages};
use common::{OWNER, World, count, exit_code, forked};
use gpusvm_mm::{AddressSpace, ArmToken, Block, Home, KeptReason, Outbound, Source, Vma, VmaKind};
use gpusvm_mm_linux::{AdoptError, Protection};
use gpusvm_types::{BLOCK_SIZE, ByteSize, PageCount, Span};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

on_userfaultfd_rungs!(
    read_only_memory_goes_and_comes,
    read_only_memory_that_was_never_touched_is_zeroes,
    zero_pages_that_can_only_be_read_are_zeroes,
    protection_changes_with_pages_on_the_device,
    closed_memory_comes_home,
    written_pages_of_a_private_file_go_and_come,
    pages_that_were_not_written_stay_the_files,
    a_dropped_page_shows_the_file_again,
    a_private_file_that_is_cut_off_ends_its_pages,
    a_child_of_fork_sees_private_pages_of_a_file,
    private_pages_of_a_file_move_with_their_mapping,
    no_write_to_a_private_file_is_lost,
    private_pages_of_a_file_are_protected_for_copies,
    one_adoption_of_two_kinds,
    files_that_are_not_watched_are_refused,
    another_kind_of_memory_does_not_move_as_the_old_one,
);

/// What the tests write to memory, by `seed`.
fn fill(span: Span, seed: u64) {
    for page in span.pages() {
        memory::store(page.start(), memory::value(seed, page.start().get()));
    }
}

fn check(span: Span, seed: u64) {
    for page in span.pages() {
        let (at, value) = (page.start(), memory::value(seed, page.start().get()));
        assert_eq!(memory::load(at), value, "{at}");
    }
}

/// Adopted and armed.
fn mirrored(world: &World, span: Span) -> ArmToken {
    assert_eq!(world.process.adopt(span.start(), span.len()), Ok(span));
    world.process.arm(span).unwrap()
}

fn end(world: &World, span: Span, token: ArmToken) {
    world.process.disarm(span, token);
    world.process.unadopt(span).unwrap();
    memory::unmap(span);
}

fn part(span: Span, first: u64, count: u64) -> Span {
    Span::from_len(span.start() + pages(first), pages(count)).unwrap()
}

/// A file in memory, and a private mapping of all of it.
struct Private {
    file: File,
    span: Span,
}

impl Private {
    /// A block long; the file has `filled` pages, whose bytes are all ones.
    fn new(filled: u64) -> Self {
        // SAFETY: a name of our own.
        let fd = unsafe { libc::memfd_create(c"gpusvm-kinds".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: just opened, and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(BLOCK_SIZE.get()).unwrap();
        file.write_all_at(&vec![1; pages(filled).as_usize()], 0)
            .unwrap();
        let span = map_file(&file);
        Self { file, span }
    }

    fn part(&self, first: u64, count: u64) -> Span {
        part(self.span, first, count)
    }

    fn byte_in_file(&self, page: u64) -> u8 {
        let mut byte = [9];
        self.file
            .read_exact_at(&mut byte, pages(page).get())
            .unwrap();
        byte[0]
    }
}

/// A private mapping of the first block of a file.
fn map_file(file: &File) -> Span {
    let span = memory::map(BLOCK_SIZE);
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    let (at, len) = (memory::pointer(span.start()).cast(), span.len().as_usize());
    // SAFETY: over memory of our own, which is empty.
    let mapped = unsafe { libc::mmap(at, len, access, flags, file.as_raw_fd(), 0) };
    assert_eq!(mapped, at);
    span
}

const ONES: u64 = 0x0101_0101_0101_0101;

fn vma(world: &World, span: Span) -> Vma {
    world.process.find_vma(span.start()).unwrap().unwrap()
}

fn read_only_memory_goes_and_comes(world: &World) {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let span = memory::map(ByteSize::mib(4));
        memory::advise(span, advice).unwrap();
        fill(span, 1);
        memory::protect(span, libc::PROT_READ);
        let token = mirrored(world, span);
        for _ in 0..3 {
            assert_eq!(world.out(span), PageCount::new(1024));
            assert_eq!(world.on_device(span), 1024);
            check(span, 1);
            assert_eq!(world.on_device(span), 0);
        }
        world.out(span);
        world.process.protect(span, Protection::ReadWrite).unwrap();
        fill(span, 2);
        world.out(span);
        check(span, 2);
        end(world, span, token);
    }
}

fn read_only_memory_that_was_never_touched_is_zeroes(world: &World) {
    let span = memory::map(BLOCK_SIZE);
    memory::advise(span, libc::MADV_HUGEPAGE).unwrap();
    memory::protect(span, libc::PROT_READ);
    let token = mirrored(world, span);
    assert_eq!(world.out(span), PageCount::new(512));
    for page in [0, 1, 255, 511] {
        let Home::Device(device) = world.home(part(span, page, 1).start()) else {
            panic!("page {page} is not on the device");
        };
        assert_eq!(world.device.peek(device), 0);
    }
    check_zero(span);
    end(world, span, token);
}

/// One page, and one of 2 MiB.
fn zero_pages_that_can_only_be_read_are_zeroes(world: &World) {
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE] {
        let span = memory::map(BLOCK_SIZE);
        memory::advise(span, advice).unwrap();
        memory::protect(span, libc::PROT_READ);
        check_zero(span);
        let token = mirrored(world, span);
        assert_eq!(world.out(span), PageCount::new(512));
        assert_eq!(world.on_device(span), 512);
        check_zero(span);
        end(world, span, token);
    }
}

/// From everything to everything, with what the device has coming home in between or not.
fn protection_changes_with_pages_on_the_device(world: &World) {
    let all = [Protection::None, Protection::Read, Protection::ReadWrite];
    for (before, after) in all
        .map(|before| all.map(|after| (before, after)))
        .as_flattened()
    {
        for comes_home in [false, true] {
            let span = memory::map(BLOCK_SIZE);
            fill(span, 1);
            let token = mirrored(world, span);
            let change = |to| world.process.protect(span, to).unwrap();
            // What nobody may read does not leave; what has left is no longer read.
            let leaves_first = *before == Protection::None;
            if leaves_first {
                assert_eq!(world.out(span), PageCount::new(512));
            }
            change(*before);
            if !leaves_first {
                assert_eq!(world.out(span), PageCount::new(512), "{before:?}");
            }
            change(*after);
            assert_eq!(world.on_device(span), 512);
            if comes_home {
                world.process.bring_home(span).unwrap();
                assert_eq!(world.on_device(span), 0, "{before:?} to {after:?}");
            }
            change(Protection::Read);
            check(span, 1);
            change(Protection::ReadWrite);
            fill(span, 2);
            check(span, 2);
            end(world, span, token);
        }
    }
}

/// Also of a private file, and when the adoption ends.
fn closed_memory_comes_home(world: &World) {
    let private = Private::new(512);
    for span in [memory::map(BLOCK_SIZE), private.span] {
        fill(span, 1);
        let token = mirrored(world, span);
        world.out(part(span, 100, 300));
        memory::protect(span, libc::PROT_NONE);
        world.process.disarm(span, token);
        world.process.unadopt(span).unwrap();
        memory::protect(span, libc::PROT_READ);
        check(span, 1);
        memory::unmap(span);
    }
}

/// The file has a page behind each: it is not seen when the program's page is away.
fn written_pages_of_a_private_file_go_and_come(world: &World) {
    for filled in [512, 0, 100] {
        let private = Private::new(filled);
        let span = private.span;
        fill(span, 1);
        let token = mirrored(world, span);
        assert_eq!(vma(world, span).kind, VmaKind::PrivateFile);
        for round in 1..4 {
            assert_eq!(world.out(span), PageCount::new(512));
            assert_eq!(world.on_device(span), 512);
            check(span, round);
            assert_eq!(world.on_device(span), 0);
            fill(span, round + 1);
        }
        // A write comes as well as a read; a system call waits, where it can.
        world.out(span);
        memory::store(span.start(), 77);
        assert_eq!(memory::load(span.start()), 77);
        if !matches!(world.rung, gpusvm_mm_linux::Rung::UserMode { .. }) {
            world.out(span);
            let zero = File::open("/dev/zero").unwrap();
            let to = memory::pointer(span.start()).cast();
            // SAFETY: eight bytes of our own.
            assert_eq!(unsafe { libc::read(zero.as_raw_fd(), to, 8) }, 8);
            assert_eq!(memory::load(span.start()), 0);
        }
        // Read-only memory too.
        fill(span, 5);
        world.process.protect(span, Protection::Read).unwrap();
        assert_eq!(world.out(span), PageCount::new(512));
        check(span, 5);
        let in_file = u8::from(filled > 0);
        assert_eq!(private.byte_in_file(0), in_file, "the file is as it was");
        end(world, span, token);
    }
}

fn pages_that_were_not_written_stay_the_files(world: &World) {
    let private = Private::new(300);
    let span = private.span;
    // Never touched, read, and written, each with a page of the file and without.
    let written = [private.part(100, 100), private.part(400, 100)];
    let read = [private.part(200, 100), private.part(310, 50)];
    written.iter().for_each(|part| fill(*part, 1));
    for page in read.iter().flat_map(|part| part.pages()) {
        memory::load(page.start());
    }
    let token = mirrored(world, span);
    let mut block = world.process.lock_block(span).unwrap();
    let collected = block.collect(span, OWNER, &mut |_, _| false).unwrap();
    let is_kept = |source: &Source| *source == Source::Kept(KeptReason::OfFile);
    let is_page = |source: &Source| matches!(source, Source::Page(_));
    let sources = collected.sources();
    assert_eq!(
        (count(sources, is_page), count(sources, is_kept)),
        (200, 312)
    );
    drop(collected);
    drop(block);
    assert_eq!(world.out(span), PageCount::new(200));
    for part in [private.part(0, 100), private.part(200, 100)] {
        for page in part.pages() {
            assert_eq!(memory::load(page.start()), ONES, "{page:?}");
        }
    }
    check_zero(private.part(300, 100));
    // Written for the first time now: the file is as it was.
    fill(private.part(0, 10), 2);
    fill(private.part(300, 10), 2);
    assert_eq!(world.on_device(span), 200);
    written.iter().for_each(|part| check(*part, 1));
    check(private.part(0, 10), 2);
    check(private.part(300, 10), 2);
    assert_eq!((private.byte_in_file(0), private.byte_in_file(300)), (1, 0));
    assert_eq!(world.out(span), PageCount::new(220), "now the program's");
    check(private.part(0, 10), 2);
    end(world, span, token);
}

/// What the program drops of its own pages is the file's, whether it is on the device or not.
fn a_dropped_page_shows_the_file_again(world: &World) {
    let private = Private::new(256);
    let span = private.span;
    fill(span, 1);
    let token = mirrored(world, span);
    world.out(span);
    let (with, without) = (private.part(10, 20), private.part(300, 20));
    for part in [with, without] {
        memory::advise(part, libc::MADV_DONTNEED).unwrap();
    }
    for page in with.pages() {
        assert_eq!(memory::load(page.start()), ONES);
    }
    check_zero(without);
    check(private.part(0, 10), 1);
    check(private.part(30, 270), 1);
    // The same of pages in RAM, and a write of what was dropped.
    memory::advise(private.part(40, 20), libc::MADV_DONTNEED).unwrap();
    fill(private.part(40, 10), 3);
    check(private.part(40, 10), 3);
    assert_eq!(memory::load(private.part(50, 1).start()), ONES);
    assert_eq!(private.byte_in_file(40), 1);
    end(world, span, token);
}

/// The kernel ends private pages behind the end of the file: those on the device end as well, and hold
/// nothing up.
fn a_private_file_that_is_cut_off_ends_its_pages(world: &World) {
    let private = Private::new(512);
    let span = private.span;
    fill(span, 1);
    let token = mirrored(world, span);
    world.out(span);
    private.file.set_len(pages(200).get()).unwrap();
    world.process.bring_home(span).unwrap();
    assert_eq!(world.on_device(span), 0);
    check(private.part(0, 200), 1);
    private.file.set_len(BLOCK_SIZE.get()).unwrap();
    check_zero(private.part(200, 312));
    end(world, span, token);
}

fn a_child_of_fork_sees_private_pages_of_a_file(world: &World) {
    let private = Private::new(256);
    let span = private.span;
    fill(private.part(128, 256), 1);
    let token = mirrored(world, span);
    assert_eq!(world.out(span), PageCount::new(256));
    let child = forked(|| {
        let is_right = |page: &gpusvm_types::PageIndex| {
            memory::load(page.start()) == memory::value(1, page.start().get())
        };
        let as_before = private.part(128, 256).pages().all(|page| is_right(&page));
        let of_file = memory::load(span.start()) == ONES;
        let none = memory::load(private.part(500, 1).start()) == 0;
        fill(span, 9);
        i32::from(!(as_before && of_file && none))
    });
    assert_eq!(exit_code(child), 0);
    check(private.part(128, 256), 1);
    assert_eq!(memory::load(span.start()), ONES);
    assert_eq!(world.out(span), PageCount::new(256), "and leave again");
    check(private.part(128, 256), 1);
    end(world, span, token);
}

fn private_pages_of_a_file_move_with_their_mapping(world: &World) {
    let private = Private::new(512);
    let written = private.part(0, 256);
    fill(written, 1);
    let token = mirrored(world, private.span);
    assert_eq!(world.out(private.span), PageCount::new(256));
    let to = memory::map(BLOCK_SIZE);
    memory::remap(private.span, to.start(), false);
    let value = |page: u64| memory::value(1, part(private.span, page, 1).start().get());
    assert_eq!(memory::load(part(to, 3, 1).start()), value(3));
    world.process.settle_events();
    for page in 0..256 {
        assert_eq!(memory::load(part(to, page, 1).start()), value(page));
        assert_eq!(memory::load(part(to, 256 + page, 1).start()), ONES);
    }
    let there = world.process.arm(to).unwrap();
    assert_eq!(world.out(to), PageCount::new(256), "as pages of a file");
    assert_eq!(memory::load(part(to, 100, 1).start()), value(100));
    world.process.disarm(private.span, token);
    end(world, to, there);
}

/// While pages go and come, others write them, and drop some: no write is lost, and nothing old comes back.
fn no_write_to_a_private_file_is_lost(world: &World) {
    let private = Private::new(512);
    let span = private.span;
    fill(span, 0);
    let (counted, dropped) = (private.part(0, 64), private.part(64, 64));
    counted
        .pages()
        .for_each(|page| memory::store(page.start(), 0));
    let token = mirrored(world, span);
    let is_over = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut rounds = 0;
            while !is_over.load(Ordering::Relaxed) {
                for page in counted.pages() {
                    memory::store(page.start(), memory::load(page.start()) + 1);
                }
                let page = part(dropped, rounds % 64, 1);
                memory::store(page.start(), rounds);
                memory::advise(page, libc::MADV_DONTNEED).unwrap();
                assert_eq!(memory::load(page.start()), ONES, "round {rounds}");
                rounds += 1;
            }
            rounds
        });
        for _ in 0..200 {
            world.out(private.part(0, 512));
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        is_over.store(true, Ordering::Relaxed);
        writer.join().unwrap()
    });
    for page in counted.pages() {
        assert_eq!(memory::load(page.start()), rounds, "{page:?}");
    }
    check(private.part(128, 384), 0);
    assert_eq!(private.byte_in_file(0), 1);
    end(world, span, token);
}

/// Those that are read in copies: the file's are not, and a write of the others is caught.
fn private_pages_of_a_file_are_protected_for_copies(world: &World) {
    if !world.process.can_watch_writes() {
        return;
    }
    let private = Private::new(512);
    let span = private.span;
    fill(private.part(0, 100), 1);
    let token = mirrored(world, span);
    let mut sources = vec![Source::Hole; 512];
    let mut block = world.process.lock_block(span).unwrap();
    block.write_protect(span, &mut sources).unwrap();
    drop(block);
    let is_kept = |source: &Source| *source == Source::Kept(KeptReason::OfFile);
    let is_page = |source: &Source| matches!(source, Source::Page(_));
    assert_eq!(
        (count(&sources, is_page), count(&sources, is_kept)),
        (100, 412)
    );
    memory::advise(private.part(50, 10), libc::MADV_DONTNEED).unwrap();
    assert_eq!(memory::load(private.part(55, 1).start()), ONES);
    check(private.part(0, 50), 1);
    fill(span, 2);
    check(span, 2);
    assert!(world.process.stats().write_faults > 0);
    assert_eq!(world.out(span), PageCount::new(512));
    check(span, 2);
    end(world, span, token);
}

/// A mapping of a file in the middle of anonymous memory, all in one block.
fn one_adoption_of_two_kinds(world: &World) {
    let private = Private::new(512);
    let span = private.span;
    let plain = private.part(300, 212);
    memory::unmap(plain);
    memory::map_at(plain);
    fill(span, 1);
    memory::protect(private.part(0, 50), libc::PROT_READ);
    memory::protect(private.part(400, 50), libc::PROT_READ);
    assert_eq!(world.process.adopt(span.start(), span.len()), Ok(span));
    let parts = [private.part(0, 300), plain];
    let tokens = parts.map(|part| world.process.arm(part).unwrap());
    let kinds = parts.map(|part| vma(world, part).kind);
    assert_eq!(kinds, [VmaKind::PrivateFile, VmaKind::PrivateAnonymous]);
    assert_eq!(world.out(private.part(0, 50)), PageCount::new(50));
    assert_eq!(world.out(private.part(50, 250)), PageCount::new(250));
    assert_eq!(world.out(private.part(300, 100)), PageCount::new(100));
    assert_eq!(world.out(private.part(400, 50)), PageCount::new(50));
    check(span, 1);
    for (part, token) in parts.into_iter().zip(tokens) {
        world.process.disarm(part, token);
    }
    world.process.unadopt(span).unwrap();
    check(span, 1);
    assert!(!memory::is_registered(span.start()));
    memory::unmap(span);
}

/// A file of a file system on a disk. With anonymous memory before it, which is let go again.
fn files_that_are_not_watched_are_refused(world: &World) {
    let file = File::open("/proc/self/exe").unwrap();
    let plain = memory::map(BLOCK_SIZE + BLOCK_SIZE);
    let of_file = part(plain, 512, 3);
    let (at, len) = (
        memory::pointer(of_file.start()).cast(),
        of_file.len().as_usize(),
    );
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: over memory of our own, which is empty.
    let mapped = unsafe { libc::mmap(at, len, access, flags, file.as_raw_fd(), 0) };
    assert_eq!(mapped, at);
    fill(of_file, 1);
    let refused = world.process.adopt(plain.start(), plain.len());
    assert_eq!(
        refused,
        Err(AdoptError::FileNotWatched { mapping: of_file })
    );
    assert!(!memory::is_registered(plain.start()));
    assert!(world.process.adoption_of(plain.start()).is_none());
    assert!(world.process.adoption_of(of_file.start()).is_none());
    check(of_file, 1);
    memory::unmap(plain);
}

/// What was adopted was replaced, and nobody heard: what is there now is used in place.
fn another_kind_of_memory_does_not_move_as_the_old_one(world: &World) {
    let private = Private::new(512);
    let span = private.span;
    world.process.adopt(span.start(), span.len()).unwrap();
    memory::unmap(span);
    memory::map_at(span);
    assert_eq!(vma(world, span).kind, VmaKind::Other);
    world.process.adopt(span.start(), span.len()).unwrap();
    assert_eq!(vma(world, span).kind, VmaKind::PrivateAnonymous);
    memory::unmap(span);
    let at = memory::pointer(span.start()).cast();
    let (access, flags) = (
        libc::PROT_READ,
        libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE,
    );
    let (len, fd) = (span.len().as_usize(), private.file.as_raw_fd());
    // SAFETY: nothing that is there is replaced.
    assert_eq!(unsafe { libc::mmap(at, len, access, flags, fd, 0) }, at);
    assert_eq!(vma(world, span).kind, VmaKind::Other);
    world.process.unadopt(span).unwrap();
    memory::unmap(span);
}
