//! Families of threads: one for each engine, all at once.

use crate::Skip;
use crate::buffer::Buffer;
use crate::engine::{ENGINES, Machine, Spec};
use crate::exec::{self, Plan, Seat};
use crate::record;
use crate::sections::Flags;
use std::sync::Barrier;

/// How threads share what they use.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sharing {
    /// One address space, or one for each.
    pub(crate) vm: bool,
    /// Neighbouring words of the same pages, or a buffer for each.
    pub(crate) alloc: bool,
    /// Every exec begins and ends for all at once.
    pub(crate) lockstep: bool,
}

/// Runs the plan on every engine at once.
pub(crate) fn run(plan: &Plan, sharing: Sharing) -> Result<(), Skip> {
    let machine = Machine::with(Spec {
        vms: if sharing.vm { 1 } else { ENGINES },
        vram: plan.vram(ENGINES),
        ..Spec::default()
    })?;
    let whole = sharing.alloc.then(|| {
        let len = plan.part() + ENGINES * record::SIZE;
        Buffer::malloc(
            machine.svm(),
            len.next_multiple_of(2 << 20),
            Flags::default(),
        )
    });
    let (go, step) = (Barrier::new(ENGINES), Barrier::new(ENGINES));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..ENGINES)
            .map(|number| {
                let engine = machine.engine(if sharing.vm { 0 } else { number });
                let seat = Seat {
                    number,
                    shared: whole.as_ref().map(|whole| (whole, number * record::SIZE)),
                    barrier: sharing.lockstep.then_some(&step),
                };
                let go = &go;
                scope.spawn(move || {
                    go.wait();
                    exec::run(engine, plan, seat);
                })
            })
            .collect();
        for thread in threads {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    drop(whole);
    assert!(!plan.migrates() || machine.stats().to_device.bytes > 0);
    machine.finish(0);
    Ok(())
}
