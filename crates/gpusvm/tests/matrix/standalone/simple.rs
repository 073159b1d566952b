//! A bad address, and engines that use neighbouring words of the same pages.

use super::Test;
use crate::Skip;
use crate::buffer::{Buffer, Reservation, SharedPage};
use crate::engine::{Engine, Machine};
use crate::exec::Plan;
use crate::names::STRIDE;
use crate::record::{Record, Write};
use crate::sections::Flags;
use crate::threads::{self, Sharing};
use gpusvm::{Error, FaultError, LaneError, LaunchError};

pub(super) fn tests() -> Vec<Test> {
    let mut tests = vec![Test::quick("fault", fault)];
    let shared = [
        (
            "threads-shared-vm-shared-alloc-many-stride-malloc",
            true,
            false,
            false,
        ),
        (
            "threads-shared-vm-shared-alloc-many-stride-malloc-race",
            true,
            true,
            false,
        ),
        (
            "threads-shared-alloc-many-stride-malloc",
            false,
            false,
            false,
        ),
        (
            "threads-shared-alloc-many-stride-malloc-sync",
            false,
            false,
            true,
        ),
        (
            "threads-shared-alloc-many-stride-malloc-race",
            false,
            true,
            false,
        ),
    ];
    for (name, vm, race, lockstep) in shared {
        let sharing = Sharing {
            vm,
            alloc: true,
            lockstep,
        };
        tests.push(Test::quick(name, move || shared_alloc(race, sharing)));
    }
    tests
}

fn shared_alloc(race: bool, sharing: Sharing) -> Result<(), Skip> {
    let plan = Plan {
        flags: if race { Flags::RACE } else { Flags::default() },
        queues: 1,
        execs: 128,
        size: None,
        stride: STRIDE,
    };
    threads::run(&plan, sharing)
}

/// Commands at an address that is not one: the exec ends in an error, its fence is never signalled, and
/// what comes before and after it is not concerned.
fn fault() -> Result<(), Skip> {
    let machine = Machine::new(1)?;
    let engine = machine.engine(0);
    let buffer = Buffer::malloc(machine.svm(), 2 << 20, Flags::default());
    let fences = SharedPage::new();
    let good = |i: usize| {
        let (record, fence) = (buffer.record(i), fences.fence(0));
        record.write_list(&[record.data_at()], 7, Write::Store);
        fence.clear();
        engine.wait(engine.exec(record, fence), fence);
        assert_eq!(record.data(), 7);
    };
    good(0);
    // Not an address at all; nothing that is mapped; nothing that may be read.
    let hole = Reservation::new(4096, 4096);
    let nowhere = hole.at();
    let twice = buffer.at().wrapping_add(buffer.at().addr());
    let bad = [twice, std::ptr::null_mut(), nowhere];
    for (i, at) in bad.into_iter().enumerate() {
        let error = refused(engine, &fences, Record::at(at));
        match error {
            FaultError::Unmapped { .. } if i < 2 => {}
            FaultError::NotPermitted { .. } if i == 2 => {}
            other => panic!("address {i}: {other:?}"),
        }
        good(i + 1);
    }
    drop(buffer);
    machine.finish(bad.len() as u64);
    Ok(())
}

fn refused(engine: Engine<'_>, fences: &SharedPage, record: Record) -> FaultError {
    let fence = fences.fence(1);
    fence.clear();
    let ended = engine.exec(record, fence).wait();
    assert!(!fence.is_signalled());
    match ended {
        Err(Error::Launch(LaunchError::Lanes {
            failed: 1,
            first: LaneError::Fault(error),
            ..
        })) => error,
        other => panic!("{other:?}"),
    }
}
