//! What is bound where in a device address space: its GPU VMAs.
//!
//! ```text
//!   at first        [ mirror .............................................. )
//!   bind object     [ mirror ....... )[ object )[ mirror ................... )
//!   unbind          [ mirror .. )      hole      [ mirror .................. )
//!   bind mirror     [ mirror .............................................. )
//! ```
//!
//! A mirror VMA is where device and process see the same: there are ranges in it, made by faults. An
//! object VMA leads to memory of the device's own, and nothing of the process is seen through it. In a
//! hole, a fault is an error.
//!
//! # Invariants
//!
//! - VMAs do not overlap, and two mirrors that touch are one.
//! - A piece of an object VMA leads where that piece led before: cutting off its front moves its offset.
//!
//! # Locking
//!
//! The map's lock is a leaf, held for one operation. Whoever changes the map holds `working` of the
//! address space to write, so what a pass over a fault has looked up stays true until it has ended.
//!
//! # Differences from the kernel
//!
//! As `drm_gpuvm`, for two kinds of VMAs. Its split and merge steps, which a driver carries out one by one,
//! are one replacement here: what is replaced comes back, for its bindings to be taken away.

use gpusvm_sync::Mutex;
use gpusvm_types::{ByteSize, Span, VirtAddr};
use std::collections::BTreeMap;

/// All addresses that a span can name.
pub(crate) fn everything() -> Span {
    let end = VirtAddr::new(u64::MAX).align_down(gpusvm_types::PAGE_SIZE);
    Span::new(VirtAddr::new(0), end).expect("pages up to the last but one")
}

/// A binding of an object: which, and what of it.
#[derive(Debug)]
pub(crate) struct Binding<O> {
    pub(crate) object: O,
    /// Where in the object the VMA begins.
    pub(crate) offset: ByteSize,
    pub(crate) writable: bool,
}

impl<O: Clone> Binding<O> {
    /// The same, for a VMA that begins so much later.
    fn later(&self, by: ByteSize) -> Self {
        Self {
            object: self.object.clone(),
            offset: self.offset + by,
            writable: self.writable,
        }
    }
}

impl<O: Clone> Clone for Binding<O> {
    fn clone(&self) -> Self {
        self.later(ByteSize::ZERO)
    }
}

/// What a VMA is.
#[derive(Clone, Debug)]
pub(crate) enum Vma<O> {
    /// The process, at the same addresses (`CPU_ADDR_MIRROR`).
    Mirror,
    /// Memory of the device.
    Object(Binding<O>),
}

impl<O: Clone> Vma<O> {
    /// What it is for a piece of it that begins so much later.
    fn later(&self, by: ByteSize) -> Self {
        match self {
            Self::Mirror => Self::Mirror,
            Self::Object(binding) => Self::Object(binding.later(by)),
        }
    }
}

/// The VMAs of one device address space, by their start.
#[derive(Debug)]
pub(crate) struct Gpuvas<O>(Mutex<Map<O>>);

type Map<O> = BTreeMap<VirtAddr, (Span, Vma<O>)>;

impl<O: Clone> Gpuvas<O> {
    /// All of it mirrors the process.
    pub(crate) fn new() -> Self {
        let all = everything();
        Self(Mutex::new(BTreeMap::from([(
            all.start(),
            (all, Vma::Mirror),
        )])))
    }

    /// The VMA that holds `at`. `None` in a hole.
    pub(crate) fn find(&self, at: VirtAddr) -> Option<(Span, Vma<O>)> {
        let map = self.0.lock();
        let (_, (span, vma)) = map.range(..=at).next_back()?;
        span.contains(at).then(|| (*span, vma.clone()))
    }

    /// What of `span` is bound, ascending, clipped to it.
    pub(crate) fn inside(&self, span: Span) -> Vec<(Span, Vma<O>)> {
        pieces(&self.0.lock(), span)
    }

    /// Puts `vma` in the place of all that is in `span`, or nothing. What was there comes back.
    pub(crate) fn replace(&self, span: Span, vma: Option<Vma<O>>) -> Vec<(Span, Vma<O>)> {
        let mut map = self.0.lock();
        let before = pieces(&map, span);
        for (whole, old) in cut_out(&mut map, span) {
            for rest in whole.without(span).into_iter().flatten() {
                let by = rest.start().offset_from(whole.start());
                map.insert(rest.start(), (rest, old.later(by)));
            }
        }
        match vma {
            Some(Vma::Mirror) => {
                let all = merged(&mut map, span);
                map.insert(all.start(), (all, Vma::Mirror));
            }
            Some(object) => {
                map.insert(span.start(), (span, object));
            }
            None => {}
        }
        before
    }

    /// Makes holes of everything. What was there comes back.
    pub(crate) fn clear(&self) -> Vec<(Span, Vma<O>)> {
        let map = core::mem::take(&mut *self.0.lock());
        map.into_values().collect()
    }
}

/// The VMAs that overlap `span`, whole.
fn overlapping<O>(map: &Map<O>, span: Span) -> impl Iterator<Item = &(Span, Vma<O>)> {
    // VMAs do not overlap, so at most one that begins below reaches in.
    let below = map.range(..span.start()).next_back();
    let inside = map.range(span.start()..span.end());
    let both = below.into_iter().chain(inside).map(|(_, vma)| vma);
    both.filter(move |(whole, _)| whole.overlaps(span))
}

/// The VMAs that overlap `span`, clipped to it.
fn pieces<O: Clone>(map: &Map<O>, span: Span) -> Vec<(Span, Vma<O>)> {
    let clipped = overlapping(map, span).filter_map(|(whole, vma)| {
        let piece = whole.intersection(span)?;
        Some((piece, vma.later(piece.start().offset_from(whole.start()))))
    });
    clipped.collect()
}

/// Takes the VMAs that overlap `span` out of the map.
fn cut_out<O: Clone>(map: &mut Map<O>, span: Span) -> Vec<(Span, Vma<O>)> {
    let starts: Vec<_> = overlapping(map, span)
        .map(|(whole, _)| whole.start())
        .collect();
    let out = starts.into_iter().filter_map(|start| map.remove(&start));
    out.collect()
}

/// Takes the mirrors that touch `span` out of the map. What they and `span` are together.
fn merged<O>(map: &mut Map<O>, span: Span) -> Span {
    let is_mirror = |vma: &&(Span, Vma<O>)| matches!(vma.1, Vma::Mirror);
    let before = map.range(..span.start()).next_back().map(|(_, vma)| vma);
    let before = before
        .filter(is_mirror)
        .filter(|vma| vma.0.end() == span.start());
    let after = map.get(&span.end()).filter(is_mirror);
    let touching: Vec<Span> = before.into_iter().chain(after).map(|vma| vma.0).collect();
    touching.into_iter().fold(span, |all, mirror| {
        map.remove(&mirror.start());
        all.union(mirror)
    })
}

#[cfg(test)]
mod tests;
