//! `docs/matrix.md` says what is covered.

use crate::names::{self, FAMILIES, Status};
use crate::standalone;

fn page() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/matrix.md");
    std::fs::read_to_string(path).expect("the page about the matrix")
}

/// The rows of the table below `title`, without its head.
fn rows<'a>(page: &'a str, title: &str) -> Vec<&'a str> {
    let (_, section) = page.split_once(title).expect(title);
    let section = section.split("\n## ").next().unwrap_or(section);
    let rows = section
        .lines()
        .filter(|line| line.starts_with("| `") || line.starts_with("| all"));
    rows.collect()
}

fn compare(found: &[&str], wanted: &[String]) {
    let missing: Vec<_> = wanted
        .iter()
        .filter(|row| !found.contains(&row.as_str()))
        .collect();
    let surplus: Vec<_> = found
        .iter()
        .filter(|row| !wanted.iter().any(|want| want == *row))
        .collect();
    let lines = |rows: &[&String]| {
        rows.iter()
            .map(|row| format!("{row}\n"))
            .collect::<String>()
    };
    let nothing = missing.is_empty() && surplus.is_empty();
    assert!(
        nothing,
        "docs/matrix.md lacks:\n{}and has {surplus:#?}",
        lines(&missing)
    );
}

/// Families, and how many of their sections are covered, and skip themselves.
pub(crate) fn check_counts() {
    let row = |name: &str, counts: [usize; 2]| {
        let [covered, skipped] = counts;
        format!("| {name} | {covered} | {skipped} |")
    };
    let mut all = [0; 2];
    let mut wanted = Vec::new();
    for family in FAMILIES {
        let counts = names::count(family);
        for (sum, count) in all.iter_mut().zip(counts) {
            *sum += count;
        }
        wanted.push(row(&format!("`{}`", family.name), counts));
    }
    wanted.push(row("all", all));
    compare(&rows(&page(), "## Families and sections"), &wanted);
}

/// Every standalone test, and what becomes of it.
pub(crate) fn check_standalone() {
    let becomes = |status| match status {
        Status::Covered => "covered".to_owned(),
        Status::SkipsItself(reason) => format!("as the suite: {reason}"),
        Status::Impossible(reason) => format!("not here: {reason}"),
    };
    let row = |test: standalone::Test| format!("| `{}` | {} |", test.name, becomes(test.status));
    let wanted: Vec<_> = standalone::all().into_iter().map(row).collect();
    compare(&rows(&page(), "## Tests that stand alone"), &wanted);
}
