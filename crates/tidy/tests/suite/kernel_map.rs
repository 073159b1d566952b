//! The kernel's words, and ours: docs/kernel-map.md.

use crate::kernel_names;
use gpusvm_tidy::tree::{File, Tree};
use gpusvm_tidy::{assert_none, pages, source};
use std::collections::{BTreeMap, BTreeSet};

/// How many lessons the kernel's fixes teach.
const LESSONS: usize = 27;

fn page(tree: &Tree) -> &File {
    tree.file("docs/kernel-map.md").expect("docs/kernel-map.md")
}

/// What stands between backticks in a cell.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// What the crates declare, by file.
struct Items<'tree> {
    tree: &'tree Tree,
    files: BTreeMap<&'tree str, (&'tree File, BTreeSet<&'tree str>)>,
}

impl<'tree> Items<'tree> {
    fn of(tree: &'tree Tree) -> Self {
        let sources = tree.sources().filter(|file| file.krate() != Some("tidy"));
        let files = sources.map(|file| (file.path.as_str(), (file, source::items(file))));
        let files = files.collect();
        Self { tree, files }
    }

    /// `b` is declared somewhere; `a::b` in a file that is called `a` or has the word. A path exists.
    fn have(&self, name: &str) -> bool {
        if pages::is_path(name) {
            return self.tree.has(name);
        }
        let Some(item) = pages::item(name) else {
            return false;
        };
        let of = name.rsplit("::").nth(1);
        self.files.iter().any(|(path, (file, items))| {
            let is_of = |of: &str| {
                path.ends_with(&format!("/{of}.rs"))
                    || source::words(&file.text).any(|word| word == of)
            };
            items.contains(item) && of.is_none_or(is_of)
        })
    }
}

/// The names of all tests.
fn tests(tree: &Tree) -> BTreeSet<&str> {
    tree.rust().flat_map(source::tests).collect()
}

/// What is wrong with a cell that is `-` or names, each of which has to be there.
fn check(cell: &str, is_there: impl Fn(&str) -> bool) -> Vec<String> {
    if cell == "-" {
        return Vec::new();
    }
    if quoted(cell).next().is_none() {
        return vec![format!("neither a name nor -: {cell}")];
    }
    let missing = quoted(cell).filter(|name| !is_there(name));
    missing.map(str::to_owned).collect()
}

#[test]
fn the_kernel_map_is_true() {
    let tree = Tree::read();
    let (page, items, tests) = (page(&tree), Items::of(&tree), tests(&tree));
    let rows = pages::rows(page, "kernel");
    assert!(!rows.is_empty(), "docs/kernel-map.md has a table");
    let mut findings = Vec::new();
    for (at, cells) in rows {
        let [_, here, _, test] = cells[..] else {
            findings.push(page.at(at, "a row has four cells: kernel, here, differs, test"));
            continue;
        };
        let wrong = check(here, |name| items.have(name));
        let wrong = wrong
            .into_iter()
            .chain(check(test, |name| tests.contains(name)));
        findings.extend(wrong.map(|what| page.at(at, &what)));
    }
    assert_none("docs/kernel-map.md names what is not there", &findings);
}

#[test]
fn what_has_no_counterpart_says_why() {
    let tree = Tree::read();
    let page = page(&tree);
    let mut findings = Vec::new();
    for (at, cells) in pages::rows(page, "kernel") {
        let says = |cell: &str| {
            ["Never: ", "Not yet"]
                .iter()
                .any(|why| cell.starts_with(why))
        };
        if cells.get(1) == Some(&"-") && !cells.get(2).is_some_and(|cell| says(cell)) {
            findings.push(page.at(at, cells[0]));
        }
    }
    assert_none("no counterpart: `Never: ` why, or `Not yet`", &findings);
}

#[test]
fn what_has_a_counterpart_has_a_test() {
    let tree = Tree::read();
    let page = page(&tree);
    let mut findings = Vec::new();
    for (at, cells) in pages::rows(page, "kernel") {
        let names = |column: usize| cells.get(column).and_then(|cell| quoted(cell).next());
        if names(1).is_some() && names(3).is_none() {
            findings.push(page.at(at, cells[0]));
        }
    }
    assert_none(
        "a row with a `here` names the test that shows it",
        &findings,
    );
}

#[test]
fn every_name_of_the_kernel_has_a_row() {
    let tree = Tree::read();
    let rows = pages::rows(page(&tree), "kernel");
    let there: BTreeSet<&str> = rows
        .iter()
        .filter_map(|(_, cells)| cells.first())
        .flat_map(|cell| quoted(cell))
        .collect();
    let names = kernel_names::ALL.iter().copied().flatten();
    let missing = names.filter(|name| !there.contains(**name));
    let findings: Vec<_> = missing.map(|name| (*name).to_owned()).collect();
    assert_none("docs/kernel-map.md has no row for", &findings);
}

#[test]
fn every_lesson_has_its_test() {
    let tree = Tree::read();
    let (page, tests) = (page(&tree), tests(&tree));
    let rows = pages::rows(page, "lesson");
    let mut findings = Vec::new();
    for (number, (at, cells)) in (1..).zip(&rows) {
        let [lesson, applies, test] = cells[..] else {
            findings.push(page.at(*at, "a row has three cells: lesson, applies here, test"));
            continue;
        };
        if !lesson.starts_with(&format!("{number}: ")) {
            findings.push(page.at(*at, &format!("this is the place of lesson {number}")));
        }
        if test == "-" && !applies.starts_with("Cannot exist: ") {
            findings.push(page.at(*at, "no test, and no reason: `Cannot exist: ` why"));
        }
        let prefix = format!("lesson_{number:02}_");
        let is_test = |name: &str| name.starts_with(&prefix) && tests.contains(name);
        findings.extend(check(test, is_test).iter().map(|what| page.at(*at, what)));
    }
    if rows.len() != LESSONS {
        findings.push(format!("{} lessons of {LESSONS}", rows.len()));
    }
    assert_none("a lesson without its test", &findings);
}
