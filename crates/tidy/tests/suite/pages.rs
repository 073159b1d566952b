//! What pages name exists.

use gpusvm_tidy::tree::{File, Tree};
use gpusvm_tidy::{assert_none, pages, source};
use std::collections::BTreeSet;

/// The pages that readers follow into the code.
fn guides(tree: &Tree) -> impl Iterator<Item = &File> {
    let at_root = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ];
    let is_guide = move |page: &&File| {
        page.is_page() && (page.path.starts_with("docs/") || at_root.contains(&page.path.as_str()))
    };
    tree.files().iter().filter(is_guide)
}

fn words_of_sources(tree: &Tree) -> BTreeSet<&str> {
    let others = tree.sources().filter(|file| file.krate() != Some("tidy"));
    others.flat_map(|file| source::words(&file.text)).collect()
}

#[test]
fn paths_exist() {
    let tree = Tree::read();
    let mut findings = Vec::new();
    for page in guides(&tree) {
        let named = pages::names(page)
            .into_iter()
            .filter(|(_, name)| pages::is_path(name));
        let missing = named.filter(|(_, path)| !tree.has(path));
        findings.extend(missing.map(|(at, path)| page.at(at, path)));
    }
    assert_none("a page names a file that is not there", &findings);
}

#[test]
fn links_lead_somewhere() {
    let tree = Tree::read();
    let mut findings = Vec::new();
    for page in guides(&tree) {
        let folder = page.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for (at, target) in pages::links(page) {
            let mut path: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
            for part in target.split('/') {
                if part == ".." {
                    path.pop().unwrap_or_default()
                } else {
                    path.push(part);
                    ""
                };
            }
            if !tree.has(&path.join("/")) {
                findings.push(page.at(at, target));
            }
        }
    }
    assert_none("a link that leads nowhere", &findings);
}

#[test]
fn items_exist() {
    let tree = Tree::read();
    let words = words_of_sources(&tree);
    let mut findings = Vec::new();
    for page in guides(&tree).filter(|page| page.path != "docs/kernel-map.md") {
        let named = pages::names(page)
            .into_iter()
            .filter(|(_, name)| name.contains("::"));
        let missing =
            named.filter(|(_, name)| pages::item(name).is_some_and(|item| !words.contains(item)));
        findings.extend(missing.map(|(at, name)| page.at(at, name)));
    }
    assert_none("a page names an item that is not there", &findings);
}

#[test]
fn steps_of_traces_are_functions_of_their_files() {
    let tree = Tree::read();
    let (mut findings, mut steps) = (Vec::new(), 0);
    for page in guides(&tree) {
        for (at, path, function) in pages::steps(page) {
            steps += 1;
            let file = tree.file(path);
            if !file.is_some_and(|file| source::functions(file).contains(function)) {
                findings.push(page.at(at, &format!("{path} {function}")));
            }
        }
    }
    assert!(steps > 0, "ARCHITECTURE.md has traces of the walks");
    assert_none(
        "a trace names a function that is not in the file",
        &findings,
    );
}

#[test]
fn every_lock_has_its_place_in_the_order() {
    let tree = Tree::read();
    let page = tree.file("docs/locking.md").expect("docs/locking.md");
    // `sync` is where locks come from.
    let others = ["sync", "tidy", "testkit"];
    let is_product = |file: &&File| !others.contains(&file.krate().unwrap_or_default());
    let sources = tree
        .sources()
        .filter(is_product)
        .filter(|file| !file.path.ends_with("testing.rs"));
    let unknown = sources.filter(|file| !page.text.contains(&file.path));
    let findings: Vec<_> = unknown.flat_map(source::locks).collect();
    assert_none(
        "docs/locking.md does not name the file of a lock",
        &findings,
    );
}

#[test]
fn the_readme_and_ci_run_the_same_commands() {
    let tree = Tree::read();
    let text = |path| {
        tree.file(path)
            .map(|file| file.text.as_str())
            .unwrap_or_default()
    };
    let mut findings = Vec::new();
    for command in ["cargo run --release -- run bfs", "cargo test --workspace"] {
        for path in ["README.md", ".ci/run"] {
            if !text(path).contains(command) {
                findings.push(format!("{path}: {command}"));
            }
        }
    }
    assert_none("what the README tells to run is what CI runs", &findings);
}

#[test]
fn the_example_of_the_readme_is_the_one_that_is_tested() {
    let tree = Tree::read();
    let text = |path| {
        tree.file(path)
            .map(|file| file.text.as_str())
            .unwrap_or_default()
    };
    let tested: Vec<&str> = text("crates/gpusvm/src/lib.rs")
        .lines()
        .filter_map(|line| line.strip_prefix("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line))
        .collect();
    let example = text("README.md")
        .lines()
        .skip_while(|line| *line != "```rust")
        .skip(1);
    let example: Vec<&str> = example.take_while(|line| *line != "```").collect();
    assert!(!example.is_empty(), "README.md begins with an example");
    let is_there = tested.windows(example.len()).any(|lines| lines == example);
    let differs: Vec<_> = example
        .iter()
        .filter(|line| !tested.contains(line))
        .collect();
    assert!(
        is_there,
        "README.md and crates/gpusvm/src/lib.rs have different examples: {differs:#?}"
    );
}
