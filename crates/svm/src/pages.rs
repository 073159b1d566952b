//! What of a range is mapped on a device: `drm_gpusvm_pages`.
//!
//! Apart from the range, because N devices can map one range, each with pages of its own.
//!
//! # Locking
//!
//! The lock of what is reached is held to exchange it, and to end it. An invalidation does that in a
//! fault handler: it frees nothing, and leaves the storage to whoever maps the range next, or drops it.

use crate::reached::Reached;
use crate::{History, Prepared, Quiesced};
use alloc::{vec, vec::Vec};
use gpusvm_mm::{AddressSpace, Home, Time};
use gpusvm_pagemap::Duplicate;
use gpusvm_sync::Mutex;
use gpusvm_sync::atomic::{AtomicU8, Ordering};
use gpusvm_types::{PageCount, Span};

/// What a mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Permission {
    /// Loads.
    Read,
    /// Loads and stores.
    Write,
    /// Loads, stores and atomic operations.
    Atomic,
}

/// The mapping state of a range on one device.
///
/// Set with the notifier lock held to read, by who serves the range; cleared with it held to write.
#[derive(Debug)]
pub struct Pages<M: AddressSpace> {
    mapped: AtomicU8,
    /// How the device reaches what is mapped.
    reached: Mutex<Reached<M>>,
    history: History,
}

/// Of a range that is mapped: one more than its permission.
const NOT_MAPPED: u8 = 0;

impl<M: AddressSpace> Pages<M> {
    pub(crate) fn new() -> Self {
        Self {
            mapped: AtomicU8::new(NOT_MAPPED),
            reached: Mutex::new(Reached::nothing()),
            history: History::default(),
        }
    }

    /// Whether the range is mapped with at least this permission. A hint without the notifier lock:
    /// enough to see that a fault was served meanwhile.
    pub fn allow(&self, wanted: Permission) -> bool {
        self.mapped.load(Ordering::Acquire) >= mapped(wanted)
    }

    /// Whether anything is mapped.
    pub fn is_mapped(&self) -> bool {
        self.allow(Permission::Read)
    }

    /// How long its mappings lived, lately.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// Takes the copies that the device read and does not any more: dropping them gives their memory
    /// back. Not for fault handlers, and nothing else takes them but the next mapping.
    pub fn reclaim(&self) -> Option<Duplicate> {
        let mut reached = self.reached.lock();
        let is_mapped = self.mapped.load(Ordering::Acquire) != NOT_MAPPED;
        if is_mapped {
            return None;
        }
        // An invalidation that is under way has zapped and flushed.
        reached.end();
        reached.take_duplicate()
    }

    /// How much device memory is used for copies that the device reads, or has read.
    pub fn duplicated(&self) -> PageCount {
        let reached = self.reached.lock();
        reached.duplicate().map_or(PageCount::ZERO, Duplicate::size)
    }

    /// What was prepared is mapped. Returns what was before, to be dropped without locks.
    pub(crate) fn set_mapped(
        &self,
        prepared: Prepared<M>,
        now: Time,
        _proof: &Quiesced<'_>,
    ) -> Reached<M> {
        let mapped = mapped(prepared.permission);
        let before = {
            let mut reached = self.reached.lock();
            let before = core::mem::replace(&mut *reached, prepared.reached);
            // With the lock: who reclaims finds what is mapped now as mapped.
            self.mapped.store(mapped, Ordering::Release);
            before
        };
        self.history.count_mapping(now);
        before
    }

    /// Nothing is mapped any more: zapped and flushed. Allocates and frees nothing.
    pub(crate) fn set_unmapped(&self) {
        self.mapped.store(NOT_MAPPED, Ordering::Release);
        self.reached.lock().end();
    }
}

const fn mapped(permission: Permission) -> u8 {
    permission as u8 + 1
}

/// Room for the homes of a span's pages.
pub(crate) fn homes_for(span: Span) -> Vec<Home> {
    vec![Home::System; span.page_count().as_usize()]
}
