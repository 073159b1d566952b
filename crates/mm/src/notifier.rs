//! Interval notifiers: subscribers learn that a span changes before they could go wrong by it.
//!
//! ```text
//!   who changes homes               subscriber                       who maps pages
//!   -----------------               ----------                       --------------
//!   mark the words                                                   seq = read_begin()
//!   invalidate() -----------------> lock; bump(); zap; flush         read words, prepare
//!   take the pages                  unlock                           lock; is_current(seq)? bind
//! ```
//!
//! # Locking
//!
//! `invalidate` runs under block locks and takes the list's lock to read, then whatever the subscriber
//! takes. Nobody subscribes with a subscriber's lock held.
//!
//! # Differences from the kernel
//!
//! `mmu_interval_read_begin` waits while an invalidation runs; here the words say `Moving` meanwhile,
//! and whoever reads them waits for that.

use alloc::{sync::Arc, vec::Vec};
use gpusvm_sync::RwLock;
use gpusvm_sync::atomic::{AtomicU64, Ordering};
use gpusvm_types::{OwnerId, Span};

/// What happens to a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidation {
    /// Which pages.
    pub span: Span,
    /// What happens to them.
    pub reason: Reason,
}

/// Why the mappings of a span go away (`enum mmu_notifier_event`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The memory is unmapped, or another mapping replaced it.
    Unmap,
    /// The contents were given up: `MADV_DONTNEED`.
    Clear,
    /// The pages move; the owner, if any, is who moves them.
    Migrate(Option<OwnerId>),
    /// The permissions change.
    Protect,
    /// The CPU, or a device, is about to write pages that others read in copies
    /// (`MMU_NOTIFY_EXCLUSIVE`, `MMU_NOTIFY_CLEAR` of a write fault). Or they are about to be copied,
    /// and must not be writable any more.
    Write,
}

/// Who wants to know.
pub trait Subscriber: Send + Sync + core::fmt::Debug {
    /// Nothing of `event.span` may be mapped by a device, or in flight on one, when this returns.
    ///
    /// Called by whoever changes the span: a thread that migrates, with the block's lock held, or a
    /// thread that handles an event. It must not allocate, not wait for a block and not fail.
    fn invalidate(&self, notifier: &IntervalNotifier, event: &Invalidation);
}

/// A reading of a notifier's sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequence(u64);

/// One subscription: a window of the address space.
#[derive(Debug)]
pub struct IntervalNotifier {
    window: Span,
    sequence: AtomicU64,
    subscriber: Arc<dyn Subscriber>,
}

impl IntervalNotifier {
    /// The window.
    pub fn window(&self) -> Span {
        self.window
    }

    /// The sequence now: read it before looking at homes.
    pub fn read_begin(&self) -> Sequence {
        Sequence(self.sequence.load(Ordering::Acquire))
    }

    /// Whether nothing in the window was invalidated since. Only an answer under the lock that the
    /// subscriber takes to invalidate.
    pub fn is_current(&self, since: Sequence) -> bool {
        self.sequence.load(Ordering::Acquire) == since.0
    }

    /// Makes every earlier reading out of date. For the subscriber, under its lock.
    pub fn bump(&self) {
        self.sequence.fetch_add(1, Ordering::AcqRel);
    }
}

/// The subscriptions of an address space.
#[derive(Debug, Default)]
pub struct Notifiers {
    list: RwLock<Vec<Arc<IntervalNotifier>>>,
}

impl Notifiers {
    /// Tells `subscriber` of every change in `window` from now on.
    pub fn subscribe(
        &self,
        window: Span,
        subscriber: Arc<dyn Subscriber>,
    ) -> Arc<IntervalNotifier> {
        let sequence = AtomicU64::new(0);
        let notifier = Arc::new(IntervalNotifier {
            window,
            sequence,
            subscriber,
        });
        self.list.write().push(Arc::clone(&notifier));
        notifier
    }

    /// Ends a subscription. No call is running when this returns.
    pub fn unsubscribe(&self, notifier: &Arc<IntervalNotifier>) {
        let removed = {
            let mut list = self.list.write();
            let at = list.iter().position(|other| Arc::ptr_eq(other, notifier));
            at.map(|at| list.swap_remove(at))
        };
        // The subscriber may be dropped with it: outside the lock.
        drop(removed);
    }

    /// Tells everyone. When it returns, no device maps anything of the span.
    pub fn invalidate(&self, event: &Invalidation) {
        gpusvm_sync::walk!("invalidate");
        for notifier in self.list.read().iter() {
            if notifier.window.overlaps(event.span) {
                notifier.subscriber.invalidate(notifier, event);
            }
        }
    }

    /// How many subscriptions there are.
    pub fn count(&self) -> usize {
        self.list.read().len()
    }
}
