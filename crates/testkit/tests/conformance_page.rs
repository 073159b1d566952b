//! `docs/conformance.md` says what the suite has.

use gpusvm_testkit::conformance::{CASES, KERNEL, WITHOUT};
use std::collections::BTreeSet;

fn page() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/conformance.md");
    std::fs::read_to_string(path).expect("the page about the suite")
}

/// The names in the first column of the table below `title`, with the next column.
fn rows<'a>(page: &'a str, title: &str) -> Vec<(&'a str, &'a str)> {
    let (_, section) = page.split_once(title).expect(title);
    let section = section.split("\n## ").next().unwrap_or(section);
    let rows = section.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| `")?.split(" | ");
        Some((cells.next()?.trim_end_matches('`'), cells.next()?))
    });
    rows.collect()
}

#[test]
fn every_test_of_the_kernel_is_a_case_or_has_a_reason() {
    for name in KERNEL {
        let is_case = CASES.contains(name);
        let has_reason = WITHOUT.iter().any(|(without, _)| without == name);
        assert!(is_case != has_reason, "{name}: a case, or a reason");
    }
    for (name, _) in WITHOUT {
        assert!(KERNEL.contains(name), "{name} is no test of the kernel");
    }
}

#[test]
fn the_page_lists_the_cases() {
    let page = page();
    let listed = rows(&page, "## The cases");
    let names: Vec<_> = listed.iter().map(|(name, _)| *name).collect();
    let sorted = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let (listed_names, cases): (BTreeSet<String>, BTreeSet<String>) =
        (sorted(&names), sorted(CASES));
    assert_eq!(listed_names, cases);
    assert_eq!(names.len(), CASES.len(), "each once");
    for (name, of_the_kernel) in listed {
        let wanted = if KERNEL.contains(&name) { "yes" } else { "no" };
        assert_eq!(of_the_kernel, wanted, "{name}");
    }
    let without = rows(&page, "## Tests of the kernel without a case");
    let without: Vec<_> = without.iter().map(|(name, _)| *name).collect();
    let reasons: Vec<_> = WITHOUT.iter().map(|(name, _)| *name).collect();
    assert_eq!(without, reasons);
}

#[test]
fn the_page_counts_the_cases() {
    // On sim: one device, faulting or not. On linux: two.
    let cases = CASES.len();
    let counts = format!(
        "Cases: {cases}. On sim: {} tests, on linux: {}.",
        2 * cases,
        4 * cases
    );
    assert!(page().contains(&counts), "the page should say: {counts}");
}
