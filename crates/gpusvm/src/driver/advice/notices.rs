//! What was unmapped, until somebody forgets what was advised of it.
//!
//! ```text
//!   unmap --> invalidate: notes the span, allocates nothing --> next look: the tree forgets it
//!                              `-- no room --> next look: every piece is asked for
//! ```
//!
//! # Locking
//!
//! The lock is a leaf, held for a few instructions.

use super::tree::Tree;
use gpusvm_mm::{AddressSpace, IntervalNotifier, Invalidation, Reason, Subscriber};
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{Span, VirtAddr};

/// How many spans that do not touch can be noted.
const ROOM: usize = 64;

/// What was unmapped and is not forgotten yet.
#[derive(Debug)]
pub(crate) struct Notices {
    spans: Mutex<Spans>,
    is_any: AtomicBool,
    overflowed: AtomicBool,
}

#[derive(Clone, Copy, Debug)]
struct Spans {
    list: [Option<Span>; ROOM],
    len: usize,
}

const NONE: Spans = Spans {
    list: [None; ROOM],
    len: 0,
};

impl Default for Notices {
    fn default() -> Self {
        Self {
            spans: Mutex::new(NONE),
            is_any: AtomicBool::new(false),
            overflowed: AtomicBool::new(false),
        }
    }
}

impl Notices {
    /// Hears of everything that is unmapped from now on.
    pub(crate) fn subscribe<M: AddressSpace>(this: &Arc<Self>, mm: &M) -> Arc<IntervalNotifier> {
        /// The end of what a process can map.
        const END: VirtAddr = VirtAddr::new(0x7fff_ffff_f000);
        let everything = Span::new(VirtAddr::new(0), END).expect("a process has pages");
        mm.notifiers().subscribe(everything, Arc::clone(this) as _)
    }

    /// Forgets what is noted. With the tree's lock held, so that nobody looks in between.
    pub(crate) fn forget_unmapped<V: Copy + PartialEq>(&self, tree: &mut Tree<V>) {
        if !self.is_any.load(Ordering::Acquire) {
            return;
        }
        let spans = {
            let mut spans = self.spans.lock();
            self.is_any.store(false, Ordering::Release);
            core::mem::replace(&mut *spans, NONE)
        };
        spans
            .list
            .into_iter()
            .flatten()
            .for_each(|span| tree.clear(span));
    }

    /// Whether more was unmapped than there was room for, since last asked.
    pub(crate) fn take_overflow(&self) -> bool {
        self.overflowed.load(Ordering::Acquire) && self.overflowed.swap(false, Ordering::AcqRel)
    }
}

impl Subscriber for Notices {
    fn invalidate(&self, _: &IntervalNotifier, event: &Invalidation) {
        if event.reason != Reason::Unmap {
            return;
        }
        let mut guard = self.spans.lock();
        let spans = &mut *guard;
        // A large span comes in blocks, one after the other.
        let last = spans
            .len
            .checked_sub(1)
            .and_then(|last| spans.list[last].as_mut());
        match last {
            Some(last) if last.end() == event.span.start() || last.overlaps(event.span) => {
                *last = last.union(event.span);
            }
            _ if spans.len == ROOM => self.overflowed.store(true, Ordering::Release),
            _ => {
                spans.list[spans.len] = Some(event.span);
                spans.len += 1;
            }
        }
        self.is_any.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpusvm_mm::Notifiers;

    fn page(page: u64) -> Span {
        Span::page_of(VirtAddr::new(page << 12))
    }

    #[test]
    fn what_is_unmapped_is_forgotten_at_the_next_look_or_asked_for() {
        let (notices, notifiers) = (Arc::new(Notices::default()), Notifiers::default());
        let all = page(0).union(page(1 << 20));
        let notifier = notifiers.subscribe(all, Arc::clone(&notices) as _);
        let tell = |span, reason| notifiers.invalidate(&Invalidation { span, reason });
        let mut tree = Tree::default();
        tree.update(page(0).union(page(999)), |_| Some(1));
        tell(page(5), Reason::Clear);
        tell(page(6), Reason::Migrate(None));
        notices.forget_unmapped(&mut tree);
        assert_eq!(tree.all().count(), 1, "it is still there");
        for first in [100, 101, 102, 200] {
            tell(page(first), Reason::Unmap);
        }
        notices.forget_unmapped(&mut tree);
        let found: Vec<Span> = tree.all().map(|(span, _)| span).collect();
        let wanted = [(0, 99), (103, 199), (201, 999)];
        assert_eq!(
            found,
            wanted.map(|(first, last)| page(first).union(page(last)))
        );
        assert!(!notices.take_overflow());
        // As many as touch are one.
        (300..700).for_each(|first| tell(page(first), Reason::Unmap));
        assert!(!notices.take_overflow());
        (0..=ROOM as u64).for_each(|n| tell(page(2 * n), Reason::Unmap));
        assert!(notices.take_overflow() && !notices.take_overflow());
        notices.forget_unmapped(&mut tree);
        assert_eq!(tree.at(page(500).start()), None);
        notifiers.unsubscribe(&notifier);
    }
}
