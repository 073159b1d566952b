//! What can run. Every workload checks its own result against a plain CPU computation.

mod bfs; // breadth-first search
mod triad; // STREAM triad
mod histogram; // bytes of a file

use crate::args::{Options, WorkloadArgs};
use crate::error::CliError;
use crate::machine::Context;
use std::time::Duration;

/// Reads the input of a workload and checks it. No device is needed for it.
pub(crate) fn prepare(
    args: &WorkloadArgs,
    options: &Options,
) -> Result<Box<dyn Workload>, CliError> {
    Ok(match args {
        WorkloadArgs::Bfs(args) => Box::new(bfs::Bfs::new(args, options.seed)?),
        WorkloadArgs::Triad(args) => Box::new(triad::Triad::new(args, options)),
        WorkloadArgs::Histogram(args) => Box::new(histogram::Histogram::new(args)?),
    })
}

/// Something to run.
pub(crate) trait Workload {
    /// As on the command line.
    fn name(&self) -> &'static str;

    /// What it works on, in a few words.
    fn subject(&self) -> String;

    /// An upper bound of the shared memory it allocates, or `None` if that is no number.
    fn footprint(&self) -> Option<u64>;

    /// Runs it on the device and verifies the result. All shared memory is given back at the end.
    fn run(self: Box<Self>, context: &Context<'_>) -> Result<Outcome, CliError>;
}

/// How a run ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Whether the result is right.
    pub(crate) verdict: Verdict,
    /// What else there is to say, in this order.
    pub(crate) facts: Vec<Fact>,
}

/// Whether a result is right.
#[derive(Debug)]
pub(crate) enum Verdict {
    /// It is; and what it was compared with.
    Verified(String),
    /// It is not; and the first place where it is not.
    Wrong(String),
}

/// One measured or counted thing.
#[derive(Debug)]
pub(crate) struct Fact {
    /// Its name in JSON, with the unit.
    pub(crate) key: &'static str,
    /// Its name for people.
    pub(crate) label: &'static str,
    /// How much.
    pub(crate) value: Value,
}

/// A value with its unit.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value {
    /// A number of things.
    Count(u64),
    /// A number that is a name.
    Id(u64),
    /// A time; seconds in JSON.
    Time(Duration),
    /// So many a second, shown with this unit in millions.
    Rate(f64, &'static str),
}

impl Fact {
    /// A number of things.
    pub(crate) fn count(key: &'static str, label: &'static str, count: u64) -> Self {
        Self {
            key,
            label,
            value: Value::Count(count),
        }
    }

    /// A number that is a name.
    pub(crate) fn id(key: &'static str, label: &'static str, id: u64) -> Self {
        Self {
            key,
            label,
            value: Value::Id(id),
        }
    }

    /// A time.
    pub(crate) fn time(key: &'static str, label: &'static str, time: Duration) -> Self {
        Self {
            key,
            label,
            value: Value::Time(time),
        }
    }

    /// So many in this time; zero if there was none.
    pub(crate) fn rate(
        key: &'static str,
        label: &'static str,
        unit: &'static str,
        (count, time): (u64, Duration),
    ) -> Self {
        let seconds = time.as_secs_f64();
        let rate = if seconds > 0.0 {
            count as f64 / seconds
        } else {
            0.0
        };
        Self {
            key,
            label,
            value: Value::Rate(rate, unit),
        }
    }
}
