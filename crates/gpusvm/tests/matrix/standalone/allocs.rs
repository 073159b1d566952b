//! Much memory: the device touches all of it, then the CPU reads all of it back.
//!
//! ```text
//!   allocate, touch   for each piece: one record in every `stride` bytes, all in one launch
//!   meet              with the other processes, if there are others
//!   read, free        one reader, or eight threads or processes, each its own records or all the same
//! ```

use super::Test;
use crate::Skip;
use crate::buffer::{Buffer, SharedPage};
use crate::engine::{Engine, Machine, Spec};
use crate::exec::Child;
use crate::objects::Bound;
use crate::processes;
use crate::record::{self, Record, Write};
use crate::sections::Flags;
use gpusvm::{ByteSize, Grid};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

const MIB: usize = 1 << 20;
/// How many read at once.
const READERS: usize = 8;
const PROCESSES_EVICT: &str = "processes-evict-malloc";
const PROCESSES_MIX: &str = "processes-evict-malloc-mix-bo";

/// Who reads the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Readers {
    One,
    Threads { same: bool },
    Processes { same: bool },
}

#[derive(Clone, Copy, Debug)]
struct Work {
    vram: ByteSize,
    count: usize,
    size: usize,
    stride: usize,
    readers: Readers,
    /// Every second piece is a device object.
    mix: bool,
}

const EVICT: Work = Work {
    vram: ByteSize::mib(64),
    // Nine eighths of it.
    count: 9,
    size: 8 * MIB,
    stride: MIB,
    readers: Readers::One,
    mix: false,
};
const MIX: Work = Work { mix: true, ..EVICT };

pub(super) fn tests() -> Vec<Test> {
    let unaligned = Work {
        vram: ByteSize::mib(32),
        count: 9,
        size: MIB + MIB / 2,
        stride: 4096,
        readers: Readers::One,
        mix: false,
    };
    let mut tests = vec![
        Test::quick("unaligned-alloc", move || unaligned.run(|| {}).map(drop)),
        Test::quick("evict-malloc", || EVICT.evict(|| {})),
        Test::quick("evict-malloc-mix-bo", || MIX.evict(|| {})),
    ];
    for name in [PROCESSES_EVICT, PROCESSES_MIX] {
        tests.push(Test::long(name, move || {
            Machine::new(1)?.finish(0);
            processes::run(name, 2);
            Ok(())
        }));
    }
    for (name, readers) in [
        ("fault-benchmark", Readers::One),
        ("fault-threads-benchmark", Readers::Threads { same: false }),
        (
            "fault-threads-same-page-benchmark",
            Readers::Threads { same: true },
        ),
        (
            "fault-process-benchmark",
            Readers::Processes { same: false },
        ),
        (
            "fault-process-same-page-benchmark",
            Readers::Processes { same: true },
        ),
    ] {
        let work = Work {
            vram: ByteSize::mib(128),
            count: 1,
            size: 64 * MIB,
            stride: 4096,
            readers,
            mix: false,
        };
        tests.push(Test::long(name, move || work.run(|| {}).map(drop)));
    }
    tests
}

/// In a process of its own.
pub(super) fn child(name: &str) -> Result<(), Skip> {
    let work = match name {
        PROCESSES_EVICT => EVICT,
        PROCESSES_MIX => MIX,
        other => panic!("{other} has no processes"),
    };
    processes::meet();
    work.evict(processes::meet)
}

impl Work {
    fn evict(self, meet: impl FnOnce()) -> Result<(), Skip> {
        let evictions = self.run(meet)?;
        assert!(evictions > 0, "more than fits went to the device");
        Ok(())
    }

    /// Does it, and says how many evictions it took.
    fn run(self, meet: impl FnOnce()) -> Result<u64, Skip> {
        let machine = Machine::with(Spec {
            vram: self.vram,
            ..Spec::default()
        })?;
        let engine = machine.engine(0);
        let began = Instant::now();
        let touched = (0..self.count).map(|piece| {
            let svm = machine.svm();
            let is_object = self.mix && piece % 2 == 1;
            let buffer = match is_object {
                true => Buffer::unshared(svm, self.size),
                false => Buffer::malloc(svm, self.size, Flags::NO_MEMSET),
            };
            let bound = is_object.then(|| Bound::over(engine, &buffer));
            self.touch(engine, (&buffer, bound.as_ref()), piece);
            (bound, buffer)
        });
        let buffers: Vec<_> = touched.collect();
        let submitted = began.elapsed();
        meet();
        let read_from = Instant::now();
        for (piece, (bound, buffer)) in buffers.into_iter().enumerate() {
            if let Some(bound) = bound {
                bound.read(&buffer);
            }
            self.read(&buffer, piece);
        }
        if self.readers != Readers::One || self.count == 1 {
            let (read, total) = (read_from.elapsed(), began.elapsed());
            println!(
                "{:?}: touch {submitted:?}, read {read:?}, total {total:?}",
                self.readers
            );
        }
        let evictions = machine.stats().evictions;
        machine.finish(0);
        Ok(evictions)
    }

    fn records(self) -> usize {
        self.size / self.stride
    }

    fn record(self, buffer: &Buffer, i: usize) -> Record {
        buffer.record(i * self.stride / record::SIZE)
    }

    fn value(self, piece: usize, i: usize) -> u32 {
        let number = u32::try_from(piece * self.records() + i).expect("small");
        0x8000_0000 | number
    }

    fn touch(
        self,
        engine: Engine<'_>,
        (buffer, bound): (&Buffer, Option<&Bound<'_>>),
        piece: usize,
    ) {
        for i in 0..self.records() {
            let record = self.record(buffer, i);
            record.write_list(&[record.data_at()], self.value(piece, i), Write::Store);
            record.fence().clear();
        }
        if let Some(bound) = bound {
            bound.write(buffer);
        }
        let first = self.record(buffer, 0);
        let (list, fence) = (first.list(), first.fence().pointer());
        let words = self.stride / 8;
        let launch = engine.launch(Grid::new(self.records()), move |lane| {
            let by = lane.id() * words;
            record::execute(lane, list.add(by), fence.add(by))
        });
        launch.wait().expect("all are touched");
    }

    fn is_right(self, buffer: &Buffer, piece: usize, i: usize) -> bool {
        let (record, value) = (self.record(buffer, i), self.value(piece, i));
        (record.data(), record.expected()) == (value, value) && record.fence().is_signalled()
    }

    fn check(self, buffer: &Buffer, piece: usize, i: usize) {
        assert!(self.is_right(buffer, piece, i), "piece {piece}, record {i}");
    }

    fn read(self, buffer: &Buffer, piece: usize) {
        match self.readers {
            Readers::One => (0..self.records()).for_each(|i| self.check(buffer, piece, i)),
            Readers::Threads { same } => self.read_in_threads(buffer, piece, same),
            Readers::Processes { same } => self.read_in_processes(buffer, piece, same),
        }
    }

    /// Which records a reader reads: all of them in step with the others, or every eighth.
    fn share(self, reader: usize, same: bool) -> impl Iterator<Item = usize> {
        let (first, step) = if same { (0, 1) } else { (reader, READERS) };
        (first..self.records()).step_by(step)
    }

    fn read_in_threads(self, buffer: &Buffer, piece: usize, same: bool) {
        let barrier = Barrier::new(READERS);
        std::thread::scope(|scope| {
            for reader in 0..READERS {
                let barrier = &barrier;
                scope.spawn(move || {
                    let wrong = self.share(reader, same).filter(|i| {
                        let right = self.is_right(buffer, piece, *i);
                        if same {
                            barrier.wait();
                        }
                        !right
                    });
                    assert_eq!(wrong.count(), 0, "wrong records in piece {piece}");
                });
            }
        });
    }

    fn read_in_processes(self, buffer: &Buffer, piece: usize, same: bool) {
        let page = SharedPage::new();
        let here = page.word(0);
        here.store(0, Ordering::Release);
        let child = |reader| {
            let mut met = 0;
            Child::fork(|| {
                let wrong = self.share(reader, same).filter(|i| {
                    let right = self.is_right(buffer, piece, *i);
                    if same {
                        met += 1;
                        meet_in_memory(here, met * READERS as u64);
                    }
                    !right
                });
                wrong.count() == 0
            })
        };
        let children: Vec<_> = (0..READERS).map(child).collect();
        for child in children {
            assert!(child.has_succeeded(), "a child found wrong records");
        }
    }
}

/// Returns when all readers came so far.
fn meet_in_memory(here: &AtomicU64, all: u64) {
    here.fetch_add(1, Ordering::AcqRel);
    while here.load(Ordering::Acquire) < all {
        std::thread::yield_now();
    }
}
