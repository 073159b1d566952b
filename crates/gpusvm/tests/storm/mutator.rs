//! The thread that changes mappings under everybody's feet: what it has, and how it takes it.

use crate::actions::ACTIONS;
use crate::random::Random;
use crate::table::{CELLS_PER_PAGE, Held, Outcome, PAGE};
use crate::{Decision, PAGES, SLICE_PAGES, SLICES, Storm, is_left_out};
use gpusvm::{Adopted, Prefetch, SvmSlice};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Far from where the kernel puts mappings: nobody else comes to what is left free here.
const WINDOW: u64 = 0x2000_0000_0000;
/// Little more than what is mapped, so that blocks are shared by several mappings.
const WINDOW_PAGES: usize = PAGES * 2;

/// The thread that changes mappings.
#[derive(Debug)]
pub(crate) struct Mutator {
    pub(crate) storm: Arc<Storm>,
    pub(crate) random: Random,
    pub(crate) adopted: Vec<Adopted>,
    pub(crate) slices: Vec<Option<SvmSlice<u64>>>,
    pub(crate) prefetches: Vec<Prefetch>,
    /// Which pages of the window are in use.
    used: Vec<bool>,
    /// What was moved away from with its mapping left behind.
    pub(crate) left_behind: Vec<(u64, usize)>,
    /// Whether the last device is out of use.
    pub(crate) is_unbound: bool,
    /// What it does.
    now: &'static str,
}

/// Consecutive pages, at consecutive addresses, that the mutator owns.
#[derive(Debug)]
pub(crate) struct Owned {
    pub(crate) pages: Range<usize>,
    pub(crate) at: u64,
    held: Vec<Held>,
}

impl Owned {
    pub(crate) fn len(&self) -> usize {
        self.pages.len() * PAGE
    }
}

impl Mutator {
    pub(crate) fn new(storm: &Arc<Storm>) -> Self {
        Self {
            storm: Arc::clone(storm),
            random: Random::new(storm.seed, 2000),
            adopted: Vec::new(),
            slices: (0..SLICES).map(|_| None).collect(),
            prefetches: Vec::new(),
            used: vec![false; WINDOW_PAGES],
            left_behind: Vec::new(),
            is_unbound: false,
            now: "",
        }
    }

    /// Does one thing after the other until the storm is over.
    pub(crate) fn run(&mut self) {
        let actions: Vec<_> = ACTIONS
            .iter()
            .enumerate()
            .filter(|(_, action)| action.anywhere || self.storm.adopts())
            .filter(|(_, action)| !is_left_out(action.name))
            .flat_map(|(i, action)| std::iter::repeat_n(i, action.weight))
            .collect();
        while !self.storm.is_over() {
            let i = actions[self.random.below(actions.len())];
            self.now = ACTIONS[i].name;
            if (ACTIONS[i].act)(self).is_some() {
                self.storm.counts.actions[i].fetch_add(1, Ordering::Relaxed);
            }
            if self.random.one_in(8) {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Remembers what was adopted.
    pub(crate) fn log_share(&self, at: u64, len: usize) {
        self.storm.log(Decision {
            name: "(adopt)",
            pages: PAGES..PAGES + len / PAGE,
            from: at,
            to: None,
        });
    }

    /// Pages of the program's that are mapped, in one piece, if nobody keeps them too long.
    pub(crate) fn own_some(&mut self, at_most: usize) -> Option<Owned> {
        let first = self.random.below(PAGES);
        let len = 1 + self.random.below(at_most);
        self.own(first..(first + len).min(PAGES))
    }

    /// As much of `pages`, from the first on, as is mapped in one piece.
    pub(crate) fn own(&self, pages: Range<usize>) -> Option<Owned> {
        let table = &self.storm.table;
        let at = table.place(pages.start);
        if at == 0 {
            return None;
        }
        let is_next = |(i, page)| table.place(page) == at + (i * PAGE) as u64;
        let len = pages
            .clone()
            .enumerate()
            .take_while(|p| is_next(*p))
            .count();
        let pages = pages.start..pages.start + len;
        let held = self.own_cells(&pages, false)?;
        Some(Owned { pages, at, held })
    }

    /// Pages that are nowhere, as many as there are in a row.
    pub(crate) fn own_gone(&self, pages: Range<usize>) -> Option<Owned> {
        let is_gone = |page: &usize| self.storm.table.place(*page) == 0;
        let len = pages.clone().take_while(is_gone).count();
        let pages = pages.start..pages.start + len;
        let held = self.own_cells(&pages, true)?;
        let at = 0;
        (len > 0).then_some(Owned { pages, at, held })
    }

    fn own_cells(&self, pages: &Range<usize>, gone: bool) -> Option<Vec<Held>> {
        let table = &self.storm.table;
        let cells = pages.start * CELLS_PER_PAGE..pages.end * CELLS_PER_PAGE;
        let until = Instant::now() + Duration::from_millis(200);
        let mut held: Vec<Held> = Vec::with_capacity(cells.len());
        for cell in cells.clone() {
            loop {
                if let Some(one) = table.try_own(cell, gone) {
                    held.push(one);
                    break;
                }
                if Instant::now() > until || self.storm.is_over() {
                    for (cell, one) in cells.zip(held) {
                        table.give_back(cell, one, Outcome::Same);
                    }
                    return None;
                }
                std::thread::yield_now();
            }
        }
        Some(held)
    }

    /// Gives pages back, which are where they were, or at `at`, or nowhere.
    pub(crate) fn give_back(&self, owned: Owned, at: Option<u64>, outcome: Outcome) {
        // Kernels run meanwhile: they are not to see what was there before.
        self.storm.svm.settle();
        let table = &self.storm.table;
        self.storm.log(Decision {
            name: self.now,
            pages: owned.pages.clone(),
            from: owned.at,
            to: at,
        });
        for (i, page) in owned.pages.clone().enumerate() {
            let place = at.map_or(0, |at| at + (i * PAGE) as u64);
            table.set_place(page, place);
        }
        let first = owned.pages.start * CELLS_PER_PAGE;
        for (i, held) in owned.held.into_iter().enumerate() {
            table.give_back(first + i, held, outcome);
        }
    }

    /// Splits off what comes behind the first `keep` pages.
    pub(crate) fn split(owned: &mut Owned, keep: usize) -> Owned {
        let middle = owned.pages.start + keep;
        let tail = Owned {
            pages: middle..owned.pages.end,
            at: owned.at + (keep * PAGE) as u64,
            held: owned.held.split_off(keep * CELLS_PER_PAGE),
        };
        owned.pages.end = middle;
        tail
    }

    /// The pages of a slice, by its number.
    pub(crate) fn pages_of_slice(slice: usize) -> Range<usize> {
        let first = PAGES + slice * SLICE_PAGES;
        first..first + SLICE_PAGES
    }

    /// A free place in the window for so many pages; it is in use from now on.
    pub(crate) fn find_place(&mut self, pages: usize) -> Option<u64> {
        for _ in 0..64 {
            let first = self.random.below(WINDOW_PAGES - pages);
            let place = &mut self.used[first..first + pages];
            if place.iter().all(|used| !used) {
                place.fill(true);
                return Some(WINDOW + (first * PAGE) as u64);
            }
        }
        None
    }

    /// A place is free again, if it is in the window.
    pub(crate) fn free_place(&mut self, at: u64, pages: usize) {
        self.mark(at, pages, false);
    }

    /// A place is in use, if it is in the window. Whether it was free.
    pub(crate) fn mark(&mut self, at: u64, pages: usize, used: bool) -> bool {
        let Some(first) = at.checked_sub(WINDOW) else {
            return true;
        };
        let first = usize::try_from(first).unwrap() / PAGE;
        // The kernel lets mappings grow beyond the end of the window as well.
        let end = (first + pages).min(WINDOW_PAGES);
        let Some(place) = self.used.get_mut(first..end) else {
            return true;
        };
        let was = place.iter().all(|now| *now != used);
        place.fill(used);
        was
    }
}
