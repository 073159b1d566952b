//! Private mappings of files: which pages are the program's, and which the file's.
//!
//! ```text
//!   pages of the mapping    . . F F P P P . P Z      P written by the program: private, anonymous
//!   pages of the file       . F F F . F F . . .      F of the file    Z zeroes    . none
//!                                   ^ ^ ^   ^        these move
//! ```
//!
//! When a written page has left and is dropped here, the kernel shows the file's page again, if there is
//! one, and says nothing: unless userfaultfd is asked to report that as well
//! (`UFFDIO_REGISTER_MODE_MINOR`). So such memory is registered that way, and who touches a page that is on
//! a device waits, whatever is in the file.

use super::PageSet;
use crate::block::BlockGuard;
use crate::region::Behind;
use crate::sys::pagemap::{Categories, Region as PageRegion};
use gpusvm_mm::{KeptReason, Source};
use gpusvm_types::Span;

/// The pages of `span` that the program has not written: none where no file is behind.
pub(crate) fn pages_of_file(block: &BlockGuard<'_>, span: Span) -> PageSet {
    let mut of_file = PageSet::default();
    if block.region.behind() == Behind::Zeroes {
        return of_file;
    }
    of_file.insert(0..span.page_count().as_usize());
    let mut seen = [PageRegion::EMPTY; 64];
    let mut rest = Some(span);
    while let Some(left) = rest {
        // What is not known is not the program's.
        let Ok(scanned) = block.process.scan(left, &mut seen) else {
            break;
        };
        let kinds = [Categories::FILE, Categories::ZERO];
        let is_written =
            |run: &&PageRegion| !kinds.iter().any(|kind| run.categories.contains(*kind));
        for run in seen[..scanned.regions].iter().filter(is_written) {
            let run = Span::new(run.start, run.end).ok();
            if let Some(run) = run.and_then(|run| run.intersection(span)) {
                of_file.remove(super::indices(span, run));
            }
        }
        rest = Span::new(scanned.until, span.end()).ok();
    }
    of_file
}

/// What is no page of the program's is the file's.
pub(crate) fn keep_holes(sources: &mut [Source]) {
    for source in sources {
        if *source == Source::Hole {
            *source = Source::Kept(KeptReason::OfFile);
        }
    }
}
