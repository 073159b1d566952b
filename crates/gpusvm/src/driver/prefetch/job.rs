//! One prefetch: what is left of it, what is under way, and what came of it.
//!
//! ```text
//!   spans    |=========|  |====|     |==================|
//!   begun     ##########    ##..                              # done   . under way, in pieces of a block
//!                             ^ next
//! ```

use super::pass::{self, Done};
use super::{Location, PrefetchError, Prefetched};
use crate::driver::vm::Vm;
use gpusvm_device::FaultError;
use gpusvm_mm::AddressSpace;
use gpusvm_sync::{Condvar, Mutex, MutexGuard, Weak};
use gpusvm_types::{Span, VirtAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};

use super::PrefetchReason;

#[derive(Debug)]
pub(super) struct Job<M: AddressSpace> {
    vm: Weak<Vm<M>>,
    to: Location,
    spans: Box<[Span]>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    /// What begins next: which span, and where in it.
    next: Option<(usize, VirtAddr)>,
    under_way: usize,
    /// In which spans something was found.
    found: Box<[bool]>,
    so_far: Prefetched,
    error: Option<PrefetchError>,
}

impl<M: AddressSpace> Job<M> {
    pub(super) fn new(vm: Weak<Vm<M>>, spans: &[Span], to: Location) -> Self {
        let state = State {
            next: spans.first().map(|span| (0, span.start())),
            under_way: 0,
            found: vec![false; spans.len()].into(),
            so_far: Prefetched::default(),
            error: None,
        };
        Self {
            vm,
            to,
            spans: spans.into(),
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// Does a piece of it, in one block. Whether there was one to begin with.
    pub(super) fn work(&self) -> bool {
        let Some((span, piece)) = self.begin() else {
            return false;
        };
        let worked = catch_unwind(AssertUnwindSafe(|| self.work_on(span, piece)));
        if worked.is_err() {
            let (at, reason) = (piece.start(), "its handler panicked");
            let reason = PrefetchReason::Fault(FaultError::Gave { at, reason });
            self.failed(PrefetchError {
                span: piece,
                reason,
            });
        }
        let mut state = self.state.lock();
        state.under_way -= 1;
        let is_done = state.is_done();
        drop(state);
        if is_done {
            self.changed.notify_all();
        }
        true
    }

    /// The next piece, which is under way from now on.
    fn begin(&self) -> Option<(usize, Span)> {
        let mut state = self.state.lock();
        let (index, at) = state.next?;
        let left = Span::new(at, self.spans[index].end()).ok()?;
        let piece = left.blocks().next()?;
        state.next = self.behind(index, piece.end());
        state.under_way += 1;
        Some((index, piece))
    }

    /// What comes behind `at`, which is in this span.
    fn behind(&self, index: usize, at: VirtAddr) -> Option<(usize, VirtAddr)> {
        if at < self.spans[index].end() {
            return Some((index, at));
        }
        let next = self.spans.get(index + 1)?;
        Some((index + 1, next.start()))
    }

    /// Each step ends behind where it began, so a piece takes as many as it has pages at most.
    fn work_on(&self, index: usize, piece: Span) {
        let mut left = Some(piece);
        while let Some(here) = left {
            let Some(vm) = self.vm.upgrade() else {
                let at = here.start();
                let reason = PrefetchReason::Fault(FaultError::Closed { at });
                return self.failed(PrefetchError { span: here, reason });
            };
            let step = pass::step(&vm, here, self.to);
            let mut state = self.state.lock();
            match &step.done {
                Some(done) => state.count(index, done),
                // How far is the next mapping? Holes are larger than blocks, as a rule.
                None if step.error.is_none() => {}
                None => state.found[index] = true,
            }
            drop(state);
            if let Some(error) = step.error {
                self.failed(error);
            } else if step.done.is_none() {
                self.skip_hole(&vm, index, step.end);
            }
            left = Span::new(step.end, piece.end()).ok();
        }
    }

    /// Nothing is mapped from before `at` on: goes on where the next mapping begins.
    fn skip_hole(&self, vm: &Vm<M>, index: usize, at: VirtAddr) {
        let end = self.spans[index].end();
        let next = match vm.svm().mm().find_vma(at) {
            Ok(vma) => vma.map_or(end, |vma| vma.span.start().min(end)),
            // Said by who looks there.
            Err(_) => at,
        };
        let mut state = self.state.lock();
        if let Some((begins, from)) = state.next
            && begins == index
            && from < next
        {
            state.next = self.behind(index, next);
        }
    }

    fn failed(&self, error: PrefetchError) {
        let mut state = self.state.lock();
        state.so_far.failed += 1;
        if error.is_gone() {
            state.next = None;
        }
        state.error.get_or_insert(error);
    }

    /// What has not begun does not begin; if there is any, it is an error with this reason.
    pub(super) fn stop(&self, reason: Option<fn(VirtAddr) -> FaultError>) {
        let mut state = self.state.lock();
        let left = state.next.take();
        if let (Some((index, at)), Some(reason)) = (left, reason) {
            let error = PrefetchError {
                span: Span::new(at, self.spans[index].end()).unwrap_or(self.spans[index]),
                reason: PrefetchReason::Fault(reason(at)),
            };
            state.so_far.failed += 1;
            state.error.get_or_insert(error);
        }
        state.so_far.cancelled |= left.is_some();
        drop(state);
        self.changed.notify_all();
    }

    /// Whether there is something that has not begun.
    pub(super) fn has_more(&self) -> bool {
        self.state.lock().next.is_some()
    }

    pub(super) fn is_done(&self) -> bool {
        self.state.lock().is_done()
    }

    /// Waits until nothing is under way, and nothing is to begin.
    pub(super) fn wait_done(&self) {
        let mut state: MutexGuard<'_, State> = self.state.lock();
        while !state.is_done() {
            state = self.changed.wait(state);
        }
    }

    /// What came of it so far.
    pub(super) fn so_far(&self) -> (Prefetched, Option<PrefetchError>) {
        let state = self.state.lock();
        let mut so_far = state.so_far.clone();
        if state.is_done() && !so_far.cancelled && !state.is_gone() {
            so_far.invalid = state.found.iter().filter(|found| !**found).count() as u64;
        }
        (so_far, state.error.clone())
    }
}

impl State {
    const fn is_done(&self) -> bool {
        self.next.is_none() && self.under_way == 0
    }

    fn is_gone(&self) -> bool {
        self.error.as_ref().is_some_and(PrefetchError::is_gone)
    }

    fn count(&mut self, index: usize, done: &Done) {
        self.found[index] = true;
        let counter = match done {
            Done::Valid => &mut self.so_far.valid,
            Done::Moved => &mut self.so_far.moved,
            Done::InPlace => &mut self.so_far.in_place,
            Done::Home => &mut self.so_far.home,
        };
        *counter += 1;
    }
}
