//! The jobs of the event thread: a queue, who puts them in, and who waits for them.
//!
//! The reader puts them in, and must not wait for room: whoever has what the event thread waits for may
//! wait for the reader, and no fault is read meanwhile. Removals and unmappings can do without a job, so
//! there is room for as many remaps as a program makes while one block is locked, and many more.

use super::Events;
use super::ends::Ends;
use core::time::Duration;
use gpusvm_mm::Time;
use gpusvm_sync::MutexGuard;
use gpusvm_types::{Span, VirtAddr};
use std::collections::VecDeque;

/// How many jobs can wait that a mark can replace. When there are more, marks in the words are all that is
/// left of a removal or an unmapping, and the event thread sweeps for them.
pub(super) const JOBS: usize = 2048;
/// How many jobs can wait at all. What was never used of the room for them is not in RAM.
pub(super) const ROOM: usize = 1 << 18;
/// How soon to ask again whether the kernel has more to say.
const ASK_AGAIN: Duration = Duration::from_micros(200);
/// How long, before a remap is done all the same.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the event thread has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Job {
    Removed {
        span: Span,
    },
    Unmapped {
        span: Span,
    },
    Remapped {
        from: Span,
        to: VirtAddr,
        /// In the order in which they were read.
        number: u64,
    },
    Sweep,
}

/// Of a fixed size: the reader allocates nothing.
#[derive(Debug)]
pub(super) struct Queue {
    // INVARIANT: no more than `ROOM`, for which there is capacity.
    jobs: VecDeque<Queued>,
    /// How many jobs there have been.
    count: u64,
    /// What was not read yet.
    pub(super) ends: Ends,
    sweeps: Sweeps,
    stopped: bool,
}

/// A job in the queue.
#[derive(Clone, Copy, Debug)]
struct Queued {
    job: Job,
    /// It was read as so many before it were.
    nth: u64,
}

/// Looks for marks of removals and unmappings that found no room.
#[derive(Debug)]
struct Sweeps {
    /// There are such marks.
    are_due: bool,
    /// One is under way.
    is_on: bool,
    /// How many have begun.
    begun: u64,
    /// How many jobs were done since they are due.
    late: usize,
}

impl Events {
    /// Queues a job. One that is not needed may find no room: then its marks are swept for. For one
    /// that is, this waits for room.
    pub(super) fn push<'a>(
        &'a self,
        mut queue: MutexGuard<'a, Queue>,
        job: Job,
        is_needed: bool,
    ) -> MutexGuard<'a, Queue> {
        gpusvm_sync::walk!("push");
        if !is_needed && queue.jobs.len() >= JOBS {
            queue.sweeps.become_due();
            return queue;
        }
        while queue.jobs.len() == ROOM {
            queue = self.changed.wait(queue);
        }
        let nth = queue.count;
        queue.jobs.push_back(Queued { job, nth });
        queue.count += 1;
        queue
    }

    /// Queues a job that is needed before the first arrival from this one on at where the job is about;
    /// behind all others if there is none.
    pub(super) fn push_before<'a>(
        &'a self,
        queue: MutexGuard<'a, Queue>,
        job: Job,
        number: u64,
    ) -> MutexGuard<'a, Queue> {
        let (Job::Unmapped { span } | Job::Removed { span } | Job::Remapped { from: span, .. }) =
            job
        else {
            return queue;
        };
        let mut queue = self.push(queue, job, true);
        let waits = |other: Job| match other {
            Job::Remapped { number: at, .. } if at < number => false,
            other => other != job && other.arrives_in(span).is_some(),
        };
        let waiting = queue.pending().position(waits);
        if let Some(first) = waiting {
            // From the end forward, to before the one that waits.
            for i in (first + 1..queue.jobs.len()).rev() {
                queue.jobs.swap(i, i - 1);
            }
        }
        queue
    }

    /// The next job; it stays queued until `done`. Of one that has to wait, `ask` says whether the kernel
    /// has told everything, and `now` when it is enough.
    pub(super) fn next(
        &self,
        now: impl Fn() -> Time,
        mut ask: impl FnMut() -> bool,
    ) -> Option<Job> {
        let mut queue = self.queue.lock();
        let mut patience: Option<(Job, Time)> = None;
        loop {
            if queue.is_time_to_sweep() {
                queue.sweeps.begin();
                return Some(Job::Sweep);
            }
            let next = queue.pending().next();
            if let Some(job) = next {
                let Some((there, number)) = queue.waits_for(job) else {
                    return Some(job);
                };
                let until = match patience {
                    Some((waiting, until)) if waiting == job => until,
                    _ => now().after(PATIENCE),
                };
                patience = Some((job, until));
                if now() >= until || queue.stopped {
                    queue.ends.forgive_before(there, number);
                    continue;
                }
                drop(queue);
                let is_told = ask();
                queue = self.queue.lock();
                if !is_told && queue.waits_for(job).is_some() {
                    (queue, _) = self.changed.wait_timeout(queue, ASK_AGAIN);
                }
                continue;
            }
            if queue.stopped {
                return None;
            }
            queue = self.changed.wait(queue);
        }
    }

    /// Whether an end is owed to anybody.
    pub(super) fn has_ends(&self) -> bool {
        !self.queue.lock().ends.is_empty()
    }

    pub(super) fn done(&self, job: Job) {
        let mut queue = self.queue.lock();
        if job == Job::Sweep {
            queue.sweeps.is_on = false;
        } else {
            queue.jobs.pop_front();
            if queue.jobs.is_empty() {
                // From the beginning again, which is in RAM.
                queue.jobs.clear();
            }
            queue.sweeps.late += 1;
        }
        drop(queue);
        self.changed.notify_all();
    }

    /// Marks were found that a remap comes before: the sweep that is on is to be made again.
    pub(super) fn sweep_again(&self) {
        self.queue.lock().sweeps.begin_again();
    }

    /// Returns when everything that was read before is done, whatever is read meanwhile.
    pub(crate) fn sync(&self) {
        let mut queue = self.queue.lock();
        let (count, sweep) = (queue.count, queue.sweeps.last_needed());
        let is_before = |queued: &Queued| queued.nth < count;
        while (queue.jobs.iter().any(is_before) || queue.sweeps.is_to_come(sweep)) && !queue.stopped
        {
            queue = self.changed.wait(queue);
        }
    }

    /// Ends the event thread, after what is queued.
    pub(crate) fn stop(&self) {
        self.queue.lock().stopped = true;
        self.changed.notify_all();
    }
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            jobs: VecDeque::with_capacity(ROOM),
            count: 0,
            ends: Ends::new(),
            sweeps: Sweeps {
                are_due: false,
                is_on: false,
                begun: 0,
                late: 0,
            },
            stopped: false,
        }
    }

    pub(super) fn is_remapping(&self) -> bool {
        self.pending()
            .any(|job| matches!(job, Job::Remapped { .. }))
    }

    /// Whether a remap that is queued takes pages from `span`, or to it.
    pub(super) fn concerns(&self, span: Span) -> bool {
        self.pending().any(|job| match job {
            Job::Remapped { from, .. } => from.overlaps(span) || job.arrives_in(span).is_some(),
            _ => false,
        })
    }

    /// Whether a remap that is queued brings something to `span`.
    pub(super) fn arrives_in(&self, span: Span) -> bool {
        self.pending().any(|job| job.arrives_in(span).is_some())
    }

    /// What of `span` a queued remap brings something to that does not end in the queue.
    pub(super) fn stays_at(&self, span: Span) -> Option<Span> {
        self.pending()
            .fold(None, |there: Option<Span>, job| match job {
                Job::Unmapped { span: gone } => there.filter(|there| !gone.overlaps(*there)),
                Job::Remapped { from, .. } => {
                    let left = there.filter(|there| !from.overlaps(*there));
                    job.arrives_in(span).or(left)
                }
                Job::Removed { .. } | Job::Sweep => there,
            })
    }

    /// The place that a job brings something to, and the number of its arrival, if the place is not free
    /// yet.
    pub(super) fn waits_for(&self, job: Job) -> Option<(Span, u64)> {
        let Job::Remapped { from, to, number } = job else {
            return None;
        };
        let there = Span::from_len(to, from.len()).ok()?;
        self.ends.holds(there, number).then_some((there, number))
    }

    /// Whether a sweep is due, and nothing is to be done before. Marks of remaps look like others, so
    /// those come first; other jobs do for so long.
    fn is_time_to_sweep(&self) -> bool {
        let is_late = || self.sweeps.late >= JOBS && !self.is_remapping();
        self.sweeps.are_due && (self.jobs.is_empty() || is_late())
    }

    /// Whether what is at `page` when the remap that is being done is done ends in the queue.
    pub(super) fn is_ended(&self, page: Span) -> bool {
        let mut ended = self.after_this().flat_map(Job::ends).flatten();
        ended.any(|span| span.covers(page))
    }

    /// What comes after the remap that is being done, which is the first.
    pub(super) fn after_this(&self) -> impl Iterator<Item = Job> + '_ {
        self.pending().skip(1)
    }

    pub(super) fn pending(&self) -> impl Iterator<Item = Job> + '_ {
        self.jobs.iter().map(|queued| queued.job)
    }
}

impl Sweeps {
    fn become_due(&mut self) {
        if !self.are_due {
            self.late = 0;
        }
        self.are_due = true;
    }

    fn begin(&mut self) {
        *self = Self {
            are_due: false,
            is_on: true,
            begun: self.begun + 1,
            late: 0,
        };
    }

    /// The one that is on does not count.
    fn begin_again(&mut self) {
        self.are_due = true;
        self.late = JOBS;
        self.begun -= 1;
    }

    /// After how many sweeps every mark of now has been looked at.
    const fn last_needed(&self) -> u64 {
        match (self.are_due, self.is_on) {
            (true, _) => self.begun + 1,
            (false, true) => self.begun,
            (false, false) => 0,
        }
    }

    /// Whether that many have not ended.
    const fn is_to_come(&self, count: u64) -> bool {
        (self.is_on && self.begun <= count) || (self.are_due && self.begun < count)
    }
}

impl Job {
    /// Where the program gave contents up.
    pub(super) fn drops(self) -> Option<Span> {
        match self {
            Self::Removed { span } => Some(span),
            Self::Unmapped { .. } | Self::Remapped { .. } | Self::Sweep => None,
        }
    }

    /// Where a mapping ends: it is unmapped, or moves; or another comes in its place, though nothing was
    /// read of its end.
    pub(super) fn ends(self) -> [Option<Span>; 2] {
        match self {
            Self::Unmapped { span } => [Some(span), None],
            Self::Remapped { from, to, .. } => [Some(from), Span::from_len(to, from.len()).ok()],
            Self::Removed { .. } | Self::Sweep => [None, None],
        }
    }

    /// What of `span` it brings something to.
    pub(super) fn arrives_in(self, span: Span) -> Option<Span> {
        match self {
            Self::Remapped { from, to, .. } => {
                Span::from_len(to, from.len()).ok()?.intersection(span)
            }
            _ => None,
        }
    }
}
