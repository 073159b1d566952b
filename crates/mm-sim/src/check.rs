//! What must be true when nobody moves anything.
//!
//! 1. A page has one home: a page on a device has no frame, unless it is coherent, then it has one; and a
//!    page in RAM is in no device's reverse map.
//! 2. Words and reverse maps agree, in both directions, and count the same.
//! 3. Nothing is on the move, no staging slot is held, no frame is nobody's.
//! 4. Whatever was unmapped is on no device.
//! 5. What is marked as protected cannot be written, and nothing else is kept from it.
//!
//! Where device page tables point is not known here: a checker that has them asks
//! [`Sim::home`](crate::Sim::home) and [`Sim::pages_on`](crate::Sim::pages_on).

use crate::Sim;
use crate::kernel::{Kernel, Pte};
use crate::region::Part;
use gpusvm_mm::{DevicePage, Place, WordState};
use gpusvm_sync::atomic::Ordering;
use gpusvm_types::{DevicePfn, PageCount, PageIndex};
use std::collections::BTreeMap;

impl Sim {
    /// Checks that every page has one home, and that nothing leaked. For quiet moments: no migration
    /// under way. Events that are still late are handled first, unless a simulated thread asks.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, with both sides of the contradiction and the seed.
    pub fn check(&self) -> Result<(), String> {
        self.settle_events();
        let kernel = self.kernel.lock();
        let found = self.find_wrong(&kernel);
        found.map_err(|what| format!("seed {}: {what}", self.seed()))
    }

    fn find_wrong(&self, kernel: &Kernel) -> Result<(), String> {
        if let Some(lost) = kernel.lost.first() {
            return Err(lost.clone());
        }
        if self.staging.in_use() > 0 {
            return Err(format!("{} staging slots are held", self.staging.in_use()));
        }
        let mut named = BTreeMap::new();
        for part in kernel.parts.all() {
            self.check_part(kernel, part, &mut named)?;
        }
        self.check_rmaps(&named)?;
        check_frames(kernel, self.staging.frames())
    }

    /// From the words to everything else.
    fn check_part(
        &self,
        kernel: &Kernel,
        part: &Part,
        named: &mut BTreeMap<DevicePage, PageIndex>,
    ) -> Result<(), String> {
        for page in part.span.pages() {
            let word = part.region.word(page).get();
            let has_frame = matches!(kernel.pages.get(&page), Some(Pte::Frame(_) | Pte::Zero));
            let is_mapped = kernel.mapping(page.start()).is_some();
            if word.unmapped || !is_mapped {
                return Err(format!(
                    "{page:?} is unmapped, and still mirrored: {word:?}"
                ));
            }
            check_protection(kernel, page, word)?;
            let device = match word.place {
                Place::System => continue,
                Place::Device(device) | Place::Coherent(device) => device,
                Place::Collected | Place::Leaving(_) => {
                    return Err(format!(
                        "{page:?} is on the move, and nobody moves it: {word:?}"
                    ));
                }
            };
            let is_coherent = matches!(word.place, Place::Coherent(_));
            match (has_frame, is_coherent) {
                (true, false) => {
                    return Err(format!("{page:?} is on {device:?}, and has a page in RAM"));
                }
                (false, true) => {
                    return Err(format!("{page:?} is coherent with {device:?}, and nowhere"));
                }
                _ => {}
            }
            let block = part.region.block(page.start());
            if !block.registered.load(Ordering::Acquire) {
                return Err(format!("{page:?} is on {device:?}, and nobody watches it"));
            }
            if let Some(other) = named.insert(device, page) {
                return Err(format!("{page:?} and {other:?} both are on {device:?}"));
            }
            let back = self.memories.address_of(device);
            if back != Some(page) {
                return Err(format!("{page:?} is on {device:?}, which says {back:?}"));
            }
        }
        let stuck = part.span.blocks().find(|piece| {
            let block = part.region.block(piece.start());
            !block.is_free()
        });
        stuck.map_or(Ok(()), |piece| Err(format!("the block {piece} is locked")))
    }

    /// From the reverse maps back to the words.
    fn check_rmaps(&self, named: &BTreeMap<DevicePage, PageIndex>) -> Result<(), String> {
        for (id, memory) in self.memories.all() {
            let of_it = named.keys().filter(|page| page.memory == id).count();
            let in_use = memory.rmap.in_use();
            if in_use == PageCount::from_usize(of_it) {
                continue;
            }
            let pfns = (0..=u32::MAX).map(DevicePfn::new);
            let stray = pfns.take(memory.pages.as_usize()).find_map(|pfn| {
                let page = memory.rmap.get(pfn)?;
                let device = DevicePage { memory: id, pfn };
                (!named.contains_key(&device)).then_some((device, page))
            });
            let Some((device, page)) = stray else {
                return Err(format!("{id:?} has {in_use:?} in use, words name {of_it}"));
            };
            let home = named.iter().find(|(_, other)| **other == page);
            let home = match home {
                Some((other, _)) => format!("is on {other:?}"),
                None => "is on no device".to_owned(),
            };
            return Err(format!("{device:?} stands in for {page:?}, which {home}"));
        }
        Ok(())
    }
}

/// Copies are read of pages that are marked: none of these can be written unheard.
fn check_protection(kernel: &Kernel, page: PageIndex, word: WordState) -> Result<(), String> {
    let is_protected = kernel.protected.contains(&page);
    if word.protected && word.place != Place::System {
        return Err(format!("{page:?} is protected, and not in RAM: {word:?}"));
    }
    if word.protected != is_protected {
        return Err(format!(
            "{page:?} is marked {word:?}, and protected: {is_protected}"
        ));
    }
    Ok(())
}

/// No frame is nobody's, and none is where nothing is mapped.
fn check_frames(kernel: &Kernel, staged: usize) -> Result<(), String> {
    let mapped = kernel.pages.iter();
    let mapped = mapped.filter(|(_, pte)| matches!(pte, Pte::Frame(_)));
    let mapped = mapped.count();
    let stray = kernel
        .pages
        .keys()
        .find(|page| kernel.mapping(page.start()).is_none());
    if let Some(page) = stray {
        return Err(format!("{page:?} has a page in RAM, and no mapping"));
    }
    let known = u64::try_from(mapped + staged).unwrap_or(u64::MAX);
    // Children that are alive may have what their parent has no more.
    let alive = kernel.frames.alive();
    if alive != known && !kernel.has_forked {
        return Err(format!(
            "{alive} frames are in use: {mapped} mapped, {staged} staged"
        ));
    }
    Ok(())
}
