//! What the library reports of devices that are opened and closed: a line each.
//!
//! ```text
//!   open pid=17 device=0
//!   close pid=17 device=0 pages=0 bytes=0
//!   close pid=17 device=0 shared               others have it open: the last of them says what is left
//! ```

use crate::tap::{Outcome, Test};
use std::collections::BTreeMap;

/// How many devices were closed with nothing left in use, and what is wrong.
pub(crate) fn check(report: &str, tests: &[Test]) -> (usize, Vec<String>) {
    let (mut clean, mut wrong) = (0, Vec::new());
    // By process and device, how many are open.
    let mut open: BTreeMap<(&str, &str), i32> = BTreeMap::new();
    for line in report.lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["open", pid, device] => *open.entry((pid, device)).or_default() += 1,
            ["close", pid, device, "shared"] => *open.entry((pid, device)).or_default() -= 1,
            ["close", pid, device, pages, bytes] => {
                *open.entry((pid, device)).or_default() -= 1;
                match (pages, bytes) {
                    ("pages=0", "bytes=0") => clean += 1,
                    _ => wrong.push(format!("a device was closed and left behind: {line}")),
                }
            }
            _ => wrong.push(format!("not a line of a report: {line}")),
        }
    }
    let unpaired = open.iter().filter(|(_, open)| **open != 0);
    wrong.extend(unpaired.map(|((pid, device), open)| {
        format!("{pid} {device}: opened {open} times more often than closed")
    }));
    // Each test closes what it was set up with.
    let passed = tests.iter().filter(|test| test.outcome == Outcome::Passed);
    let least: usize = passed.map(devices).sum();
    if clean + wrong.len() < least {
        wrong.push(format!(
            "{clean} devices were closed, and the tests have {least}"
        ));
    }
    (clean, wrong)
}

/// How many devices a test has.
fn devices(test: &Test) -> usize {
    if test.name.starts_with("hmm2.") { 2 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(name: &str) -> Test {
        Test {
            name: name.to_owned(),
            outcome: Outcome::Passed,
            reason: String::new(),
        }
    }

    #[test]
    fn a_close_for_each_device_with_nothing_in_use_is_right() {
        let report = "open pid=1 device=0\nopen pid=1 device=1\n\
            close pid=1 device=0 pages=0 bytes=0\nclose pid=1 device=1 pages=0 bytes=0\n\
            open pid=2 device=0\nclose pid=2 device=0 pages=0 bytes=0\n";
        let shared = "open pid=3 device=0\nopen pid=3 device=0\n\
            close pid=3 device=0 shared\nclose pid=3 device=0 pages=0 bytes=0\n";
        assert_eq!(check(shared, &[passed("hmm.x.b")]), (1, vec![]));
        let tests = [passed("hmm2.x.a"), passed("hmm.x.b")];
        assert_eq!(check(report, &tests), (3, vec![]));
    }

    #[test]
    fn all_else_is_wrong() {
        let tests = [passed("hmm.x.a")];
        for (report, clean, what) in [
            ("", 0, "0 devices were closed"),
            (
                "open pid=1 device=0\n",
                0,
                "pid=1 device=0: opened 1 times more",
            ),
            (
                "close pid=1 device=0 pages=0 bytes=0\n",
                1,
                "opened -1 times more",
            ),
            (
                "open pid=1 device=0\nclose pid=1 device=0 pages=1 bytes=4096\n",
                0,
                "left behind: close",
            ),
            (
                "open pid=1 device=0\nclose pid=1 device=0 pages=0 bytes=4096\n",
                0,
                "left behind: close",
            ),
            (
                "open pid=1 device=0\nclose pid=2 device=0 pages=0 bytes=0\n",
                1,
                "opened 1 times more",
            ),
            (
                "open pid=1 device=0\nclose pid=1 device=0 pa",
                0,
                "not a line",
            ),
        ] {
            let (found, wrong) = check(report, &tests);
            assert_eq!(found, clean, "{report}");
            assert!(
                wrong.iter().any(|wrong| wrong.contains(what)),
                "{report}: {wrong:?}"
            );
        }
    }
}
