//! What the mutator does: one line each in a table. More of it is more lines.

use crate::Failures;
use crate::model::{Outcome, Owned, behind, span_of};
use crate::mutator::Mutator;
use crate::touch::{Side, read_held};
use gpusvm::driver::{Location, ObjectError};
use gpusvm::{Advice, AdviseError, Atomics, ByteSize, Preferred, Priority, Span, VirtAddr};
use gpusvm_mm::MmError;
use gpusvm_mm_sim::Step;
use gpusvm_pagemap::{Cause, EvictError};
use gpusvm_testkit::world::{Kind, Prot, World};
use gpusvm_types::PageCount;
use std::sync::atomic::Ordering;

/// One kind of thing to do. `None`: it found nothing to do it with.
pub(crate) struct Action {
    pub(crate) name: &'static str,
    pub(crate) act: fn(&mut Mutator) -> Option<()>,
    /// How often, as compared to others.
    pub(crate) weight: usize,
}

macro_rules! table {
    ($($name:literal, $act:expr, $weight:literal;)*) => {
        &[$(Action { name: $name, act: $act, weight: $weight }),*]
    };
}

pub(crate) const ACTIONS: &[Action] = table![
    // name             what                          how often
    "map",              map,                          20;
    "map over",         map_over,                      3;
    "munmap",           unmap,                         4;
    "dontneed",         dont_need,                     6;
    "mremap",           |m| relocate(m, false, false), 3;
    "mremap fixed",     |m| relocate(m, true, false),  6;
    "mremap dontunmap", |m| relocate(m, true, true),   5;
    "left behind",      left_behind,                   5;
    "mprotect",         protect,                       4;
    "adopt",            adopt,                        10;
    "unadopt",          unadopt,                       2;
    "fork",             fork,                          1;
    "advise",           advise,                       10;
    "prefetch",         prefetch,                      8;
    "end prefetch",     end_prefetch,                  8;
    "evict",            evict,                         3;
    "to RAM",           to_ram,                        3;
    "to device",        to_device,                     4;
    "unbind",           unbind,                        2;
    "new VM",           new_vm,                        1;
    "object",           object,                        3;
    "fail",             fail,                          6;
];

fn map(m: &mut Mutator) -> Option<()> {
    let gone = m.own_gone(40)?;
    let Some(at) = m.find_place(gone.pages.len()) else {
        m.storm.model.give_back(gone, Outcome::Gone);
        return None;
    };
    let plain = m.storm.below(5) == 0;
    m.map_at(span_of(at, gone.pages.len())?, plain);
    m.give_back(gone, Outcome::Zeroed { at, plain });
    Some(())
}

fn map_over(m: &mut Mutator) -> Option<()> {
    let owned = m.own_some(24)?;
    let (at, span) = (owned.at?, owned.span()?);
    let plain = m.storm.below(5) == 0;
    m.map_at(span, plain);
    m.give_back(owned, Outcome::Zeroed { at, plain });
    Some(())
}

fn unmap(m: &mut Mutator) -> Option<()> {
    let owned = m.own_some(48)?;
    m.storm.world.unmap(owned.span()?);
    m.mark(owned.at?, owned.pages.len(), false);
    m.give_back(owned, Outcome::Gone);
    Some(())
}

fn dont_need(m: &mut Mutator) -> Option<()> {
    let owned = m.own_some(32)?;
    let (at, plain) = (owned.at?, owned.plain);
    m.storm.world.drop_contents(owned.span()?);
    m.give_back(owned, Outcome::Zeroed { at, plain });
    Some(())
}

/// To a new place; or, fixed, to one that may have been in use before, or is.
fn relocate(m: &mut Mutator, fixed: bool, dontunmap: bool) -> Option<()> {
    let owned = m.own_some(40)?;
    let (from, pages) = (owned.span()?, owned.pages.len());
    let to = if fixed {
        let Some((to, there)) = m.find_target(pages, from) else {
            m.give_back(owned, Outcome::Stayed);
            return None;
        };
        m.storm.world.mm().mremap_fixed(from, to, dontunmap);
        there
            .into_iter()
            .for_each(|gone| m.storm.model.give_back(gone, Outcome::Gone));
        to
    } else {
        let to = m.storm.world.remap(from, dontunmap).start();
        m.mark(to, pages, true);
        to
    };
    match dontunmap {
        true => m.left_behind.push(from),
        false => m.mark(from.start(), pages, false),
    }
    m.give_back(owned, Outcome::Moved(to));
    Some(())
}

/// What a move left behind is empty.
fn left_behind(m: &mut Mutator) -> Option<()> {
    let span = m.left_behind.pop()?;
    let side = m.storm.a_side();
    for page in span.pages() {
        let found = match &side {
            Side::Cpu => gpusvm_testkit::world::Cpu::read(&*m.storm.world, page.start()).ok(),
            Side::Device(mirror) => mirror.read(&[page.start()]).ok().map(|words| words[0]),
        };
        assert!(
            found.unwrap_or_default() == 0,
            "left at {:?}: {found:x?}",
            page
        );
    }
    m.storm.world.unmap(span);
    m.mark(span.start(), span.page_count().as_usize(), false);
    Some(())
}

/// Everybody reads, nobody writes.
fn protect(m: &mut Mutator) -> Option<()> {
    let found = m.find_some(32)?;
    let storm = &m.storm;
    let cells = found
        .pages
        .clone()
        .flat_map(|page| [page * 2, page * 2 + 1]);
    let all = found.pages.len() * 2;
    let shared: Vec<_> = cells
        .map_while(|cell| storm.model.try_share(cell))
        .collect();
    let is_there = shared.len() == all;
    if is_there {
        let span = found.span()?;
        storm.world.protect(span, Prot::Read);
        let side = storm.a_side();
        for held in shared.iter().step_by(3).take(6) {
            read_held(storm, *held, &side);
        }
        storm.world.protect(span, Prot::ReadWrite);
        storm.world.settle();
    }
    shared.iter().for_each(|held| storm.model.unshare(*held));
    is_there.then_some(())
}

/// What was plain is mirrored from now on.
fn adopt(m: &mut Mutator) -> Option<()> {
    m.switch(true)
}

fn unadopt(m: &mut Mutator) -> Option<()> {
    m.switch(false)
}

/// A child finds what the parent had, in cells that nobody writes meanwhile.
fn fork(m: &mut Mutator) -> Option<()> {
    let storm = &m.storm;
    let shared: Vec<_> = (0..12)
        .filter_map(|_| storm.model.try_share(storm.below(storm.model.cells())))
        .collect();
    let harmless = storm.failures == Failures::Harmless;
    let is_right = storm.world.fork(&mut |child| {
        shared.iter().all(|held| match child.read(held.at) {
            Ok(found) => found == held.value,
            Err(_) => !harmless,
        })
    });
    assert!(is_right, "a child found wrong words");
    shared.iter().for_each(|held| storm.model.unshare(*held));
    Some(())
}

fn advise(m: &mut Mutator) -> Option<()> {
    let storm = &m.storm;
    let span = m.find_some(48)?.span()?;
    let device = storm.below(2);
    let advice = match storm.below(9) {
        0 => Advice::PreferredLocation(Preferred::Ram),
        1 => Advice::PreferredLocation(Preferred::Device(device)),
        2 => Advice::AccessedBy {
            device,
            on: storm.below(2) == 0,
        },
        3 | 4 => Advice::ReadMostly(storm.below(3) > 0),
        5 => Advice::Granularity(
            [None, Some(ByteSize::kib(4)), Some(ByteSize::kib(16))][storm.below(3)],
        ),
        6 => Advice::EvictionPriority(
            [Priority::Low, Priority::High, Priority::Pinned][storm.below(3)],
        ),
        7 => Advice::Atomics([Atomics::Device, Atomics::Global, Atomics::Cpu][storm.below(3)]),
        _ => Advice::Nothing,
    };
    let advised = storm.a_mirror().vm.advise(span, advice);
    let is_plain = matches!(advised, Err(AdviseError::NotMirrored { .. }));
    assert!(advised.is_ok() || is_plain, "{advice:?}: {advised:?}");
    advised.ok()
}

fn prefetch(m: &mut Mutator) -> Option<()> {
    if m.prefetches.len() >= 6 {
        return None;
    }
    let spans: Vec<Span> = (0..1 + m.storm.below(3))
        .filter_map(|_| m.find_some(64)?.span())
        .collect();
    let to = [Location::Device, Location::Ram, Location::Advised][m.storm.below(3)];
    let mirror = m.storm.a_mirror();
    m.prefetches.push(mirror.vm.prefetch(&spans, to));
    Some(())
}

/// It is waited for, or cancelled, or left on its way.
fn end_prefetch(m: &mut Mutator) -> Option<()> {
    let len = m.prefetches.len();
    (len > 0).then_some(())?;
    let prefetch = m.prefetches.swap_remove(m.storm.below(len));
    match m.storm.below(3) {
        0 => drop(prefetch),
        1 => {
            // What could not be done is told; others work on the same memory.
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

fn evict(m: &mut Mutator) -> Option<()> {
    // What others need just now may stay.
    let _ = m.storm.a_mirror().evict_all();
    Some(())
}

fn to_ram(m: &mut Mutator) -> Option<()> {
    let span = m.find_mirrored(64)?.span()?;
    let came = m.storm.a_mirror().migrate_to_sys(span);
    // Of two mappings side by side, each has to be asked for.
    let fine = matches!(came, Ok(()) | Err(MmError::NotMirrored { .. }));
    assert!(fine || m.storm.failures == Failures::Any, "{came:?}");
    Some(())
}

fn to_device(m: &mut Mutator) -> Option<()> {
    let span = m.find_mirrored(64)?.span()?;
    // Full, or taken out of use, or wanted by somebody else.
    let _ = m.storm.a_mirror().vm.migrate_to_devmem(span, Cause::Asked);
    Some(())
}

/// Takes a device out of use, or into use again.
fn unbind(m: &mut Mutator) -> Option<()> {
    let mirror = m.storm.a_mirror();
    if !mirror.gpu.device().caps().coherent {
        return None;
    }
    m.storm.unbinds.store(true, Ordering::Relaxed);
    if mirror.pagemap().is_bound() {
        let unbound = mirror.region.unbind();
        let is_busy = matches!(unbound, Err(EvictError::Busy { .. }));
        let fine = unbound.is_ok() || is_busy || m.storm.failures == Failures::Any;
        assert!(fine, "{unbound:?}");
    } else {
        mirror.region.rebind().ok()?;
    }
    Some(())
}

/// The second address space of the first device ends, and another begins.
fn new_vm(m: &mut Mutator) -> Option<()> {
    let storm = &m.storm;
    let old = storm.mirror(1);
    let new = old.beside(storm.policy());
    storm.replace_mirror(1, new);
    drop(old);
    Some(())
}

/// Memory of the device's own is zero, wherever it was before, and then what was written to it.
fn object(m: &mut Mutator) -> Option<()> {
    let mirror = m.storm.mirror(1);
    let pages = 1 + m.storm.below(8);
    let size = PageCount::from_usize(pages).bytes();
    let object = match mirror.region.create_object(size) {
        Ok(object) => object,
        Err(ObjectError::NoSpace { .. } | ObjectError::Unbound) => return None,
        Err(error) => {
            assert_eq!(m.storm.failures, Failures::Any, "{error}");
            return None;
        }
    };
    let span = Span::from_len(OBJECTS, size).ok()?;
    mirror
        .vm
        .bind_object(span, &object, ByteSize::ZERO)
        .unwrap();
    drop(object);
    for page in span.pages() {
        let words = [page.start(), page.start() + ByteSize::new(4088)];
        assert_eq!(mirror.read(&words).unwrap(), [0, 0], "a new object");
        let value = page.start().get();
        mirror
            .write(&[(words[0], value), (words[1], !value)])
            .unwrap();
    }
    for page in span.pages() {
        let words = [page.start(), page.start() + ByteSize::new(4088)];
        let value = page.start().get();
        assert_eq!(mirror.read(&words).unwrap(), [value, !value], "an object");
    }
    mirror.vm.bind_mirror(span).unwrap();
    Some(())
}

/// Where objects are bound: nothing is ever mapped there.
const OBJECTS: VirtAddr = VirtAddr::new(1 << 44);

/// Something fails soon.
fn fail(m: &mut Mutator) -> Option<()> {
    /// After these, every page is where it was.
    const HARMLESS: [Step; 4] = [Step::TakeOut, Step::PageBusy, Step::Arm, Step::Protect];
    /// After these a page can be lost; never wrong.
    const ANY: [Step; 2] = [Step::Staging, Step::CommitIn];
    let storm = &m.storm;
    let (injector, nth) = (storm.world.mm().injector(), 1 + storm.world.mm().random(6));
    match storm.failures {
        Failures::None => return None,
        Failures::Any if storm.below(2) == 0 => {
            let mirror = storm.a_mirror();
            let hook = mirror.gpu.hook()?;
            hook.fail(storm.world.mm().random(8), 1 + storm.world.mm().random(3));
        }
        Failures::Any => injector.fail_step_nth(ANY[storm.below(2)], nth),
        Failures::Harmless => injector.fail_step_nth(HARMLESS[storm.below(4)], nth),
    }
    Some(())
}

impl Mutator {
    fn map_at(&self, span: Span, plain: bool) {
        let kind = if plain { Kind::Plain } else { Kind::Mirrored };
        self.storm.world.map_again(span, Prot::ReadWrite, kind);
    }

    /// Pages that are not mirrored are, or the other way round.
    fn switch(&mut self, to_mirrored: bool) -> Option<()> {
        let owned: Owned = self.own_some(24)?;
        if owned.plain != to_mirrored {
            self.give_back(owned, Outcome::Stayed);
            return None;
        }
        let (at, span) = (owned.at?, owned.span()?);
        let sim = self.storm.world.mm();
        let done = match to_mirrored {
            true => sim.adopt(span),
            false => sim.unadopt(span),
        };
        assert!(
            done.is_ok() || self.storm.failures == Failures::Any,
            "{done:?}"
        );
        match done {
            Ok(()) => self.give_back_switched(owned, at),
            Err(_) => self.give_back(owned, Outcome::Stayed),
        }
        Some(())
    }

    /// A place for a mapping to move to: free, or where other pages are, which go.
    fn find_target(&mut self, pages: usize, from: Span) -> Option<(VirtAddr, Option<Owned>)> {
        if self.storm.below(3) > 0 {
            return Some((self.find_place(pages)?, None));
        }
        let there = self.own_some(pages)?;
        let at = there.at?;
        let span = span_of(at, pages)?;
        // What is behind must be nobody's, or it would go as well.
        let first_free = behind(at, there.pages.len());
        let rest = pages - there.pages.len();
        if span.overlaps(from) || !self.is_free(first_free, rest) {
            self.storm.model.give_back(there, Outcome::Stayed);
            return None;
        }
        self.mark(first_free, rest, true);
        Some((at, Some(there)))
    }
}
