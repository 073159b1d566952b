//! What must hold when nothing moves, across all layers.
//!
//! ```text
//!   device mappings ----> homes ----> device pages ----> allocations ----> free + used = all
//!        |  nothing of what      |  nobody's page        |  in that memory,
//!        |  was unmapped         |  is another's too     |  and not freed
//! ```

use crate::dmirror::Entry;
use crate::mirror::{Mirror, home_of, words_of};
use crate::world::World;
use gpusvm_device::Target;
use gpusvm_mm::{AddressSpace, DevicePage, Home, Mirror as Mirrored};
use gpusvm_sync::Arc;
use gpusvm_types::{DevicePfn, DmaAddr, PageCount, PageIndex, Span};
use std::collections::BTreeMap;

/// Looks at everything. What it finds wrong, in words.
pub fn check<W: World>(world: &W, mirrors: &[&Mirror<W::Mm>], spans: &[Span]) -> Vec<String> {
    let mut wrong = Vec::new();
    wrong.extend(world.check().err());
    let homes = homes(world, spans, &mut wrong);
    for (number, mirror) in mirrors.iter().enumerate() {
        let mut says = |what: String| wrong.push(format!("device {number}: {what}"));
        mappings_lead_home(world, mirrors, mirror, &mut says);
        memory_adds_up(mirrors, mirror, &homes, &mut says);
    }
    for page in homes.values() {
        let first = |(i, mirror): &(usize, &&Mirror<W::Mm>)| {
            let is_same = |other: &&Mirror<W::Mm>| share_memory(other, mirror);
            !mirrors[..*i].iter().any(is_same)
        };
        let memories = mirrors.iter().enumerate().filter(first);
        let owners = memories.filter(|(_, mirror)| mirror.pagemap().contains(*page));
        if owners.count() != 1 {
            wrong.push(format!("{page:?} is of no device, or of two"));
        }
    }
    wrong
}

/// The pages of `spans` that live on devices.
fn homes<W: World>(
    world: &W,
    spans: &[Span],
    wrong: &mut Vec<String>,
) -> BTreeMap<PageIndex, DevicePage> {
    let mm = &**world.mm();
    let mut homes = BTreeMap::new();
    let mut seen: BTreeMap<DevicePage, PageIndex> = BTreeMap::new();
    for page in spans.iter().flat_map(|span| span.pages()) {
        match home_of(mm, page.start()) {
            Home::Device(device) | Home::Coherent(device) => {
                if homes.insert(page, device).is_none()
                    && let Some(other) = seen.insert(device, page)
                {
                    wrong.push(format!(
                        "{device:?} is the home of {page:?} and of {other:?}"
                    ));
                }
            }
            Home::Moving => wrong.push(format!("{page:?} is on the move, and nothing moves")),
            Home::System | Home::Protected | Home::Unmapped => {}
        }
    }
    homes
}

fn mappings_lead_home<W: World>(
    world: &W,
    mirrors: &[&Mirror<W::Mm>],
    mirror: &Mirror<W::Mm>,
    says: &mut impl FnMut(String),
) {
    let mm = &**world.mm();
    for (vm, page, entry) in mirror.gpu.mappings() {
        if vm != mirror.vm.id() {
            continue;
        }
        let at = page.start();
        if let Some(object) = mirror.vm.object_at(at) {
            if entry.target != Target::Vram(object) {
                says(format!(
                    "{page:?} is mapped to {:?}, not to its object",
                    entry.target
                ));
            }
            continue;
        }
        let vma = mm.find_vma(at).ok().flatten();
        let vma = vma.filter(|vma| vma.span.contains(at));
        let is_mirrored = matches!(mm.mirrored(at), Mirrored::Mapping(_));
        // What nobody mirrors can be unmapped unheard: an access finds out, as a stale fault.
        let unheard = !is_mirrored && matches!(entry.target, Target::System(_));
        match vma {
            None if !unheard => says(format!("{page:?} is mapped to {entry:?}, and is unmapped")),
            Some(vma) if entry.allows.is_write() && !vma.writable => {
                says(format!("{page:?} is mapped for writing, and is read-only"));
            }
            _ => {}
        }
        let wanted = match home_of(mm, at) {
            Home::System | Home::Coherent(_) => Some(Target::System(DmaAddr::new(at.get()))),
            Home::Protected => {
                copy_is_the_same(world, mirror, page, &entry, says);
                continue;
            }
            Home::Device(device) => reach(mirrors, mirror, device),
            Home::Moving | Home::Unmapped => None,
        };
        if !wanted.is_some_and(|wanted| is_same_place(wanted, entry.target)) {
            says(format!(
                "{page:?} is mapped to {:?}, and lives at {wanted:?}",
                entry.target
            ));
        }
    }
}

/// A page that is read in copies: nobody maps it to write, and who maps a copy reads the same.
fn copy_is_the_same<W: World>(
    world: &W,
    mirror: &Mirror<W::Mm>,
    page: PageIndex,
    entry: &Entry,
    says: &mut impl FnMut(String),
) {
    let at = page.start();
    let in_place = Target::System(DmaAddr::new(at.get()));
    if entry.allows.is_write() {
        says(format!(
            "{page:?} is protected, and mapped to write: {entry:?}"
        ));
    }
    if matches!(entry.target, Target::Peer(_)) {
        says(format!("{page:?} is protected, and mapped to {entry:?}"));
    }
    if entry.target == in_place || !mirror.is_faulting() {
        return;
    }
    let words = words_of(Span::page_of(at));
    let copy = mirror.gpu.load(mirror.vm.id(), &words);
    let original: Vec<u64> = words.iter().flat_map(|word| world.read(*word)).collect();
    if copy.as_ref() != Ok(&original) {
        says(format!(
            "{page:?} holds {original:?}, and its copy {copy:?}"
        ));
    }
}

/// Where `mirror` finds a device page.
fn reach<M: AddressSpace>(
    mirrors: &[&Mirror<M>],
    mirror: &Mirror<M>,
    page: DevicePage,
) -> Option<Target> {
    let at = page.pfn.dev_addr();
    if mirror.pagemap().contains(page) {
        return Some(Target::Vram(at));
    }
    let owner = mirrors
        .iter()
        .find(|other| other.pagemap().contains(page))?;
    let aperture = owner.gpu.device().aperture()?;
    let offset = at.offset_from(DevicePfn::new(0).dev_addr());
    Some(Target::Peer(aperture + offset))
}

/// A peer may be mapped as one, or as a bus address like those of RAM.
fn is_same_place(wanted: Target, target: Target) -> bool {
    match (wanted, target) {
        (Target::Peer(wanted), Target::System(at) | Target::Peer(at)) => wanted == at,
        _ => wanted == target,
    }
}

/// Whether they are of one device.
fn share_memory<M: AddressSpace>(one: &Mirror<M>, other: &Mirror<M>) -> bool {
    Arc::ptr_eq(&one.region, &other.region)
}

fn memory_adds_up<M: AddressSpace>(
    mirrors: &[&Mirror<M>],
    mirror: &Mirror<M>,
    homes: &BTreeMap<PageIndex, DevicePage>,
    says: &mut impl FnMut(String),
) {
    let pagemap = mirror.pagemap();
    let live = pagemap.live();
    let sharing = mirrors.iter().filter(|other| share_memory(other, mirror));
    let duplicated = sharing.fold(PageCount::ZERO, |sum, it| sum + it.vm.duplicated());
    let allocated = live
        .iter()
        .fold(duplicated, |sum, (devmem, _)| sum + devmem.size());
    let allocated = allocated + mirror.region.stats().object_pages;
    let (used, total) = (mirror.region.used(), mirror.region.total());
    if used > total || used != allocated {
        says(format!(
            "{used:?} of {total:?} pages are in use, and what is alive has {allocated:?}"
        ));
    }
    let ours = homes.values().filter(|page| pagemap.contains(**page));
    let mut count = PageCount::ZERO;
    for page in ours {
        count += PageCount::ONE;
        if page.pfn.index() >= total.as_usize() || pagemap.devmem_of(*page).is_none() {
            says(format!("{page:?} is a home, and is free"));
        }
    }
    let in_use = pagemap.pages_in_use();
    if count != in_use {
        says(format!(
            "{count:?} pages live here, and {in_use:?} are in use"
        ));
    }
}
