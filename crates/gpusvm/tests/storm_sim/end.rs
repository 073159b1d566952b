//! What must be as before when a storm is over.

use crate::Counts;
use crate::Failures;
use crate::actions::ACTIONS;
use crate::mutator::Mutator;
use crate::touch::{Side, read};
use core::fmt;
use gpusvm_mm_sim::Sim;
use gpusvm_testkit::check::check;
use gpusvm_testkit::mirror::Mirror;
use gpusvm_testkit::world::World;
use gpusvm_types::PageCount;
use std::sync::Arc;

impl Mutator {
    /// Looks at everything once more, and gives it back.
    pub(crate) fn end(mut self) {
        let storm = Arc::clone(&self.storm);
        storm.world.mm().injector().disarm();
        self.prefetches
            .drain(..)
            .for_each(|prefetch| drop(prefetch.wait()));
        let mirrors = storm.mirrors.lock().unwrap().clone();
        for mirror in &mirrors {
            mirror.gpu.hook().into_iter().for_each(|hook| hook.heal());
            while mirror.region.work_on_prefetches() {}
        }
        self.is_sound(&mirrors);
        for side in mirrors.iter().cloned().map(Side::Device).chain([Side::Cpu]) {
            (0..storm.model.cells()).for_each(|cell| read(&storm, cell, &side));
        }
        self.is_sound(&mirrors);
        storm.tell(&mirrors);
        if storm.failures != Failures::Any {
            for mirror in &mirrors {
                mirror.region.unbind().unwrap();
                assert_eq!(mirror.region.used(), PageCount::ZERO, "everything is home");
            }
            self.is_sound(&mirrors);
        }
        let spans = storm
            .model
            .spans()
            .into_iter()
            .chain(self.left_behind.drain(..));
        spans.for_each(|span| storm.world.unmap(span));
        storm.world.settle();
        for mirror in &mirrors {
            mirror.vm.tend();
            assert_eq!(mirror.vm.stats().ranges_live, 0, "ranges of nothing");
        }
        self.is_sound(&mirrors);
        for mirror in &mirrors {
            mirror.vm.close();
            assert_eq!(
                mirror.region.used(),
                PageCount::ZERO,
                "device memory in use"
            );
            assert_eq!(mirror.region.stats().object_pages, PageCount::ZERO);
        }
        mirrors
            .iter()
            .for_each(|it| assert_eq!(it.gpu.mappings(), [], "mapped after the end"));
        assert_eq!(storm.world.mm().staging_in_use(), 0);
    }

    /// What must hold when nothing moves holds.
    fn is_sound(&self, mirrors: &[Arc<Mirror<Sim>>]) {
        let storm = &self.storm;
        storm.world.settle();
        mirrors.iter().for_each(|mirror| mirror.vm.tend());
        let all: Vec<&Mirror<Sim>> = mirrors.iter().map(|mirror| &**mirror).collect();
        let spans = storm
            .model
            .spans()
            .into_iter()
            .chain(self.left_behind.iter().copied());
        let spans: Vec<_> = spans.collect();
        let wrong = check(&*storm.world, &all, &spans);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

impl crate::Storm {
    /// Counts what devices did.
    fn tell(&self, mirrors: &[Arc<Mirror<Sim>>]) {
        for mirror in mirrors {
            let faults = mirror.vm.stats().faults;
            self.count(|counts| counts.faults += faults);
        }
        // The second is of the same device as the first.
        for mirror in mirrors.iter().step_by(2) {
            let stats = mirror.region.stats();
            self.count(|counts| {
                counts.migrated += stats.to_device.bytes >> 12;
                counts.evictions += stats.evictions;
            });
        }
    }
}

impl Counts {
    pub(crate) fn add(&mut self, other: &Self) {
        self.writes += other.writes;
        self.adds += other.adds;
        self.reads += other.reads;
        self.peeks += other.peeks;
        self.peeks_for_nothing += other.peeks_for_nothing;
        self.leases += other.leases;
        self.excused += other.excused;
        self.faults += other.faults;
        self.migrated += other.migrated;
        self.evictions += other.evictions;
        for (sum, more) in self.actions.iter_mut().zip(other.actions) {
            *sum += more;
        }
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} writes, {} atomics, {} reads, {} peeks and {} for nothing, {} leases, {} excused; \
             {} faults, {} pages to devices, {} evictions;",
            self.writes,
            self.adds,
            self.reads,
            self.peeks,
            self.peeks_for_nothing,
            self.leases,
            self.excused,
            self.faults,
            self.migrated,
            self.evictions,
        )?;
        for (action, count) in ACTIONS.iter().zip(self.actions) {
            write!(f, " {} {count},", action.name)?;
        }
        Ok(())
    }
}
