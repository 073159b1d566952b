//! What of a range is mapped on a device: `drm_gpusvm_pages`.
//!
//! Apart from the range, because N devices can map one range, each with pages of its own.

use crate::Quiesced;
use alloc::{vec, vec::Vec};
use gpusvm_mm::Home;
use gpusvm_sync::atomic::{AtomicU8, Ordering};
use gpusvm_types::Span;

/// What a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// Loads.
    Read,
    /// Loads, stores and atomics.
    Write,
}

/// The mapping state of a range on one device.
///
/// Set with the notifier lock held to read, by who serves the range; cleared with it held to write.
#[derive(Debug, Default)]
pub struct Pages(AtomicU8);

const NOT_MAPPED: u8 = 0;
const READ: u8 = 1;
const WRITE: u8 = 2;

impl Pages {
    /// Whether the range is mapped with at least this permission. A hint without the notifier lock:
    /// enough to see that a fault was served meanwhile.
    pub fn allow(&self, wanted: Permission) -> bool {
        let mapped = self.0.load(Ordering::Acquire);
        match wanted {
            Permission::Read => mapped != NOT_MAPPED,
            Permission::Write => mapped == WRITE,
        }
    }

    /// Whether anything is mapped.
    pub fn is_mapped(&self) -> bool {
        self.allow(Permission::Read)
    }

    pub(crate) fn set_mapped(&self, permission: Permission, _proof: &Quiesced<'_>) {
        let mapped = if permission == Permission::Write {
            WRITE
        } else {
            READ
        };
        self.0.store(mapped, Ordering::Release);
    }

    /// Nothing is mapped any more. Whether anything was.
    pub(crate) fn set_unmapped(&self) -> bool {
        self.0.swap(NOT_MAPPED, Ordering::AcqRel) != NOT_MAPPED
    }

    /// Room for the homes of a span's pages.
    pub(crate) fn homes_for(span: Span) -> Vec<Home> {
        vec![Home::System; span.page_count().as_usize()]
    }
}
