//! Faults that sleep until a page may leave: the end of a timeslice.
//!
//! A fixed table, one entry for each block, because whoever waits for a page of a block is woken
//! with everybody else who does.

use gpusvm_mm::Time;
use gpusvm_sync::Mutex;
use gpusvm_types::VirtAddr;

/// How many blocks can be waited for at once.
const ROOM: usize = 256;

/// Faults that sleep.
#[derive(Debug)]
pub(crate) struct Delays(Mutex<Table>);

#[derive(Debug)]
struct Table {
    entries: [(Time, VirtAddr); ROOM],
    len: usize,
}

impl Delays {
    pub(crate) const fn new() -> Self {
        let entries = [(Time::START, VirtAddr::new(0)); ROOM];
        Self(Mutex::new(Table { entries, len: 0 }))
    }

    /// The fault at `at` is to be looked at again at `due`. `false` when there is no room.
    pub(crate) fn push(&self, due: Time, at: VirtAddr) -> bool {
        gpusvm_sync::walk!("push");
        let mut table = self.0.lock();
        let len = table.len;
        let same = |entry: &&mut (Time, VirtAddr)| entry.1.block_start() == at.block_start();
        if let Some(entry) = table.entries[..len].iter_mut().find(same) {
            // The later fault may be of another allocation: the sooner look decides.
            entry.0 = entry.0.min(due);
            return true;
        }
        if len == ROOM {
            return false;
        }
        table.entries[len] = (due, at);
        table.len += 1;
        true
    }

    /// A fault that is due, if there is one.
    pub(crate) fn pop_due(&self, now: Time) -> Option<VirtAddr> {
        let mut table = self.0.lock();
        let len = table.len;
        let due = table.entries[..len]
            .iter()
            .position(|(due, _)| *due <= now)?;
        let (_, at) = table.entries[due];
        table.entries.swap(due, len - 1);
        table.len -= 1;
        Some(at)
    }

    /// When the next one is due.
    pub(crate) fn next_due(&self) -> Option<Time> {
        let table = self.0.lock();
        table.entries[..table.len].iter().map(|(due, _)| *due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::time::Duration;
    use gpusvm_types::BLOCK_SHIFT;

    fn at(block: u64) -> VirtAddr {
        VirtAddr::new(block << BLOCK_SHIFT)
    }

    #[test]
    fn due_faults_come_out_once() {
        let delays = Delays::new();
        let time = |millis| Time::START.after(Duration::from_millis(millis));
        assert!(delays.push(time(5), at(1)));
        assert!(delays.push(time(3), at(2)));
        assert!(
            delays.push(time(4), at(1)),
            "the same block: one entry, the sooner"
        );
        assert_eq!(delays.next_due(), Some(time(3)));
        assert_eq!(delays.pop_due(time(2)), None);
        assert_eq!(delays.pop_due(time(4)), Some(at(1)));
        assert_eq!(delays.pop_due(time(4)), Some(at(2)));
        assert_eq!(delays.next_due(), None);
    }

    #[test]
    fn a_full_table_says_so() {
        let delays = Delays::new();
        for block in 0..ROOM {
            assert!(delays.push(Time::START, at(block as u64)));
        }
        assert!(!delays.push(Time::START, at(ROOM as u64)));
    }
}
