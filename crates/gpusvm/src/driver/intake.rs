//! Which faults are being served, and which wait for them.
//!
//! ```text
//!   taken: A1 -----> leads A: served ........................ answered   next: A2   next: A3   lets go
//!          A2 --------> parked on A .............................|          |          |
//!          A3 --------> parked on A .......................................-'          |
//!          B1 ------------> leads B: served ... answered, lets go            mapped: replayed at once
//! ```
//!
//! Many lanes fault in one block at about the same time, and one service answers most of them. A worker
//! that took a second fault of a block would only wait for the first, and a fault in another block would
//! find no worker. So a fault of a (address space, 2 MiB block) that is being served is parked, and the
//! worker that took it goes on; whoever serves the block answers what was parked there in turn.
//!
//! # Invariants
//!
//! Every fault that was taken is resolved once: whoever leads answers what is parked before it lets go
//! of the block, and both happen under one lock; if it unwinds, what is left is refused.
//!
//! # Locking
//!
//! One lock, a leaf, held for a few instructions. Allocates: for workers only.

use core::fmt;
use gpusvm_device::{DeviceFault, FaultError, FaultQueue, Verdict, VmId};
use gpusvm_sync::Mutex;
use gpusvm_types::{Span, VirtAddr};
use std::collections::VecDeque;

/// How many faults are parked at most. A fault for which there is no room is served by who took it,
/// which then waits for the range: as slow as without an intake, and no fault is lost. A device has a
/// fault a unit, and units are hundreds at most.
pub const MAX_PARKED: usize = 1024;

/// The faults of one device.
#[derive(Debug, Default)]
pub(crate) struct Intake {
    blocks: Mutex<Vec<Block>>,
}

/// A block that is being served. There are as few as workers: a list is found through fast enough.
#[derive(Debug)]
struct Block {
    key: Key,
    parked: VecDeque<DeviceFault>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key(VmId, VirtAddr);

/// The right, and the duty, to serve a block until nothing is parked on it.
pub(crate) struct Lead<'a> {
    intake: &'a Intake,
    queue: &'a dyn FaultQueue,
    /// `None` once the block was let go, or when there was no room to park.
    key: Option<Key>,
}

impl Key {
    fn of(fault: &DeviceFault) -> Self {
        Self(fault.vm, Span::block_of(fault.at).start())
    }
}

impl Intake {
    /// A fault was taken from `queue`. `None` when somebody serves its block, and will answer it.
    pub(crate) fn begin<'a>(
        &'a self,
        queue: &'a dyn FaultQueue,
        fault: &DeviceFault,
    ) -> Option<Lead<'a>> {
        gpusvm_sync::walk!("begin");
        let key = Key::of(fault);
        let mut blocks = self.blocks.lock();
        let parked: usize = blocks.iter().map(|block| block.parked.len()).sum();
        let known = blocks.iter_mut().find(|block| block.key == key);
        let key = match known {
            Some(block) if parked < MAX_PARKED => {
                block.parked.push_back(*fault);
                return None;
            }
            Some(_) => None,
            None => {
                let parked = VecDeque::new();
                blocks.push(Block { key, parked });
                Some(key)
            }
        };
        Some(Lead {
            intake: self,
            queue,
            key,
        })
    }

    /// What is parked on a block next; lets go of the block when that is nothing.
    fn next(&self, key: Key) -> Option<DeviceFault> {
        let mut blocks = self.blocks.lock();
        let at = blocks.iter().position(|block| block.key == key)?;
        let next = blocks[at].parked.pop_front();
        if next.is_none() {
            blocks.swap_remove(at);
        }
        next
    }
}

impl Lead<'_> {
    /// The next fault of the block. When there is none, the block was let go.
    pub(crate) fn next(&mut self) -> Option<DeviceFault> {
        let next = self.intake.next(self.key?);
        if next.is_none() {
            self.key = None;
        }
        next
    }
}

impl Drop for Lead<'_> {
    fn drop(&mut self) {
        while let Some(fault) = self.next() {
            let (at, reason) = (fault.at, "who served its block stopped");
            let refused = Verdict::Fail(FaultError::Gave { at, reason });
            self.queue.resolve(&fault, refused);
        }
    }
}

impl fmt::Debug for Lead<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lead").field(&self.key).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::time::Duration;
    use gpusvm_device::{Access, FaultId};

    /// Counts how often each fault is resolved.
    #[derive(Default)]
    struct Counting(Mutex<Vec<(FaultId, Verdict)>>);

    impl FaultQueue for Counting {
        fn take(&self, _: &mut [DeviceFault], _: Duration) -> usize {
            0
        }

        fn is_closed(&self) -> bool {
            false
        }

        fn resolve(&self, fault: &DeviceFault, verdict: Verdict) {
            self.0.lock().push((fault.id, verdict));
        }

        fn close(&self) {}
    }

    fn fault(id: u64, vm: u16, at: u64) -> DeviceFault {
        DeviceFault {
            id: FaultId(id),
            vm: VmId(vm),
            at: VirtAddr::new(at),
            access: Access::Read,
            stale: false,
        }
    }

    const BLOCK: u64 = 2 << 20;

    #[test]
    fn faults_of_one_block_have_one_lead_and_come_in_turn() {
        let (intake, queue) = (Intake::default(), Counting::default());
        let mut lead = intake.begin(&queue, &fault(0, 1, BLOCK)).expect("first");
        assert!(intake.begin(&queue, &fault(1, 1, 2 * BLOCK - 1)).is_none());
        assert!(intake.begin(&queue, &fault(2, 1, BLOCK + 8)).is_none());
        let others = [fault(3, 2, BLOCK), fault(4, 1, 2 * BLOCK)];
        let others: Vec<_> = others.iter().map(|it| intake.begin(&queue, it)).collect();
        assert!(
            others.iter().all(Option::is_some),
            "another address space, another block"
        );
        let mut next = || lead.next().map(|fault| fault.id.0);
        assert_eq!(
            [next(), next(), next(), next()],
            [Some(1), Some(2), None, None]
        );
        assert!(
            intake.begin(&queue, &fault(5, 1, BLOCK)).is_some(),
            "it was let go"
        );
        assert!(queue.0.lock().is_empty(), "who leads resolves");
    }

    #[test]
    fn what_is_parked_when_its_lead_unwinds_is_refused_once() {
        let (intake, queue) = (Intake::default(), Counting::default());
        let lead = intake.begin(&queue, &fault(0, 1, 0)).expect("first");
        for id in 1..4 {
            assert!(intake.begin(&queue, &fault(id, 1, 0)).is_none());
        }
        drop(lead);
        let resolved = queue.0.lock();
        let ids: Vec<_> = resolved.iter().map(|(id, _)| id.0).collect();
        assert_eq!(ids, [1, 2, 3]);
        let is_refused =
            |verdict: &Verdict| matches!(verdict, Verdict::Fail(FaultError::Gave { .. }));
        assert!(resolved.iter().all(|(_, verdict)| is_refused(verdict)));
        assert!(intake.blocks.lock().is_empty());
    }

    #[test]
    fn a_fault_without_room_to_park_is_served_by_who_took_it() {
        let (intake, queue) = (Intake::default(), Counting::default());
        let mut lead = intake.begin(&queue, &fault(0, 1, 0)).expect("first");
        for id in 0..MAX_PARKED as u64 {
            assert!(intake.begin(&queue, &fault(1 + id, 1, 0)).is_none());
        }
        let mut alone = intake.begin(&queue, &fault(9999, 1, 0)).expect("no room");
        assert!(alone.next().is_none(), "what is parked is the lead's");
        assert!(lead.next().is_some());
        assert!(
            intake.begin(&queue, &fault(10000, 1, 0)).is_none(),
            "room again"
        );
    }
}
