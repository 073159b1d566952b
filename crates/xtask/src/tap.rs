//! What the kernel's test harness says: the Test Anything Protocol.
//!
//! ```text
//!   1..58
//!   #  RUN           hmm.hmm_device_private.open_close ...
//!   # hmm-tests.c:289:open_close:Expected ret (-1) == 0 (0)
//!   not ok 1 hmm.hmm_device_private.open_close
//!   ok 2 hmm.hmm_device_coherent.open_close # SKIP DEVICE_COHERENT not available
//! ```

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Passed,
    Skipped,
    Failed,
}

/// A test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Test {
    pub(crate) name: String,
    pub(crate) outcome: Outcome,
    /// Why it was skipped, or the first thing that was not as expected.
    pub(crate) reason: String,
}

/// All tests, run once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) tests: Vec<Test>,
    /// Whether as many ended as were announced.
    pub(crate) is_complete: bool,
    /// How many devices were closed, with nothing left in use.
    pub(crate) closes: usize,
    /// What else is not as it must be.
    pub(crate) wrong: Vec<String>,
}

impl Run {
    /// Whether nothing failed, and something passed.
    pub(crate) fn is_good(&self) -> bool {
        let is_all_right = self.is_complete && self.wrong.is_empty();
        is_all_right && self.count(Outcome::Failed) == 0 && self.count(Outcome::Passed) > 0
    }

    /// How many ended so.
    pub(crate) fn count(&self, outcome: Outcome) -> usize {
        let so = self.tests.iter().filter(|test| test.outcome == outcome);
        so.count()
    }
}

/// Reads what was said.
pub(crate) fn parse(said: &str) -> Run {
    let mut tests = Vec::new();
    let mut planned = None;
    let mut reason = None;
    for line in said.lines() {
        if let Some(count) = line.strip_prefix("1..") {
            planned = count.trim().parse().ok();
        } else if line.starts_with("#  RUN") {
            reason = None;
        } else if let Some(test) = ended(line, reason.take_if(|_| is_end(line))) {
            tests.push(test);
        } else if let Some(note) = line.strip_prefix("# ")
            && is_a_reason(note)
        {
            // Without the folder of the source.
            let (_, note) = note.rsplit_once('/').unwrap_or(("", note));
            reason = reason.or_else(|| Some(note.trim().to_owned()));
        }
    }
    Run {
        is_complete: planned == Some(tests.len()),
        tests,
        closes: 0,
        wrong: Vec::new(),
    }
}

fn is_end(line: &str) -> bool {
    line.starts_with("ok ") || line.starts_with("not ok ")
}

/// Expectations that were not met, and how a test was ended if not by itself.
fn is_a_reason(note: &str) -> bool {
    note.contains(":Expected ") || note.contains(": Test terminated")
}

fn ended(line: &str, reason: Option<String>) -> Option<Test> {
    let (failed, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (true, rest),
        None => (false, line.strip_prefix("ok ")?),
    };
    let (_, rest) = rest.split_once(' ')?;
    let (name, note) = rest.split_once('#').unwrap_or((rest, ""));
    let skipped = note.trim().strip_prefix("SKIP");
    let outcome = match (failed, skipped) {
        (true, _) => Outcome::Failed,
        (false, Some(_)) => Outcome::Skipped,
        (false, None) => Outcome::Passed,
    };
    let why = skipped.map(|why| why.trim().to_owned());
    Some(Test {
        name: name.trim().to_owned(),
        outcome,
        reason: why.or(reason).unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "TAP version 13\n1..3\n# Starting 3 tests from 2 test cases.\n\
        #  RUN           a.x ...\n# /src/t.c:9:x:Expected 1 (1) == 0 (0)\n# x: Test terminated by assertion\n\
        #          FAIL  a.x\nnot ok 1 a.x\n#  RUN           a.y ...\n#            OK  a.y\nok 2 a.y\n\
        #  RUN           b.y ...\n#      SKIP      none\nok 3 b.y # SKIP none\n\
        # FAILED: 2 / 3 tests passed.\n";

    #[test]
    fn each_test_has_its_outcome_and_its_reason() {
        let run = parse(SAID);
        let found: Vec<_> = run
            .tests
            .iter()
            .map(|test| (test.name.as_str(), test.outcome, test.reason.as_str()))
            .collect();
        let expected = [
            ("a.x", Outcome::Failed, "t.c:9:x:Expected 1 (1) == 0 (0)"),
            ("a.y", Outcome::Passed, ""),
            ("b.y", Outcome::Skipped, "none"),
        ];
        assert_eq!(found, expected);
        assert!(run.is_complete && !run.is_good());
    }

    #[test]
    fn a_run_that_ends_early_is_not_good() {
        let cut = SAID.replace("not ok 1", "ok 1");
        assert!(parse(&cut).is_good());
        let (cut, _) = cut.split_once("ok 3").unwrap_or_default();
        assert!(!parse(cut).is_good());
    }

    #[test]
    fn skipping_everything_is_not_good() {
        let run = parse("1..1\nok 1 a # SKIP no device\n");
        assert!(run.is_complete && !run.is_good());
    }
}
