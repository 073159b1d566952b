//! What the program's own page table has, page by page: for who reports it.
//!
//! The contract's look ([`AddressSpace::snapshot`]) tells where pages are, which is all that a decision
//! needs. This tells what kind of page of RAM it is, and what the mapping allows.

use super::Process;
use crate::Protection;
use crate::sys::pagemap::{Categories, Region as PageRegion};
use gpusvm_mm::{AddressSpace, MmError};
use gpusvm_types::{PageCount, Span, VirtAddr};

/// A page of RAM, as the program has it mapped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RamPage {
    /// It is the page of zeroes that all share.
    pub zero: bool,
    /// It is mapped as part of a huge page.
    pub huge: bool,
    /// A write would have to copy it first: the shared page of zeroes, or a page of a file in a private
    /// mapping.
    pub copied_on_write: bool,
}

/// What the program has at a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageLook {
    /// What its mapping allows. `None`: there is no mapping.
    pub protection: Option<Protection>,
    /// Its page of RAM, if it has one. One that was swapped out counts.
    pub ram: Option<RamPage>,
    /// It was swapped out; or there is a mark of a userfaultfd in its place, which looks the same.
    pub swapped: bool,
}

/// How many runs one scan reports: more runs, and it goes on where it stopped.
const RUNS: usize = 64;

impl Process {
    /// What the program has at each page of `span`. Nothing faults, and it is out of date when it returns.
    ///
    /// Before Linux 6.7 zero pages and huge pages cannot be told from others.
    ///
    /// # Errors
    ///
    /// `Gone`, and what the system refused.
    pub fn page_looks(&self, span: Span) -> Result<Vec<PageLook>, MmError> {
        let mut looks = vec![PageLook::default(); span.page_count().as_usize()];
        let mut rest = Some(span);
        // Each mapping ends behind the one before: at most one for each page.
        while let Some(left) = rest {
            let vma = self.find_vma(left.start())?;
            let Some(vma) = vma.filter(|vma| vma.span.start() < left.end()) else {
                break;
            };
            if let Some(mapped) = vma.span.intersection(left) {
                let protection = match (vma.readable, vma.writable) {
                    (false, _) => Protection::None,
                    (true, false) => Protection::Read,
                    (true, true) => Protection::ReadWrite,
                };
                let looks = &mut looks[range_of(span, mapped)];
                looks
                    .iter_mut()
                    .for_each(|look| look.protection = Some(protection));
                self.look_at_pages(mapped, looks)?;
            }
            rest = Span::new(vma.span.end(), span.end()).ok();
        }
        Ok(looks)
    }

    /// The pages of one mapping.
    fn look_at_pages(&self, span: Span, looks: &mut [PageLook]) -> Result<(), MmError> {
        let is_private = self.is_private(span.start())?;
        let mut runs = [PageRegion::EMPTY; RUNS];
        let mut rest = Some(span);
        // A scan that stops early has reported a run, so it came further.
        while let Some(left) = rest {
            let scanned = self.pages.scan(left, &mut runs);
            let scanned = scanned.map_err(refused("scanning the page table", left))?;
            for run in &runs[..scanned.regions] {
                let zero = run.categories.contains(Categories::ZERO);
                let page = RamPage {
                    zero,
                    huge: run.categories.contains(Categories::HUGE),
                    copied_on_write: zero
                        || is_private && run.categories.contains(Categories::FILE),
                };
                let piece = Span::new(run.start, run.end).ok();
                let piece = piece.and_then(|piece| piece.intersection(span));
                let pages = piece.map(|piece| &mut looks[range_of(span, piece)]);
                pages.into_iter().flatten().for_each(|look| {
                    look.ram = Some(page);
                    look.swapped = !run.categories.contains(Categories::PRESENT);
                });
            }
            rest = Span::new(scanned.until, span.end()).ok();
        }
        Ok(())
    }

    fn is_private(&self, at: VirtAddr) -> Result<bool, MmError> {
        let found = self.vmas.find(at);
        let found = found.map_err(refused("looking a mapping up", Span::page_of(at)))?;
        // Pages of hugetlbfs say that they are of a file, and are copied only when they are shared.
        Ok(found.is_some_and(|vma| !vma.shared && !vma.hugetlb))
    }
}

fn refused(call: &'static str, span: Span) -> impl FnOnce(rustix::io::Errno) -> MmError {
    move |errno| MmError::System {
        call,
        span,
        errno: errno.raw_os_error(),
    }
}

/// Where the entries of `piece` are, which is in `span`.
fn range_of(span: Span, piece: Span) -> core::ops::Range<usize> {
    let first = span.index_of(piece.first_page());
    let count: PageCount = piece.page_count();
    first..first + count.as_usize()
}
