//! Who touches: threads of the CPU, and lanes of devices, in the same ways.

use crate::Storm;
use crate::model::Held;
use gpusvm::driver::Declared;
use gpusvm::{Access, FaultError, Span, VirtAddr};
use gpusvm_mm_sim::Sim;
use gpusvm_testkit::mirror::Mirror;
use gpusvm_testkit::world::Cpu;
use std::sync::Arc;

/// Memory, as one side reaches it.
#[derive(Clone)]
pub(crate) enum Side {
    Cpu,
    /// By an address space of a device.
    Device(Arc<Mirror<Sim>>),
}

/// Why a touch was refused.
#[derive(Debug)]
pub(crate) enum Refused {
    Signal,
    Fault(FaultError),
}

impl Side {
    fn read(&self, storm: &Storm, at: VirtAddr) -> Result<u64, Refused> {
        match self {
            Self::Cpu => storm.world.read(at).map_err(|_| Refused::Signal),
            Self::Device(mirror) => {
                let read = mirror.read(&[at]).map_err(Refused::Fault);
                read.map(|words| words[0])
            }
        }
    }

    fn write(&self, storm: &Storm, at: VirtAddr, value: u64) -> Result<(), Refused> {
        match self {
            Self::Cpu => storm.world.write(at, value).map_err(|_| Refused::Signal),
            Self::Device(mirror) => mirror.write(&[(at, value)]).map_err(Refused::Fault),
        }
    }

    fn add(&self, storm: &Storm, at: VirtAddr, by: u64) -> Result<u64, Refused> {
        match self {
            Self::Cpu => storm.world.fetch_add(at, by).map_err(|_| Refused::Signal),
            Self::Device(mirror) => {
                let added = mirror.add(&[at], by).map_err(Refused::Fault);
                added.map(|words| words[0])
            }
        }
    }

    fn name(&self) -> String {
        match self {
            Self::Cpu => "the CPU".to_owned(),
            Self::Device(mirror) => {
                format!("device {:?}, {:?}", mirror.region.peer(), mirror.vm.id())
            }
        }
    }
}

/// Touches a few cells in a row, each in some way.
pub(crate) fn touch_some(storm: &Storm, side: &Side) {
    let cells = storm.model.cells();
    let first = storm.below(cells);
    let stride = [1, 1, 2, 5][storm.below(4)];
    for i in 0..1 + storm.below(6) {
        let cell = (first + i * stride) % cells;
        match storm.below(8) {
            0..=2 => write(storm, cell, side),
            3 => add(storm, cell, side),
            4 | 5 => read(storm, cell, side),
            6 => leased(storm, cell, side),
            _ => peek(storm, cell, side),
        }
    }
}

fn write(storm: &Storm, cell: usize, side: &Side) {
    let Some(held) = storm.model.try_own(cell) else {
        return;
    };
    let before = side.read(storm, held.at);
    judge(storm, side, held, before, Access::Read);
    let value = storm.next_value(cell);
    let written = side.write(storm, held.at, value);
    let is_done = judge(
        storm,
        side,
        held,
        written.map(|()| held.value),
        Access::Write,
    );
    let now = if is_done { value } else { held.value };
    storm.model.give_back_cell(held, now);
    storm.count(|counts| counts.writes += 1);
}

fn add(storm: &Storm, cell: usize, side: &Side) {
    let Some(held) = storm.model.try_own(cell) else {
        return;
    };
    let added = side.add(storm, held.at, 3);
    let is_done = judge(storm, side, held, added, Access::Atomic);
    let now = held.value.wrapping_add(if is_done { 3 } else { 0 });
    storm.model.give_back_cell(held, now);
    storm.count(|counts| counts.adds += 1);
}

/// Reads a cell that nobody writes meanwhile.
pub(crate) fn read(storm: &Storm, cell: usize, side: &Side) {
    let Some(held) = storm.model.try_share(cell) else {
        return;
    };
    read_held(storm, held, side);
    storm.model.unshare(held);
}

/// Reads a cell that is the caller's, or shared with it.
pub(crate) fn read_held(storm: &Storm, held: Held, side: &Side) {
    let found = side.read(storm, held.at);
    judge(storm, side, held, found, Access::Read);
    storm.count(|counts| counts.reads += 1);
}

/// Writes a cell while a lease keeps its page where the device finds it. A device that does not fault
/// declares what it touches for each touch: who has some of it must not ask for more.
fn leased(storm: &Storm, cell: usize, side: &Side) {
    let mirror = match side {
        Side::Device(mirror) if mirror.is_faulting() => mirror,
        _ => return write(storm, cell, side),
    };
    let Some(held) = storm.model.look(cell) else {
        return;
    };
    let declared = Declared {
        span: Span::page_of(held.at),
        access: Access::Write,
    };
    // Whether it is there still is for the touch to find out.
    if let Ok(lease) = mirror.vm.make_resident(&[declared]) {
        write(storm, cell, side);
        drop(lease);
        storm.count(|counts| counts.leases += 1);
    }
}

/// Reads a cell without asking: it may move, or go, or be written meanwhile, and then nothing is said
/// of what was found.
fn peek(storm: &Storm, cell: usize, side: &Side) {
    let Some(seen) = storm.model.look(cell) else {
        return;
    };
    let found = side.read(storm, seen.at);
    if storm.model.is_unchanged(seen) {
        judge(storm, side, seen, found, Access::Read);
        storm.count(|counts| counts.peeks += 1);
    } else {
        storm.count(|counts| counts.peeks_for_nothing += 1);
    }
}

/// What was found is what the cell holds. Whether there was anything: nothing is only allowed where
/// there is a reason.
fn judge(
    storm: &Storm,
    side: &Side,
    held: Held,
    found: Result<u64, Refused>,
    access: Access,
) -> bool {
    let Held {
        cell, at, value, ..
    } = held;
    match found {
        Ok(found) if found == value => return true,
        Ok(found) => {
            let side = side.name();
            let history = storm.history(held);
            panic!("{side} finds {found:#x} in cell {cell} at {at}, not {value:#x}\n{history}");
        }
        Err(refused) => {
            let side_name = side.name();
            assert!(
                storm.excuses(side, held, access, &refused),
                "{side_name} touches cell {cell} at {at}, {access:?}: {refused:?}\n{}",
                storm.history(held)
            );
        }
    }
    storm.count(|counts| counts.excused += 1);
    false
}
