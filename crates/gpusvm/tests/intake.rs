//! Many faults at once: those of one block are served together, those of others do not wait for them.

#![allow(
    clippy::allow_attributes,
    clippy::unwrap_used,
    reason = "a test may panic, also outside of its test function"
)]

mod common;

use common::gated::Gated;
use common::{Stay, World, is_so_within, wait_until, within, world_with};
use gpusvm::driver::{MAX_WORKERS, Served, worker};
use gpusvm::{ByteSize, FaultError, FaultInfo, Grid, LaneError, LaunchError, Plan, Policy, SvmPtr};
use gpusvm_device::FaultQueue;
use gpusvm_mm_linux::Allocation;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

const BLOCK: usize = 2 << 20;
const WORDS: usize = BLOCK / 8;

/// One test at a time: one of them counts the workers of this process.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many workers the process has.
fn workers() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let name = |task: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_to_string(task.ok()?.path().join("comm")).ok()
    };
    let names = tasks.filter_map(name);
    names
        .filter(|name| name.starts_with("gpusvm-worker"))
        .count()
}

/// A device with workers, and memory of some blocks.
struct Lab {
    gpu: Arc<Gated>,
    world: World,
    words: Allocation<u64>,
    workers: Vec<JoinHandle<()>>,
}

impl Lab {
    fn new(blocks: usize, policy: impl Policy + 'static) -> Self {
        let gpu = Gated::new(ByteSize::mib(64), 24);
        let world = world_with(&[Arc::clone(&gpu) as _], policy);
        let mut words = Allocation::new(&world.process, blocks * WORDS).unwrap();
        // What was never written is cleared on the device, not copied.
        words.fill(0);
        let workers = worker::start(&world.regions[0]).unwrap();
        Self {
            gpu,
            world,
            words,
            workers,
        }
    }

    /// `lanes` lanes add one to a word each, in pages of their own, of one block.
    fn launch(&self, block: usize, lanes: usize) -> gpusvm_softgpu::Launch {
        let p = SvmPtr::from(self.words.as_ptr().cast_mut()).add(block * WORDS);
        // SAFETY: by atomics; the words outlive the launch.
        let launch = unsafe {
            let gpu = &self.gpu.gpu;
            gpu.launch(self.world.vms[0].id(), Grid::new(lanes), move |lane| {
                lane.atomic_add(p.add(lane.id() * 512), 1u64)?;
                Ok(())
            })
        };
        launch.unwrap()
    }

    fn finish(self) {
        self.gpu.close();
        for worker in self.workers {
            worker.join().unwrap();
        }
        self.gpu.assert_each_resolved_once();
    }
}

/// Three lanes more than there were workers once fault in a block whose copy is slow. That kept every
/// worker, each waiting for the range, and a lane in another block waited for a copy that was none of
/// its business.
#[test]
fn faults_in_two_blocks_do_not_wait_for_each_other() {
    let _alone = alone();
    within(Duration::from_secs(120), || {
        const LANES: usize = 6;
        let lab = Lab::new(2, Stay(Duration::ZERO));
        lab.gpu.hold(1);
        let slow = lab.launch(0, LANES);
        lab.gpu.wait_held(1);
        wait_until("duplicates are taken", || lab.gpu.taken() >= 3);
        let other = lab.launch(1, 1);
        let waited = !is_so_within(Duration::from_secs(5), || other.is_done());
        let was_held = !slow.is_done();
        lab.gpu.open();
        slow.wait().unwrap();
        other.wait().unwrap();
        assert!(!waited, "a fault waited for one in another block");
        assert!(was_held, "the copy of the other was held");
        let stats = lab.world.vms[0].stats();
        assert!(stats.coalesced >= 3, "{stats:?}");
        assert!(lab.words.iter().step_by(512).take(LANES).all(|x| *x == 1));
        lab.finish();
    });
}

/// As many blocks as there may be workers are served at once; the next one waits for one of them. When
/// all is done, one worker stays.
#[test]
fn so_many_blocks_are_served_at_once() {
    let _alone = alone();
    within(Duration::from_secs(120), || {
        let lab = Lab::new(MAX_WORKERS + 1, Stay(Duration::ZERO));
        let bound = u32::try_from(MAX_WORKERS).unwrap();
        lab.gpu.hold(bound + 1);
        let launch = |block| lab.launch(block, 2);
        let launches: Vec<_> = (0..=MAX_WORKERS).map(launch).collect();
        lab.gpu.wait_held(bound);
        assert_eq!(workers(), MAX_WORKERS, "and no more threads than that");
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(lab.gpu.held(), bound, "the last block waits");
        lab.gpu.open();
        for launch in launches {
            launch.wait().unwrap();
        }
        wait_until("those without work end", || workers() == 1);
        // The one that stays serves as ever.
        lab.launch(0, 1).wait().unwrap();
        lab.finish();
    });
}

#[test]
fn closing_answers_what_is_parked() {
    let _alone = alone();
    within(Duration::from_secs(120), || {
        let lab = Lab::new(1, Stay(Duration::ZERO));
        lab.gpu.hold(1);
        let launch = lab.launch(0, 8);
        lab.gpu.wait_held(1);
        wait_until("all are taken", || lab.gpu.taken() == 8);
        lab.world.vms[0].refuse_faults();
        lab.gpu.close();
        let error = launch.wait().unwrap_err();
        assert!(
            matches!(
                error,
                LaunchError::Lanes {
                    failed: 8,
                    first: LaneError::Fault(FaultError::Closed { .. }),
                    ..
                }
            ),
            "{error}"
        );
        lab.gpu.open();
        lab.finish();
    });
}

/// Panics when it is asked for the first time.
#[derive(Debug, Default)]
struct PanicsOnce(AtomicBool);

impl Policy for PanicsOnce {
    fn on_device_fault(&self, fault: &FaultInfo) -> Plan {
        assert!(
            self.0.swap(true, Ordering::AcqRel),
            "a test wants this panic"
        );
        Stay(Duration::ZERO).on_device_fault(fault)
    }
}

#[test]
fn a_handler_that_panics_takes_nobody_with_it() {
    let _alone = alone();
    within(Duration::from_secs(120), || {
        let lab = Lab::new(1, PanicsOnce::default());
        let error = lab.launch(0, 6).wait().unwrap_err();
        // The lane whose fault it was stops; those behind it are served.
        let LaunchError::Lanes { first, .. } = &error else {
            panic!("{error}");
        };
        assert!(
            matches!(
                first,
                LaneError::Fault(FaultError::Gave {
                    reason: "its handler panicked",
                    ..
                })
            ),
            "{error}"
        );
        lab.launch(0, 6).wait().unwrap();
        let added: u64 = lab.words.iter().sum();
        assert_eq!(added, 11, "all but one lane");
        lab.finish();
    });
}

/// The lane of a fault that was parked once waited for ever: whether it is served by now was asked where
/// no panic was caught.
#[test]
fn a_panic_over_a_parked_fault_takes_nobody_with_it() {
    let _alone = alone();
    within(Duration::from_secs(120), || {
        let lab = Lab::new(1, Stay(Duration::ZERO));
        lab.gpu.hold(1);
        let launch = lab.launch(0, 4);
        lab.gpu.wait_held(1);
        wait_until("all are taken", || lab.gpu.taken() == 4);
        lab.gpu.panic_after_an_answer();
        lab.gpu.open();
        wait_until("all are answered", || launch.is_done());
        let error = launch.wait().unwrap_err();
        assert!(
            matches!(
                error,
                LaunchError::Lanes {
                    failed: 1,
                    first: LaneError::Fault(FaultError::Gave {
                        reason: "its handler panicked",
                        ..
                    }),
                    ..
                }
            ),
            "{error}"
        );
        let added: u64 = lab.words.iter().sum();
        assert_eq!(added, 3, "all but one lane");
        lab.finish();
    });
}

#[test]
fn the_last_fault_says_what_became_of_it() {
    let _alone = alone();
    within(Duration::from_secs(120), || {
        let lab = Lab::new(1, Stay(Duration::ZERO));
        let vm = &lab.world.vms[0];
        assert_eq!(vm.last_fault(), None);
        lab.gpu.hold(1);
        let launch = lab.launch(0, 3);
        lab.gpu.wait_held(1);
        wait_until("all are taken", || lab.gpu.taken() == 3);
        lab.gpu.open();
        launch.wait().unwrap();
        let last = vm.last_fault().unwrap();
        assert_eq!((last.outcome, last.passes), (Ok(Served::Coalesced), 0));
        assert_eq!(last.access, gpusvm::Access::Atomic);
        assert_eq!(
            last.at.align_down(gpusvm_types::BLOCK_SIZE),
            lab.words.span().start()
        );
        lab.finish();
    });
}
