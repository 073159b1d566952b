//! Engines that take their time, fail, or do not reach peers. Device memory that is cleared when it is
//! given back.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::{within, world};
use gpusvm::{ByteSize, Fabric, SoftGpu};
use gpusvm_device::{Caps, CopyEngine, CopyOp, Device, DeviceError, FaultQueue, Fence, PageTables};
use gpusvm_mm_linux::{Allocation, Process};
use gpusvm_pagemap::{Cause, MigrateError};
use gpusvm_types::{DevAddr, DmaAddr};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// All that the devices have.
const VRAM: u64 = 2 << 20;

/// What an engine did, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    ClearSubmitted,
    ClearDone,
    CopiedIn,
}

/// A device whose engine does nothing before somebody waits for it.
#[derive(Debug)]
struct Late {
    gpu: Arc<SoftGpu>,
    queue: Mutex<Queue>,
    log: Arc<Mutex<Vec<Event>>>,
}

#[derive(Debug, Default)]
struct Queue {
    submitted: u64,
    pending: VecDeque<(u64, CopyOp)>,
    refuses_clears: bool,
    /// The aperture of a peer that it does not write to.
    out_of_reach: Option<DmaAddr>,
    fails: bool,
}

impl Late {
    fn new(log: &Arc<Mutex<Vec<Event>>>) -> Arc<Self> {
        let gpu = SoftGpu::builder().vram(ByteSize::new(VRAM)).units(1);
        Arc::new(Self {
            gpu: gpu.fabric(Fabric(5)).build().unwrap(),
            queue: Mutex::default(),
            log: Arc::clone(log),
        })
    }

    fn log(&self, event: Event) {
        self.log.lock().unwrap().push(event);
    }

    fn pending(&self) -> usize {
        self.queue.lock().unwrap().pending.len()
    }

    /// Whether every byte of its memory is `value`.
    fn holds_only(&self, value: u8) -> bool {
        let mut bytes = vec![!value; usize::try_from(VRAM).unwrap()];
        let op = CopyOp::ToRam {
            from: DevAddr::new(0),
            to: DmaAddr::new(bytes.as_mut_ptr().addr() as u64),
            len: ByteSize::new(VRAM),
        };
        self.gpu.copy_engine().submit(&[op]).unwrap();
        bytes.iter().all(|x| *x == value)
    }
}

impl Device for Late {
    fn caps(&self) -> &Caps {
        self.gpu.caps()
    }

    fn copy_engine(&self) -> &dyn CopyEngine {
        self
    }

    fn page_tables(&self) -> &dyn PageTables {
        self.gpu.page_tables()
    }

    fn fault_queue(&self) -> Option<&dyn FaultQueue> {
        self.gpu.fault_queue()
    }

    fn aperture(&self) -> Option<DmaAddr> {
        self.gpu.aperture()
    }
}

impl CopyEngine for Late {
    fn submit(&self, batch: &[CopyOp]) -> Result<Fence, DeviceError> {
        let mut queue = self.queue.lock().unwrap();
        for op in batch {
            if matches!(op, CopyOp::Clear { .. }) {
                if queue.refuses_clears {
                    let reason = "it clears no more";
                    return Err(DeviceError::Lost { reason });
                }
                self.log(Event::ClearSubmitted);
            }
            if let CopyOp::ToRam { to, .. } = op
                && let Some(start) = queue.out_of_reach
                && (start..start + ByteSize::new(VRAM)).contains(to)
            {
                let what = "writes to peers";
                return Err(DeviceError::Unsupported { what });
            }
            let number = queue.submitted + 1;
            queue.pending.push_back((number, *op));
        }
        queue.submitted += 1;
        Ok(Fence(queue.submitted))
    }

    fn wait(&self, fence: Fence) -> Result<(), DeviceError> {
        let mut queue = self.queue.lock().unwrap();
        if queue.fails {
            let reason = "a test wants it so";
            return Err(DeviceError::Lost { reason });
        }
        while queue
            .pending
            .front()
            .is_some_and(|(number, _)| *number <= fence.0)
        {
            let (_, op) = queue.pending.pop_front().unwrap();
            self.gpu.copy_engine().submit(&[op])?;
            self.log(match op {
                CopyOp::Clear { .. } => Event::ClearDone,
                _ => Event::CopiedIn,
            });
        }
        Ok(())
    }
}

fn filled(process: &Arc<Process>, value: u8) -> Allocation<u8> {
    let mut bytes = Allocation::<u8>::new(process, usize::try_from(VRAM).unwrap()).unwrap();
    bytes.fill(value);
    bytes
}

#[test]
fn no_byte_is_copied_into_memory_that_is_still_being_cleared() {
    within(Duration::from_secs(60), || {
        let log = Arc::default();
        let (a, b) = (Late::new(&log), Late::new(&log));
        let world = world(&[a as _, b.clone() as _]);
        let (to_a, to_b) = (&world.vms[0], &world.vms[1]);
        world.regions[1].set_scrub(true);
        let (ones, twos) = (filled(&world.process, 1), filled(&world.process, 2));
        to_b.migrate_to_devmem(ones.span(), Cause::Prefetch)
            .unwrap();
        to_b.migrate_to_ram(ones.span()).unwrap();
        assert!(b.pending() > 0, "not cleared yet");
        assert_eq!(world.regions[1].used().get(), 0, "and free");

        to_a.migrate_to_devmem(twos.span(), Cause::Prefetch)
            .unwrap();
        log.lock().unwrap().clear();
        // Directly, by the engine of the other device, which knows nothing of the clear.
        to_b.migrate_to_devmem(twos.span(), Cause::Prefetch)
            .unwrap();
        assert_eq!(world.regions[0].stats().to_peer.bytes, VRAM);
        let order = log.lock().unwrap().clone();
        let cleared = order.iter().rposition(|event| *event == Event::ClearDone);
        let copied = order.iter().position(|event| *event == Event::CopiedIn);
        assert!(cleared.unwrap() < copied.unwrap(), "{order:?}");
        assert!(b.holds_only(2));
        assert!(ones.iter().all(|x| *x == 1) && twos.iter().all(|x| *x == 2));
    });
}

#[test]
fn nothing_stays_on_a_device_that_was_taken_out_of_use() {
    for scrub in [false, true] {
        let b = Late::new(&Arc::default());
        let world = world(&[b.clone() as _]);
        world.regions[0].set_scrub(scrub);
        let bytes = filled(&world.process, 9);
        let vm = &world.vms[0];
        vm.migrate_to_devmem(bytes.span(), Cause::Prefetch).unwrap();
        world.regions[0].unbind().unwrap();
        assert!(b.holds_only(if scrub { 0 } else { 9 }));
        assert!(bytes.iter().all(|x| *x == 9));
    }
}

#[test]
fn memory_that_cannot_be_cleared_is_not_used_again() {
    let b = Late::new(&Arc::default());
    let world = world(&[b.clone() as _]);
    let (region, vm) = (&world.regions[0], &world.vms[0]);
    region.set_scrub(true);
    let bytes = filled(&world.process, 3);
    vm.migrate_to_devmem(bytes.span(), Cause::Prefetch).unwrap();
    b.queue.lock().unwrap().refuses_clears = true;
    vm.migrate_to_ram(bytes.span()).unwrap();
    let stats = region.stats();
    assert_eq!((stats.lost, stats.used), (region.total(), region.total()));
    let full = vm.migrate_to_devmem(bytes.span(), Cause::Prefetch);
    assert!(matches!(full, Err(MigrateError::NoSpace { .. })));
    assert!(bytes.iter().all(|x| *x == 3));
}

#[test]
fn a_clear_that_fails_ends_the_migration_that_waits_for_it() {
    let b = Late::new(&Arc::default());
    let world = world(&[b.clone() as _]);
    let (region, vm) = (&world.regions[0], &world.vms[0]);
    region.set_scrub(true);
    let bytes = filled(&world.process, 4);
    vm.migrate_to_devmem(bytes.span(), Cause::Prefetch).unwrap();
    vm.migrate_to_ram(bytes.span()).unwrap();
    b.queue.lock().unwrap().fails = true;
    let failed = vm
        .migrate_to_devmem(bytes.span(), Cause::Prefetch)
        .unwrap_err();
    assert_eq!(failed.errno(), 5, "{failed}");
    assert_eq!(region.used().get(), 0, "given back, to be cleared again");
    assert!(bytes.iter().all(|x| *x == 4));
    b.queue.lock().unwrap().fails = false;
    vm.migrate_to_devmem(bytes.span(), Cause::Prefetch).unwrap();
    assert!(b.holds_only(4));
    vm.migrate_to_ram(bytes.span()).unwrap();
    assert!(bytes.iter().all(|x| *x == 4));
}

#[test]
fn what_an_engine_cannot_copy_to_a_peer_goes_through_ram() {
    let log = Arc::default();
    let (a, b) = (Late::new(&log), Late::new(&log));
    let world = world(&[a.clone() as _, b.clone() as _]);
    let bytes = filled(&world.process, 6);
    world.vms[0]
        .migrate_to_devmem(bytes.span(), Cause::Prefetch)
        .unwrap();
    a.queue.lock().unwrap().out_of_reach = b.aperture();
    world.vms[1]
        .migrate_to_devmem(bytes.span(), Cause::Prefetch)
        .unwrap();
    let stats = world.regions[0].stats();
    assert_eq!((stats.to_peer.bytes, stats.to_ram.bytes), (0, VRAM));
    assert_eq!(stats.used.get(), 0);
    assert!(b.holds_only(6));
    assert!(bytes.iter().all(|x| *x == 6));
}
