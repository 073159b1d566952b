//! The table: a test in a row, with how often it passed.

use crate::tap::{Outcome, Run};
use std::fmt::Write;

/// All runs, test by test, in the order of the first; and the sum.
pub(crate) fn table(runs: &[Run]) -> String {
    let mut table = String::new();
    let Some(first) = runs.first() else {
        return table;
    };
    let width = first.tests.iter().map(|test| test.name.len()).max();
    let width = width.unwrap_or_default();
    for test in &first.tests {
        let mut counts = [0; 3];
        let mut reason = "";
        for ended in runs
            .iter()
            .filter_map(|run| run.tests.iter().find(|other| other.name == test.name))
        {
            counts[ended.outcome as usize] += 1;
            if reason.is_empty() || ended.outcome == Outcome::Failed {
                reason = &ended.reason;
            }
        }
        let [passed, skipped, _] = counts;
        let word = match runs.len() {
            all if passed == all => "pass",
            all if skipped == all => "skip",
            all if passed + skipped == all => "pass or skip",
            _ => "FAIL",
        };
        let of = format!("{passed}/{}", runs.len());
        // Writing to a string does not fail.
        let _ = writeln!(table, "{:width$}  {of:>7}  {word}  {reason}", test.name);
    }
    for run in runs.iter().filter(|run| !run.is_complete) {
        let _ = writeln!(table, "a run ended early: {}", line(run));
    }
    for wrong in runs.iter().flat_map(|run| &run.wrong) {
        let _ = writeln!(table, "WRONG: {wrong}");
    }
    let _ = writeln!(table, "{}", sum(runs));
    table
}

/// One run in one line.
pub(crate) fn line(run: &Run) -> String {
    sum(core::slice::from_ref(run))
}

fn sum(runs: &[Run]) -> String {
    let count = |outcome| -> usize { runs.iter().map(|run| run.count(outcome)).sum() };
    let (passed, skipped, failed) = (
        count(Outcome::Passed),
        count(Outcome::Skipped),
        count(Outcome::Failed),
    );
    let closes: usize = runs.iter().map(|run| run.closes).sum();
    format!(
        "{passed} passed, {skipped} skipped, {failed} failed; {closes} devices closed with nothing in use"
    )
}
