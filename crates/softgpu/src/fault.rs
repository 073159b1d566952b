//! The fault buffer: one slot per unit, because a unit has one outstanding fault at most.
//!
//! ```text
//!             report                 take                    resolve
//!   Idle --------------> Pending ------------> Taken ---------------------> Settled(verdict)
//!    ^                      |                    |                               |
//!    +----- withdraw -------+---- withdraw ------+               unit wakes -----+--> Idle
//!         (launch cancelled)   (its resolve, when it comes, finds another id)
//! ```
//!
//! Two units that fault on the same page report it twice; the driver finds the second one served.
//!
//! # Locking
//!
//! One lock around all slots, a leaf. Takers share a condition; each unit has its own.

use gpusvm_device::{Access, DeviceFault, FaultError, FaultId, FaultQueue, Verdict, VmId};
use gpusvm_sync::{Condvar, Mutex, MutexGuard};
use gpusvm_types::VirtAddr;
use std::time::{Duration, Instant};

/// What became of a fault, to the unit that waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// By the driver, or by closing.
    Verdict(Verdict),
    /// The launch was cancelled.
    Cancelled,
}

#[derive(Clone, Copy, Debug)]
enum Slot {
    Idle,
    Pending(DeviceFault),
    Taken(DeviceFault),
    Settled(Verdict),
}

#[derive(Debug)]
struct State {
    slots: Box<[Slot]>,
    // How many slots are pending.
    pending: usize,
    // Where the next take begins, so that no unit starves.
    cursor: usize,
    next_id: u64,
    closed: bool,
}

/// Where faults wait.
#[derive(Debug)]
pub(crate) struct FaultBuffer {
    state: Mutex<State>,
    arrived: Condvar,
    settled: Box<[Condvar]>,
}

impl FaultBuffer {
    /// A buffer for this many units.
    pub(crate) fn new(units: usize) -> Self {
        let slots = vec![Slot::Idle; units].into_boxed_slice();
        let state = State {
            slots,
            pending: 0,
            cursor: 0,
            next_id: 0,
            closed: false,
        };
        let settled = (0..units).map(|_| Condvar::new()).collect();
        Self {
            state: Mutex::new(state),
            arrived: Condvar::new(),
            settled,
        }
    }

    /// Reports a fault of a unit and waits until it is served, or until `cancelled`.
    pub(crate) fn report(
        &self,
        unit: usize,
        fault: (VmId, VirtAddr, Access, bool),
        cancelled: impl Fn() -> bool,
    ) -> Served {
        gpusvm_sync::walk!("report");
        let (vm, at, access, stale) = fault;
        let mut state = self.state.lock();
        if state.closed {
            return Served::Verdict(closed(at));
        }
        let units = state.slots.len() as u64;
        let id = FaultId(state.next_id * units + unit as u64);
        state.next_id += 1;
        state.slots[unit] = Slot::Pending(DeviceFault {
            id,
            vm,
            at,
            access,
            stale,
        });
        state.pending += 1;
        self.arrived.notify_one();
        loop {
            if let Slot::Settled(verdict) = state.slots[unit] {
                state.slots[unit] = Slot::Idle;
                return Served::Verdict(verdict);
            }
            if cancelled() {
                state.withdraw(unit);
                return Served::Cancelled;
            }
            state = self.settled[unit].wait(state);
        }
    }

    /// Makes every waiting unit look whether its launch was cancelled.
    pub(crate) fn wake_units(&self) {
        let _state = self.state.lock();
        self.settled.iter().for_each(Condvar::notify_one);
    }

    fn wait_for_arrival(&self, timeout: Duration) -> MutexGuard<'_, State> {
        #[expect(
            clippy::disallowed_methods,
            reason = "the device's side of a timeout, real time"
        )]
        let now = Instant::now;
        let deadline = now().checked_add(timeout);
        let mut state = self.state.lock();
        while state.pending == 0 && !state.closed {
            let Some(deadline) = deadline else {
                state = self.arrived.wait(state);
                continue;
            };
            let left = deadline.saturating_duration_since(now());
            if left.is_zero() {
                break;
            }
            state = self.arrived.wait_timeout(state, left).0;
        }
        state
    }
}

impl State {
    /// The next pending fault, which becomes taken.
    fn take_one(&mut self) -> Option<DeviceFault> {
        let units = self.slots.len();
        for at in (self.cursor..units).chain(0..self.cursor) {
            if let Slot::Pending(fault) = self.slots[at] {
                self.slots[at] = Slot::Taken(fault);
                self.pending -= 1;
                self.cursor = (at + 1) % units;
                return Some(fault);
            }
        }
        None
    }

    fn withdraw(&mut self, unit: usize) {
        if matches!(self.slots[unit], Slot::Pending(_)) {
            self.pending -= 1;
        }
        self.slots[unit] = Slot::Idle;
    }
}

impl FaultQueue for FaultBuffer {
    fn take(&self, out: &mut [DeviceFault], timeout: Duration) -> usize {
        gpusvm_sync::walk!("take");
        if out.is_empty() {
            return 0;
        }
        let mut state = self.wait_for_arrival(timeout);
        let mut taken = 0;
        while let Some(place) = out.get_mut(taken) {
            let Some(fault) = state.take_one() else { break };
            *place = fault;
            taken += 1;
        }
        if state.pending > 0 {
            self.arrived.notify_one();
        }
        taken
    }

    fn is_closed(&self) -> bool {
        self.state.lock().closed
    }

    fn resolve(&self, fault: &DeviceFault, verdict: Verdict) {
        gpusvm_sync::walk!("resolve");
        let mut state = self.state.lock();
        let units = state.slots.len() as u64;
        let unit = usize::try_from(fault.id.0 % units).expect("fewer units than addresses");
        // Else the fault was withdrawn, or closed over, while it was served.
        if matches!(state.slots[unit], Slot::Taken(taken) if taken.id == fault.id) {
            state.slots[unit] = Slot::Settled(verdict);
            self.settled[unit].notify_one();
        }
    }

    fn close(&self) {
        let mut state = self.state.lock();
        state.closed = true;
        state.pending = 0;
        for slot in &mut state.slots {
            if let Slot::Pending(fault) | Slot::Taken(fault) = *slot {
                *slot = Slot::Settled(closed(fault.at));
            }
        }
        self.arrived.notify_all();
        self.settled.iter().for_each(Condvar::notify_one);
    }
}

/// The verdict on everything once the buffer is closed.
fn closed(at: VirtAddr) -> Verdict {
    Verdict::Fail(FaultError::Closed { at })
}
