//! Pages of one memory go home: those that were named, and no others of their allocation. `migrate_vma` with
//! `MIGRATE_VMA_SELECT_DEVICE_PRIVATE`.
//!
//! ```text
//!   each block -> lock -> each allocation in it -> a launch needs it? wait
//!                            collect_device: named, and of this allocation -> copy -> commit
//! ```
//!
//! A CPU fault brings the whole window of its allocation; whoever asks for pages gets these pages.

use crate::pieces::{self, Cause};
use crate::{Holds, MigrateError, Pagemap};
use core::time::Duration;
use gpusvm_mm::range_fault::{self, Snapshot};
use gpusvm_mm::{AddressSpace, Block, Home, Inbound, Mirror, MmError};
use gpusvm_types::{PAGES_PER_BLOCK, PageCount, PageIndex, Span};

/// Brings the pages of `span` home that are in this memory. Says how many came. Timeslices do not hold; launches
/// that need pages are waited for, for so long
/// ([`HELD_TIMEOUT`](gpusvm_mm::range_fault::HELD_TIMEOUT)).
///
/// # Errors
///
/// `Mm`: `Gone`, `Unstable` when a launch needs a page for too long, and what the address space refused; `Devmem`
/// when a copy failed. Pages of before have come.
pub fn migrate_back<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    span: Span,
    cause: Cause,
) -> Result<PageCount, MigrateError> {
    gpusvm_sync::walk!("migrate_back");
    let mm = pagemap.mm.upgrade().ok_or(MmError::Gone)?;
    let mut count = PageCount::ZERO;
    each_mirrored(&*mm, span, |piece| {
        count += of_block(pagemap, &*mm, piece, cause)?;
        Ok::<(), MigrateError>(())
    })?;
    Ok(count)
}

/// Calls `each` with every part of `span` that is mirrored, of one block and one mirrored mapping at a time.
pub(crate) fn each_mirrored<M: AddressSpace, E>(
    mm: &M,
    span: Span,
    mut each: impl FnMut(Span) -> Result<(), E>,
) -> Result<(), E> {
    for block in span.blocks() {
        let mut rest = Some(block);
        while let Some(left) = rest {
            let mirror = mm.mirrored(left.start());
            let here = mirror.span().intersection(left).unwrap_or(left);
            if let Mirror::Mapping(_) = mirror {
                each(here)?;
            }
            rest = Span::new(here.end(), left.end()).ok();
        }
    }
    Ok(())
}

/// How soon to look again at pages that a launch needs.
const HELD_POLL: Duration = Duration::from_millis(1);

/// What became of a page, and of those of its allocation that were named with it.
enum Came {
    /// So many are home, which were not before.
    Home(PageCount),
    /// A launch needs them.
    Held,
}

/// Of one block.
fn of_block<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    mm: &M,
    span: Span,
    cause: Cause,
) -> Result<PageCount, MigrateError> {
    let mut count = PageCount::ZERO;
    let mut failed = None;
    let mut look = || {
        let mut block = match mm.lock_block(span) {
            Ok(block) => block,
            // It was unmapped, or let go: what was there is home, or nobody's.
            Err(MmError::NotMirrored { .. }) => return Ok(Snapshot::Stable),
            Err(error) => return Err(error),
        };
        let mut is_held = false;
        for page in span.pages() {
            match bring(pagemap, mm, &mut block, (span, page), cause) {
                Ok(Came::Home(pages)) => count += pages,
                Ok(Came::Held) => is_held = true,
                Err(MigrateError::Mm(error)) => return Err(error),
                Err(error) => {
                    failed = Some(error);
                    return Ok(Snapshot::Stable);
                }
            }
        }
        drop(block);
        if is_held {
            gpusvm_sync::sleep(HELD_POLL);
            return Ok(Snapshot::Held);
        }
        Ok(Snapshot::Stable)
    };
    range_fault::until_stable(span, || mm.now(), &mut look)?;
    failed.map_or(Ok(count), Err)
}

fn bring<M: AddressSpace>(
    pagemap: &Pagemap<M>,
    mm: &M,
    block: &mut M::Block<'_>,
    (span, page): (Span, PageIndex),
    cause: Cause,
) -> Result<Came, MigrateError> {
    let device = block.home(page).device_page();
    let device = device.filter(|device| pagemap.contains(*device));
    let Some(zdd) = device.and_then(|device| pagemap.zdds.of(device.pfn)) else {
        return Ok(Came::Home(PageCount::ZERO));
    };
    let Some(devmem) = pagemap.zdds.devmem(zdd) else {
        return Ok(Came::Home(PageCount::ZERO));
    };
    if devmem.stays_until(mm.now(), Holds::Leases).is_some() {
        return Ok(Came::Held);
    }
    let mut leave = [false; PAGES_PER_BLOCK];
    let collected = block.collect_device(span, &mut |page, device| {
        let leaves = pagemap.is_same(device, zdd);
        leave[span.index_of(page)] |= leaves;
        leaves
    })?;
    let mut pieces = pieces::to_ram(collected.leaving());
    let copied = devmem.ops().copy_to_ram(&mut pieces, None, cause);
    drop(pieces);
    copied.map_err(|error| MigrateError::Devmem { span, error })?;
    let in_place = collected.in_place();
    collected.commit()?;
    devmem.came_home_in_place(in_place, cause);
    // What was unmapped meanwhile stays: the event says what becomes of it.
    let is_home = |page| matches!(block.home(page), Home::System | Home::Protected);
    let pages = span.pages().zip(leave);
    let count = pages
        .filter(|(page, leaves)| *leaves && is_home(*page))
        .count();
    Ok(Came::Home(PageCount::from_usize(count)))
}
