//! The table of mirrored mappings.
//!
//! A region keeps its words when parts of it are unmapped or moved; the table says which parts of
//! which region are still mirrored.
//!
//! # Locking
//!
//! Handlers take it to read, for a look-up. Who changes it prepares outside the lock what it puts in,
//! and drops outside what it took out.

use crate::region::Region;
use gpusvm_mm::Mirror;
use gpusvm_sync::{Arc, RwLock};
use gpusvm_types::{Span, VirtAddr};

/// A part of a region that is still mirrored.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub(crate) span: Span,
    pub(crate) region: Arc<Region>,
}

/// The mirrored mappings: parts of regions, ascending, without overlap.
#[derive(Debug, Default)]
pub(crate) struct Regions(RwLock<Vec<Part>>);

impl Regions {
    /// The part that holds `at`.
    pub(crate) fn find(&self, at: VirtAddr) -> Option<Part> {
        let parts = self.0.read();
        let part = parts.get(first_ending_above(&parts, at))?;
        part.span.contains(at).then(|| part.clone())
    }

    /// What is mirrored around `at`.
    pub(crate) fn mirror(&self, at: VirtAddr) -> Mirror {
        let parts = self.0.read();
        let next = first_ending_above(&parts, at);
        if let Some(part) = parts.get(next).filter(|part| part.span.contains(at)) {
            return Mirror::Mapping(part.span);
        }
        let below = next
            .checked_sub(1)
            .map_or(VirtAddr::new(0), |i| parts[i].span.end());
        let above = parts.get(next).map_or(END, |part| part.span.start());
        Mirror::Gap(Span::new(below, above).unwrap_or_else(|_| Span::page_of(at)))
    }

    /// Calls `each` with every part that overlaps `span`, and how much of it does.
    pub(crate) fn for_each_in(&self, span: Span, mut each: impl FnMut(&Region, Span)) {
        let parts = self.0.read();
        let first = first_ending_above(&parts, span.start());
        for part in &parts[first..] {
            match part.span.intersection(span) {
                Some(inside) => each(&part.region, inside),
                None => break,
            }
        }
    }

    /// The parts that overlap `span`, cut to it. Allocates.
    pub(crate) fn parts_in(&self, span: Span) -> Vec<Part> {
        let parts = self.0.read();
        let cut = |part: &Part| {
            let span = part.span.intersection(span)?;
            Some(Part {
                span,
                region: Arc::clone(&part.region),
            })
        };
        parts.iter().filter_map(cut).collect()
    }

    /// All parts. Allocates.
    pub(crate) fn all(&self) -> Vec<Part> {
        self.0.read().clone()
    }

    /// Adds a region.
    ///
    /// # Errors
    ///
    /// The span that is mirrored already.
    pub(crate) fn insert(&self, region: Arc<Region>) -> Result<(), Span> {
        let span = region.span();
        let mut parts = self.0.write();
        let at = first_ending_above(&parts, span.start());
        if let Some(other) = parts.get(at).filter(|part| part.span.overlaps(span)) {
            return Err(other.span);
        }
        parts.insert(at, Part { span, region });
        Ok(())
    }

    /// Forgets what of `span` is mirrored.
    pub(crate) fn remove(&self, span: Span) {
        gpusvm_sync::walk!("remove");
        let mut parts = self.0.write();
        let kept = parts
            .iter()
            .flat_map(|part| {
                let rest = part.span.without(span);
                rest.map(|span| {
                    Some(Part {
                        span: span?,
                        region: Arc::clone(&part.region),
                    })
                })
            })
            .flatten()
            .collect();
        let gone = core::mem::replace(&mut *parts, kept);
        drop(parts);
        drop(gone);
    }
}

/// The end of what a process can map: 2^47 less the last page.
const END: VirtAddr = VirtAddr::new(0x7fff_ffff_f000);

fn first_ending_above(parts: &[Part], at: VirtAddr) -> usize {
    parts.partition_point(|part| part.span.end() <= at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::Behind;

    fn span(start: u64, end: u64) -> Span {
        Span::new(VirtAddr::new(start << 12), VirtAddr::new(end << 12)).unwrap()
    }

    fn at(page: u64) -> VirtAddr {
        VirtAddr::new(page << 12)
    }

    fn region(span: Span) -> Region {
        Region::new(
            span,
            Behind::Zeroes,
            &crate::sys::room::Room::reserve().unwrap(),
        )
        .unwrap()
    }

    #[test]
    fn parts_are_found_and_gaps_between_them() {
        let regions = Regions::default();
        regions.insert(Arc::new(region(span(10, 20)))).unwrap();
        regions.insert(Arc::new(region(span(30, 40)))).unwrap();
        assert_eq!(regions.mirror(at(10)), Mirror::Mapping(span(10, 20)));
        assert_eq!(regions.mirror(at(20)), Mirror::Gap(span(20, 30)));
        assert_eq!(regions.mirror(at(5)), Mirror::Gap(span(0, 10)));
        assert_eq!(
            regions.insert(Arc::new(region(span(39, 41)))),
            Err(span(30, 40))
        );
    }

    #[test]
    fn a_hole_leaves_two_parts_of_one_region() {
        let regions = Regions::default();
        regions.insert(Arc::new(region(span(10, 20)))).unwrap();
        regions.remove(span(13, 15));
        assert_eq!(
            regions.find(at(12)).map(|part| part.span),
            Some(span(10, 13))
        );
        assert!(regions.find(at(13)).is_none());
        assert_eq!(
            regions.find(at(15)).map(|part| part.span),
            Some(span(15, 20))
        );
        assert_eq!(regions.find(at(15)).unwrap().region.span(), span(10, 20));
        regions.remove(span(0, 100));
        assert!(regions.all().is_empty());
    }
}
