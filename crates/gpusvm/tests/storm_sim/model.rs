//! What every word of the storm's memory is to hold, and who may say so.
//!
//! ```text
//!   page      0      1      2    ...    where it is, if it is anywhere
//!   cells    [0 1]  [2 3]  [4 5]        its first word and its last: what it holds, who uses it
//! ```
//!
//! Whoever writes a cell owns it; whoever reads it owns it together with other readers, or nobody, and
//! then finds out afterwards whether what it read may be judged. So a wrong word is wrong for sure.

use gpusvm::{ByteSize, Span, VirtAddr};
use gpusvm_types::{PAGE_SIZE, PageCount};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

pub(crate) const CELLS_PER_PAGE: usize = 2;

/// What is known of all pages.
#[derive(Debug)]
pub(crate) struct Model(Mutex<Vec<Page>>);

#[derive(Clone, Debug, Default)]
struct Page {
    at: Option<VirtAddr>,
    /// Nobody mirrors it.
    plain: bool,
    cells: [Cell; CELLS_PER_PAGE],
}

#[derive(Clone, Copy, Debug, Default)]
struct Cell {
    value: u64,
    owned: bool,
    readers: u32,
    /// How often somebody owned it.
    version: u64,
}

/// A cell that is there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Held {
    pub(crate) cell: usize,
    pub(crate) at: VirtAddr,
    pub(crate) value: u64,
    pub(crate) plain: bool,
    version: u64,
}

/// Consecutive pages, at consecutive addresses if they are mapped, that somebody owns.
#[derive(Debug)]
#[must_use = "nobody else gets at them"]
pub(crate) struct Owned {
    pub(crate) pages: Range<usize>,
    pub(crate) at: Option<VirtAddr>,
    pub(crate) plain: bool,
}

/// What becomes of pages that somebody owned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// They are where they were.
    Stayed,
    /// They are somewhere else, as they were.
    Moved(VirtAddr),
    /// They are there, all zero, mirrored or not.
    Zeroed { at: VirtAddr, plain: bool },
    /// They are no more.
    Gone,
}

impl Owned {
    pub(crate) fn span(&self) -> Option<Span> {
        span_of(self.at?, self.pages.len())
    }
}

pub(crate) fn span_of(at: VirtAddr, pages: usize) -> Option<Span> {
    Span::from_len(at, PageCount::from_usize(pages).bytes()).ok()
}

/// The address of the page `i` pages behind one.
pub(crate) fn behind(at: VirtAddr, i: usize) -> VirtAddr {
    at + PageCount::from_usize(i).bytes()
}

impl Model {
    /// So many pages, all of them nowhere.
    pub(crate) fn new(pages: usize) -> Self {
        Self(Mutex::new(vec![Page::default(); pages]))
    }

    // Never across a step of the world: then nobody waits for it.
    fn lock(&self) -> MutexGuard<'_, Vec<Page>> {
        self.0.lock().unwrap()
    }

    pub(crate) fn pages(&self) -> usize {
        self.lock().len()
    }

    pub(crate) fn cells(&self) -> usize {
        self.pages() * CELLS_PER_PAGE
    }

    /// All that is mapped, page by page.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let pages = self.lock();
        pages
            .iter()
            .filter_map(|page| span_of(page.at?, 1))
            .collect()
    }

    /// Takes a cell that is there and that nobody has.
    pub(crate) fn try_own(&self, cell: usize) -> Option<Held> {
        let mut pages = self.lock();
        let held = held(&pages, cell)?;
        let cell = &mut pages[cell / CELLS_PER_PAGE].cells[cell % CELLS_PER_PAGE];
        (cell.readers == 0).then(|| cell.owned = true)?;
        Some(held)
    }

    /// Gives a cell back, with what it holds now.
    pub(crate) fn give_back_cell(&self, held: Held, value: u64) {
        let cell = &mut self.lock()[held.cell / CELLS_PER_PAGE].cells[held.cell % CELLS_PER_PAGE];
        cell.value = value;
        cell.owned = false;
        cell.version += 1;
    }

    /// Reads a cell together with others, so that nobody writes it.
    pub(crate) fn try_share(&self, cell: usize) -> Option<Held> {
        let mut pages = self.lock();
        let held = held(&pages, cell)?;
        pages[cell / CELLS_PER_PAGE].cells[cell % CELLS_PER_PAGE].readers += 1;
        Some(held)
    }

    pub(crate) fn unshare(&self, held: Held) {
        self.lock()[held.cell / CELLS_PER_PAGE].cells[held.cell % CELLS_PER_PAGE].readers -= 1;
    }

    /// What a cell holds, for who reads it without asking anybody.
    pub(crate) fn look(&self, cell: usize) -> Option<Held> {
        held(&self.lock(), cell)
    }

    /// Whether nobody owned the cell since that look: then what was read may be judged.
    pub(crate) fn is_unchanged(&self, seen: Held) -> bool {
        let pages = self.lock();
        let now = held(&pages, seen.cell);
        now.is_some_and(|now| now.version == seen.version)
    }

    /// As many of `pages`, from the first on, as are mapped in one piece; no touching them.
    pub(crate) fn find(&self, pages: Range<usize>) -> Option<Owned> {
        find(&self.lock(), pages, false)
    }

    /// As `find`, or as many as are nowhere; and takes them, if nobody has one.
    pub(crate) fn try_own_pages(&self, wanted: Range<usize>, gone: bool) -> Option<Owned> {
        let mut pages = self.lock();
        let found = find(&pages, wanted, gone)?;
        let cells = pages[found.pages.clone()]
            .iter()
            .flat_map(|page| &page.cells);
        if cells.clone().any(|cell| cell.owned || cell.readers > 0) {
            return None;
        }
        for page in &mut pages[found.pages.clone()] {
            page.cells.iter_mut().for_each(|cell| cell.owned = true);
        }
        Some(found)
    }

    /// Pages that the caller owns are mirrored from now on, or not.
    pub(crate) fn set_plain(&self, pages: Range<usize>, plain: bool) {
        self.lock()[pages]
            .iter_mut()
            .for_each(|page| page.plain = plain);
    }

    pub(crate) fn give_back(&self, owned: Owned, outcome: Outcome) {
        let mut pages = self.lock();
        for (i, page) in pages[owned.pages].iter_mut().enumerate() {
            let (at, plain, zero) = match outcome {
                Outcome::Stayed => (page.at, page.plain, false),
                Outcome::Moved(at) => (Some(behind(at, i)), page.plain, false),
                Outcome::Zeroed { at, plain } => (Some(behind(at, i)), plain, true),
                Outcome::Gone => (None, false, true),
            };
            (page.at, page.plain) = (at, plain);
            for cell in &mut page.cells {
                cell.owned = false;
                cell.version += 1;
                cell.value = if zero { 0 } else { cell.value };
            }
        }
    }
}

/// A cell that is mapped and that nobody owns.
fn held(pages: &[Page], cell: usize) -> Option<Held> {
    let page = &pages[cell / CELLS_PER_PAGE];
    let Cell {
        value,
        owned,
        version,
        ..
    } = page.cells[cell % CELLS_PER_PAGE];
    let last = PAGE_SIZE.get() - 8;
    let offset = if cell.is_multiple_of(CELLS_PER_PAGE) {
        0
    } else {
        last
    };
    let at = page.at.filter(|_| !owned)? + ByteSize::new(offset);
    Some(Held {
        cell,
        at,
        value,
        plain: page.plain,
        version,
    })
}

fn find(pages: &[Page], wanted: Range<usize>, gone: bool) -> Option<Owned> {
    let Page { at, plain, .. } = *pages.get(wanted.start)?;
    let belongs = |(i, page): &(usize, &Page)| match at {
        Some(at) => page.at == Some(behind(at, *i)) && page.plain == plain,
        None => page.at.is_none(),
    };
    let all = pages[wanted.clone()].iter().enumerate();
    let len = all.take_while(belongs).count();
    let pages = wanted.start..wanted.start + len;
    (at.is_none() == gone && len > 0).then_some(Owned { pages, at, plain })
}
