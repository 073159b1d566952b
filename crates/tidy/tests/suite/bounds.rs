//! Every loop of the fault path has a bound, and each bound a test: `docs/bounds.md`.

use gpusvm_tidy::tree::{File, Tree};
use gpusvm_tidy::{assert_none, pages, source};
use std::collections::BTreeSet;

/// The crates in the way of a fault.
const CRATES: &[&str] = &["gpusvm", "svm", "pagemap", "mm", "mm-linux", "mm-sim"];
/// What the name of a bound has in it.
const BOUNDS: &[&str] = &[
    "MAX_", "TRIES", "TIMEOUT", "PATIEN", "POLLS", "HASTY", "MOMENTS",
];

/// The constants of a file that bound something, outside of its tests.
fn bounds(file: &File) -> BTreeSet<&str> {
    let code = file.text.split("#[cfg(test)]").next().unwrap_or_default();
    let constants = code.lines().filter_map(|line| {
        let line = line.trim_start();
        let line = line.strip_prefix("pub(crate) ").unwrap_or(line);
        let line = line.strip_prefix("pub ").unwrap_or(line);
        line.strip_prefix("const ")?.split(':').next()
    });
    let is_bound = |name: &&str| {
        let is_name = name.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        is_name && BOUNDS.iter().any(|part| name.contains(part))
    };
    constants.filter(is_bound).collect()
}

/// What a cell has in backticks.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// The rows of both tables: the line, the place, the bound if the row has one, the tests.
fn rows(page: &File) -> Vec<(usize, &str, Option<&str>, &str)> {
    let rows = pages::rows(page, "loop").into_iter();
    rows.map(|(at, cells)| match cells[..] {
        [_, place, bound, _, tests] => (at, place, Some(bound), tests),
        [_, place, _, tests] => (at, place, None, tests),
        _ => (at, "", None, ""),
    })
    .collect()
}

fn page(tree: &Tree) -> &File {
    tree.file("docs/bounds.md").expect("docs/bounds.md")
}

#[test]
fn every_bound_has_a_row() {
    let tree = Tree::read();
    let named: BTreeSet<(&str, &str)> = rows(page(&tree))
        .into_iter()
        .flat_map(|(_, place, bound, _)| {
            let path = quoted(place).next().and_then(|it| it.split("::").next());
            let bounds = quoted(bound.unwrap_or_default());
            bounds.map(move |bound| (path.unwrap_or_default(), bound))
        })
        .collect();
    let mut findings = Vec::new();
    let sources = tree.sources();
    for file in sources.filter(|file| CRATES.contains(&file.krate().unwrap_or_default())) {
        let missing = bounds(file)
            .into_iter()
            .filter(|bound| !named.contains(&(file.path.as_str(), bound)));
        findings.extend(missing.map(|bound| format!("{}: {bound}", file.path)));
    }
    assert_none("docs/bounds.md has no row for a bound", &findings);
}

#[test]
fn the_rows_are_true() {
    let tree = Tree::read();
    let page = page(&tree);
    let rows = rows(page);
    assert!(rows.len() > 30, "both tables are read");
    let tests: BTreeSet<&str> = tree.rust().flat_map(source::tests).collect();
    let constants: BTreeSet<&str> = tree.sources().flat_map(source::items).collect();
    let mut findings = Vec::new();
    for (at, place, bound, named) in rows {
        let place = quoted(place).next().and_then(|it| it.rsplit_once("::"));
        let has_function = place.is_some_and(|(path, function)| {
            let file = tree.file(path);
            file.is_some_and(|file| source::functions(file).contains(function))
        });
        if !has_function {
            findings.push(page.at(at, "no such function"));
        }
        let bounds = bound.map(|bound| quoted(bound).collect::<Vec<_>>());
        if bounds.is_some_and(|all| all.is_empty() || all.iter().any(|it| !constants.contains(it)))
        {
            findings.push(page.at(at, "no such bound"));
        }
        let named: Vec<_> = quoted(named).collect();
        if named.is_empty() || named.iter().any(|test| !tests.contains(test)) {
            findings.push(page.at(at, "no such test"));
        }
    }
    assert_none("a row of docs/bounds.md is not true", &findings);
}
