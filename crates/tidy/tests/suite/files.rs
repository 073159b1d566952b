//! What files must and must not have.

use gpusvm_tidy::assert_none;
use gpusvm_tidy::source::{self, MANY_LINES, MOST_LINES};
use gpusvm_tidy::tree::{File, Tree};

/// No unsafe code at all.
const FORBIDS: &[&str] = &[
    "types", "sync", "mm", "device", "pagemap", "svm", "mm-sim", "tidy",
];
/// Unsafe code only where it is expected, with a reason: launching a kernel is a promise that only
/// the caller can keep.
const DENIES: &[&str] = &["gpusvm", "cli"];
/// The layers that another kernel could host.
const NO_STD: &[&str] = &["types", "mm", "device", "pagemap", "svm"];
/// Files that may have one other character than ASCII: the micro sign, as `Duration` prints it.
const HAS_MICROS: &[&str] = &["README.md", "crates/cli/src/report/text.rs"];

/// Where a crate begins.
fn roots(tree: &Tree) -> impl Iterator<Item = (&str, &File)> {
    tree.crates().into_iter().filter_map(|krate| {
        let root = |name| tree.file(&format!("crates/{krate}/src/{name}"));
        Some((krate, root("lib.rs").or_else(|| root("main.rs"))?))
    })
}

fn lacking(crates: &[&str], attributes: &[&str]) -> Vec<String> {
    let tree = Tree::read();
    let wanted = roots(&tree).filter(|(krate, _)| crates.contains(krate));
    let lacks =
        wanted.filter(|(_, root)| !attributes.iter().any(|wanted| source::says(root, wanted)));
    lacks
        .map(|(_, root)| format!("{}: #![{}]", root.path, attributes[0]))
        .collect()
}

#[test]
fn unsafe_code_is_forbidden_where_there_is_none() {
    assert_none(
        "a crate without unsafe code says so",
        &lacking(FORBIDS, &["forbid(unsafe_code)"]),
    );
}

#[test]
fn unsafe_code_is_denied_where_it_is_rare() {
    let attributes = ["deny(unsafe_code)", "forbid(unsafe_code)"];
    assert_none(
        "unsafe code is the exception here",
        &lacking(DENIES, &attributes),
    );
}

#[test]
fn core_layers_need_no_std() {
    assert_none("a core layer needs no std", &lacking(NO_STD, &["no_std"]));
}

#[test]
fn every_crate_is_introduced() {
    let tree = Tree::read();
    let silent = roots(&tree).filter(|(_, root)| !root.text.starts_with("//! "));
    let silent: Vec<_> = silent.map(|(_, root)| root.path.clone()).collect();
    assert_none(
        "a crate's first file begins with what the crate is",
        &silent,
    );
}

#[test]
fn files_are_short() {
    let tree = Tree::read();
    let mut lengths: Vec<_> = tree
        .sources()
        .map(|file| (file.text.lines().count(), file))
        .collect();
    lengths.sort_by_key(|(lines, _)| std::cmp::Reverse(*lines));
    let over = |most: usize| lengths.iter().filter(move |(lines, _)| *lines > most);
    for (lines, file) in over(MANY_LINES) {
        println!("worth a thought: {} has {lines} lines", file.path);
    }
    let long: Vec<_> = over(MOST_LINES)
        .map(|(lines, file)| format!("{}: {lines} lines", file.path))
        .collect();
    assert_none(&format!("a file of more than {MOST_LINES} lines"), &long);
}

#[test]
fn unsafe_items_say_why_they_are_sound() {
    let tree = Tree::read();
    let findings: Vec<_> = tree.rust().flat_map(source::undocumented_unsafe).collect();
    assert_none(
        "`unsafe impl` wants SAFETY:, `unsafe fn` and `unsafe trait` want # Safety",
        &findings,
    );
}

#[test]
fn text_is_ascii() {
    let tree = Tree::read();
    let texts = tree
        .files()
        .iter()
        .filter(|file| file.is_rust() || file.is_page());
    let has_micros = |file: &File| HAS_MICROS.contains(&file.path.as_str());
    let is_bad = |file: &File, c: char| !c.is_ascii() && (c != '\u{b5}' || !has_micros(file));
    let findings: Vec<_> = texts
        .flat_map(|file| source::lines_with(file, |c| is_bad(file, c)))
        .collect();
    assert_none("diagrams and text are ASCII", &findings);
}

#[test]
fn nothing_is_left_to_do() {
    let tree = Tree::read();
    let mut findings = Vec::new();
    for file in tree.rust().filter(|file| file.krate() != Some("tidy")) {
        for call in ["todo!", "unimplemented!", "dbg!", "#[ignore"] {
            findings.extend(source::text_places(file, call));
        }
        for word in ["FIXME", "XXX", "TODO"] {
            findings.extend(source::word_places(file, word));
        }
    }
    assert_none("what is not done is an issue, not a remark", &findings);
}

#[test]
fn no_path_of_a_machine() {
    let tree = Tree::read();
    let mut findings = Vec::new();
    for file in tree
        .files()
        .iter()
        .filter(|file| file.krate() != Some("tidy"))
    {
        for path in ["/home/", "/root/"] {
            findings.extend(source::text_places(file, path));
        }
    }
    assert_none("a path that only one machine has", &findings);
}
