//! Failures on demand: the n-th step that can fail does.
//!
//! ```text
//!   steps     Staging  TakeOut  PageBusy  PageBusy  Allocate  CopyToDevmem ...
//!   fail_nth     1        2         3         4         5           6
//! ```
//!
//! A test runs its story with `fail_nth(1)`, `fail_nth(2)`, and so on until nothing is left to fail:
//! then every step has failed once, and after each the test finds all bytes and all counts as they must
//! be. One injector is shared by the simulated world and the simulated devices in it.

use gpusvm_sync::{Arc, Mutex};

/// A step that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Step {
    /// The address space finds a staging slot.
    Staging,
    /// The address space takes a run of pages out.
    TakeOut,
    /// One page of a run can be taken: it is not pinned.
    PageBusy,
    /// The address space begins to watch a block.
    Arm,
    /// A page that comes home is put in.
    CommitIn,
    /// The address space keeps writers from pages.
    Protect,
    /// The address space fills the holes of pages that are to be coherent.
    FillHoles,
    /// A device finds memory.
    Allocate,
    /// A device names the pages of an allocation.
    PopulatePfn,
    /// A device copies to its memory.
    CopyToDevmem,
    /// A device copies to RAM.
    CopyToRam,
    /// A device copies to another device.
    CopyToPeer,
    /// A device makes a page of its memory known to another.
    DeviceMap,
    /// A device enters a mapping.
    Bind,
    /// A device takes a mapping away.
    Unbind,
}

impl Step {
    /// The steps of the simulated world itself.
    pub const OF_THE_WORLD: [Self; 5] = [
        Self::Staging,
        Self::TakeOut,
        Self::PageBusy,
        Self::Arm,
        Self::CommitIn,
    ];
}

/// Decides which step fails.
#[derive(Debug, Default)]
pub struct Injector(Mutex<Plan>);

#[derive(Debug, Default)]
struct Plan {
    /// Which kind of step counts; all, if none is named.
    only: Option<Step>,
    /// How many more steps until one fails; none does without.
    left: Option<u64>,
    /// Whether none goes well after that.
    every: bool,
    /// Steps that counted since this was armed.
    passed: u64,
    fired: Option<Step>,
}

impl Injector {
    /// Nothing fails.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// The n-th step from now on fails, counted from one, whatever it is. None of the others does.
    pub fn fail_nth(&self, n: u64) {
        self.arm(None, n);
    }

    /// The n-th step of this kind from now on fails, counted from one.
    pub fn fail_step_nth(&self, step: Step, n: u64) {
        self.arm(Some(step), n);
    }

    /// Every step of this kind fails from now on.
    pub fn fail_every(&self, step: Step) {
        self.arm(Some(step), 1);
        self.0.lock().every = true;
    }

    /// Nothing fails any more. Steps are counted from here on.
    pub fn disarm(&self) {
        *self.0.lock() = Plan::default();
    }

    /// What failed since this was armed.
    pub fn fired(&self) -> Option<Step> {
        self.0.lock().fired
    }

    /// How many steps of the kind that was named were made since this was armed, with the one that
    /// failed.
    pub fn passed(&self) -> u64 {
        self.0.lock().passed
    }

    /// A step is made. Whether it has to fail.
    #[must_use]
    pub fn step(&self, step: Step) -> bool {
        let mut plan = self.0.lock();
        if plan.only.is_some_and(|only| only != step) {
            return false;
        }
        plan.passed += 1;
        let Some(left) = plan.left else {
            return false;
        };
        let fails = left == 1;
        if !(fails && plan.every) {
            plan.left = left.checked_sub(1).filter(|left| *left > 0);
        }
        if fails {
            plan.fired = Some(step);
        }
        fails
    }

    fn arm(&self, only: Option<Step>, n: u64) {
        *self.0.lock() = Plan {
            only,
            left: Some(n),
            every: false,
            passed: 0,
            fired: None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_step_fails_and_no_other() {
        let injector = Injector::new();
        injector.fail_nth(2);
        let failed = [(); 4].map(|()| injector.step(Step::TakeOut));
        assert_eq!(failed, [false, true, false, false]);
        assert_eq!(
            (injector.fired(), injector.passed()),
            (Some(Step::TakeOut), 4)
        );
        injector.disarm();
        assert!(!injector.step(Step::TakeOut));
        assert_eq!(injector.fired(), None);
    }

    #[test]
    fn only_the_named_step_counts() {
        let injector = Injector::new();
        injector.fail_step_nth(Step::Bind, 1);
        assert!(!injector.step(Step::Arm));
        assert!(injector.step(Step::Bind));
        assert_eq!(injector.passed(), 1);
    }
}
