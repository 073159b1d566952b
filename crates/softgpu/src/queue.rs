//! Launches that units take chunks of: first in, first to start.
//!
//! A launch stands in `waiting` while it has lanes that nobody took, and in `running` until it has
//! ended. When the first has no lanes left to take, units go on to the next: launches overlap.
//!
//! # Locking
//!
//! One lock, a leaf.

use crate::launch::LaunchState;
use gpusvm_sync::{Arc, Condvar, Mutex};
use std::collections::VecDeque;
use std::ops::Range;

/// The launches of a device.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Arc<LaunchState>>,
    running: Vec<Arc<LaunchState>>,
    closed: bool,
}

impl Queue {
    /// Puts a launch at the end. `false` when the queue is closed.
    pub(crate) fn push(&self, launch: &Arc<LaunchState>) -> bool {
        let mut state = self.state.lock();
        if !state.closed {
            state.waiting.push_back(Arc::clone(launch));
            state.running.push(Arc::clone(launch));
            self.changed.notify_all();
        }
        !state.closed
    }

    /// Waits for work. `None` when the queue is closed and empty.
    pub(crate) fn take(&self) -> Option<(Arc<LaunchState>, Range<usize>)> {
        let mut state = self.state.lock();
        loop {
            while let Some(first) = state.waiting.front() {
                if let Some(lanes) = first.take() {
                    return Some((Arc::clone(first), lanes));
                }
                state.waiting.pop_front();
            }
            if state.closed {
                return None;
            }
            state = self.changed.wait(state);
        }
    }

    /// Forgets a launch that has ended.
    pub(crate) fn retire(&self, launch: &Arc<LaunchState>) {
        let mut state = self.state.lock();
        state.running.retain(|other| !Arc::ptr_eq(other, launch));
        state.waiting.retain(|other| other.has_more());
    }

    /// Cancels everything, and lets units go when that has ended.
    pub(crate) fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.running.iter().for_each(|launch| launch.cancel());
        self.changed.notify_all();
    }
}
