//! The thread that changes mappings under everybody's feet: what it has, and how it takes it.

use crate::Storm;
use crate::actions::ACTIONS;
use crate::model::{Outcome, Owned, behind, span_of};
use gpusvm::driver::Prefetch;
use gpusvm::{Span, VirtAddr};
use gpusvm_mm_sim::Sim;
use gpusvm_testkit::world::World;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Where pages are mapped: across the border of two blocks, little more than there are; apart from where
/// the world puts what may be anywhere.
const WINDOW: VirtAddr = VirtAddr::new((3 << 44) - 96 * 4096);
const WINDOW_PAGES: usize = 256;

/// The thread that changes mappings.
#[derive(Debug)]
pub(crate) struct Mutator {
    pub(crate) storm: Arc<Storm>,
    pub(crate) prefetches: Vec<Prefetch<Sim>>,
    /// What was moved away from with its mapping left behind.
    pub(crate) left_behind: Vec<Span>,
    /// Which pages of the window are in use.
    used: Vec<bool>,
    now: &'static str,
}

impl Mutator {
    pub(crate) fn new(storm: &Arc<Storm>) -> Self {
        Self {
            storm: Arc::clone(storm),
            prefetches: Vec::new(),
            left_behind: Vec::new(),
            used: vec![false; WINDOW_PAGES],
            now: "",
        }
    }

    /// Does one thing after the other.
    pub(crate) fn run(&mut self, actions: usize) {
        let choice: Vec<usize> = (0..ACTIONS.len())
            .flat_map(|i| std::iter::repeat_n(i, ACTIONS[i].weight))
            .collect();
        for _ in 0..actions {
            let i = choice[self.storm.below(choice.len())];
            self.now = ACTIONS[i].name;
            if (ACTIONS[i].act)(self).is_some() {
                self.storm.count(|counts| counts.actions[i] += 1);
            }
            self.storm.touched.store(0, Ordering::Relaxed);
            self.pause(300);
        }
    }

    /// Others go on for a while.
    fn pause(&self, micros: u64) {
        let sim = self.storm.world.mm();
        sim.sleep(Duration::from_micros(sim.random(micros)));
    }

    fn some(&self, at_most: usize) -> core::ops::Range<usize> {
        let first = self.storm.below(self.storm.model.pages());
        let end = first + 1 + self.storm.below(at_most);
        first..end.min(self.storm.model.pages())
    }

    /// Pages that are mapped in one piece; whoever touches them goes on.
    pub(crate) fn find_some(&self, at_most: usize) -> Option<Owned> {
        self.storm.model.find(self.some(at_most))
    }

    /// Those of them that are mirrored.
    pub(crate) fn find_mirrored(&self, at_most: usize) -> Option<Owned> {
        self.find_some(at_most).filter(|found| !found.plain)
    }

    /// Pages that are mapped in one piece, if nobody keeps them too long.
    pub(crate) fn own_some(&self, at_most: usize) -> Option<Owned> {
        self.own(at_most, false)
    }

    /// Pages that are nowhere.
    pub(crate) fn own_gone(&self, at_most: usize) -> Option<Owned> {
        self.own(at_most, true)
    }

    fn own(&self, at_most: usize, gone: bool) -> Option<Owned> {
        let pages = self.some(at_most);
        for _ in 0..20 {
            let owned = self.storm.model.try_own_pages(pages.clone(), gone);
            if owned.is_some() {
                return owned;
            }
            self.pause(40);
        }
        None
    }

    /// Gives pages back, when the engine has heard of what became of them: lanes that run meanwhile are
    /// not to see what was there before.
    pub(crate) fn give_back(&self, owned: Owned, outcome: Outcome) {
        self.storm.world.settle();
        let to = match outcome {
            Outcome::Moved(at) | Outcome::Zeroed { at, .. } => Some(at),
            Outcome::Stayed => owned.at,
            Outcome::Gone => None,
        };
        let pages = owned.pages.len();
        let span = |at: Option<VirtAddr>| span_of(at?, pages);
        self.storm.log((self.now, [span(owned.at), span(to)]));
        self.storm.model.give_back(owned, outcome);
    }

    /// Gives pages back that are mirrored now and were not, or the other way round.
    pub(crate) fn give_back_switched(&self, owned: Owned, at: VirtAddr) {
        let plain = !owned.plain;
        self.storm.model.set_plain(owned.pages.clone(), plain);
        self.give_back(owned, Outcome::Moved(at));
    }

    /// A free place in the window for so many pages; it is in use from now on.
    pub(crate) fn find_place(&mut self, pages: usize) -> Option<VirtAddr> {
        for _ in 0..32 {
            let at = behind(WINDOW, self.storm.below(WINDOW_PAGES - pages));
            if self.is_free(at, pages) {
                self.mark(at, pages, true);
                return Some(at);
            }
        }
        None
    }

    /// Whether nothing is mapped there.
    pub(crate) fn is_free(&self, at: VirtAddr, pages: usize) -> bool {
        let mut places = self.places(at, pages).peekable();
        pages == 0
            || (places.peek().is_some() && places.all(|i| !self.used.get(i).unwrap_or(&true)))
    }

    /// A place is in use, or free again, if it is in the window.
    pub(crate) fn mark(&mut self, at: VirtAddr, pages: usize, used: bool) {
        let places: Vec<usize> = self.places(at, pages).collect();
        for i in places {
            self.used.get_mut(i).into_iter().for_each(|it| *it = used);
        }
    }

    /// Where in the window that is.
    fn places(&self, at: VirtAddr, pages: usize) -> impl Iterator<Item = usize> + use<> {
        let first = at.get().checked_sub(WINDOW.get());
        let first = first.and_then(|offset| usize::try_from(offset / 4096).ok());
        first
            .into_iter()
            .flat_map(move |first| first..first + pages)
    }
}
