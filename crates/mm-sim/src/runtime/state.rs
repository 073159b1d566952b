//! Who can run, who waits, and what time it is.

use crate::random::Random;
use core::fmt::Write;
use std::sync::{Arc, Condvar};
use std::time::Duration;

/// What one step takes.
pub(crate) const TICK: Duration = Duration::from_micros(1);

/// All that a choice depends on.
#[derive(Debug)]
pub(super) struct State {
    pub(super) now: Duration,
    pub(super) random: Random,
    pub(super) threads: Vec<Thread>,
    /// Who runs.
    pub(super) current: Option<usize>,
    /// How often somebody did something that another could wait for.
    pub(super) progress: u64,
    /// One yield in so many gives the turn away.
    pub(super) patience: u64,
    pub(super) steps: u64,
    pub(super) most_steps: u64,
    /// Why the run is given up: threads that run again end.
    pub(super) failed: Option<String>,
    /// Threads that can never end stay behind: they unwind, and wait for each other.
    pub(super) stuck: bool,
}

/// One simulated thread.
#[derive(Debug)]
pub(super) struct Thread {
    pub(super) status: Status,
    pub(super) times: ThreadTimes,
    pub(super) turn: Arc<Condvar>,
    /// It serves the others: the run ends without it.
    pub(super) is_servant: bool,
}

/// What a simulated thread did with its time, in virtual time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadTimes {
    /// It made steps.
    pub busy: Duration,
    /// It slept, as who waits for the end of a timeslice does.
    pub slept: Duration,
    /// It waited for somebody: a lock, a block, a condition.
    pub waited: Duration,
}

/// What a thread is about.
#[derive(Debug)]
pub(super) enum Status {
    Ready,
    Sleeping {
        until: Duration,
    },
    Waiting {
        what: String,
        since: Duration,
        until: Option<Duration>,
        /// What it saw when it looked last.
        seen: u64,
        /// It waits while it ends because the run was given up.
        unwinding: bool,
    },
    Done,
}

impl State {
    /// Who runs next, at the earliest time somebody can. `None` when nobody ever can.
    pub(super) fn choose(&mut self) -> Option<usize> {
        loop {
            let ready: Vec<usize> = (0..self.threads.len())
                .filter(|i| self.can_run(&self.threads[*i].status))
                .collect();
            if !ready.is_empty() {
                return Some(self.pick(&ready));
            }
            let alarms = self.threads.iter().filter_map(|thread| thread.alarm());
            self.now = alarms.filter(|at| *at > self.now).min()?;
        }
    }

    fn pick(&mut self, ready: &[usize]) -> usize {
        // Who runs goes on, most of the time, in runs that are patient.
        if let Some(current) = self.current.filter(|current| ready.contains(current))
            && self.random.below(self.patience) != 0
        {
            return current;
        }
        ready[self.random.index(ready.len())]
    }

    fn can_run(&self, status: &Status) -> bool {
        match *status {
            Status::Ready => true,
            Status::Done => false,
            Status::Sleeping { until } => until <= self.now || self.failed.is_some(),
            Status::Waiting {
                until,
                seen,
                unwinding,
                ..
            } => {
                let can_end = self.failed.is_some() && !unwinding;
                seen < self.progress || can_end || until.is_some_and(|until| until <= self.now)
            }
        }
    }

    /// Nobody can ever run again: says who waits for what.
    pub(super) fn dump(&self) -> String {
        let mut text = format!("at {:?}", self.now);
        for (i, thread) in self.threads.iter().enumerate() {
            let what = match &thread.status {
                Status::Ready => "can run".to_owned(),
                Status::Done => "is done".to_owned(),
                Status::Sleeping { until } => format!("sleeps until {until:?}"),
                Status::Waiting { what, since, .. } => {
                    format!("waits for {what} since {since:?}")
                }
            };
            let name = if thread.is_servant {
                "servant"
            } else {
                "thread"
            };
            // Writing to a string does not fail.
            let _ = write!(text, "\n  {name} {i} {what}");
        }
        text
    }

    /// Whether all that the run is for is done.
    pub(super) fn is_over(&self) -> bool {
        let mut wanted = self.threads.iter().filter(|thread| !thread.is_servant);
        wanted.all(|thread| matches!(thread.status, Status::Done))
    }

    /// Whether every thread has ended, or never will.
    pub(super) fn has_ended(&self) -> bool {
        let is_done = |thread: &Thread| matches!(thread.status, Status::Done);
        self.stuck || self.threads.iter().all(is_done)
    }
}

impl Thread {
    pub(super) fn new(is_servant: bool) -> Self {
        Self {
            status: Status::Ready,
            times: ThreadTimes::default(),
            turn: Arc::new(Condvar::new()),
            is_servant,
        }
    }

    /// When it runs at the latest.
    fn alarm(&self) -> Option<Duration> {
        match self.status {
            Status::Sleeping { until } => Some(until),
            Status::Waiting { until, .. } => until,
            Status::Ready | Status::Done => None,
        }
    }
}
