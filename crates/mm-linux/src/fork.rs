//! What fork does: everything comes home first, the child gets plain memory and an inert engine.
//!
//! ```text
//!   prepare   close every gate, wait for migrations to devices, bring all pages home
//!   fork
//!   parent    open the gates
//!   child     every engine is gone: calls answer so, memory is plain, the parent's is not ours to hear of
//! ```
//!
//! A raw `clone` without these handlers gets memory that is not registered in the child: pages that
//! live on a device then read as zeroes there. That is what `pthread_atfork` cannot see; who clones
//! by hand brings memory home first.
//!
//! # Locking
//!
//! Whoever locks a block that pages can leave holds a [`Pass`], and has it before the block: the gate
//! waits for all passes, and then for blocks. A handler, which only brings pages home, needs none, so
//! CPU faults are served all the time.

use crate::process::Process;
use crate::sys::futex;
use core::cell::{Cell, RefCell};
use core::marker::PhantomData;
use gpusvm_mm::Wanted;
use gpusvm_sync::atomic::{AtomicBool, AtomicU32, Ordering};
use gpusvm_sync::{Arc, Mutex, Weak};
use std::sync::Once;

/// Lets migrations to devices through, except while the process forks.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    /// Passes given out, and `CLOSED`.
    state: AtomicU32,
    /// How many forks are under way.
    closers: Mutex<u32>,
}

/// Evidence that the process does not fork. It stays with its thread.
#[derive(Debug)]
pub struct Pass<'a> {
    gate: &'a Gate,
    _of_this_thread: PhantomData<*const ()>,
}

thread_local! {
    /// How many passes this thread has, of which gates. Who has one gets more: the gate waits for it
    /// anyway.
    static PASSES: Cell<[Passes; ENGINES_AT_ONCE]> = const { Cell::new([(0, 0); ENGINES_AT_ONCE]) };
}

/// A gate's address, and how many passes of it.
type Passes = (usize, u32);
/// Of how many engines one thread moves pages at the same time.
const ENGINES_AT_ONCE: usize = 4;

const CLOSED: u32 = 1 << 31;

impl Gate {
    /// Waits until the gate is open. `None` in a child of fork.
    pub(crate) fn pass(&self) -> Option<Pass<'_>> {
        loop {
            let now = self.state.load(Ordering::Acquire);
            if now & CLOSED != 0 && !self.has_pass() {
                if is_child() {
                    return None;
                }
                futex::wait(&self.state, now, None);
                continue;
            }
            let given =
                self.state
                    .compare_exchange(now, now + 1, Ordering::AcqRel, Ordering::Relaxed);
            if given.is_ok() {
                self.count_pass(true);
                return Some(Pass {
                    gate: self,
                    _of_this_thread: PhantomData,
                });
            }
        }
    }

    fn has_pass(&self) -> bool {
        let this = core::ptr::from_ref(self).addr();
        PASSES
            .get()
            .iter()
            .any(|(gate, passes)| *gate == this && *passes > 0)
    }

    fn count_pass(&self, more: bool) {
        let this = core::ptr::from_ref(self).addr();
        let mut all = PASSES.get();
        let known = all.iter().position(|(gate, n)| *gate == this && *n > 0);
        let free = || all.iter().position(|(_, n)| *n == 0);
        // Without room it is not counted: this thread waits at the gate for its next pass.
        if let Some(at) = known.or_else(|| if more { free() } else { None }) {
            let (_, passes) = all[at];
            all[at] = (this, if more { passes + 1 } else { passes - 1 });
            PASSES.set(all);
        }
    }

    fn close(&self) {
        let mut closers = self.closers.lock();
        *closers += 1;
        drop(closers);
        let mut now = self.state.fetch_or(CLOSED, Ordering::AcqRel) | CLOSED;
        while now != CLOSED {
            futex::wait(&self.state, now, None);
            now = self.state.load(Ordering::Acquire);
        }
    }

    fn open(&self) {
        let mut closers = self.closers.lock();
        *closers -= 1;
        if *closers == 0 {
            self.state.fetch_and(!CLOSED, Ordering::AcqRel);
            futex::wake(&self.state, u32::MAX);
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.count_pass(false);
        let before = self.gate.state.fetch_sub(1, Ordering::AcqRel);
        if before == CLOSED + 1 {
            futex::wake(&self.gate.state, u32::MAX);
        }
    }
}

/// The engines of this process.
static ENGINES: Mutex<Vec<Weak<Process>>> = Mutex::new(Vec::new());
/// Set in a child of a process that had engines.
static CHILD: AtomicBool = AtomicBool::new(false);

/// Whether this is a child of fork, whose engines are its parent's.
pub(crate) fn is_child() -> bool {
    CHILD.load(Ordering::Acquire)
}

/// Brings the pages of `process` home before each fork from now on.
pub(crate) fn watch(process: &Arc<Process>) {
    static HANDLERS: Once = Once::new();
    HANDLERS.call_once(|| {
        // SAFETY: the handlers are functions of this crate, which is never unloaded.
        unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    });
    let mut engines = ENGINES.lock();
    engines.retain(|engine| engine.strong_count() > 0);
    engines.push(Arc::downgrade(process));
}

thread_local! {
    /// Engines whose gates this thread's `prepare` closed, for its `parent` to open.
    static CLOSED_BY_US: RefCell<Vec<Arc<Process>>> = const { RefCell::new(Vec::new()) };
}

unsafe extern "C" fn prepare() {
    if is_child() {
        return;
    }
    // Copied: an engine that ends meanwhile is dropped without the lock.
    let engines: Vec<_> = ENGINES.lock().iter().filter_map(Weak::upgrade).collect();
    engines.iter().for_each(|engine| engine.gate.close());
    for engine in &engines {
        // Pages that this thread moved are brought home to where they are now.
        engine.settle_events();
        engine.bring_all_home(Wanted::Fork);
    }
    CLOSED_BY_US.with_borrow_mut(|closed| *closed = engines);
}

unsafe extern "C" fn parent() {
    if is_child() {
        return;
    }
    let engines = CLOSED_BY_US.take();
    engines.iter().for_each(|engine| engine.gate.open());
}

unsafe extern "C" fn child() {
    CHILD.store(true, Ordering::Release);
    // Or the parent's memory would stay registered after its engine has ended, for as long as we live.
    for engine in CLOSED_BY_US.take() {
        engine.mover.end();
        // Dropped, it would free what other threads of the parent may have had in hand.
        core::mem::forget(engine);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::time::Duration;

    #[test]
    fn a_closed_gate_lets_nobody_through_until_it_opens() {
        let gate = Gate::default();
        let through = AtomicU32::new(0);
        let pass = gate.pass().unwrap();
        std::thread::scope(|scope| {
            let closer = scope.spawn(|| gate.close());
            std::thread::sleep(Duration::from_millis(20));
            assert!(!closer.is_finished(), "somebody is inside");
            drop(pass);
            closer.join().unwrap();
            let waiting = scope.spawn(|| {
                let _pass = gate.pass().unwrap();
                through.store(1, Ordering::Release);
            });
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(through.load(Ordering::Acquire), 0);
            gate.open();
            waiting.join().unwrap();
        });
        assert_eq!(through.into_inner(), 1);
    }
}
