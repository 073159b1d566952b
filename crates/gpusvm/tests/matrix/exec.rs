//! The common loop of the matrix.
//!
//! ```text
//!   for each exec:  write the commands -> launch -> fence, and launch, ended
//!                   -> move the buffer? -> check the word on the CPU -> another buffer?
//! ```
//!
//! So each exec is a fault of the device that reads (the commands), one that writes (the word), and a
//! fault of the CPU (the check), unless the section makes it harder. Where there are several queues, as
//! many execs are on their way at once, unless the section moves or replaces the buffer after each.

use crate::buffer::{Buffer, Reservation, SharedPage};
use crate::engine::Engine;
use crate::names::Family;
use crate::objects::{self, Bound};
use crate::record::{self, Fence, PLACES, Record, Write};
use crate::sections::{Flags, Section};
use gpusvm::{ByteSize, Launch};
use std::sync::{Barrier, PoisonError, RwLock, RwLockReadGuard};

/// What to execute.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) flags: Flags,
    pub(crate) queues: usize,
    pub(crate) execs: usize,
    pub(crate) size: Option<usize>,
    pub(crate) stride: usize,
}

impl Plan {
    pub(crate) fn of(family: &Family, section: &Section) -> Self {
        Self {
            flags: section.flags,
            queues: family.queues,
            execs: family.execs,
            size: family.size,
            stride: family.stride,
        }
    }

    /// How many bytes the records take.
    fn used(&self) -> usize {
        ((self.execs - 1) * self.stride + 1) * record::SIZE
    }

    /// How many bytes the records take, in whole pages, or what was asked for.
    pub(crate) fn part(&self) -> usize {
        self.size
            .unwrap_or_else(|| self.used().next_multiple_of(4096))
    }

    fn len(&self) -> usize {
        let parts = if self.flags.has(Flags::MULTI_FAULT) {
            PLACES
        } else {
            1
        };
        let len = self.part() * parts;
        if self.flags.has(Flags::HUGE) {
            len.next_multiple_of(2 << 20)
        } else {
            len
        }
    }

    /// How many execs are on their way at once.
    fn wave(&self) -> usize {
        let one = self.flags.any(Flags::NEW | Flags::REMAP);
        if one { 1 } else { self.queues.min(self.execs) }
    }

    /// How much device memory so many engines need: objects are never evicted, and what is fetched is to
    /// find room, with all buffers that are kept.
    pub(crate) fn vram(&self, engines: usize) -> ByteSize {
        let is_kept = self.flags.has(Flags::NEW) && self.flags.any(Flags::BO_MAP | Flags::PREFETCH);
        let kept = match is_kept {
            true => engines * (self.execs + 1) * self.len(),
            false => 0,
        };
        ByteSize::mib(32) + ByteSize::from_usize(kept)
    }

    /// Whether the number of faults of the device must not grow after a prefetch: nobody takes pages
    /// away again, as the CPU does that polls its fence there, or writes the next commands there while
    /// others are on their way.
    fn counts_faults(&self) -> bool {
        self.flags.has(Flags::PREFETCH) && !self.flags.has(Flags::RACE) && self.wave() == 1
    }

    /// Whether the buffer can move to the device.
    pub(crate) fn migrates(&self) -> bool {
        let in_place = Flags::SHARED | Flags::FILE | Flags::HUGE;
        // The first exec prefers RAM, and on the way of mappings later buffers are shared ones.
        let only_first = self.execs == 1 || self.flags.has(Flags::MMAP | Flags::NEW);
        let stays = self.flags.has(Flags::MADVISE) && only_first;
        !self.flags.any(in_place) && !stays
    }
}

/// Who executes, among others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seat<'a> {
    pub(crate) number: usize,
    /// Memory that all use, and where this one's part begins.
    pub(crate) shared: Option<(&'a Buffer, usize)>,
    /// All wait for each other before and after each launch.
    pub(crate) barrier: Option<&'a Barrier>,
}

impl Seat<'_> {
    pub(crate) const ALONE: Self = Self {
        number: 0,
        shared: None,
        barrier: None,
    };
}

/// Executes it all, and checks it all.
pub(crate) fn run(engine: Engine<'_>, plan: &Plan, seat: Seat<'_>) {
    let needs_pages_to_stay = plan.counts_faults() || plan.flags.has(Flags::BUSY);
    let _no_fork = needs_pages_to_stay.then(no_fork);
    let mut test = Test::begin(engine, *plan, seat);
    let all: Vec<usize> = (0..plan.execs).collect();
    for wave in all.chunks(plan.wave()) {
        let launches: Vec<Launch> = wave.iter().map(|i| test.submit(*i)).collect();
        for (i, launch) in wave.iter().zip(launches) {
            engine.wait(launch, test.fence(*i));
        }
        test.look();
        for i in wave {
            test.finish(*i);
        }
    }
    test.end();
}

struct Test<'a> {
    engine: Engine<'a>,
    plan: Plan,
    seat: Seat<'a>,
    /// An object over the buffer.
    bound: Option<Bound<'a>>,
    buffer: Buffer,
    /// Where the buffer moves next, if that is known already.
    next: Option<Reservation>,
    kept: Vec<(Option<Bound<'a>>, Buffer)>,
    /// Faults of the device before the exec.
    faults: u64,
    fences: SharedPage,
}

impl<'a> Test<'a> {
    fn begin(engine: Engine<'a>, plan: Plan, seat: Seat<'a>) -> Self {
        let svm = engine.machine().svm();
        let buffer = match seat.shared {
            Some((whole, offset)) => Buffer::borrowed(whole, offset),
            None => Buffer::new(svm, plan.len(), plan.flags),
        };
        if plan.flags.has(Flags::LOCK) {
            buffer.lock();
        }
        if plan.flags.has(Flags::BO_UNMAP) {
            objects::bind_and_unbind(engine, &buffer);
        }
        Self {
            engine,
            plan,
            seat,
            bound: None,
            buffer,
            faults: 0,
            next: None,
            kept: Vec::new(),
            fences: SharedPage::new(),
        }
    }

    fn has(&self, flags: Flags) -> bool {
        self.plan.flags.has(flags)
    }

    fn record(&self, i: usize) -> Record {
        self.buffer.record(i * self.plan.stride)
    }

    fn fence(&self, i: usize) -> Fence {
        if self.has(Flags::RACE) {
            self.record(i).fence()
        } else {
            self.fences.fence(i % self.plan.wave())
        }
    }

    /// Another one for each exec of each engine, and never what memory is filled with.
    fn value(&self, i: usize) -> u32 {
        let number = u32::try_from(self.seat.number << 16 | i).expect("a small number");
        0x8000_0000 | number
    }

    fn submit(&mut self, i: usize) -> Launch {
        self.meet();
        if self.has(Flags::MADVISE) {
            let (at, len) = (self.buffer.at(), self.buffer.len());
            let advised = self.engine.prefer(at, len, i % 2 == 1);
            // An adoption whose mapping went unheard can still be where a shared mapping is now.
            assert!(advised.is_ok() || !self.buffer.is_shared());
        }
        self.write(i);
        let fence = self.fence(i);
        fence.clear();
        if let Some(bound) = &self.bound {
            bound.write(&self.buffer);
        }
        if self.has(Flags::PREFETCH) {
            self.engine.prefetch(self.buffer.at(), self.buffer.len());
            self.engine.prefetch(fence.0.cast(), size_of::<u64>());
            self.faults = self.engine.stats().faults;
        }
        let launch = self.engine.exec(self.record(i), fence);
        self.meet();
        launch
    }

    fn meet(&self) {
        if let Some(barrier) = self.seat.barrier {
            barrier.wait();
        }
    }

    /// Writes the commands of exec `i`; of two where every other one is checked: the second writes to
    /// where the buffer will be then.
    fn write(&mut self, i: usize) {
        let data = self.record(i).data_at();
        if self.has(Flags::MULTI_FAULT) {
            let place = |part| data.wrapping_add(part * self.plan.part());
            let places: Vec<_> = (0..PLACES).map(place).collect();
            self.write_to(i, &places);
        } else if !self.has(Flags::EVERY_OTHER) {
            self.write_to(i, &[data]);
        } else if i.is_multiple_of(2) {
            self.write_to(i, &[data]);
            let next = Reservation::for_buffer(self.buffer.len());
            let offset = self.record(i + 1).data_at().addr() - self.buffer.at().addr();
            self.write_to(i + 1, &[next.at().wrapping_add(offset)]);
            self.next = Some(next);
        }
    }

    fn write_to(&self, i: usize, places: &[*mut u8]) {
        let value = self.value(i);
        self.record(i).write_list(places, value, Write::Store);
    }

    /// What must hold before the CPU looks at results.
    fn look(&self) {
        if self.plan.counts_faults() {
            let stats = self.engine.stats();
            assert_eq!(stats.faults, self.faults, "after a prefetch: {stats:?}");
        }
        if self.has(Flags::BUSY) {
            self.engine.expect_busy();
        }
        if let Some(bound) = &self.bound {
            bound.read(&self.buffer);
        }
    }

    /// What comes after an exec has ended.
    fn finish(&mut self, i: usize) {
        if i == 0 && self.has(Flags::LOCK) {
            self.buffer.unlock();
        }
        if self.has(Flags::REMAP) {
            let len = self.buffer.len();
            let to = self
                .next
                .take()
                .unwrap_or_else(|| Reservation::for_buffer(len));
            self.buffer.remap(to, self.plan.flags);
        }
        if !self.has(Flags::EVERY_OTHER) {
            self.check(i);
        } else if i % 2 == 1 {
            self.check(i);
            self.check(i - 1);
        }
        if self.has(Flags::NEW) {
            self.replace(i + 1);
        }
    }

    fn check(&self, i: usize) {
        let (record, value) = (self.record(i), self.value(i));
        let is_right = || (record.data(), record.expected()) == (value, value);
        if self.has(Flags::FORK) {
            let child = Child::fork(is_right);
            if !self.has(Flags::FORK_AFTER) {
                assert!(is_right(), "meanwhile");
            }
            assert!(
                child.has_succeeded(),
                "exec {i}: the child found something else"
            );
        }
        let found = (record.data(), record.expected());
        assert_eq!(
            found,
            (value, value),
            "exec {i}: what it wrote, and was to write"
        );
        if self.has(Flags::MULTI_FAULT) {
            for part in 1..PLACES {
                let place = self.record_of_part(i, part);
                assert_eq!(place.data(), value, "exec {i}, place {part}");
            }
        }
    }

    fn record_of_part(&self, i: usize, part: usize) -> Record {
        let offset = part * self.plan.part() + i * self.plan.stride * record::SIZE;
        Record::at(self.buffer.at().wrapping_add(offset))
    }

    /// Exec `i` gets a buffer of its own: on the way of mappings, a shared one; a device object, every
    /// second time.
    fn replace(&mut self, i: usize) {
        let svm = self.engine.machine().svm();
        let only = Flags::NO_MEMSET;
        let plain = if self.has(only) {
            only
        } else {
            Flags::default()
        };
        let is_object = self.has(Flags::BO_MAP) && i % 2 == 1;
        let new = if is_object {
            Buffer::map(svm, self.plan.len(), plain | Flags::MMAP | Flags::BO_MAP)
        } else if self.has(Flags::MMAP) {
            Buffer::map(svm, self.plan.len(), plain | Flags::MMAP | Flags::SHARED)
        } else {
            Buffer::malloc(svm, self.plan.len(), plain)
        };
        let bound = is_object.then(|| Bound::over(self.engine, &new));
        let old = std::mem::replace(&mut self.buffer, new);
        let unbound = std::mem::replace(&mut self.bound, bound);
        self.check_rest(&old);
        if !self.has(Flags::FREE) {
            self.kept.push((unbound, old));
        }
    }

    /// That nobody wrote where nobody was to write.
    fn check_rest(&self, buffer: &Buffer) {
        let part = self.plan.part();
        let used = self.plan.used();
        for begin in (0..buffer.len() / part).map(|number| number * part) {
            buffer.check_untouched(begin + used, begin + part);
        }
    }

    fn end(self) {
        if self.seat.shared.is_none() {
            self.check_rest(&self.buffer);
        }
        // What the CPU has had since is in use by no device.
        let ends_unbound = self.plan.flags.any(Flags::BUSY | Flags::MMAP);
        if ends_unbound && self.buffer.is_shared() {
            std::hint::black_box(self.buffer.bytes().to_vec());
            self.engine.unbind_at_last(self.buffer.span());
        }
        if self.has(Flags::LOCK) {
            self.buffer.unlock();
        }
    }
}

/// A fork brings home what other tests of this process have on devices.
static FORKS: RwLock<()> = RwLock::new(());

/// No test forks as long as this is held: so nothing takes pages from devices but who uses them.
pub(crate) fn no_fork() -> RwLockReadGuard<'static, ()> {
    FORKS.read().unwrap_or_else(PoisonError::into_inner)
}

/// A child of fork.
pub(crate) struct Child(libc::pid_t);

impl Child {
    /// Which looks at memory, and ends.
    pub(crate) fn fork(check: impl FnOnce() -> bool) -> Self {
        let _counted = FORKS.write().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the child loads words from memory, and ends.
        match unsafe { libc::fork() } {
            0 => {
                let code = i32::from(!check());
                // SAFETY: ends the child without running what belongs to the parent.
                unsafe { libc::_exit(code) }
            }
            pid => {
                assert!(pid > 0, "fork");
                Self(pid)
            }
        }
    }

    pub(crate) fn has_succeeded(self) -> bool {
        let mut status = 0;
        // SAFETY: our own child, and a status of our own.
        let ended = unsafe { libc::waitpid(self.0, &raw mut status, 0) };
        ended == self.0 && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}
