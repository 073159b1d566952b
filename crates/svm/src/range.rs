//! A chunk of the process that a device touched: `drm_gpusvm_range`.

use crate::Pages;
use alloc::{boxed::Box, sync::Arc};
use gpusvm_mm::{AddressSpace, ArmToken, IntervalNotifier};
use gpusvm_sync::atomic::{AtomicU8, Ordering};
use gpusvm_sync::{Mutex, MutexGuard};
use gpusvm_types::Span;

/// Which of the devices that share the ranges of a mirror, in the order in which it was given them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceIndex(pub usize);

/// A chunk of the process that a device touched.
#[derive(Debug)]
pub struct Range<M: AddressSpace> {
    span: Span,
    notifier: Arc<IntervalNotifier>,
    can_migrate: bool,
    /// One for each device.
    pages: Box<[Pages<M>]>,
    /// Which mirrored mapping was armed for it.
    armed: Mutex<Option<ArmToken>>,
    /// Set by invalidations, never cleared.
    flags: AtomicU8,
    /// Held by whoever serves a fault in it: duplicates wait, and find it served.
    serving: Mutex<()>,
}

const UNMAPPED: u8 = 1;
const PARTIAL: u8 = 2;
const REMOVED: u8 = 4;

impl<M: AddressSpace> Range<M> {
    pub(crate) fn new(
        span: Span,
        notifier: Arc<IntervalNotifier>,
        can_migrate: bool,
        devices: usize,
    ) -> Self {
        let (flags, serving) = (AtomicU8::new(0), Mutex::new(()));
        let pages = (0..devices).map(|_| Pages::new()).collect();
        let armed = Mutex::new(None);
        Self {
            span,
            notifier,
            can_migrate,
            pages,
            armed,
            flags,
            serving,
        }
    }

    /// What it covers.
    pub fn span(&self) -> Span {
        self.span
    }

    /// Who hears of its changes.
    pub fn notifier(&self) -> &IntervalNotifier {
        &self.notifier
    }

    /// Whether its pages can live on a device (`migrate_devmem`). Fixed when it is made.
    pub fn can_migrate(&self) -> bool {
        self.can_migrate
    }

    /// What of it is mapped on a device.
    ///
    /// # Panics
    ///
    /// When the mirror has no device with this number.
    pub fn pages(&self, device: DeviceIndex) -> &Pages<M> {
        &self.pages[device.0]
    }

    /// What of it is mapped, for each device.
    pub(crate) fn pages_by_device(&self) -> &[Pages<M>] {
        &self.pages
    }

    /// Whether anything of it is mapped, on any device.
    pub fn is_mapped(&self) -> bool {
        self.pages.iter().any(Pages::is_mapped)
    }

    /// Whether memory under it was unmapped.
    pub fn is_unmapped(&self) -> bool {
        self.flags.load(Ordering::Acquire) & UNMAPPED != 0
    }

    /// Whether memory under it was unmapped, but not all of it.
    pub fn is_partially_unmapped(&self) -> bool {
        self.flags.load(Ordering::Acquire) & PARTIAL != 0
    }

    /// Whether nothing of it may be mapped any more: unmapped, or no longer in the tree. Only an
    /// answer for good when it is `true`, or with invalidations kept out.
    pub fn is_gone(&self) -> bool {
        self.flags.load(Ordering::Acquire) & (UNMAPPED | REMOVED) != 0
    }

    /// Whether it is no longer in the tree, or about to leave it.
    pub(crate) fn is_removed(&self) -> bool {
        self.flags.load(Ordering::Acquire) & REMOVED != 0
    }

    /// Whether its mapping is armed.
    pub(crate) fn is_armed(&self) -> bool {
        self.armed.lock().is_some()
    }

    /// Its mapping is armed.
    pub(crate) fn set_armed(&self, token: ArmToken) {
        *self.armed.lock() = Some(token);
    }

    /// What to disarm, once.
    pub(crate) fn take_armed(&self) -> Option<ArmToken> {
        self.armed.lock().take()
    }

    /// Waits until nobody else serves a fault in it.
    pub fn serve(&self) -> Serving<'_> {
        gpusvm_sync::walk!("serve");
        Serving(self.serving.lock())
    }

    /// As [`Range::serve`], unless somebody else serves the range now.
    pub fn try_serve(&self) -> Option<Serving<'_>> {
        self.serving.try_lock().map(Serving)
    }

    /// Memory under it was unmapped (`drm_gpusvm_range_set_unmapped`). Whether that is news.
    pub(crate) fn set_unmapped(&self, event: Span) -> bool {
        let partial = if event.covers(self.span) { 0 } else { PARTIAL };
        self.flags.fetch_or(UNMAPPED | partial, Ordering::AcqRel) & UNMAPPED == 0
    }

    /// It is no longer in the tree. Whether that is news.
    pub(crate) fn set_removed(&self) -> bool {
        self.flags.fetch_or(REMOVED, Ordering::AcqRel) & REMOVED == 0
    }
}

/// Evidence that nobody else serves a fault in the range.
#[derive(Debug)]
pub struct Serving<'range>(#[expect(dead_code, reason = "held, not read")] MutexGuard<'range, ()>);
