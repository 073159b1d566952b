//! What the mutator does: one line each in a table. More of it is more lines.

use crate::mutator::{Mutator, Owned};
use crate::table::{CELLS_PER_PAGE, Outcome, PAGE, WORDS};
use crate::touch::{Cpu, Reach, read_held};
use crate::{PAGES, SLICES};
use gpusvm::{Advice, AdviseError, Atomics, Preferred, Priority};
use gpusvm::{ByteSize, Error, Protection, SvmPtr, VirtAddr};
use libc::{c_int, c_void};

/// One kind of thing to do. `None`: it found nothing to do it with.
pub(crate) struct Action {
    pub(crate) name: &'static str,
    pub(crate) act: fn(&mut Mutator) -> Option<()>,
    /// How often, as compared to others.
    pub(crate) weight: usize,
    /// Whether also without adopted memory, on the last rung.
    pub(crate) anywhere: bool,
}

macro_rules! table {
    ($($name:literal, $act:expr, $weight:literal, $anywhere:literal;)*) => {
        &[$(Action { name: $name, act: $act, weight: $weight, anywhere: $anywhere }),*]
    };
}

pub(crate) const ACTIONS: &[Action] = table![
    // name             what                     how often, without userfaultfd
    "map",              map,                      40, false;
    "map over",         map_over,                  4, false;
    "munmap",           |m| unmap(m, 96),          6, false;
    "munmap much",      |m| unmap(m, 1400),        1, false;
    "dontneed",         dont_need,                 8, false;
    "mremap move",      |m| relocate(m, 0),       10, false;
    "mremap dontunmap", |m| relocate(m, libc::MREMAP_DONTUNMAP), 6, false;
    "left behind",      left_behind,               8, false;
    "mremap grow",      grow,                      4, false;
    "mremap shrink",    shrink,                    3, false;
    "mprotect",         protect,                   6, false;
    "adopt",            adopt,                     4, false;
    "unadopt",          unadopt,                   4, false;
    "slice",            slice,                     6, true;
    "drop slice",       drop_slice,                4, true;
    "touch",            touch,                     4, true;
    "fork",             fork,                      2, true;
    "exec",             exec,                      1, true;
    "thread",           thread,                    4, true;
    "unbind",           unbind,                    1, true;
    "advise",           advise,                    8, true;
    "prefetch",         prefetch,                  8, true;
    "end prefetch",     end_prefetch,              8, true;
];

const OPEN: c_int = libc::PROT_READ | libc::PROT_WRITE;
const PLAIN: c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

fn pointer(at: u64) -> *mut c_void {
    SvmPtr::<c_void>::new(VirtAddr::new(at)).as_ptr()
}

/// Maps at a place that is free, or over what is the caller's.
fn map_at(at: u64, len: usize, flags: c_int) {
    // SAFETY: nobody uses the place, or its owner has it replaced.
    let map = unsafe { libc::mmap(pointer(at), len, OPEN, PLAIN | flags, -1, 0) };
    let error = std::io::Error::last_os_error();
    assert_eq!(map, pointer(at), "mmap of {len:#x} at {at:#x}: {error}");
}

fn unmap_at(at: u64, len: usize) {
    // SAFETY: nobody uses the place any more but lanes and threads that are told so.
    assert_eq!(unsafe { libc::munmap(pointer(at), len) }, 0, "munmap");
}

fn share(m: &mut Mutator, at: u64, len: usize) {
    let shared = m.storm.svm.adopt(pointer(at), ByteSize::from_usize(len));
    let shared = shared.unwrap_or_else(|error| panic!("{error}\n{}", maps_around(at)));
    m.adopted.push(shared);
    m.log_share(at, len);
}

/// New pages where none are, mostly adopted.
fn map(m: &mut Mutator) -> Option<()> {
    let first = m.random.below(PAGES);
    let most = [16, 200, 1100][m.random.below(3)];
    let len = 1 + m.random.below(most);
    let gone = m.own_gone(first..(first + len).min(PAGES))?;
    let Some(at) = m.find_place(gone.pages.len()) else {
        m.give_back(gone, None, Outcome::Same);
        return None;
    };
    map_at(at, gone.len(), libc::MAP_FIXED_NOREPLACE);
    if m.random.one_in(2) {
        // SAFETY: advice on a new mapping.
        unsafe { libc::madvise(pointer(at), gone.len(), libc::MADV_HUGEPAGE) };
    }
    if !m.random.one_in(8) {
        share(m, at, gone.len());
    }
    m.give_back(gone, Some(at), Outcome::Zeroed);
    Some(())
}

fn map_over(m: &mut Mutator) -> Option<()> {
    let owned = m.own_some(64)?;
    let at = owned.at;
    map_at(at, owned.len(), libc::MAP_FIXED);
    if m.random.one_in(2) {
        share(m, at, owned.len());
    }
    m.give_back(owned, Some(at), Outcome::Zeroed);
    Some(())
}

fn unmap(m: &mut Mutator, most: usize) -> Option<()> {
    let owned = m.own_some(most)?;
    unmap_at(owned.at, owned.len());
    m.free_place(owned.at, owned.pages.len());
    m.give_back(owned, None, Outcome::Gone);
    Some(())
}

fn dont_need(m: &mut Mutator) -> Option<()> {
    let owned = m.own_some(128)?;
    // SAFETY: our own mapping.
    let dropped = unsafe { libc::madvise(pointer(owned.at), owned.len(), libc::MADV_DONTNEED) };
    assert_eq!(dropped, 0, "madvise");
    let at = owned.at;
    m.give_back(owned, Some(at), Outcome::Zeroed);
    Some(())
}

/// The end of the mapping that holds an address.
fn end_of_mapping(at: u64) -> Option<u64> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let spans = maps.lines().map(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        (number(start), number(rest.split_once(' ').unwrap().0))
    });
    let mut found = spans.filter(|(start, end)| *start <= at && at < *end);
    found.next().map(|(_, end)| end)
}

/// How many of the first `pages` of a place that was free are mapped.
fn mapped_pages(at: u64, pages: usize) -> usize {
    let end = at + (pages * PAGE) as u64;
    let mut to = at;
    while let Some(next) = end_of_mapping(to).filter(|_| to < end) {
        to = next.min(end);
    }
    usize::try_from(to - at).unwrap() / PAGE
}

/// Pages that are part of one mapping: others cannot be moved in one call.
fn own_of_one_mapping(m: &mut Mutator, most: usize) -> Option<Owned> {
    let mut owned = m.own_some(most)?;
    let end = end_of_mapping(owned.at).expect("a mapping");
    let there = usize::try_from(end - owned.at).unwrap() / PAGE;
    if there < owned.pages.len() {
        let tail = Mutator::split(&mut owned, there);
        let at = tail.at;
        m.give_back(tail, Some(at), Outcome::Same);
    }
    Some(owned)
}

fn relocate(m: &mut Mutator, more: c_int) -> Option<()> {
    let owned = own_of_one_mapping(m, 700)?;
    let (at, len, pages) = (owned.at, owned.len(), owned.pages.len());
    let Some(to) = m.find_place(pages) else {
        m.give_back(owned, Some(at), Outcome::Same);
        return None;
    };
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | more;
    // SAFETY: our own mapping, to a place that is free.
    let moved = unsafe { libc::mremap(pointer(at), len, len, flags, pointer(to)) };
    let mut owned = owned;
    if moved != pointer(to) {
        // The engine cut the mapping in two a moment ago.
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "mremap: {error}");
        // Since Linux 6.17 one call moves several mappings, one after the other, up to the first that it
        // refuses to: one that is registered is only moved alone. Those before it have gone.
        let gone = mapped_pages(to, pages);
        m.free_place(to + (gone * PAGE) as u64, pages - gone);
        let stayed = Mutator::split(&mut owned, gone);
        let at = stayed.at;
        assert!(end_of_mapping(at).is_some(), "{gone} pages of {pages} went");
        m.give_back(stayed, Some(at), Outcome::Same);
    }
    let pages = owned.pages.len();
    if pages == 0 {
        return None;
    }
    match more {
        0 => m.free_place(at, pages),
        _ => m.left_behind.push((at, pages)),
    }
    m.give_back(owned, Some(to), Outcome::Same);
    Some(())
}

/// What a move left behind is empty.
fn left_behind(m: &mut Mutator) -> Option<()> {
    let (at, pages) = m.left_behind.pop()?;
    let mut found = [1; WORDS];
    for page in 0..pages {
        let at = at + (page * PAGE) as u64;
        Cpu.read(at, &mut found).unwrap();
        assert!(found.iter().all(|word| *word == 0), "left at {at:#x}");
    }
    unmap_at(at, pages * PAGE);
    m.free_place(at, pages);
    Some(())
}

fn grow(m: &mut Mutator) -> Option<()> {
    let owned = own_of_one_mapping(m, 200)?;
    let (at, len, pages) = (owned.at, owned.len(), owned.pages.len());
    let next = owned.pages.end..(owned.pages.end + 40).min(PAGES);
    let Some(gone) = m.own_gone(next) else {
        m.give_back(owned, Some(at), Outcome::Same);
        return None;
    };
    let longer = len + gone.len();
    // SAFETY: our own mapping; the kernel finds a place that is free.
    let moved = unsafe { libc::mremap(pointer(at), len, longer, libc::MREMAP_MAYMOVE) };
    if moved == libc::MAP_FAILED {
        let error = std::io::Error::last_os_error();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT), "mremap: {error}");
        m.give_back(gone, None, Outcome::Same);
        m.give_back(owned, Some(at), Outcome::Same);
        return None;
    }
    let to = moved.expose_provenance() as u64;
    if to != at {
        m.free_place(at, pages);
    }
    let is_free = m.mark(to + len as u64, gone.pages.len(), true);
    assert!(is_free, "it grew over others");
    if m.random.one_in(2) {
        share(m, to, longer);
    }
    m.give_back(gone, Some(to + len as u64), Outcome::Zeroed);
    m.give_back(owned, Some(to), Outcome::Same);
    Some(())
}

fn shrink(m: &mut Mutator) -> Option<()> {
    let mut owned = own_of_one_mapping(m, 200)?;
    let (at, len, pages) = (owned.at, owned.len(), owned.pages.len());
    if pages == 1 {
        m.give_back(owned, Some(at), Outcome::Same);
        return None;
    }
    let keep = 1 + m.random.below(pages - 1);
    // SAFETY: our own mapping.
    let shrunk = unsafe { libc::mremap(pointer(at), len, keep * PAGE, 0) };
    assert_eq!(shrunk, pointer(at), "{}", std::io::Error::last_os_error());
    let tail = Mutator::split(&mut owned, keep);
    m.free_place(tail.at, tail.pages.len());
    m.give_back(tail, None, Outcome::Gone);
    m.give_back(owned, Some(at), Outcome::Same);
    Some(())
}

/// Everybody reads, nobody writes.
fn protect(m: &mut Mutator) -> Option<()> {
    let table = &m.storm.table;
    let first = m.random.below(PAGES);
    let at = table.place(first);
    let mut pages = 0;
    let mut shared = Vec::new();
    for page in first..(first + 1 + m.random.below(160)).min(PAGES) {
        let cells = page * CELLS_PER_PAGE..(page + 1) * CELLS_PER_PAGE;
        let before = shared.len();
        shared.extend(cells.map_while(|cell| Some((cell, table.try_share(cell)?))));
        let is_next = at != 0 && table.place(page) == at + (pages * PAGE) as u64;
        if !is_next || shared.len() < before + CELLS_PER_PAGE {
            break;
        }
        pages += 1;
    }
    let storm = &m.storm;
    let raw = |with_us: bool, protection: Protection| {
        let len = pages * PAGE;
        if with_us {
            let len = ByteSize::from_usize(len);
            return storm.svm.protect(pointer(at), len, protection).unwrap();
        }
        let flags = if protection == Protection::Read {
            libc::PROT_READ
        } else {
            OPEN
        };
        // SAFETY: nobody writes the pages meanwhile.
        let done = unsafe { libc::mprotect(pointer(at), len, flags) };
        assert_eq!(done, 0, "mprotect");
    };
    if pages > 0 {
        let with_us = first.is_multiple_of(2);
        raw(with_us, Protection::Read);
        for (cell, held) in shared.iter().step_by(3).take(20) {
            read_held(storm, *cell, *held, &mut Cpu);
        }
        std::thread::yield_now();
        raw(with_us, Protection::ReadWrite);
    }
    shared.iter().for_each(|(cell, _)| table.unshare(*cell));
    (pages > 0).then_some(())
}

fn adopt(m: &mut Mutator) -> Option<()> {
    let owned = m.own_some(300)?;
    let (at, len) = (owned.at, owned.len());
    if m.random.one_in(2) {
        share(m, at, len);
        m.give_back(owned, Some(at), Outcome::Same);
    } else {
        // While others use it.
        m.give_back(owned, Some(at), Outcome::Same);
        share(m, at, len);
    }
    Some(())
}

fn unadopt(m: &mut Mutator) -> Option<()> {
    if m.adopted.len() < 16 {
        return None;
    }
    let i = m.random.below(m.adopted.len());
    drop(m.adopted.swap_remove(i));
    Some(())
}

fn slice(m: &mut Mutator) -> Option<()> {
    let i = m.random.below(SLICES);
    if m.slices[i].is_some() {
        return None;
    }
    let gone = m.own_gone(Mutator::pages_of_slice(i))?;
    let slice = m.storm.svm.alloc_slice::<u64>(gone.len() / 8).unwrap();
    let at = slice.span().start().get();
    m.slices[i] = Some(slice);
    m.give_back(gone, Some(at), Outcome::Zeroed);
    Some(())
}

fn drop_slice(m: &mut Mutator) -> Option<()> {
    let i = m.random.below(SLICES);
    m.slices[i].as_ref()?;
    let owned = m.own(Mutator::pages_of_slice(i))?;
    m.slices[i] = None;
    m.give_back(owned, None, Outcome::Gone);
    Some(())
}

/// Brings some pages home.
fn touch(m: &mut Mutator) -> Option<()> {
    let page = m.random.below(m.storm.table.cells() / CELLS_PER_PAGE);
    let at = m.storm.table.place(page);
    if at == 0 {
        return None;
    }
    let len = ByteSize::from_usize(PAGE * (1 + m.random.below(600)));
    let touched = m.storm.svm.touch(pointer(at), len);
    touched.unwrap();
    Some(())
}

/// A child finds what the parent had, in cells that nobody writes meanwhile.
fn fork(m: &mut Mutator) -> Option<()> {
    let table = &m.storm.table;
    let cells: Vec<_> = (0..96).map(|_| m.random.below(table.cells())).collect();
    let shared: Vec<_> = cells
        .iter()
        .filter_map(|cell| Some((*cell, table.try_share(*cell)?)))
        .collect();
    let is_right = |(cell, held): &(usize, crate::table::Held)| {
        let mut found = [0; WORDS];
        let done = Cpu.read(table.address(*cell), &mut found);
        done.is_ok() && held.wrong(*cell, &found).is_none()
    };
    // SAFETY: the child reads memory and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let wrong = shared.iter().filter(|cell| !is_right(cell)).count();
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(c_int::try_from(wrong).unwrap_or(100)) };
    }
    assert!(child > 0, "fork");
    let mut status = 0;
    // SAFETY: our own child.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    if status != 0 {
        let what = format!("a child found wrong cells: status {status:#x}");
        m.storm.wrong(&what);
    }
    shared.iter().for_each(|(cell, _)| table.unshare(*cell));
    Some(())
}

fn exec(_: &mut Mutator) -> Option<()> {
    let child = std::process::Command::new("/bin/true").status();
    assert!(child.unwrap().success());
    Some(())
}

/// A thread that touches a little and ends.
fn thread(m: &mut Mutator) -> Option<()> {
    let (storm, mut random) = (std::sync::Arc::clone(&m.storm), m.random.clone());
    m.random.next();
    let thread = std::thread::spawn(move || {
        crate::touch::touch_some(&storm, &mut random, &mut Cpu);
    });
    thread.join().unwrap();
    Some(())
}

/// Takes a device out of use, or into use again.
fn unbind(m: &mut Mutator) -> Option<()> {
    let device = m.storm.devices - 1;
    if m.is_unbound {
        // What stayed may take a while to leave.
        let bound = m.storm.svm.rebind(device);
        assert!(matches!(bound, Ok(()) | Err(gpusvm::Error::Rebind { .. })));
        bound.ok()?;
    } else {
        // Pages that others hold just now may stay; it is out of use all the same.
        let unbound = m.storm.svm.unbind(device);
        assert!(matches!(
            unbound,
            Ok(()) | Err(gpusvm::Error::Unbind { .. })
        ));
    }
    m.is_unbound = !m.is_unbound;
    Some(())
}

/// Where the program has pages in a row, which stay as long as the mutator does nothing else.
fn find(m: &mut Mutator, most: usize) -> Option<(u64, ByteSize)> {
    let table = &m.storm.table;
    let all = table.cells() / CELLS_PER_PAGE;
    let first = m.random.below(all);
    let at = table.place(first);
    let most = (1 + m.random.below(most)).min(all - first);
    let is_next = |i: &usize| table.place(first + i) == at + (i * PAGE) as u64;
    let pages = (0..most).take_while(is_next).count();
    (at != 0).then_some((at, ByteSize::from_usize(pages * PAGE)))
}

fn advise(m: &mut Mutator) -> Option<()> {
    let (at, len) = find(m, 400)?;
    let (device, on) = (m.random.below(m.storm.devices), m.random.one_in(2));
    let advice = match m.random.below(10) {
        0 => Advice::PreferredLocation(Preferred::Ram),
        1 => Advice::PreferredLocation(Preferred::Device(device)),
        2 => Advice::AccessedBy { device, on },
        3 | 4 => Advice::ReadMostly(on),
        5 => Advice::Granularity(on.then_some(ByteSize::kib(4 << m.random.below(7)))),
        6 => {
            let priorities = [Priority::Low, Priority::High, Priority::Pinned];
            Advice::EvictionPriority(priorities[m.random.below(3)])
        }
        7 => Advice::Atomics([Atomics::Device, Atomics::Global, Atomics::Cpu][m.random.below(3)]),
        _ => Advice::Nothing,
    };
    match m.storm.svm.advise(pointer(at), len, advice) {
        Ok(()) => Some(()),
        // Not all of it is adopted.
        Err(Error::Advise(AdviseError::NotMirrored { .. })) => None,
        Err(error) => panic!("{advice:?} at {at:#x}: {error}\n{}", maps_around(at)),
    }
}

/// What is mapped around an address, to be read when something went wrong.
pub(crate) fn maps_around(at: u64) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let near = |line: &&str| {
        let mut ends = line.split([' ', '-']).take(2);
        let mut next = || u64::from_str_radix(ends.next()?, 16).ok();
        matches!((next(), next()), (Some(start), Some(end)) if start < at + (1 << 21) && at < end + (1 << 21))
    };
    maps.lines().filter(near).collect::<Vec<_>>().join("\n")
}

/// Some of it may be unmapped by the time it is brought.
fn prefetch(m: &mut Mutator) -> Option<()> {
    if m.prefetches.len() >= MOST_PREFETCHES {
        return None;
    }
    let (at, len) = find(m, 600)?;
    let (svm, device) = (&m.storm.svm, m.random.below(m.storm.devices));
    let prefetch = match m.random.below(3) {
        0 => svm.prefetch(device, pointer(at), len),
        1 => svm.prefetch_advised(device, pointer(at), len),
        _ => svm.prefetch_to_ram(pointer(at), len),
    };
    match prefetch {
        Ok(prefetch) => m.prefetches.push(prefetch),
        Err(Error::Unbound { .. }) => return None,
        Err(error) => panic!("a prefetch at {at:#x}: {error}"),
    }
    Some(())
}

const MOST_PREFETCHES: usize = 12;

/// It is waited for, or cancelled, or left on its way.
fn end_prefetch(m: &mut Mutator) -> Option<()> {
    let len = m.prefetches.len();
    (len > 0).then_some(())?;
    let prefetch = m.prefetches.swap_remove(m.random.below(len));
    match m.random.below(3) {
        0 => drop(prefetch),
        1 => {
            // What could not be brought is told: others are at work on the same memory.
            let _ = prefetch.wait();
            assert!(prefetch.is_done());
        }
        _ => {
            prefetch.cancel();
            assert!(prefetch.is_done());
        }
    }
    Some(())
}
