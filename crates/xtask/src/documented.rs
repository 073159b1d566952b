//! What the documentation says of each test: the table of `docs/conformance.md`.
//!
//! ```text
//!   | test | devices | private | coherent | what is skipped |
//!   | `anon_read` | 1 | pass | skip | ... |
//! ```

use crate::hmm_selftests::Failed;
use crate::tap::{Outcome, Test};
use std::path::Path;

/// The head of the table.
const HEAD: &str = "| test | devices | private | coherent |";

/// A test, by the name that the harness gives it, and what is said to come of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Expected {
    name: String,
    outcome: Outcome,
}

/// Reads the table of a page.
pub(crate) fn read(page: &Path) -> Result<Vec<Expected>, Failed> {
    let text = std::fs::read_to_string(page).map_err(|error| Failed::Run {
        what: "reading docs/conformance.md",
        error,
    })?;
    parse(&text).map_err(|row| Failed::Run {
        what: "reading docs/conformance.md",
        error: std::io::Error::other(format!("not a row of the table: {row}")),
    })
}

/// The rows under the head, two tests in each. Or what is not a row.
fn parse(text: &str) -> Result<Vec<Expected>, String> {
    let table = text.lines().skip_while(|line| !line.starts_with(HEAD));
    let rows = table.skip(2).take_while(|line| line.starts_with('|'));
    let mut expected = Vec::new();
    for row in rows {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let ["", test, devices, private, coherent, ..] = cells[..] else {
            return Err(row.to_owned());
        };
        let fixture = match devices {
            "1" => "hmm",
            "2" => "hmm2",
            _ => return Err(row.to_owned()),
        };
        for (memory, word) in [("private", private), ("coherent", coherent)] {
            let outcome = match word {
                "pass" => Outcome::Passed,
                "skip" => Outcome::Skipped,
                _ => return Err(row.to_owned()),
            };
            let test = test.trim_matches('`');
            let name = format!("{fixture}.{fixture}_device_{memory}.{test}");
            expected.push(Expected { name, outcome });
        }
    }
    match expected.is_empty() {
        true => Err(format!("no table that begins with {HEAD}")),
        false => Ok(expected),
    }
}

/// As the table says it.
const fn word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "pass",
        Outcome::Skipped => "skip",
        Outcome::Failed => "FAIL",
    }
}

/// Where the table and what came of the tests part. With `is_all`, each row has a test.
pub(crate) fn differences(expected: &[Expected], tests: &[Test], is_all: bool) -> Vec<String> {
    if expected.is_empty() {
        return Vec::new();
    }
    let mut differences = Vec::new();
    for test in tests {
        let said = expected.iter().find(|said| said.name == test.name);
        if said.is_some_and(|said| said.outcome == test.outcome) {
            continue;
        }
        let said = said.map_or("nothing", |said| word(said.outcome));
        let (name, came) = (&test.name, word(test.outcome));
        differences.push(format!(
            "docs/conformance.md says {said} of {name}, and it is: {came}"
        ));
    }
    let is_missing = |expected: &&Expected| tests.iter().all(|test| test.name != expected.name);
    let missing = expected.iter().filter(|_| is_all).filter(is_missing);
    differences.extend(missing.map(|expected| {
        format!(
            "docs/conformance.md has a row for {}, and it did not run",
            expected.name
        )
    }));
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "text\n\n| test | devices | private | coherent | why |\n|---|---|---|---|---|\n\
        | `a` | 1 | pass | skip | none |\n| `b` | 2 | pass | pass | |\n\nmore\n| `c` | 1 | x | y |\n";

    fn test(name: &str, outcome: Outcome) -> Test {
        Test {
            name: name.to_owned(),
            outcome,
            reason: String::new(),
        }
    }

    #[test]
    fn a_row_is_two_tests() {
        let expected = parse(TABLE).unwrap();
        let names: Vec<_> = expected
            .iter()
            .map(|one| (one.name.as_str(), one.outcome))
            .collect();
        let all = [
            ("hmm.hmm_device_private.a", Outcome::Passed),
            ("hmm.hmm_device_coherent.a", Outcome::Skipped),
            ("hmm2.hmm2_device_private.b", Outcome::Passed),
            ("hmm2.hmm2_device_coherent.b", Outcome::Passed),
        ];
        assert_eq!(names, all);
        let tests: Vec<_> = all
            .iter()
            .map(|(name, outcome)| test(name, *outcome))
            .collect();
        assert_eq!(differences(&expected, &tests, true), [""; 0]);
        assert_eq!(differences(&expected, &tests[..1], false), [""; 0]);
    }

    #[test]
    fn what_is_otherwise_is_told() {
        let expected = parse(TABLE).unwrap();
        let tests = [
            test("hmm.hmm_device_private.a", Outcome::Skipped),
            test("hmm.hmm_device_coherent.a", Outcome::Skipped),
            test("hmm2.hmm2_device_private.b", Outcome::Failed),
            test("hmm.hmm_device_private.new", Outcome::Passed),
        ];
        let said = "docs/conformance.md";
        let found = differences(&expected, &tests, true);
        let wanted = [
            format!("{said} says pass of hmm.hmm_device_private.a, and it is: skip"),
            format!("{said} says pass of hmm2.hmm2_device_private.b, and it is: FAIL"),
            format!("{said} says nothing of hmm.hmm_device_private.new, and it is: pass"),
            format!("{said} has a row for hmm2.hmm2_device_coherent.b, and it did not run"),
        ];
        assert_eq!(found, wanted);
    }

    #[test]
    fn what_is_no_table_is_an_error() {
        assert!(parse("no table").is_err());
        for cell in ["| `b` | 3 |", "| b | 2 | maybe |", "| b |"] {
            assert!(
                parse(&TABLE.replace("| `b` | 2 | pass |", cell)).is_err(),
                "{cell}"
            );
        }
    }

    /// The kernel's tests of 6.12: 29, on both kinds of device.
    #[test]
    fn the_page_has_all_tests() {
        let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/conformance.md");
        let expected = read(&page).unwrap();
        assert_eq!(expected.len(), 58);
        let passes = |one: &&Expected| one.outcome == Outcome::Passed;
        assert!(expected.iter().filter(passes).count() >= 28);
    }
}
