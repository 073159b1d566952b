//! The progress bar: one line on standard error, only if somebody watches.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::borrow::Cow;
use std::io::IsTerminal;

/// Where a run is.
#[derive(Debug)]
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// A bar, or nothing if it is not wanted or standard error is not a terminal.
    pub(crate) fn new(wanted: bool) -> Self {
        let shown = wanted && std::io::stderr().is_terminal();
        let target = if shown {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        Self(ProgressBar::with_draw_target(None, target))
    }

    /// Begins a stage of so many steps.
    pub(crate) fn stage(&self, what: &'static str, steps: u64) {
        self.begin(
            what.into(),
            "{elapsed:>4} {msg:<20} {wide_bar} {percent:>3}%",
        );
        self.0.set_length(steps);
    }

    /// Begins a stage that ends when it ends.
    pub(crate) fn open_stage(&self, what: impl Into<Cow<'static, str>>) {
        self.begin(what.into(), "{elapsed:>4} {msg}");
    }

    fn begin(&self, what: Cow<'static, str>, template: &str) {
        let style = ProgressStyle::with_template(template).expect("a template of this file");
        self.0.set_style(style);
        self.0.set_position(0);
        self.0.set_message(what);
        self.0.tick();
    }

    /// Some steps further.
    pub(crate) fn step(&self, steps: u64) {
        self.0.inc(steps);
    }

    /// Clears the line.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}
