//! What is advised in one address space, and of which memory it is true.
//!
//! # Locking
//!
//! `advising` orders those who advise; blocks are taken with it. The tree's lock is a leaf under which
//! memory is allocated: no handler takes it.

use super::attributes::{Advice, Attributes, Priority};
use super::notices::Notices;
use super::tree::Tree;
use super::{AdviseError, Advised, AdvisedBy};
use gpusvm_mm::{AddressSpace, ArmToken, IntervalNotifier, Mirror, MmError};
use gpusvm_sync::atomic::{AtomicBool, Ordering};
use gpusvm_sync::{Arc, Mutex};
use gpusvm_types::{Span, VirtAddr};

/// What is advised of the memory of an address space.
#[derive(Debug, Default)]
pub(crate) struct AdviceMap {
    tree: Mutex<Tree<Entry>>,
    /// Nothing is advised: then nobody takes the lock.
    is_used: AtomicBool,
    notices: Arc<Notices>,
    /// The subscription, once anything was advised.
    advising: Mutex<Option<Arc<IntervalNotifier>>>,
}

/// What is advised of some pages.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Entry {
    attributes: Attributes,
    by: AdvisedBy,
    /// Of this mapping: it is not true of another at its address.
    token: ArmToken,
}

/// What was advised of some pages otherwise before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Change {
    pub(crate) span: Span,
    pub(crate) before: Attributes,
    pub(crate) after: Attributes,
}

/// What became of advice.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// What is advised otherwise than before.
    pub(crate) changes: Vec<Change>,
    /// What went while the rest was advised: nothing is advised of it.
    pub(crate) gone: Option<Span>,
}

impl AdviceMap {
    /// Whether anything is advised of any memory.
    pub(crate) fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Acquire)
    }

    /// Advises. Says what changed: nothing, where it was advised before. Nothing is advised and nothing is
    /// watched that was not, where this fails.
    pub(crate) fn advise<M: AddressSpace>(
        &self,
        mm: &M,
        span: Span,
        (advice, by): (Advice, AdvisedBy),
    ) -> Result<Outcome, AdviseError> {
        let mut advising = self.advising.lock();
        if advising.is_none() {
            *advising = Some(Notices::subscribe(&self.notices, mm));
        }
        let mappings = self.watch(mm, span)?;
        let mut changes = Vec::new();
        {
            let mut tree = self.tree.lock();
            self.notices.forget_unmapped(&mut tree);
            for &(part, token) in &mappings {
                let current = |entry: &Entry| entry.token == token;
                let of = |entry: Option<Entry>| {
                    let entry = entry.filter(current);
                    entry.map_or_else(Attributes::default, |entry| entry.attributes)
                };
                for (span, entry) in tree.pieces_and_gaps(part) {
                    let (before, after) = (of(entry), of(entry).with(advice));
                    if before != after {
                        changes.push(Change {
                            span,
                            before,
                            after,
                        });
                    }
                }
                tree.update(part, |entry| {
                    let attributes = of(entry).with(advice);
                    let entry = Entry {
                        attributes,
                        by,
                        token,
                    };
                    (attributes != Attributes::default()).then_some(entry)
                });
            }
        }
        // It may have been unmapped after it was watched, and before it was known here.
        let mut gone = None;
        for &(part, token) in &mappings {
            gone = gone.or(self.forget_gone(mm, part, token));
        }
        let is_used = !self.tree.lock().is_empty();
        self.is_used.store(is_used, Ordering::Release);
        self.unwatch_unused(mm, &mappings);
        Ok(Outcome { changes, gone })
    }

    /// What is advised of the page at `at`, and how far around it the same is, within its block.
    pub(crate) fn around<M: AddressSpace>(&self, mm: &M, at: VirtAddr) -> (Attributes, Span) {
        let block = Span::block_of(at);
        if !self.is_used.load(Ordering::Acquire) {
            return (Attributes::default(), block);
        }
        self.sweep_if_needed(mm);
        let (around, entry) = {
            let mut tree = self.tree.lock();
            self.notices.forget_unmapped(&mut tree);
            same_around(&tree, block, at)
        };
        match entry {
            Some(entry) if mm.watched(at, entry.token).is_none() => {
                // Unmapped a moment ago: whatever is there now, nothing was advised of it.
                (Attributes::default(), Span::page_of(at))
            }
            Some(entry) => (entry.attributes, around),
            None => (Attributes::default(), around),
        }
    }

    /// What is advised of all pages of `span`, ascending, without holes.
    pub(crate) fn query<M: AddressSpace>(&self, mm: &M, span: Span) -> Vec<Advised> {
        self.sweep_if_needed(mm);
        let pieces = {
            let mut tree = self.tree.lock();
            self.notices.forget_unmapped(&mut tree);
            tree.pieces_and_gaps(span)
        };
        let mut all: Vec<Advised> = Vec::new();
        let mut add = |span: Span, entry: Option<Entry>| {
            let attributes = entry.map_or_else(Attributes::default, |entry| entry.attributes);
            let by = entry.map(|entry| entry.by);
            match all.last_mut() {
                Some(last) if (last.attributes, last.by) == (attributes, by) => {
                    last.span = last.span.union(span);
                }
                _ => all.push(Advised {
                    span,
                    attributes,
                    by,
                }),
            }
        };
        for (piece, entry) in pieces {
            match entry {
                None => add(piece, None),
                Some(entry) => each_part(mm, piece, entry.token, |part, is_there| {
                    add(part, is_there.then_some(entry));
                }),
            }
        }
        all
    }

    /// Who goes last of what lives in `span`. A hint: what is unmapped goes anyway.
    pub(crate) fn priority(&self, span: Span) -> Priority {
        if !self.is_used.load(Ordering::Acquire) {
            return Priority::default();
        }
        let tree = self.tree.lock();
        let pieces = tree.pieces_and_gaps(span).into_iter();
        let each = pieces.map(|(_, entry)| {
            entry.map_or_else(Priority::default, |entry| entry.attributes.priority)
        });
        each.max().unwrap_or_default()
    }

    /// Nothing is advised any more, and nothing heard of.
    pub(crate) fn end<M: AddressSpace>(&self, mm: &M) {
        let mut advising = self.advising.lock();
        let tree = core::mem::take(&mut *self.tree.lock());
        self.is_used.store(false, Ordering::Release);
        for (span, entry) in tree.all() {
            mm.unwatch(span, entry.token);
        }
        if let Some(notifier) = advising.take() {
            mm.notifiers().unsubscribe(&notifier);
        }
    }

    /// More was unmapped than there was room to note: looks for what is gone.
    fn sweep_if_needed<M: AddressSpace>(&self, mm: &M) {
        if !self.notices.take_overflow() {
            return;
        }
        let pieces: Vec<_> = self.tree.lock().all().collect();
        for (piece, Entry { token, .. }) in pieces {
            self.forget_gone(mm, piece, token);
        }
    }

    /// Forgets what was advised of pages of a mapping that are gone. The first of them.
    fn forget_gone<M: AddressSpace>(&self, mm: &M, span: Span, token: ArmToken) -> Option<Span> {
        let mut gone = None;
        each_part(mm, span, token, |part, is_there| {
            if !is_there {
                let other = |entry: &Entry| entry.token != token;
                self.tree.lock().update(part, |entry| entry.filter(other));
                gone = gone.or(Some(part));
            }
        });
        gone
    }

    /// Watches `span`, all of which must be mirrored. Says which mappings it is in.
    fn watch<M: AddressSpace>(
        &self,
        mm: &M,
        span: Span,
    ) -> Result<Vec<(Span, ArmToken)>, AdviseError> {
        let mut watched: Vec<(Span, ArmToken)> = Vec::new();
        // Block by block: of one that is refused, nothing is watched.
        for piece in mirrored_parts(mm, span)?
            .iter()
            .flat_map(|part| part.blocks())
        {
            match (mm.watch(piece), watched.last_mut()) {
                (Ok(token), Some((part, of))) if *of == token => *part = part.union(piece),
                (Ok(token), _) => watched.push((piece, token)),
                (Err(error), _) => {
                    self.unwatch_unused(mm, &watched);
                    return Err(match error {
                        MmError::NotMirrored { span } => AdviseError::NotMirrored { span },
                        error => AdviseError::Mm(error),
                    });
                }
            }
        }
        Ok(watched)
    }

    /// Blocks of which nothing is advised need not be watched.
    fn unwatch_unused<M: AddressSpace>(&self, mm: &M, mappings: &[(Span, ArmToken)]) {
        for &(part, token) in mappings {
            for piece in part.blocks() {
                let block = Span::block_of(piece.start());
                let is_used = self.tree.lock().pieces_in(block).next().is_some();
                if !is_used {
                    mm.unwatch(piece, token);
                }
            }
        }
    }
}

/// `span` by the mappings it is in, all of which must be mirrored.
fn mirrored_parts<M: AddressSpace>(mm: &M, span: Span) -> Result<Vec<Span>, AdviseError> {
    let mut parts = Vec::new();
    let mut rest = Some(span);
    while let Some(left) = rest {
        let mirror = mm.mirrored(left.start());
        let part = left.intersection(mirror.span());
        let part = part.unwrap_or_else(|| Span::page_of(left.start()));
        if matches!(mirror, Mirror::Gap(_)) {
            return Err(AdviseError::NotMirrored { span: part });
        }
        parts.push(part);
        rest = Span::new(part.end(), left.end()).ok();
    }
    Ok(parts)
}

/// How far around `at` the same is advised, within `block`.
fn same_around(tree: &Tree<Entry>, block: Span, at: VirtAddr) -> (Span, Option<Entry>) {
    let entry = tree.at(at);
    let attributes = |entry: Option<Entry>| entry.map(|entry| entry.attributes);
    let mut around = Span::page_of(at);
    let (mut start, mut end) = (block.start(), block.end());
    for (piece, other) in tree.pieces_and_gaps(block) {
        if piece.contains(at) {
            around = around.union(piece);
        } else if attributes(other) != attributes(entry) {
            match piece.end() <= at {
                true => start = start.max(piece.end()),
                false => end = end.min(piece.start()),
            }
        }
    }
    (Span::new(start, end).unwrap_or(around), entry)
}

/// Calls `each` with the parts of `span`, and whether they are of the mapping still.
fn each_part<M: AddressSpace>(
    mm: &M,
    span: Span,
    token: ArmToken,
    mut each: impl FnMut(Span, bool),
) {
    let mut rest = Some(span);
    while let Some(left) = rest {
        let there = mm.watched(left.start(), token);
        let part = there.and_then(|there| there.intersection(left));
        each(
            part.unwrap_or_else(|| Span::page_of(left.start())),
            part.is_some(),
        );
        let end = part.unwrap_or_else(|| Span::page_of(left.start())).end();
        rest = Span::new(end, left.end()).ok();
    }
}
