//! Who touches: threads of the CPU, and lanes of devices, in the same ways.

use crate::Storm;
use crate::random::Random;
use crate::table::{Held, Outcome, PAGE, WORDS, Words};
use gpusvm::{Grid, Lane, LaneError, SvmPtr, VirtAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Memory, as one side reaches it.
pub(crate) trait Reach {
    const NAME: &'static str;

    /// Reads memory that nobody takes away meanwhile.
    fn read(&mut self, at: u64, into: &mut Words) -> Result<(), String>;

    /// Writes it.
    fn write(&mut self, at: u64, from: &Words) -> Result<(), String>;

    /// Reads memory that may go meanwhile.
    fn try_read(&mut self, at: u64, into: &mut Words) -> Result<(), String>;
}

/// By plain loads and stores.
pub(crate) struct Cpu;

fn pointer(at: u64) -> *mut u64 {
    SvmPtr::<u64>::new(VirtAddr::new(at)).as_ptr()
}

impl Reach for Cpu {
    const NAME: &'static str = "CPU";

    fn read(&mut self, at: u64, into: &mut Words) -> Result<(), String> {
        for (i, word) in into.iter_mut().enumerate() {
            // SAFETY: the cell is the caller's to read: it stays mapped, and nobody writes it.
            *word = unsafe { pointer(at).wrapping_add(i).read_volatile() };
        }
        Ok(())
    }

    fn write(&mut self, at: u64, from: &Words) -> Result<(), String> {
        for (i, word) in from.iter().enumerate() {
            // SAFETY: the cell is the caller's to write.
            unsafe { pointer(at).wrapping_add(i).write_volatile(*word) };
        }
        Ok(())
    }

    fn try_read(&mut self, at: u64, into: &mut Words) -> Result<(), String> {
        let to = into.as_mut_ptr().cast();
        // SAFETY: the caller's words; what is read is only judged if nobody wrote it meanwhile.
        let read = unsafe { gpusvm_guarded::copy(to, pointer(at).cast(), size_of::<Words>()) };
        read.map_err(|refused| format!("{refused:?}"))
    }
}

impl Reach for &mut Lane<'_> {
    const NAME: &'static str = "device";

    fn read(&mut self, at: u64, into: &mut Words) -> Result<(), String> {
        self.try_read(at, into)
    }

    fn write(&mut self, at: u64, from: &Words) -> Result<(), String> {
        let to = SvmPtr::<u64>::new(VirtAddr::new(at));
        self.store_tile(to, from).map_err(|error| error.to_string())
    }

    fn try_read(&mut self, at: u64, into: &mut Words) -> Result<(), String> {
        let from = SvmPtr::<u64>::new(VirtAddr::new(at));
        self.load_tile(from, into)
            .map_err(|error| error.to_string())
    }
}

/// Touches a few cells in a row, each in some way.
pub(crate) fn touch_some(storm: &Storm, random: &mut Random, side: &mut impl Reach) {
    let first = random.below(storm.table.cells());
    let stride = [1, 1, 2, 5][random.below(4)];
    for i in 0..1 + random.below(12) {
        let cell = (first + i * stride) % storm.table.cells();
        match random.below(4) {
            0 | 1 => write(storm, cell, side),
            2 => read(storm, cell, side),
            _ => peek(storm, cell, side),
        }
    }
}

fn write<R: Reach>(storm: &Storm, cell: usize, side: &mut R) {
    let Some(held) = storm.table.try_own(cell, false) else {
        return;
    };
    let (at, mut found) = (storm.table.address(cell), [0; WORDS]);
    let mut done = side.read(at, &mut found);
    storm.judge::<R>(cell, held, &found, &done);
    done = done.and_then(|()| side.write(at, &held.next_words(cell)));
    storm.judge_write::<R>(cell, held, &done);
    storm.table.give_back(cell, held, Outcome::Written);
    storm.counts.writes.fetch_add(1, Ordering::Relaxed);
}

/// Reads a cell that nobody writes meanwhile. Its place is looked up while that is so.
pub(crate) fn read<R: Reach>(storm: &Storm, cell: usize, side: &mut R) {
    let Some(held) = storm.table.try_share(cell) else {
        return;
    };
    read_held(storm, cell, held, side);
    storm.table.unshare(cell);
    storm.counts.reads.fetch_add(1, Ordering::Relaxed);
}

/// Reads a cell that is the caller's, or shared with it.
pub(crate) fn read_held<R: Reach>(storm: &Storm, cell: usize, held: Held, side: &mut R) {
    let mut found = [0; WORDS];
    let done = side.read(storm.table.address(cell), &mut found);
    storm.judge::<R>(cell, held, &found, &done);
}

/// Reads a cell without asking: it may move, or go, or be written meanwhile, and then nothing is said
/// of what was found.
fn peek<R: Reach>(storm: &Storm, cell: usize, side: &mut R) {
    let Some(seen) = storm.table.look(cell) else {
        return;
    };
    let at = storm.table.address(cell);
    let mut found = [0; WORDS];
    let done = if at < PAGE as u64 {
        Err(String::new())
    } else {
        side.try_read(at, &mut found)
    };
    if storm.table.is_unchanged(cell, seen) {
        storm.judge::<R>(cell, seen, &found, &done);
        storm.counts.peeks.fetch_add(1, Ordering::Relaxed);
    } else {
        storm
            .counts
            .peeks_for_nothing
            .fetch_add(1, Ordering::Relaxed);
    }
}

/// A thread of the CPU, until the storm is over.
pub(crate) fn on_cpu(storm: &Storm, thread: u64) {
    let mut random = Random::new(storm.seed, thread);
    while !storm.is_over() {
        touch_some(storm, &mut random, &mut Cpu);
        if random.one_in(64) {
            std::thread::yield_now();
        }
    }
}

/// A queue of launches on one device, until the storm is over. The first queue of each device uses the
/// address space that the device has from the beginning, the others have their own, now and then a new
/// one.
pub(crate) fn on_device(storm: &Arc<Storm>, queue: u64) {
    let mut random = Random::new(storm.seed, 1000 + queue);
    let queue = usize::try_from(queue).unwrap();
    let device = queue % storm.devices;
    let mut own = None;
    while !storm.is_over() {
        if queue >= storm.devices && (own.is_none() || random.one_in(100)) {
            // The old one is closed.
            own = Some(storm.svm.create_vm(device).unwrap());
        }
        let vm = own.as_ref().map_or_else(|| storm.svm.vm(device), Ok);
        let vm = vm.unwrap();
        let (kernel, seed) = (Arc::clone(storm), random.next());
        let lanes = 1 + random.below(48);
        let body = move |lane: &mut Lane<'_>| -> Result<(), LaneError> {
            let mut random = Random::new(seed, lane.id() as u64);
            let mut lane = lane;
            touch_some(&kernel, &mut random, &mut lane);
            Ok(())
        };
        // SAFETY: the table says who writes what; nobody holds references to it.
        let launch = unsafe { vm.launch(Grid::new(lanes), body) };
        match launch {
            Ok(launch) => {
                launch.wait().unwrap();
                storm.counts.launches.fetch_add(1, Ordering::Relaxed);
            }
            // The mutator takes devices out of use for a while.
            Err(gpusvm::Error::Unbound { .. }) => std::thread::yield_now(),
            Err(error) => panic!("a launch was refused: {error}"),
        }
    }
}
